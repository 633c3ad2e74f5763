"""How tests hold a computation against the oracle: in float64, and by the tolerance rule."""

from dataclasses import replace
from functools import lru_cache

import torch
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

import tokenmix_ops as tm
from tokenmix_ops.mixing import NAMES
from tokenmix_ops.reference import token_mix_attention_ref
from tokenmix_ops.testing import Case, max_error, output_and_gradients, tolerance


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


def gather_and_sdpa(case, scale=None):
    """What a user of PyTorch alone would write: index the keys, call its attention."""

    def attend(queries, k, v, plan, row, cross):
        index = plan.key_index[row].long()
        keys, values = (
            x if case.layout == "selected" else x.flatten(1, 2)[:, index] for x in (k, v)
        )
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
            return oracle(case, scale)(q, k, v)
        nowhere = torch.zeros_like(plan.is_cross_frame[0, 0])
        return torch.stack([attend(q[:, :, s], k, v, plan, s, nowhere) for s in tokens], dim=2)

    return attention


def some_output_grad(query):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(query.shape, generator=generator, dtype=torch.float64).to(query)


def expected(case, inputs, output_grad, scale=None):
    """Output and gradients in float64, by name, each with the largest error that is allowed."""
    doubles = tuple(t.detach().double() for t in inputs)
    exact = output_and_gradients(oracle(case, scale), doubles, output_grad)
    ways = (oracle(case, scale), gather_and_sdpa(case, scale))
    plain = [output_and_gradients(way, inputs, output_grad) for way in ways]
    double = inputs[0].dtype == torch.float64
    return {
        name: (value, 1e-12 if double else tolerance(value, *(way[name] for way in plain)))
        for name, value in exact.items()
    }


# Backends and algorithms share it; the reference takes longer than they do.
@lru_cache(maxsize=32)
def _inputs_and_expected(case, dtype, device):
    inputs = case.inputs(dtype, device)
    output_grad = some_output_grad(inputs[0])
    return inputs, output_grad, expected(case, inputs, output_grad)


def assert_case_agrees(attention, case, dtype, device="cpu"):
    """Output and gradients of ``attention`` for a case obey the tolerance rule; NaN nowhere."""
    inputs, output_grad, wanted = _inputs_and_expected(case, dtype, device)
    _assert_within(wanted, output_and_gradients(attention, inputs, output_grad), dtype)


def assert_agrees(attention, case, inputs, output_grad=None, scale=None):
    """The same for inputs of one's own."""
    output_grad = some_output_grad(inputs[0]) if output_grad is None else output_grad
    wanted = expected(case, inputs, output_grad, scale)
    _assert_within(wanted, output_and_gradients(attention, inputs, output_grad), inputs[0].dtype)


def _assert_within(wanted, found, dtype):
    for name, (exact, limit) in wanted.items():
        assert found[name].shape == exact.shape, name
        assert found[name].dtype == dtype, name
        error = max_error(found[name], exact)
        assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g}"


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
