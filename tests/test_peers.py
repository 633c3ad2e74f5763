"""Peers compute what they claim to, or say why they cannot."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

import tokenmix_ops as tm
from bench.operators import ADJACENT, OFF
from bench.passes import Contender, checked, failure, fault, relative_errors
from tokenmix_ops import peers
from tokenmix_ops.backends import cpu
from tokenmix_ops.peers import (
    OPERATOR_TITLES,
    SDPA,
    SDPA_BY_FRAME,
    SELECTED,
)
from tokenmix_ops.peers import operators as ways
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import Case, output_and_gradients

# Where there is a GPU, the Triton backend runs there alone, and flash attention too.
ON_GPU = torch.cuda.is_available()


TINY = Case(tm.Mixing.released(), batch=2, num_frames=4, num_tokens=18, num_heads=2, head_dim=16)


MIXINGS = (TINY.mixing, OFF, ADJACENT, tm.Mixing.adjacent((1, -1), cross_frame_gain=0.7))


GPU_ONLY = [name for name in (*SDPA, *SDPA_BY_FRAME) if "flash" not in name]
GPU_ONLY += ["cudnn_selected", "xformers", "flash_attn"]


@pytest.mark.parametrize("name", OPERATOR_TITLES)
@pytest.mark.parametrize("mixing", MIXINGS, ids=repr)
def test_contenders_compute_the_oracle(mixing, name):
    case = replace(TINY, mixing=mixing)
    device = "cuda" if ON_GPU and name.startswith("triton") else "cpu"
    kernel = "cpu" if name.startswith("cpu") else "triton"
    if kernel == "cpu" and (why := cpu.unavailable()):
        pytest.skip(why)
    plan = case.plan_on(device)
    call = ways(plan, compiled=False, kernel=kernel)[name]
    if isinstance(call, str):
        assert name not in ("triton", "cpu", "eager", "flex", "spatial_sdpa")
        return
    inputs = tuple(t.detach() for t in case.inputs(torch.float32, device))
    expected_plan = (
        replace(case, mixing=tm.Mixing.spatial()).plan if name == "spatial_sdpa" else plan
    )
    doubles = tuple(t.double().cpu() for t in inputs)
    output_grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))

    def oracle(query, key, value):
        on_cpu = replace(expected_plan, **tables(expected_plan))
        return token_mix_attention_ref(query, key, value, on_cpu)

    exact = output_and_gradients(oracle, doubles, output_grad.double())
    if name in SELECTED:
        index = plan.key_index[0]
        inputs = (inputs[0], *(t.flatten(1, 2).index_select(1, index) for t in inputs[1:]))
        for key in ("key gradient", "value gradient"):
            exact[key] = exact[key].flatten(1, 2).index_select(1, index.cpu())
    if name in GPU_ONLY:
        assert failure(lambda: call(*inputs))
        return
    output = {"output": call(*inputs).cpu()}
    assert output["output"].shape == inputs[0].shape
    assert fault(relative_errors(output, exact), torch.float32) is None
    if name != "flex":  # which has no gradient on CPUs
        found = output_and_gradients(call, inputs, output_grad.to(device))
        found = {key: value.cpu() for key, value in found.items()}
        assert fault(relative_errors(found, exact), torch.float32) is None


@pytest.mark.interfaces
@pytest.mark.parametrize("name", ["flex", "xformers", "flash_attn", "sdpa_efficient"])
def test_peers_compute_the_oracle_or_say_why_not(name):
    test_contenders_compute_the_oracle(TINY.mixing, name)


def tables(plan):
    return {name: getattr(plan, name).cpu() for name in ("key_index", "key_frame")}


@pytest.fixture
def on_cpu(monkeypatch):
    """Has flash attention, which CPUs have too, stand in for every backend of SDPA."""
    real = peers._sdpa
    flash = SDPBackend.FLASH_ATTENTION
    monkeypatch.setattr(peers, "_sdpa", lambda backend, *tensors: real(flash, *tensors))


SCALED = (
    TINY,
    replace(TINY, num_prefix_tokens=0),
    replace(TINY, num_prefix_tokens=3),
    replace(TINY, num_frames=1),
    *(replace(TINY, mixing=mixing) for mixing in MIXINGS[1:]),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_every_way_through_sdpa_is_right_with_and_without_a_gain(case, dtype, on_cpu):
    query, key, value = (t.detach() for t in case.inputs(dtype))
    output_grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    calls = ways(case.plan)
    for name in (*SDPA, *SDPA_BY_FRAME):
        if callable(calls[name]):
            contender = Contender(calls[name], [(query, key, value)], [output_grad])
            assert checked(contender, case.plan, dtype)[1:] == (None, None)
    if callable(calls["cudnn_selected"]):
        chosen = (t.flatten(1, 2)[:, case.plan.key_index[0]] for t in (key, value))
        mixed = calls["cudnn_selected"](query, *chosen)
        assert torch.equal(mixed, calls["sdpa_flash"](query, key, value))


def test_a_forgotten_gain_is_noticed(on_cpu):
    inputs = tuple(t.detach() for t in TINY.inputs(torch.bfloat16))
    call = ways(replace(TINY, mixing=OFF).plan)["sdpa_flash"]
    contender = Contender(call, [inputs], [torch.ones_like(inputs[0])])
    assert "wrong: the output" in checked(contender, TINY.plan, torch.bfloat16)[1]


def test_what_has_no_way_to_compute_a_call_says_so():
    with_gain, without = (ways(replace(TINY, mixing=m).plan) for m in MIXINGS[:2])
    ours = ["cpu", "cpu_selected"]
    assert list(with_gain) == list(without) == [n for n in OPERATOR_TITLES if n not in ours]
    on_cpu = list(ways(TINY.plan, kernel="cpu"))
    assert on_cpu[:3] == [*ours, "eager"]
    assert set(on_cpu) == OPERATOR_TITLES.keys() - set(GPU_ONLY) - {"triton", "triton_selected"}
    for name in (*SDPA, *SDPA_BY_FRAME, "cudnn_selected"):
        assert callable(with_gain[name])
    for name in SDPA_BY_FRAME:
        assert without[name] == "without a gain all frames go at once"
    assert callable(without["sdpa_cudnn"])
    per_frame = ways(replace(TINY, mixing=MIXINGS[3]).plan)
    for name in (*SDPA_BY_FRAME, "triton_selected", "cudnn_selected"):
        assert per_frame[name] == "frames share no key set"
    assert per_frame["naive_gather"] == "published for the released mixing only"
