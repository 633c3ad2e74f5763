"""How tests hold a computation against the oracle: in float64, and by the tolerance rule."""

from dataclasses import replace
from functools import lru_cache

import torch
from hypothesis import strategies as st
from interpreter import round_to_nearest_bfloat16

import tokenmix_ops as tm
from tokenmix_ops import testing
from tokenmix_ops.backends import triton
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import Case, gather_and_sdpa, output_and_gradients
from tokenmix_ops.tolerance import FUSED, Arithmetic

if triton.unavailable() is None and triton.interpreted():
    round_to_nearest_bfloat16()


def compute(case, backend=None, **arguments):
    return lambda q, k, v: tm.token_mix_attention(
        q, k, v, mixing=case.plan_on(q.device), backend=backend, **arguments
    )


def oracle(case, scale=None):
    """The reference; keys that come selected are all tokens that there are, in order."""

    def attention(q, k, v):
        plan = case.plan_on(q.device)
        if case.layout == "selected":
            in_order = torch.arange(plan.num_keys, device=q.device)
            plan, k, v = replace(plan, key_index=in_order[None]), k.unsqueeze(1), v.unsqueeze(1)
        return token_mix_attention_ref(q, k, v, plan, scale)

    return attention


def plain_pytorch(case, scale=None, dtype=None):
    """`gather_and_sdpa` of a case; the reference where that has no way to apply the gain."""
    plan = case.plan
    if plan.rows == "token" and plan.scales_logits:
        exact = oracle(case, scale)
        return lambda *tensors: exact(*(x.to(dtype or x.dtype) for x in tensors))
    return lambda q, k, v: gather_and_sdpa(case.plan_on(q.device), scale, dtype)(q, k, v)


def some_output_grad(query):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(query.shape, generator=generator, dtype=torch.float64).to(query)


def arithmetic_of(backend):
    """What a backend may round."""
    return Arithmetic(composed=True) if backend == "eager" else FUSED


def expected(case, inputs, output_grad, arithmetic=FUSED, scale=None):
    """`Expected` of a case with its or other inputs."""
    plain = plain_pytorch(case, scale, inputs[0].dtype)
    plan = case.plan_on(inputs[0].device)
    return testing.expected(inputs, output_grad, plan, arithmetic, scale, plain)


# Algorithms share it.
@lru_cache(maxsize=32)
def _inputs_and_expected(case, dtype, device, arithmetic):
    inputs = case.inputs(dtype, device)
    output_grad = some_output_grad(inputs[0])
    return inputs, output_grad, expected(case, inputs, output_grad, arithmetic)


def assert_case_agrees(attention, case, dtype, device="cpu", arithmetic=FUSED):
    """Output and gradients of ``attention`` for a case obey the tolerance rule; NaN nowhere."""
    inputs, output_grad, wanted = _inputs_and_expected(case, dtype, device, arithmetic)
    assert_within(wanted, output_and_gradients(attention, inputs, output_grad), dtype)


def assert_agrees(attention, case, inputs, output_grad=None, scale=None, arithmetic=FUSED):
    """The same for inputs of one's own."""
    output_grad = some_output_grad(inputs[0]) if output_grad is None else output_grad
    wanted = expected(case, inputs, output_grad, arithmetic, scale)
    assert_within(wanted, output_and_gradients(attention, inputs, output_grad), inputs[0].dtype)


def assert_within(wanted, found, dtype):
    assert found.keys() == wanted.budgets.keys()
    fault = wanted.fault(found, dtype)
    assert fault is None, fault


@st.composite
def random_cases(draw, kinds=(*NAMES, "from_index"), max_batch=3, max_heads=3, max_head_dim=9):
    t, p, patches = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(1, 14))
    s = p + patches
    gain = draw(st.sampled_from((1.0, 0.8, 0.0, 2.0)))
    kind = draw(st.sampled_from(kinds))
    if kind == "from_index":
        rows = draw(st.sampled_from((1, t)))
        keys = draw(st.integers(1, 12))

        def table(low, high):
            row = st.lists(st.integers(low, high), min_size=keys, max_size=keys)
            return draw(st.lists(row, min_size=rows, max_size=rows))

        frame = draw(st.booleans()) and table(-1, t - 1)
        mixing = tm.Mixing.from_index(table(0, t * s - 1), frame or None, cross_frame_gain=gain)
    elif kind == "adjacent":
        offsets = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4))
        mixing = tm.Mixing.adjacent(offsets, wrap=draw(st.booleans()), cross_frame_gain=gain)
    elif kind == "spatial":
        mixing = tm.Mixing.spatial()
    else:
        mixing = getattr(tm.Mixing, kind)(cross_frame_gain=gain)
    return Case(
        mixing,
        batch=draw(st.integers(1, max_batch)),
        num_frames=t,
        num_tokens=s,
        num_prefix_tokens=p,
        num_heads=draw(st.integers(1, max_heads)),
        head_dim=draw(st.integers(1, max_head_dim)),
        layout=draw(st.sampled_from(("contiguous", "packed", "padded", "heads_first"))),
    )
