"""The kernels of fused.py, in Triton: a norm, a gate and a rotation, each in one launch.

Numbers are rounded where transformers' code rounds them: computed in float32, and cast to the dtype of the rows after
each of its steps.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    rows,  # (rows, SIZE)
    weight,
    output,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    CASTS_FIRST: tl.constexpr,
):
    """Divide rows by their root mean square, and multiply them by the weight or by 1 + the weight."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    idx = tl.arange(0, PADDED_SIZE)[None, :]
    is_number = (row < num_rows) & (idx < SIZE)
    given = tl.load(rows + row * SIZE + idx, is_number, 0.0)
    numbers = given.to(tl.float32)
    factors = tl.load(weight + idx, idx < SIZE, 0.0).to(tl.float32)
    if ADDS_ONE:
        factors += 1.0
    mean = tl.sum(numbers * numbers, 1) / SIZE
    normed = numbers * tl.rsqrt(mean + eps)[:, None]
    if CASTS_FIRST:
        normed = normed.to(given.dtype).to(tl.float32)
    tl.store(output + row * SIZE + idx, (normed * factors).to(given.dtype), is_number)


@triton.jit(do_not_specialize=["num_numbers"])
def gate_kernel(gates, numbers, output, num_numbers, SIZE: tl.constexpr):
    """Multiply numbers by the SiLU of gates."""
    idx = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    is_number = idx < num_numbers
    given = tl.load(gates + idx, is_number, 0.0)
    gate = given.to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(given.dtype).to(tl.float32)
    product = gate * tl.load(numbers + idx, is_number, 0.0).to(tl.float32)
    tl.store(output + idx, product.to(given.dtype), is_number)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    query,  # (HEADS, tokens, 2 HALF)
    key,  # (KV_HEADS, tokens, 2 HALF)
    cos,  # (tokens, 2 HALF)
    sin,
    query_output,
    key_output,
    query_head_stride,
    query_token_stride,
    key_head_stride,
    key_token_stride,
    num_tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Rotate some tokens of a head of queries or of keys: each number is paired with one of the other half."""
    axis = tl.program_id(0) % (HEADS + KV_HEADS)
    token = (tl.program_id(0) // (HEADS + KV_HEADS) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    dim = tl.arange(0, PADDED_HALF)[None, :]
    is_number = (token < num_tokens) & (dim < HALF)
    if axis < HEADS:
        head = axis.to(tl.int64)
        source = query + head * query_head_stride + token * query_token_stride + dim
        target = query_output + (head * num_tokens + token) * 2 * HALF + dim
    else:
        head = (axis - HEADS).to(tl.int64)
        source = key + head * key_head_stride + token * key_token_stride + dim
        target = key_output + (head * num_tokens + token) * 2 * HALF + dim
    angle = token * 2 * HALF + dim
    first, second = tl.load(source, is_number, 0.0), tl.load(source + HALF, is_number, 0.0)
    rotated = _sum_of_products(
        first, tl.load(cos + angle, is_number, 0.0), -second, tl.load(sin + angle, is_number, 0.0)
    )
    tl.store(target, rotated, is_number)
    rotated = _sum_of_products(
        second, tl.load(cos + angle + HALF, is_number, 0.0), first, tl.load(sin + angle + HALF, is_number, 0.0)
    )
    tl.store(target + HALF, rotated, is_number)


@triton.jit
def _sum_of_products(a, b, c, d):
    """Return a * b + c * d, rounded after each step."""
    element: tl.constexpr = a.dtype
    left = (a.to(tl.float32) * b.to(tl.float32)).to(element).to(tl.float32)
    right = (c.to(tl.float32) * d.to(tl.float32)).to(element).to(tl.float32)
    return (left + right).to(element)
