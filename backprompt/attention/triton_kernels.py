"""The kernels of the one-launch attention, in Triton; triton.py launches them.

Arguments that change from pass to pass are not specialised, so a model needs a handful of compilations, however many
shapes its passes have. The columns of the tables are described in tables.py and device_tables.py.
"""

# The language of kernels has no types for Python's checkers. `from __future__ import annotations` would hide
# `tl.constexpr` only from the checkers.

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer_idx", "num_blocks", "num_tokens", "num_axes", "num_heads", "window"])
def attend_kernel(
    query,  # (heads, tokens, HEAD_DIM)
    own_key,  # (kv_heads, tokens, HEAD_DIM)
    own_value,
    output,  # (tokens, heads, HEAD_DIM)
    sinks,  # (heads,)
    partial,  # (slots, axes, ROWS, HEAD_DIM)
    partial_lse,  # (slots, axes, ROWS), to the base 2
    addresses,
    positions,
    until,
    pieces,
    programs,
    query_head_stride,
    query_token_stride,
    layer_idx,
    num_blocks,
    num_tokens,
    num_axes,
    num_heads,
    window,
    scale,
    cap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # of a program; an axis is a head of keys and a part of its group
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    PROGRAM_COLUMNS: tl.constexpr,
    PIECE_COLUMNS: tl.constexpr,
    ADDRESS_COLUMNS: tl.constexpr,
):
    """Attend a tile of rows to some pieces of keys."""
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    axis = tl.program_id(0) % num_axes
    program = programs + tl.program_id(0) // num_axes * PROGRAM_COLUMNS
    first_row, last_row = tl.load(program), tl.load(program + 1)
    first_piece, last_piece, slot = tl.load(program + 2), tl.load(program + 3), tl.load(program + 4)
    kv_head = axis // parts
    lane = tl.arange(0, ROWS)
    row = first_row + lane // HEADS
    in_group = axis % parts * HEADS + lane % HEADS
    head = kv_head * GROUP + in_group
    is_live = (row < last_row) & (in_group < GROUP)
    dim = tl.arange(0, PADDED_DIM)
    key_idx = tl.arange(0, KEYS)
    is_number = is_live[:, None] & (dim[None, :] < HEAD_DIM)
    query_start = head.to(tl.int64) * query_head_stride + row.to(tl.int64) * query_token_stride
    q = tl.load(query + query_start[:, None] + dim[None, :], mask=is_number, other=0.0)
    position = tl.load(positions + row, mask=is_live, other=0)
    element: tl.constexpr = query.dtype.element_ty
    own_stride = num_tokens.to(tl.int64) * HEAD_DIM
    # Scores are to the base 2. A finite start keeps differences of infinities out.
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for idx in range(first_piece, last_piece):
        piece = pieces + idx * PIECE_COLUMNS
        block, first_key, num_keys = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
        low, high = tl.load(piece + 3), tl.load(piece + 4)
        kind = tl.load(piece + 6)
        is_own = kind == 1
        log2_times = tl.load(piece + 7).to(tl.float32, bitcast=True)
        in_block = block >= 0
        entry = addresses + (layer_idx * num_blocks + block) * ADDRESS_COLUMNS
        key_address = tl.where(in_block, tl.load(entry, mask=in_block, other=0), own_key.to(tl.int64))
        value_address = tl.where(in_block, tl.load(entry + 1, mask=in_block, other=0), own_value.to(tl.int64))
        stride = tl.where(in_block, tl.load(entry + 2, mask=in_block, other=0), own_stride)
        start = kv_head * stride + first_key.to(tl.int64) * HEAD_DIM
        keys = key_address.to(tl.pointer_type(element)) + start + key_idx[None, :] * HEAD_DIM + dim[:, None]
        values = value_address.to(tl.pointer_type(element)) + start + key_idx[:, None] * HEAD_DIM + dim[None, :]
        if IS_ALIGNED:
            keys, values = tl.multiple_of(keys, [16, 16]), tl.multiple_of(values, [16, 16])
        is_key = key_idx < num_keys
        if HEAD_DIM == PADDED_DIM:
            k = tl.load(keys, mask=is_key[None, :], other=0.0)
            v = tl.load(values, mask=is_key[:, None], other=0.0)
        else:
            k = tl.load(keys, mask=is_key[None, :] & (dim[:, None] < HEAD_DIM), other=0.0)
            v = tl.load(values, mask=is_key[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)
        scores = _dot(q, k, IS_INTERPRETED) * scale
        if HAS_SOFTCAP:
            scores = _tanh(scores) * cap
        scores += log2_times
        if kind < 2:  # else all rows see all keys
            scores = _masked(
                scores, row, position, positions, until, first_key, key_idx, is_key, is_own, low, high, piece, window,
                HAS_WINDOW,
            )  # fmt: skip
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        fading = tl.exp2(largest - new_largest)
        total = total * fading + tl.sum(weights, 1)
        summed = summed * fading[:, None]
        summed += _dot(weights.to(element), v, IS_INTERPRETED)
        largest = new_largest
    if slot >= 0:
        at = (slot.to(tl.int64) * num_axes + axis) * ROWS + lane
        safe = tl.where(total > 0, total, 1.0)
        lse = tl.where(total > 0, largest + tl.log2(safe), -float("inf"))
        tl.store(partial_lse + at, lse)
        is_stored = dim[None, :] < HEAD_DIM
        tl.store(partial + at[:, None] * HEAD_DIM + dim[None, :], summed / safe[:, None], mask=is_stored)
    else:
        if HAS_SINKS:
            sink = tl.load(sinks + head, mask=is_live, other=0.0).to(tl.float32) * 1.4426950408889634
            new_largest = tl.maximum(largest, sink)
            fading = tl.exp2(largest - new_largest)
            total = total * fading + tl.exp2(sink - new_largest)
            summed = summed * fading[:, None]
        safe = tl.where(total > 0, total, 1.0)
        at = (row.to(tl.int64) * num_heads + head) * HEAD_DIM
        tl.store(output + at[:, None] + dim[None, :], (summed / safe[:, None]).to(element), mask=is_number)


@triton.jit
def _masked(
    scores, row, position, positions, until, first_key, key_idx, is_key, is_own, low, high, piece, window,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Return scores, -inf for keys that a row does not see.

    Row r sees key k of its own segment if k <= r < until[k], and a key of another segment if low <= r < high.
    """
    key_row = first_key + key_idx
    is_own_key = is_key & is_own
    row_from = tl.where(is_own, key_row, low)
    row_until = tl.where(is_key, tl.load(until + key_row, mask=is_own_key, other=high), 0)
    is_seen = (row[:, None] >= row_from[None, :]) & (row[:, None] < row_until[None, :])
    if HAS_WINDOW:
        other_position = tl.load(piece + 5) + key_idx
        own_position = tl.load(positions + key_row, mask=is_own_key, other=0)
        key_position = tl.where(is_own, own_position, other_position)
        is_seen = is_seen & (position[:, None] - key_position[None, :] < window)
    return tl.where(is_seen, scores, -float("inf"))


@triton.jit
def _dot(a, b, IS_INTERPRETED: tl.constexpr):
    """Return a product; the interpreter cannot multiply in bfloat16."""
    if IS_INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tanh(x):
    """Return the hyperbolic tangent, exact to the last bits of float32: a series where the quotient would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    size = tl.abs(x)
    small = tl.exp2(size * -2.8853900817779268)
    quotient = (1.0 - small) / (1.0 + small)
    return tl.where(size < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit(do_not_specialize=["num_axes", "num_heads"])
def join_kernel(
    output,
    sinks,
    partial,
    partial_lse,
    joins,
    num_axes,
    num_heads,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    JOIN_COLUMNS: tl.constexpr,
):
    """Join the partial results of a tile."""
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    axis = tl.program_id(0) % num_axes
    join = joins + tl.program_id(0) // num_axes * JOIN_COLUMNS
    first_row, last_row, first_slot, last_slot = tl.load(join), tl.load(join + 1), tl.load(join + 2), tl.load(join + 3)
    lane = tl.arange(0, ROWS)
    row = first_row + lane // HEADS
    in_group = axis % parts * HEADS + lane % HEADS
    head = axis // parts * GROUP + in_group
    is_live = (row < last_row) & (in_group < GROUP)
    dim = tl.arange(0, PADDED_DIM)
    is_number = is_live[:, None] & (dim[None, :] < HEAD_DIM)
    largest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    at = (first_slot.to(tl.int64) * num_axes + axis) * ROWS + lane
    for _ in range(first_slot, last_slot):
        lse = tl.load(partial_lse + at)
        part = tl.load(partial + at[:, None] * HEAD_DIM + dim[None, :], mask=is_number, other=0.0)
        new_largest = tl.maximum(largest, lse)
        fading, weight = tl.exp2(largest - new_largest), tl.exp2(lse - new_largest)
        total = total * fading + weight
        summed = summed * fading[:, None] + part * weight[:, None]
        largest = new_largest
        at += num_axes * ROWS
    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_live, other=0.0).to(tl.float32) * 1.4426950408889634
        new_largest = tl.maximum(largest, sink)
        fading = tl.exp2(largest - new_largest)
        total = total * fading + tl.exp2(sink - new_largest)
        summed = summed * fading[:, None]
    safe = tl.where(total > 0, total, 1.0)
    at = (row.to(tl.int64) * num_heads + head) * HEAD_DIM
    tl.store(output + at[:, None] + dim[None, :], (summed / safe[:, None]).to(output.dtype.element_ty), mask=is_number)


@triton.jit(do_not_specialize=["num_tokens"])
def copy_kernel(
    query,  # (HEADS, tokens, HEAD_DIM)
    key,  # (KV_HEADS, tokens, HEAD_DIM)
    value,
    key_copy,
    value_copy,
    flag,
    query_head_stride,
    query_token_stride,
    key_head_stride,
    key_token_stride,
    value_head_stride,
    value_token_stride,
    num_tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Copy some tokens of a head of keys or of values; set the flag if a query or a key is not finite."""
    axes: tl.constexpr = HEADS + 2 * KV_HEADS
    axis = tl.program_id(0) % axes
    token = (tl.program_id(0) // axes * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    is_number = (token < num_tokens) & (dim < HEAD_DIM)
    if axis < HEADS:
        _check(
            tl.load(query + axis.to(tl.int64) * query_head_stride + token * query_token_stride + dim, is_number, 0.0),
            flag,
        )
    elif axis < HEADS + KV_HEADS:
        head = (axis - HEADS).to(tl.int64)
        numbers = tl.load(key + head * key_head_stride + token * key_token_stride + dim, is_number, 0.0)
        tl.store(key_copy + (head * num_tokens + token) * HEAD_DIM + dim, numbers, is_number)
        _check(numbers, flag)
    else:
        head = (axis - HEADS - KV_HEADS).to(tl.int64)
        numbers = tl.load(value + head * value_head_stride + token * value_token_stride + dim, is_number, 0.0)
        tl.store(value_copy + (head * num_tokens + token) * HEAD_DIM + dim, numbers, is_number)


@triton.jit
def _check(numbers, flag):
    """Set the flag if a number is NaN or infinite. Programs that race store the same."""
    is_finite = tl.abs(numbers.to(tl.float32)) < float("inf")
    if tl.min(is_finite.to(tl.int32)) == 0:
        tl.store(flag, 1)
