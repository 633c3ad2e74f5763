"""A fused kernel written out in PyTorch, with faults to plant that the tolerance rule has to catch.

It rounds where `tolerance.FUSED` says that a kernel may, and nowhere else. Its exponential is off
by 2 units in the last place, up or down at random.
"""

import torch

from tokenmix_ops.testing import output_and_gradients

FAULTS = {
    "a key is dropped": ("float32", "bfloat16", "float16"),
    "a key is dropped for one query": ("float32", "bfloat16", "float16"),
    "a key counts twice": ("float32", "bfloat16", "float16"),
    "the gain is on prefix tokens": ("float32", "bfloat16", "float16"),
    "the gain is missing in the gradients": ("float32", "bfloat16", "float16"),
    "delta is of the next query": ("float32", "bfloat16", "float16"),
    "the last query adds nothing to the key gradients": ("float32", "bfloat16", "float16"),
    "logits are rounded once too often": ("float32", "bfloat16", "float16"),
    "weights are rounded to bfloat16": ("float32", "float16"),
    "output is summed in the dtype of the inputs": ("bfloat16", "float16"),
    "output is summed in float16": ("float32",),
    "value gradients are summed in the dtype of the inputs": ("bfloat16", "float16"),
    "key gradients of frames are added up in the dtype of the inputs": ("bfloat16", "float16"),
    "value gradients of frames are added up in float16": ("float32",),
    "products are in TF32": ("float32",),
    "an element is not written": ("float32", "bfloat16", "float16"),
}
"""Faults, and the dtypes in which each is one.

One rounding of the output more than a kernel needs is none that the rule can see: it adds a fifth
to the RMS error. A rounding of the logits shows where they are large, one of each of many partial
sums where they are many.
"""


def emulated(case, fault=None, exponential_ulp=2):
    """The attention of a case, differentiable, for inputs as `Case.inputs` makes them."""

    def attention(query, key, value):
        return _Emulated.apply(query, key, value, case, fault, exponential_ulp)

    return attention


def results(case, inputs, output_grad, fault=None, exponential_ulp=2):
    return output_and_gradients(emulated(case, fault, exponential_ulp), inputs, output_grad)


def to_tf32(x):
    """Rounded to the 10 bits of TF32's mantissa."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def _sum_in(dtype, terms, dim):
    """A sum of which every partial one is rounded to ``dtype``."""
    total = torch.zeros_like(terms.select(dim, 0), dtype=dtype)
    for term in terms.unbind(dim):
        total = (total.float() + term).to(dtype)
    return total.float()


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, case, fault, exponential_ulp):
        ctx.case, ctx.fault, ctx.exponential_ulp = case, fault, exponential_ulp
        output = torch.empty_like(query)
        for t in range(query.shape[1]):
            output[:, t] = _frame(ctx, t, query, key, value)[0]
        if fault == "an element is not written":
            output[0, -1, -1, 0, 0] = 0
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, output_grad):
        query, key, value, output = ctx.saved_tensors
        fault, dtype = ctx.fault, query.dtype
        query_grad = torch.empty_like(query)
        key_grad, value_grad = (torch.zeros(key.shape) for _ in range(2))
        for t in range(query.shape[1]):
            _, weights, keys, values, factor, index = _frame(ctx, t, query, key, value)
            do, o, q = output_grad[:, t].float(), output[:, t].float(), query[:, t].float()
            delta = (do * o).sum(-1).transpose(1, 2)[..., None]
            if fault == "delta is of the next query":
                delta = delta.roll(-1, dims=2)
            slopes = torch.einsum("bnhd,bmhd->bhnm", do, values)
            if fault == "the gain is missing in the gradients":
                factor = torch.full_like(factor, ctx.case.head_dim**-0.5)
            grads = (weights * (slopes - delta) * factor).to(dtype).float()
            query_grad[:, t] = torch.einsum("bhnm,bmhd->bnhd", grads, keys)
            of_keys = grads
            if fault == "the last query adds nothing to the key gradients":
                of_keys = grads.clone()
                of_keys[:, :, -1] = 0
            part = torch.einsum("bhnm,bnhd->bmhd", of_keys, q)
            key_grad.flatten(1, 2).index_add_(1, index, part)
            if fault == "key gradients of frames are added up in the dtype of the inputs":
                key_grad.copy_(key_grad.to(dtype))
            stored = weights.to(dtype).float()
            if fault == "value gradients are summed in the dtype of the inputs":
                terms = torch.einsum("bhnm,bnhd->bmhdn", stored, do)
                part = _sum_in(dtype, terms, -1)
            else:
                part = torch.einsum("bhnm,bnhd->bmhd", stored, do)
            value_grad.flatten(1, 2).index_add_(1, index, part)
            if fault == "value gradients of frames are added up in float16":
                value_grad.copy_(value_grad.half())
        return query_grad, key_grad.to(dtype), value_grad.to(dtype), None, None, None


def _frame(ctx, t, query, key, value):
    """Output, weights in float32, keys, values, factors of the logits and indices of one frame."""
    case, fault, dtype = ctx.case, ctx.fault, query.dtype
    plan = case.plan
    index = plan.key_index[0 if plan.rows == "shared" else t].long()
    cross = plan.is_cross_frame[t]
    if fault == "the gain is on prefix tokens":
        of_prefix = index % plan.num_tokens < plan.num_prefix_tokens
        cross = cross | (of_prefix & (index // plan.num_tokens != t))
    factor = torch.where(cross, plan.cross_frame_gain, 1.0) * case.head_dim**-0.5
    q = query[:, t].float()
    k, v = (x.flatten(1, 2)[:, index].float() for x in (key, value))
    if fault == "products are in TF32":
        q, k, v = to_tf32(q), to_tf32(k), to_tf32(v)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * factor
    if fault == "logits are rounded once too often":
        logits = logits.to(torch.bfloat16 if dtype == torch.float32 else dtype).float()
    if fault == "a key is dropped":
        logits[..., 7] = -torch.inf
    if fault == "a key is dropped for one query":
        logits[:, :, 3, 7] = -torch.inf
    generator = torch.Generator().manual_seed(t)
    off = torch.randint(-1, 2, logits.shape, generator=generator) * ctx.exponential_ulp
    numbers = (logits - logits.amax(-1, keepdim=True)).exp()
    # An integer added to the bits of a positive number is so many units in the last place.
    numbers = (numbers.view(torch.int32) + off.int() * (numbers > 1e-30)).view(torch.float32)
    if fault == "a key counts twice":
        numbers[..., 7] *= 2
    weights = numbers / numbers.sum(-1, keepdim=True)
    if fault == "weights are rounded to bfloat16":
        weights = weights.bfloat16().float()
    stored = weights.to(dtype).float()
    terms = ("bhnm,bmhd->bnhdm", stored, v)
    if fault == "output is summed in the dtype of the inputs":
        output = _sum_in(dtype, torch.einsum(*terms), -1)
    elif fault == "output is summed in float16":
        output = _sum_in(torch.float16, torch.einsum(*terms), -1)
    else:
        output = torch.einsum("bhnm,bmhd->bnhd", stored, v)
    return output.to(dtype), weights, k, v, factor, index
