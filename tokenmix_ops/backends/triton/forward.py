"""Forward kernels: output and lse of a tile of queries of one (video, head).

``fwd_resident_kernel`` keeps all keys of a row on chip and loads them once for many query tiles, so
its softmax takes one pass. ``fwd_streamed_kernel`` loops over any number of keys with an online
softmax. Both compute exponentials to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenmix_ops.backends.triton.keys import (
    LOG2E,
    add_product,
    gains_of,
    load_keys,
    load_rows,
    lse_start,
    output_offsets,
    output_start,
    place,
    product,
    query_frames,
    query_offsets,
    slots_of,
    start_of,
    store_rows,
)
from tokenmix_ops.backends.triton.layout import Strides


@triton.jit
def _scores(
    rows, keys, slots, of_queries, of_keys, gain,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Unscaled logits; -inf past the last slot."""
    scores = product(rows, tl.trans(keys), L)
    if L.gains:
        scores *= gains_of(of_queries[:, None], of_keys[None, :], gain)
    if NEGATIVE:
        scores = -scores
    if MASKED:
        scores = tl.where((slots < L.num_keys)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _finite(largest):
    """Replaces -inf, the maximum of a row whose logits are all -inf, by 0."""
    return tl.where(largest == float("-inf"), 0.0, largest)


# Cached launches do not check this argument, so the kernel must not be specialised to its value.
@triton.jit(do_not_specialize=["tiles_per_program"])
def fwd_resident_kernel(
    query, key, value, output, lse, key_index, key_frame,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    scale, gain, tiles_per_program,
    L: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * heads * programs per group). ``scale`` is the magnitude of the scale and
    NEGATIVE its sign. TILES are the `Tile`s of the keys."""
    query_strides = Strides(stride_qb, stride_qt, stride_qs, stride_qh)
    key_strides = Strides(stride_kb, stride_kt, stride_ks, stride_kh)
    value_strides = Strides(stride_vb, stride_vt, stride_vs, stride_vh)
    num_tiles: tl.constexpr = (L.group_queries + BLOCK_M - 1) // BLOCK_M
    programs = tl.cdiv(num_tiles, tiles_per_program)
    program = tl.program_id(0)
    video, row, head = place(program // programs, L)
    first = (program % programs) * tiles_per_program
    query += start_of(video, head, query_strides)
    key += start_of(video, head, key_strides)
    value += start_of(video, head, value_strides)
    output += output_start(video, head, L)
    lse += lse_start(video, row, head, L)

    # Loaded before the loop over queries, the keys stay in shared memory throughout.
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles += (
            load_keys(
                slots_of(TILES[i].first, TILES[i].width), row,
                key, value, key_index, key_frame, key_strides, value_strides,
                TILES[i].ragged, BLOCK_D, L,
            ),
        )  # fmt: skip

    scale2 = scale * LOG2E
    for tile in range(first, tl.minimum(first + tiles_per_program, num_tiles)):
        queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = queries < L.group_queries
        of_queries = query_frames(queries, row, L)
        offsets = query_offsets(queries, row, query_strides, L)
        rows = load_rows(query, offsets, inside, True, BLOCK_D, L)
        scores = ()
        for i in tl.static_range(len(TILES)):
            scores += (
                _scores(
                    rows, tiles[i][0], slots_of(TILES[i].first, TILES[i].width),
                    of_queries, tiles[i][2], gain, TILES[i].ragged, NEGATIVE, L,
                ),
            )  # fmt: skip
        largest = tl.max(scores[0], 1)
        for i in tl.static_range(1, len(TILES)):
            largest = tl.maximum(largest, tl.max(scores[i], 1))
        largest = _finite(largest) * scale2
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i in tl.static_range(len(TILES)):
            weights = tl.exp2(scores[i] * scale2 - largest[:, None])
            total += tl.sum(weights, 1)
            mixed = add_product(mixed, weights.to(value.dtype.element_ty), tiles[i][1], L)
        store_rows(
            output, output_offsets(queries, row, L), mixed / total[:, None], inside, BLOCK_D, L
        )
        tl.store(lse + queries, largest + tl.log2(total), mask=inside)


@triton.jit
def _step(
    rows, slots, row, key, value, key_index, key_frame,
    key_strides, value_strides,
    of_queries, gain, scale2, largest, total, mixed,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the maximum, the sum and the mixed values so far."""
    keys, values, of_keys = load_keys(
        slots, row, key, value, key_index, key_frame, key_strides, value_strides,
        MASKED, BLOCK_D, L,
    )  # fmt: skip
    scores = _scores(rows, keys, slots, of_queries, of_keys, gain, MASKED, NEGATIVE, L)
    now = tl.maximum(largest, tl.max(scores, 1) * scale2)
    shift = _finite(now)
    weights = tl.exp2(scores * scale2 - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    mixed = add_product(mixed * fade[:, None], weights.to(values.dtype), values, L)
    return now, total, mixed


@triton.jit
def fwd_streamed_kernel(
    query, key, value, output, lse, key_index, key_frame,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    scale, gain,
    L: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * heads * query tiles). Takes the arguments of the resident kernel."""
    query_strides = Strides(stride_qb, stride_qt, stride_qs, stride_qh)
    key_strides = Strides(stride_kb, stride_kt, stride_ks, stride_kh)
    value_strides = Strides(stride_vb, stride_vt, stride_vs, stride_vh)
    num_tiles: tl.constexpr = (L.group_queries + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = L.num_keys // BLOCK_N
    program = tl.program_id(0)
    video, row, head = place(program // num_tiles, L)
    query += start_of(video, head, query_strides)
    key += start_of(video, head, key_strides)
    value += start_of(video, head, value_strides)
    output += output_start(video, head, L)
    lse += lse_start(video, row, head, L)

    queries = (program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = queries < L.group_queries
    of_queries = query_frames(queries, row, L)
    offsets = query_offsets(queries, row, query_strides, L)
    rows = load_rows(query, offsets, inside, True, BLOCK_D, L)
    scale2 = scale * LOG2E
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, FULL * BLOCK_N, BLOCK_N):
        largest, total, mixed = _step(
            rows, start + tl.arange(0, BLOCK_N), row, key, value, key_index, key_frame,
            key_strides, value_strides,
            of_queries, gain, scale2, largest, total, mixed, False, NEGATIVE, BLOCK_D, L,
        )  # fmt: skip
    for i in tl.static_range(FULL, len(TILES)):
        largest, total, mixed = _step(
            rows, slots_of(TILES[i].first, TILES[i].width), row,
            key, value, key_index, key_frame, key_strides, value_strides,
            of_queries, gain, scale2, largest, total, mixed,
            TILES[i].ragged, NEGATIVE, BLOCK_D, L,
        )  # fmt: skip
    store_rows(output, output_offsets(queries, row, L), mixed / total[:, None], inside, BLOCK_D, L)
    tl.store(lse + queries, _finite(largest) + tl.log2(total), mask=inside)
