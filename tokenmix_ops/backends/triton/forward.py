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
from tokenmix_ops.backends.triton.layout import ONE_PASS, Strides

HELD = tl.constexpr(ONE_PASS)


@triton.jit
def _scores(
    rows, keys, slots, of_queries, of_keys, gain, scale2,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, PERIOD: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys, -inf past the last slot, and their factors: scores * factors
    are logits to base 2. ``scale2`` is not negative; NEGATIVE is the sign of the scale."""
    scores = product(rows, tl.trans(keys), L)
    factors = scale2
    if NEGATIVE:
        scores = -scores
    if L.gains:
        factors = gains_of(of_queries[:, None], of_keys[None, :], gain, L) * scale2
        if PERIOD == 0:
            scores *= factors
            factors = 1.0
    if MASKED:
        used = (slots < L.num_keys)[None, :]
        scores = tl.where(used, scores, float("-inf"))
        if PERIOD > 0:
            # The gain may be 0, and -inf * 0 is NaN.
            factors = tl.where(used, factors, scale2)
    return scores, factors


@triton.jit
def _maxima(scores, slots, PERIOD: tl.constexpr, L: tl.constexpr):
    """Maximum of each row of scores [queries, slots] over the slots that no gain scales, and over
    the others of each frame [queries, frames]. Without a PERIOD, the first is over all."""
    if PERIOD == 0:
        return tl.max(scores, 1), 0.0
    else:
        scaled = (slots >= L.num_unscaled)[None, :]
        PERIODS: tl.constexpr = scores.shape[1] // PERIOD
        of_frames = tl.reshape(
            tl.where(scaled, scores, float("-inf")), [scores.shape[0], PERIODS, PERIOD]
        )
        return tl.max(tl.where(scaled, float("-inf"), scores), 1), tl.max(of_frames, 1)


@triton.jit
def _largest(
    unscaled, of_frames, of_queries, row, gain, scale2, PERIOD: tl.constexpr, L: tl.constexpr
):
    """The largest logits, to base 2, from `_maxima`."""
    if PERIOD == 0:
        # Scores that carry the gain carry the scale too.
        return unscaled if L.gains else unscaled * scale2
    else:
        frames = row * L.group_frames + tl.arange(0, PERIOD)
        scaled = of_frames * tl.where(of_queries[:, None] == frames[None, :], 1.0, gain)
        if L.num_keys > HELD or L.num_keys < L.num_unscaled + PERIOD:
            # A frame may have no slot in a tile, or at all, and -inf * 0 is NaN.
            scaled = tl.where(of_frames == float("-inf"), of_frames, scaled)
        return tl.maximum(unscaled, tl.max(scaled, 1)) * scale2


@triton.jit
def _finite(largest):
    """Replaces -inf, the maximum of a row whose logits are all -inf, by 0."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _add_tile(
    scores, factors, values, now, largest, total, mixed, L: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, with the largest logit ``now``: the maximum, the sum and the
    mixed values so far."""
    shift = _finite(now)
    weights = tl.exp2(scores * factors - shift[:, None])
    fade = tl.exp2(largest - shift)
    total = total * fade + tl.sum(weights, 1)
    mixed = add_product(mixed * fade[:, None], weights.to(values.dtype), values, L)
    return now, total, mixed


@triton.jit
def _store(
    output, lse, queries, row, largest, total, mixed, inside,
    BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    # One division a query; a product with the reciprocal rounds once more.
    mixed *= (1.0 / total)[:, None]
    store_rows(output, output_offsets(queries, row, L), mixed, inside, BLOCK_D, L)
    tl.store(lse + queries, _finite(largest) + tl.log2(total), mask=inside)


# Cached launches do not check this argument, so the kernel must not be specialised to its value.
@triton.jit(do_not_specialize=["tiles_per_program"])
def fwd_resident_kernel(
    query, key, value, output, lse, key_index, key_frame,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    scale, gain, tiles_per_program,
    L: tl.constexpr, NEGATIVE: tl.constexpr, PERIOD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * heads * programs per group). ``scale`` is the magnitude of the scale and
    NEGATIVE its sign. PERIOD is a `Layout.gain_period`, or 0. TILES are the `Tile`s of the keys."""
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
                key, value, key_index, key_frame, gain, key_strides, value_strides,
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
        if L.num_keys <= HELD:
            scores = ()
            factors = ()
            unscaled, of_frames = float("-inf"), float("-inf")
            for i in tl.static_range(len(TILES)):
                slots = slots_of(TILES[i].first, TILES[i].width)
                of_tile, its_factors = _scores(
                    rows, tiles[i][0], slots, of_queries, tiles[i][2], gain, scale2,
                    TILES[i].ragged, NEGATIVE, PERIOD, L,
                )  # fmt: skip
                scores += (of_tile,)
                factors += (its_factors,)
                maxima = _maxima(of_tile, slots, PERIOD, L)
                unscaled = tl.maximum(unscaled, maxima[0])
                of_frames = tl.maximum(of_frames, maxima[1])
            largest = _largest(unscaled, of_frames, of_queries, row, gain, scale2, PERIOD, L)
            shift = _finite(largest)[:, None]
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.static_range(len(TILES)):
                weights = tl.exp2(scores[i] * factors[i] - shift)
                total += tl.sum(weights, 1)
                mixed = add_product(mixed, weights.to(value.dtype.element_ty), tiles[i][1], L)
        else:
            largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for i in tl.static_range(len(TILES)):
                slots = slots_of(TILES[i].first, TILES[i].width)
                of_tile, its_factors = _scores(
                    rows, tiles[i][0], slots, of_queries, tiles[i][2], gain, scale2,
                    TILES[i].ragged, NEGATIVE, PERIOD, L,
                )  # fmt: skip
                maxima = _maxima(of_tile, slots, PERIOD, L)
                now = _largest(maxima[0], maxima[1], of_queries, row, gain, scale2, PERIOD, L)
                largest, total, mixed = _add_tile(
                    of_tile, its_factors, tiles[i][1], tl.maximum(largest, now),
                    largest, total, mixed, L,
                )  # fmt: skip
        _store(output, lse, queries, row, largest, total, mixed, inside, BLOCK_D, L)


@triton.jit
def _step(
    rows, slots, row, key, value, key_index, key_frame,
    key_strides, value_strides,
    of_queries, gain, scale2, largest, total, mixed,
    MASKED: tl.constexpr, NEGATIVE: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """`_add_tile` of a tile of keys that is loaded for it."""
    keys, values, of_keys = load_keys(
        slots, row, key, value, key_index, key_frame, gain, key_strides, value_strides,
        MASKED, BLOCK_D, L,
    )  # fmt: skip
    scores, factors = _scores(
        rows, keys, slots, of_queries, of_keys, gain, scale2, MASKED, NEGATIVE, 0, L
    )
    now = _largest(tl.max(scores, 1), 0.0, of_queries, row, gain, scale2, 0, L)
    return _add_tile(scores, factors, values, tl.maximum(largest, now), largest, total, mixed, L)


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
    _store(output, lse, queries, row, largest, total, mixed, inside, BLOCK_D, L)
