"""The kernels that rate tokens, in Triton; rating_triton.py launches them.

The first kernel reads each logit once. A lane of a block keeps results for its columns; the lanes of a row are joined
at the row's end. The kernels are specialised only on sizes of rows and on alignments, which are the same for all logits
of a model. So a model needs one compilation of each kernel.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["largest_of", "log_total_of", "argmax_of"])
def rows_kernel(
    logits,  # (rows, columns)
    largest_of,  # (rows,), float32: the maximum
    log_total_of,  # (rows,), float32: log(sum(exp(logits - maximum))); NaN where a logit is NaN
    argmax_of,  # (rows,), int64: of equal maxima the first
    num_columns,
    row_stride,
    COLUMNS: tl.constexpr,
):
    """Read a row of logits."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, COLUMNS)
    start = logits + row * row_stride
    largest = tl.full([COLUMNS], -float("inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    argmax = lane
    for first in range(0, num_columns, COLUMNS):
        column = first + lane
        value = tl.load(start + column, mask=column < num_columns, other=-float("inf")).to(tl.float32)
        # One exponential a logit: of the smaller of two, relative to the larger. Equal infinities differ by nothing.
        fading = tl.exp(tl.where(value == largest, 0.0, -tl.abs(value - largest)))
        is_larger = value > largest
        total = tl.where(is_larger, total * fading + 1.0, total + fading)
        argmax = tl.where(is_larger, column, argmax)
        largest = tl.where(is_larger, value, largest)
    row_largest = tl.max(largest, 0)
    total = total * tl.exp(tl.where(largest == row_largest, 0.0, largest - row_largest))
    tl.store(largest_of + row, row_largest)
    tl.store(log_total_of + row, tl.log(tl.sum(total, 0)))
    tl.store(argmax_of + row, tl.min(tl.where(largest == row_largest, argmax, 2147483647), 0).to(tl.int64))


@triton.jit(
    do_not_specialize=[
        "largest_of",
        "log_total_of",
        "argmax_of",
        "rows",
        "token_ids",
        "logprobs",
        "is_argmax",
        "is_usable",
        "num_tokens",
    ]
)
def tokens_kernel(
    logits,
    largest_of,
    log_total_of,
    argmax_of,
    rows,  # (tokens,), int64: the row that rates each
    token_ids,  # (tokens,), int64
    logprobs,  # (tokens,), float32
    is_argmax,  # (tokens,), bool
    is_usable,  # (tokens,), bool
    row_stride,
    num_tokens,
    TOKENS: tl.constexpr,
):
    """Rate tokens by the results for their rows."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_there = token < num_tokens
    row = tl.load(rows + token, mask=is_there, other=0)
    token_id = tl.load(token_ids + token, mask=is_there, other=0)
    value = tl.load(logits + row * row_stride + token_id, mask=is_there, other=0.0).to(tl.float32)
    largest = tl.load(largest_of + row, mask=is_there, other=0.0)
    log_total = tl.load(log_total_of + row, mask=is_there, other=0.0)
    tl.store(logprobs + token, value - largest - log_total, mask=is_there)
    tl.store(is_argmax + token, tl.load(argmax_of + row, mask=is_there, other=0) == token_id, mask=is_there)
    # No maximum of infinity, and no NaN.
    is_finite = (tl.abs(largest) < float("inf")) & (log_total == log_total)
    tl.store(is_usable + token, is_finite, mask=is_there)
