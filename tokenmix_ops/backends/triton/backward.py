"""Backward kernels. They use no atomics, so results are deterministic bit for bit.

``bwd_resident_kernel`` keeps all keys of a row and their gradients in one program: five products,
and nothing is read or written twice. With more keys, or too few programs to fill the GPU, two
kernels run instead: ``bwd_query_kernel`` loops over the keys for a tile of queries,
``bwd_key_kernel`` over the queries for a tile of keys.

With P = exp(logits - lse), dP = dO V' and delta = sum(dO O): dS = P (dP - delta), times the gain;
dV = P' dO, dQ = scale dS K, dK = scale dS' Q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenmix_ops.backends.triton.keys import (
    LOG2E,
    add_product,
    gains_between,
    gains_of,
    key_offsets,
    load_keys,
    load_rows,
    lse_start,
    offsets_of,
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
def _weights_and_slopes(
    scores, slopes, lse, delta, used, of_queries, of_keys, gain, scale2,
    MASKED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """P and unscaled dS from Q K' and dO V', or the transposes of all four.

    Per-query and per-key arguments must broadcast against them. If MASKED, P and dS are 0 for keys
    that are not ``used``.
    """
    factors = scale2
    if L.gains:
        gains = gains_of(of_queries, of_keys, gain, L)
        factors = gains * scale2
    weights = tl.exp2(scores * factors - lse)
    if MASKED:
        weights = tl.where(used, weights, 0.0)
    slopes = weights * (slopes - delta)
    if L.gains:
        slopes *= gains
    return weights, slopes


@triton.jit
def _store_keys(
    slots, row, key_grads, value_grads, scale, key_grad, value_grad, key_index,
    key_strides, value_strides, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    inside = slots < L.num_keys
    k_offsets = key_offsets(slots, row, key_index, key_strides, L)
    v_offsets = key_offsets(slots, row, key_index, value_strides, L)
    store_rows(key_grad, k_offsets, key_grads * scale, inside, BLOCK_D, L)
    store_rows(value_grad, v_offsets, value_grads, inside, BLOCK_D, L)


# A separate function, because Triton 3.6 rejects an element of TILES inside a list.
@triton.jit
def _zeros(WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.zeros([WIDTH, BLOCK_D], tl.float32)


@triton.jit
def _side_by_side(of_parts, tile: tl.constexpr, PARTS: tl.constexpr):
    """The matrices [keys, queries] of a key tile as one, whose columns the parts take in turn."""
    if PARTS == 1:
        return of_parts[0][tile]
    else:
        both = tl.join(of_parts[0][tile], of_parts[1][tile])
        return tl.reshape(both, [both.shape[0], both.shape[1] * PARTS])


@triton.jit
def _store_zeros(
    key_grad, value_grad, first, row, key_strides, value_strides,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Zeroes the gradients of tokens that the strided rule leaves out, starting at ``first``."""
    others: tl.constexpr = L.group_frames - 1
    left_out = first + tl.arange(0, WIDTH)
    rest = left_out // others
    # The token's only selected frame is rest mod frames; the others follow it cyclically.
    frames = (rest + 1 + left_out % others) % L.group_frames + row * L.group_frames
    tokens = rest + L.num_full_tokens
    inside = left_out < L.num_unselected
    zeros = tl.zeros([WIDTH, BLOCK_D], tl.float32)
    k_offsets = offsets_of(frames, tokens, key_strides, L)
    v_offsets = offsets_of(frames, tokens, value_strides, L)
    store_rows(key_grad, k_offsets, zeros, inside, BLOCK_D, L)
    store_rows(value_grad, v_offsets, zeros, inside, BLOCK_D, L)


@triton.jit
def bwd_resident_kernel(
    output_grad, query, key, value, output, lse, query_grad, key_grad, value_grad,
    key_index, key_frame,
    stride_gb, stride_gt, stride_gs, stride_gh,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    stride_dkb, stride_dkt, stride_dks, stride_dkh,
    stride_dvb, stride_dvt, stride_dvs, stride_dvh,
    scale, gain,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Grid: (groups * heads). Does not support keys whose gradient is gathered by token."""
    output_grad_strides = Strides(stride_gb, stride_gt, stride_gs, stride_gh)
    query_strides = Strides(stride_qb, stride_qt, stride_qs, stride_qh)
    key_strides = Strides(stride_kb, stride_kt, stride_ks, stride_kh)
    value_strides = Strides(stride_vb, stride_vt, stride_vs, stride_vh)
    key_grad_strides = Strides(stride_dkb, stride_dkt, stride_dks, stride_dkh)
    value_grad_strides = Strides(stride_dvb, stride_dvt, stride_dvs, stride_dvh)
    video, row, head = place(tl.program_id(0), L)
    query += start_of(video, head, query_strides)
    output_grad += start_of(video, head, output_grad_strides)
    key += start_of(video, head, key_strides)
    value += start_of(video, head, value_strides)
    key_grad += start_of(video, head, key_grad_strides)
    value_grad += start_of(video, head, value_grad_strides)
    output += output_start(video, head, L)
    query_grad += output_start(video, head, L)
    lse += lse_start(video, row, head, L)

    tiles = ()
    key_grads = ()
    value_grads = ()
    for i in tl.static_range(len(TILES)):
        tiles += (
            load_keys(
                slots_of(TILES[i].first, TILES[i].width), row,
                key, value, key_index, key_frame, gain, key_strides, value_strides,
                TILES[i].ragged, BLOCK_D, L,
            ),
        )  # fmt: skip
        key_grads += (_zeros(TILES[i].width, BLOCK_D),)
        value_grads += (_zeros(TILES[i].width, BLOCK_D),)

    # Two parts of a tile of queries share a product for dQ, which takes hardly longer than for one.
    PARTS: tl.constexpr = 2 if BLOCK_M > 32 else 1
    WIDTH: tl.constexpr = BLOCK_M // PARTS
    scale2 = scale * LOG2E
    for start in range(0, L.group_queries, BLOCK_M):
        of_parts = ()
        for part in tl.static_range(PARTS):
            queries = start + part * WIDTH + tl.arange(0, WIDTH)
            inside = queries < L.group_queries
            of_queries = query_frames(queries, row, L)
            q_offsets = query_offsets(queries, row, query_strides, L)
            g_offsets = query_offsets(queries, row, output_grad_strides, L)
            rows = load_rows(query, q_offsets, inside, True, BLOCK_D, L)
            grads = load_rows(output_grad, g_offsets, inside, True, BLOCK_D, L)
            outputs = load_rows(output, output_offsets(queries, row, L), inside, True, BLOCK_D, L)
            lse_rows = tl.load(lse + queries, mask=inside, other=0.0)
            delta = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
            next_key_grads = ()
            next_value_grads = ()
            of_tiles = ()
            for i in tl.static_range(len(TILES)):
                keys, values, of_keys = tiles[i]
                slots = slots_of(TILES[i].first, TILES[i].width)
                weights, slopes = _weights_and_slopes(
                    product(keys, tl.trans(rows), L), product(values, tl.trans(grads), L),
                    lse_rows[None, :], delta[None, :], (slots < L.num_keys)[:, None],
                    of_queries[None, :], of_keys[:, None], gain, scale2, TILES[i].ragged, L,
                )  # fmt: skip
                slopes = slopes.to(rows.dtype)
                next_value_grads += (
                    add_product(value_grads[i], weights.to(grads.dtype), grads, L),
                )
                next_key_grads += (add_product(key_grads[i], slopes, rows, L),)
                of_tiles += (slopes,)
            key_grads = next_key_grads
            value_grads = next_value_grads
            of_parts += (of_tiles,)

        query_grads = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        for i in tl.static_range(len(TILES)):
            slopes = _side_by_side(of_parts, i, PARTS)
            query_grads = add_product(query_grads, tl.trans(tiles[i][0]), slopes, L)
        lanes = tl.arange(0, BLOCK_M)
        queries = start + lanes % PARTS * WIDTH + lanes // PARTS
        store_rows(
            query_grad, output_offsets(queries, row, L), tl.trans(query_grads) * scale,
            queries < L.group_queries, BLOCK_D, L,
        )  # fmt: skip

    for i in tl.static_range(len(TILES)):
        _store_keys(
            slots_of(TILES[i].first, TILES[i].width), row,
            key_grads[i], value_grads[i], scale, key_grad, value_grad, key_index,
            key_grad_strides, value_grad_strides, BLOCK_D, L,
        )  # fmt: skip
    for first in range(0, L.num_unselected, BLOCK_M):
        _store_zeros(
            key_grad, value_grad, first, row, key_grad_strides, value_grad_strides,
            BLOCK_M, BLOCK_D, L,
        )  # fmt: skip


@triton.jit
def _query_step(
    rows, grads, slots, row, key, value, key_index, key_frame,
    key_strides, value_strides,
    lse_rows, delta, of_queries, gain, scale2, query_grads,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Adds one key tile's contribution to the unscaled dQ."""
    keys, values, of_keys = load_keys(
        slots, row, key, value, key_index, key_frame, gain, key_strides, value_strides,
        MASKED, BLOCK_D, L,
    )  # fmt: skip
    _, slopes = _weights_and_slopes(
        product(rows, tl.trans(keys), L), product(grads, tl.trans(values), L),
        lse_rows[:, None], delta[:, None], (slots < L.num_keys)[None, :],
        of_queries[:, None], of_keys[None, :], gain, scale2, MASKED, L,
    )  # fmt: skip
    return add_product(query_grads, slopes.to(keys.dtype), keys, L)


@triton.jit
def bwd_query_kernel(
    output_grad, query, key, value, output, lse, query_grad, delta, key_index, key_frame,
    stride_gb, stride_gt, stride_gs, stride_gh,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    scale, gain,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Computes dQ of a tile of queries, and delta, with the layout of lse, for the key kernel.

    Grid: (groups * heads * query tiles).
    """
    output_grad_strides = Strides(stride_gb, stride_gt, stride_gs, stride_gh)
    query_strides = Strides(stride_qb, stride_qt, stride_qs, stride_qh)
    key_strides = Strides(stride_kb, stride_kt, stride_ks, stride_kh)
    value_strides = Strides(stride_vb, stride_vt, stride_vs, stride_vh)
    num_tiles: tl.constexpr = (L.group_queries + BLOCK_M - 1) // BLOCK_M
    FULL: tl.constexpr = L.num_keys // BLOCK_N
    program = tl.program_id(0)
    video, row, head = place(program // num_tiles, L)
    query += start_of(video, head, query_strides)
    output_grad += start_of(video, head, output_grad_strides)
    key += start_of(video, head, key_strides)
    value += start_of(video, head, value_strides)
    output += output_start(video, head, L)
    query_grad += output_start(video, head, L)
    lse += lse_start(video, row, head, L)
    delta += lse_start(video, row, head, L)

    queries = (program % num_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = queries < L.group_queries
    of_queries = query_frames(queries, row, L)
    q_offsets = query_offsets(queries, row, query_strides, L)
    g_offsets = query_offsets(queries, row, output_grad_strides, L)
    out_offsets = output_offsets(queries, row, L)
    rows = load_rows(query, q_offsets, inside, True, BLOCK_D, L)
    grads = load_rows(output_grad, g_offsets, inside, True, BLOCK_D, L)
    outputs = load_rows(output, out_offsets, inside, True, BLOCK_D, L)
    lse_rows = tl.load(lse + queries, mask=inside, other=0.0)
    of_tile = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)
    tl.store(delta + queries, of_tile, mask=inside)

    scale2 = scale * LOG2E
    query_grads = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, FULL * BLOCK_N, BLOCK_N):
        query_grads = _query_step(
            rows, grads, start + tl.arange(0, BLOCK_N), row, key, value, key_index, key_frame,
            key_strides, value_strides,
            lse_rows, of_tile, of_queries, gain, scale2, query_grads, False, BLOCK_D, L,
        )  # fmt: skip
    for i in tl.static_range(FULL, len(TILES)):
        query_grads = _query_step(
            rows, grads, slots_of(TILES[i].first, TILES[i].width), row,
            key, value, key_index, key_frame, key_strides, value_strides,
            lse_rows, of_tile, of_queries, gain, scale2, query_grads,
            TILES[i].ragged, BLOCK_D, L,
        )  # fmt: skip
    store_rows(query_grad, out_offsets, query_grads * scale, inside, BLOCK_D, L)


@triton.jit
def _over_queries(
    keys, values, used, of_keys, row, key_grads, value_grads,
    output_grad, query, lse, delta,
    output_grad_strides, query_strides, scale2, gain,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Adds the contributions of all queries of a row to the unscaled dK and dV of a key tile."""
    for start in range(0, L.group_queries, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        inside = queries < L.group_queries
        # Rows past the last query repeat it, with a gradient of 0.
        there = tl.minimum(queries, L.group_queries - 1)
        q_offsets = query_offsets(there, row, query_strides, L)
        g_offsets = query_offsets(queries, row, output_grad_strides, L)
        rows = load_rows(query, q_offsets, there >= 0, False, BLOCK_D, L)
        grads = load_rows(output_grad, g_offsets, inside, True, BLOCK_D, L)
        in_row = row * L.group_queries + queries
        lse_rows = tl.load(lse + row * L.group_queries + there)
        of_tile = tl.load(delta + in_row, mask=inside, other=0.0)
        of_queries = query_frames(there, row, L)
        weights, slopes = _weights_and_slopes(
            product(keys, tl.trans(rows), L), product(values, tl.trans(grads), L),
            lse_rows[None, :], of_tile[None, :], used[:, None],
            of_queries[None, :], of_keys[:, None], gain, scale2, True, L,
        )  # fmt: skip
        value_grads = add_product(value_grads, weights.to(grads.dtype), grads, L)
        key_grads = add_product(key_grads, slopes.to(rows.dtype), rows, L)
    return key_grads, value_grads


@triton.jit
def bwd_key_kernel(
    output_grad, query, key, value, lse, delta, key_grad, value_grad,
    key_index, key_frame, token_order, use_start, uses,
    stride_gb, stride_gt, stride_gs, stride_gh,
    stride_qb, stride_qt, stride_qs, stride_qh,
    stride_kb, stride_kt, stride_ks, stride_kh,
    stride_vb, stride_vt, stride_vs, stride_vh,
    stride_dkb, stride_dkt, stride_dks, stride_dkh,
    stride_dvb, stride_dvt, stride_dvs, stride_dvh,
    scale, gain,
    L: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes dK and dV of a tile of keys; runs after the query kernel.

    If every slot is a different token, a tile is BLOCK_N slots of a row, followed by tiles of
    tokens that no slot names. Otherwise (rows share tokens, or repeat one) a tile is BLOCK_N tokens
    of the video, and the program loops over the rows that use any of them.
    Grid: (groups * heads * tiles of slots and of unselected tokens), or (batch * heads * tiles of
    tokens).
    """
    output_grad_strides = Strides(stride_gb, stride_gt, stride_gs, stride_gh)
    query_strides = Strides(stride_qb, stride_qt, stride_qs, stride_qh)
    key_strides = Strides(stride_kb, stride_kt, stride_ks, stride_kh)
    value_strides = Strides(stride_vb, stride_vt, stride_vs, stride_vh)
    key_grad_strides = Strides(stride_dkb, stride_dkt, stride_dks, stride_dkh)
    value_grad_strides = Strides(stride_dvb, stride_dvt, stride_dvs, stride_dvh)
    program = tl.program_id(0)
    if L.by_token:
        num_tokens: tl.constexpr = L.num_frames * L.num_tokens
        num_tiles: tl.constexpr = (num_tokens + BLOCK_N - 1) // BLOCK_N
        index = program // num_tiles
        video, head = (index // L.num_heads).to(tl.int64), (index % L.num_heads).to(tl.int64)
    else:
        key_tiles: tl.constexpr = (L.num_keys + BLOCK_N - 1) // BLOCK_N
        num_tiles: tl.constexpr = key_tiles + (L.num_unselected + BLOCK_N - 1) // BLOCK_N
        video, row, head = place(program // num_tiles, L)
    tile = program % num_tiles
    query += start_of(video, head, query_strides)
    output_grad += start_of(video, head, output_grad_strides)
    key += start_of(video, head, key_strides)
    value += start_of(video, head, value_strides)
    key_grad += start_of(video, head, key_grad_strides)
    value_grad += start_of(video, head, value_grad_strides)
    lse += lse_start(video, 0, head, L)
    delta += lse_start(video, 0, head, L)
    scale2 = scale * LOG2E
    key_grads = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    value_grads = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if L.by_token:
        lanes = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = lanes < num_tokens
        tokens = tl.load(token_order + lanes, mask=inside, other=0)
        frames, of_frame = tokens // L.num_tokens, tokens % L.num_tokens
        k_offsets = offsets_of(frames, of_frame, key_strides, L)
        v_offsets = offsets_of(frames, of_frame, value_strides, L)
        keys = load_rows(key, k_offsets, inside, True, BLOCK_D, L)
        values = load_rows(value, v_offsets, inside, True, BLOCK_D, L)
        use = tl.load(use_start + tokens, mask=inside, other=0)
        end = tl.load(use_start + tokens + 1, mask=inside, other=0)
        slots = tl.load(uses + use, mask=use < end, other=L.num_rows * L.num_keys)
        row = tl.min(slots // L.num_keys, 0)
        # Each iteration handles the lowest remaining row: the next use of every token in it.
        while row < L.num_rows:
            used = slots // L.num_keys == row
            of_keys = slots
            if L.gains:
                of_keys = tl.load(key_frame + slots, mask=used, other=-1)
                if L.group_frames == 1:
                    of_keys = gains_between(row, of_keys, gain)
            key_grads, value_grads = _over_queries(
                keys, values, used, of_keys, row, key_grads, value_grads,
                output_grad, query, lse, delta,
                output_grad_strides, query_strides, scale2, gain, BLOCK_M, BLOCK_D, L,
            )  # fmt: skip
            use += used.to(tl.int32)
            slots = tl.load(uses + use, mask=use < end, other=L.num_rows * L.num_keys)
            row = tl.min(slots // L.num_keys, 0)
        # Stores 0, not 0 * query, which may be NaN.
        named = (tl.load(use_start + tokens, mask=inside, other=0) < end)[:, None]
        key_grads = tl.where(named, key_grads, 0.0)
        value_grads = tl.where(named, value_grads, 0.0)
        k_offsets = offsets_of(frames, of_frame, key_grad_strides, L)
        v_offsets = offsets_of(frames, of_frame, value_grad_strides, L)
        store_rows(key_grad, k_offsets, key_grads * scale, inside, BLOCK_D, L)
        store_rows(value_grad, v_offsets, value_grads, inside, BLOCK_D, L)
    elif tile < key_tiles:
        slots = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keys, values, of_keys = load_keys(
            slots, row, key, value, key_index, key_frame, gain,
            key_strides, value_strides, True, BLOCK_D, L,
        )  # fmt: skip
        key_grads, value_grads = _over_queries(
            keys, values, slots < L.num_keys, of_keys, row, key_grads, value_grads,
            output_grad, query, lse, delta,
            output_grad_strides, query_strides, scale2, gain, BLOCK_M, BLOCK_D, L,
        )  # fmt: skip
        _store_keys(
            slots, row, key_grads, value_grads, scale, key_grad, value_grad, key_index,
            key_grad_strides, value_grad_strides, BLOCK_D, L,
        )  # fmt: skip
    elif L.num_unselected > 0:
        _store_zeros(
            key_grad, value_grad, (tile - key_tiles) * BLOCK_N, row,
            key_grad_strides, value_grad_strides, BLOCK_N, BLOCK_D, L,
        )  # fmt: skip
