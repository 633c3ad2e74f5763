"""The operator and a layer against each peer: ``pytest bench --benchmark-only``.

Each contender is checked once, then timed. Run with ``--benchmark-autosave``, and later with
``--benchmark-compare``, to compare with a run before.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch

from bench.layers import CheckedLayers
from bench.operators import MAIN, OFF
from bench.passes import BACKENDS, PASSES, Contender, checked, turn
from tokenmix_ops.mixing import Mixing
from tokenmix_ops.peer_layers import LAYER_TITLES
from tokenmix_ops.peers import KERNELS, OPERATOR_TITLES, SELECTED, operators

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SMALL = replace(MAIN, batch=1, num_frames=4, num_tokens=50, num_heads=4, head_dim=32)
"""Where there is no GPU."""
CASE = MAIN if DEVICE == "cuda" else SMALL
OURS = KERNELS[DEVICE]


def timed(benchmark, contender, of_pass):
    """Times a pass whose graph, if it needs one, is made outside the timed call."""
    ready = turn(contender, of_pass)
    numbers = iter(range(1 << 30))

    def setup():
        return (ready(next(numbers)),), {}

    def run(call):
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    rounds = 41 if DEVICE == "cuda" else 7
    benchmark.pedantic(run, setup=setup, rounds=rounds, warmup_rounds=2)


def normal(generator, *sizes):
    return torch.randn(sizes, generator=generator, device=DEVICE, dtype=DTYPE)


@cache
def operator(name, case):
    """(contender, why it cannot run forward, why not backward)."""
    plan = case.plan_on(DEVICE)
    ways = operators(plan, compiled=DEVICE == "cuda", kernel=OURS)
    call = ways.get(name, f"not on {DEVICE}")
    if isinstance(call, str):
        return None, call, call
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (case.batch, case.num_frames, case.num_tokens, case.num_heads, case.head_dim)
    query, key, value, grad = (normal(generator, *shape) for _ in range(4))
    if name in SELECTED:
        key, value = (t.flatten(1, 2).index_select(1, plan.key_index[0]) for t in (key, value))
    if name == "spatial_sdpa":
        plan = replace(case, mixing=Mixing.spatial()).plan_on(DEVICE)
    contender = Contender(call, [(query, key, value)], [grad])
    arithmetic = BACKENDS.get(name.removesuffix("_selected"))
    _, forward, backward = checked(contender, plan, DTYPE, arithmetic=arithmetic)
    return contender, forward, forward or backward


@pytest.mark.parametrize("name", OPERATOR_TITLES)
@pytest.mark.parametrize("gain", [0.8, 1.0], ids=lambda gain: f"gain {gain}")
@pytest.mark.parametrize("of_pass", PASSES[:2])
def test_operator(benchmark, of_pass, gain, name):
    benchmark.group = f"operator, gain {gain}, {of_pass}"
    case = CASE if gain != 1.0 else replace(CASE, mixing=OFF)
    contender, forward, backward = operator(name, case)
    if why := forward if of_pass == "forward" else backward:
        pytest.skip(why)
    timed(benchmark, contender, of_pass)


@cache
def layers():
    """(the layers that were checked, contenders among them)."""
    dim = CASE.num_heads * CASE.head_dim
    sizes = (CASE.num_frames, CASE.num_tokens, CASE.num_heads, dim)
    found = CheckedLayers(*sizes, DEVICE, DTYPE, OURS, with_eager=True)
    return found, found.contenders(CASE.batch)


@pytest.mark.parametrize("name", LAYER_TITLES)
@pytest.mark.parametrize("of_pass", PASSES[:2])
def test_layer(benchmark, of_pass, name):
    benchmark.group = f"layer, {of_pass}"
    found, contenders = layers()
    if name not in contenders:
        pytest.skip(found.reasons.get(name, "transformers is not installed"))
    timed(benchmark, contenders[name], of_pass)
