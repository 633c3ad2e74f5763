"""How tests hold a computation against the oracle: in float64, and by the tolerance rule."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from hypothesis import strategies as st
from interpreter import round_to_nearest_bfloat16
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tokenmix_ops as tm
from tokenmix_ops.backends import triton
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import Case, output_and_gradients
from tokenmix_ops.tolerance import FUSED, Arithmetic, error_budget, rms_error, rms_limit

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


def gather_and_sdpa(case, scale=None, dtype=None):
    """What a user of PyTorch alone would write: index the keys, call its attention.

    Given inputs in float32 and a ``dtype``, attention computes in that one, and the parts of a
    token's gradients add up in float32.
    """

    def attend(queries, k, v, plan, row, cross):
        index = plan.key_index[row].long()
        keys, values = (
            x if case.layout == "selected" else x.flatten(1, 2)[:, index] for x in (k, v)
        )
        queries, keys, values = (x.to(dtype or x.dtype) for x in (queries, keys, values))
        keys = torch.where(cross[:, None, None], keys * plan.cross_frame_gain, keys)
        heads_first = (x.transpose(1, 2) for x in (queries, keys, values))
        return sdpa(*heads_first, scale=scale).transpose(1, 2)

    def attention(q, k, v):
        plan = case.plan_on(q.device)
        frames, tokens = range(q.shape[1]), range(q.shape[2])
        if plan.rows != "token":
            rows = [0 if plan.rows == "shared" else t for t in frames]
            ways = [attend(q[:, t], k, v, plan, rows[t], plan.is_cross_frame[t]) for t in frames]
            return torch.stack(ways, dim=1)
        if plan.scales_logits:
            return oracle(case, scale)(*(x.to(dtype or x.dtype) for x in (q, k, v)))
        nowhere = torch.zeros_like(plan.is_cross_frame[0, 0])
        return torch.stack([attend(q[:, :, s], k, v, plan, s, nowhere) for s in tokens], dim=2)

    return attention


def some_output_grad(query):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(query.shape, generator=generator, dtype=torch.float64).to(query)


def arithmetic_of(backend):
    """What a backend may round."""
    return Arithmetic(composed=True) if backend == "eager" else FUSED


@dataclass(frozen=True)
class Expected:
    """What a call should give, by name, and the RMS error that each tensor may have."""

    budgets: dict
    rms_limits: dict


def expected(case, inputs, output_grad, arithmetic=FUSED, scale=None):
    """`Expected` of a case with its or other inputs."""
    tensors = tuple(t.detach() for t in inputs)
    plan = case.plan_on(tensors[0].device)
    budgets = error_budget(*tensors, output_grad, plan, scale, arithmetic)
    if tensors[0].dtype == torch.float64:
        # The exact values are rounded like any others.
        doubled = {name: replace(b, limit=2 * b.limit) for name, b in budgets.items()}
        return Expected(doubled, dict.fromkeys(budgets, math.inf))
    dtype = tensors[0].dtype
    plain = gather_and_sdpa(case, scale, dtype)
    found = output_and_gradients(plain, tuple(t.float() for t in tensors), output_grad)
    limits = {
        name: rms_limit(budget.exact, found[name].to(dtype), budget.mean_square)
        for name, budget in budgets.items()
    }
    return Expected(budgets, limits)


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
    for name, budget in wanted.budgets.items():
        exact, limit = budget.exact, budget.limit
        assert limit.isfinite().all(), f"{name}: these inputs are beyond what the rule covers"
        assert found[name].shape == exact.shape, name
        assert found[name].dtype == dtype, name
        error = (found[name].double() - exact).abs()
        wrong = ~(error <= limit)
        worst = float((error / limit).amax()) if error.numel() else 0.0
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements too far off, the worst by "
            f"{worst:.3g} times its limit"
        )
        rms, allowed = rms_error(found[name], exact), wanted.rms_limits[name]
        assert rms <= allowed, f"{name}: RMS error {rms:.3g}, allowed {allowed:.3g}"


@st.composite
def random_cases(draw, kinds=(*NAMES, "from_index"), max_batch=3, max_heads=3):
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
        head_dim=draw(st.integers(1, 9)),
        layout=draw(st.sampled_from(("contiguous", "packed", "padded", "heads_first"))),
    )
