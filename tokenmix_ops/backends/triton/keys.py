"""Code shared by all kernels: the rows of the tensors that a program reads, and gains of logits.

Kernels do not know mixings. A `Layout` gives them the sizes of a call and how to find its keys: by
the strided rule in integer arithmetic, through a table, or in order if they are already selected.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(index, L: tl.constexpr):
    """Video, row and head of a flat group index; video and head in 64 bits, for addresses."""
    head = (index % L.num_heads).to(tl.int64)
    group = index // L.num_heads
    return (group // L.num_rows).to(tl.int64), group % L.num_rows, head


@triton.jit
def start_of(video, head, strides):
    """Offset of a video's first token in one head."""
    return video * strides.video + head * strides.head


@triton.jit
def offsets_of(frames, tokens, strides, L: tl.constexpr):
    """Offsets of tokens from the start of their video, in 64 bits unless all fit in 32."""
    if L.wide:
        return tl.cast(frames, tl.int64) * strides.frame + tokens.to(tl.int64) * strides.token
    else:
        return frames * strides.frame + tokens * strides.token


@triton.jit
def query_offsets(queries, row, strides, L: tl.constexpr):
    """Offsets of a group's queries from the start of the video."""
    frames = query_frames(queries, row, L)
    return offsets_of(frames, queries % L.num_queries, strides, L)


@triton.jit
def output_offsets(queries, row, L: tl.constexpr):
    """The same for contiguous tensors: the output and the query gradient."""
    indices = row * L.group_queries + queries
    if L.wide:
        return indices.to(tl.int64) * (L.num_heads * L.head_dim)
    else:
        return indices * (L.num_heads * L.head_dim)


@triton.jit
def output_start(video, head, L: tl.constexpr):
    """Offset of a video's first query in contiguous tensors."""
    return (video * (L.num_frames * L.num_queries * L.num_heads) + head) * L.head_dim


@triton.jit
def lse_start(video, row, head, L: tl.constexpr):
    """Offset of a group's first query in lse and in tensors with the same layout."""
    return ((video * L.num_heads + head) * L.num_rows + row) * L.group_queries


@triton.jit
def query_frames(queries, row, L: tl.constexpr):
    return row * L.group_frames + queries // L.num_queries


@triton.jit
def slots_of(FIRST: tl.constexpr, WIDTH: tl.constexpr):
    return FIRST + tl.arange(0, WIDTH)


@triton.jit
def strided_tokens(slots, L: tl.constexpr):
    """Frame within the group and token of the keys in these slots, by the strided rule."""
    lead: tl.constexpr = L.group_frames * L.num_full_tokens
    rest = slots - lead
    frames = rest % L.group_frames
    tokens = rest + L.num_full_tokens
    if lead > 0:
        frames = tl.where(slots < lead, slots // L.num_full_tokens, frames)
        tokens = tl.where(slots < lead, slots % L.num_full_tokens, tokens)
    return frames, tokens


@triton.jit
def key_offsets(slots, row, key_index, strides, L: tl.constexpr):
    """Offsets of the keys in these slots of a row from the start of the video."""
    if L.selected:
        frames, tokens = slots * 0, slots
    elif L.num_full_tokens < 0:
        inside = slots < L.num_keys
        index = tl.load(key_index + row * L.num_keys + slots, mask=inside, other=0)
        frames, tokens = index // L.num_tokens, index % L.num_tokens
    else:
        frames, tokens = strided_tokens(slots, L)
        frames += row * L.group_frames
    return offsets_of(frames, tokens, strides, L)


@triton.jit
def key_frames(slots, row, key_frame, gain, L: tl.constexpr):
    """The frames that keys count as for the gain; -1 for keys whose logits are never scaled.

    Where all queries of a row are of one frame, the gains themselves.
    """
    if L.num_full_tokens < 0:
        inside = slots < L.num_keys
        frames = tl.load(key_frame + row * L.num_keys + slots, mask=inside, other=-1)
    else:
        of_group, tokens = strided_tokens(slots, L)
        frames = tl.where(tokens < L.num_prefix_tokens, -1, of_group + row * L.group_frames)
    if L.group_frames == 1:
        return gains_between(row, frames, gain)
    else:
        return frames


@triton.jit
def gains_between(of_queries, of_keys, gain):
    return tl.where(of_queries == of_keys, 1.0, tl.where(of_keys == -1, 1.0, gain))


@triton.jit
def gains_of(of_queries, of_keys, gain, L: tl.constexpr):
    """Factors of the logits, from broadcastable frames of queries and `key_frames`."""
    if L.group_frames == 1:
        return of_keys
    else:
        return gains_between(of_queries, of_keys, gain)


@triton.jit
def row_pointers(base, offsets, BLOCK_D: tl.constexpr, L: tl.constexpr):
    """Pointers to rows of head_dim numbers at these offsets [rows].

    Triton takes strides for odd unless 16 divides them, and reads odd rows number by number.
    """
    alignment: tl.constexpr = L.alignment
    pointers = base + (offsets[:, None] + tl.arange(0, BLOCK_D)[None, :])
    return tl.multiple_of(pointers, [1, alignment])


@triton.jit
def load_rows(base, offsets, inside, MASKED: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr):
    """Loads rows of head_dim numbers at these offsets [rows]; zero where not ``inside``."""
    dims = tl.arange(0, BLOCK_D)
    pointers = row_pointers(base, offsets, BLOCK_D, L)
    if L.head_dim < BLOCK_D:
        mask = inside[:, None] & (dims < L.head_dim)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_keys(
    slots, row, key, value, key_index, key_frame, gain, key_strides, value_strides,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Loads keys and values in these slots, zero past the last, and their `key_frames`."""
    inside = slots < L.num_keys
    k_offsets = key_offsets(slots, row, key_index, key_strides, L)
    v_offsets = key_offsets(slots, row, key_index, value_strides, L)
    keys = load_rows(key, k_offsets, inside, MASKED, BLOCK_D, L)
    values = load_rows(value, v_offsets, inside, MASKED, BLOCK_D, L)
    of_keys = key_frames(slots, row, key_frame, gain, L) if L.gains else slots
    return keys, values, of_keys


@triton.jit
def store_rows(base, offsets, rows, inside, BLOCK_D: tl.constexpr, L: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dims < L.head_dim)[None, :]
    pointers = row_pointers(base, offsets, BLOCK_D, L)
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def product(left, right, L: tl.constexpr):
    """left @ right in float32."""
    if L.upcast:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(left, right, input_precision=L.precision)


@triton.jit
def add_product(total, left, right, L: tl.constexpr):
    """total + left @ right in float32."""
    if L.upcast:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(left, right, total, input_precision=L.precision)
