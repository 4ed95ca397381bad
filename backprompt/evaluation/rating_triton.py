"""Rating with a kernel in Triton: each logit is read once, and a token's score follows from the results for its row.

Torch's functions read a logit in half precision about nine times: the conversion to float32, the maximum, and the
log-softmax, which is written too. Here the sums are float32 as well, so the results differ by rounding alone: measured
with the interpreter up to 0.8 units in the last place from float64's, where torch's are up to 4.6.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from backprompt.attention.launches import Launcher
from backprompt.evaluation.rating_kernels import rows_kernel, tokens_kernel
from backprompt.logprobs import rated

COLUMNS = 4096
"""The number of logits of a row that a program reads at a time."""

TOKENS = 256

TOLERANCE = 4
"""The allowed distance from log-probabilities in float64, in float32's units in the last place, at least that of 1."""


def rate(logits: Tensor, rows: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, and whether each token is its row's argmax and rated by a distribution; see `Rate`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (num_rows, num_columns), num_tokens, device = logits.shape, len(rows), logits.device
    largest, log_total = torch.empty((2, num_rows), dtype=torch.float32, device=device)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_tokens, dtype=torch.float32, device=device)
    is_argmax, is_usable = torch.empty((2, num_tokens), dtype=torch.bool, device=device)
    of_rows, of_tokens = launchers(device, logits.dtype)
    of_rows.launch(num_rows, (logits, largest, log_total, argmax), (num_columns, logits.stride(0)))
    found = logprobs, is_argmax, is_usable
    tensors = logits, largest, log_total, argmax, rows, token_ids, *found
    of_tokens.launch(-(-num_tokens // TOKENS), tensors, (logits.stride(0),), (num_tokens,))
    return found


@lru_cache(maxsize=64)
def launchers(device: torch.device, dtype: torch.dtype) -> tuple[Launcher, Launcher]:
    """Return the launchers of the kernel for rows and of that for tokens."""
    of_rows = Launcher(rows_kernel, {"COLUMNS": COLUMNS}, {"num_warps": 8})
    return of_rows, Launcher(tokens_kernel, {"TOKENS": TOKENS}, {})


def reason_against(device: torch.device, dtype: torch.dtype, is_aligned: bool) -> str | None:
    """Return the reason why the kernel is not used; None if the kernel agrees with torch on a tiny case."""
    try:
        gap = _largest_gap(device, dtype, 2 * COLUMNS + (80 if is_aligned else 77))
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # a compiler runs, and fails in ways of its own
        return f"triton failed: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return None if gap <= TOLERANCE else f"triton was off by {gap:.1f} units in the last place"


def _largest_gap(device: torch.device, dtype: torch.dtype, num_columns: int) -> float:
    """Return the largest gap in units of the last place; infinity if a flag differs.

    The case has rows with ties, with -inf, with NaN, with +inf, and of -inf throughout. Its columns are two blocks and
    a part of a third.
    """
    drawn = torch.randn((7, num_columns), generator=torch.Generator().manual_seed(0)) * 3
    drawn[1, 5000] = drawn[1, 70] = drawn[1, 4166] = 20.0
    drawn[2, 100:9000:3] = -torch.inf
    drawn[3, 8000] = torch.nan
    drawn[4, 4500] = torch.inf
    drawn[5] = -torch.inf
    drawn[6] = drawn[6].mul(300)
    logits = drawn.to(device, dtype)
    token_ids = torch.tensor([0, 70, 5000, 100, 101, 4500, num_columns - 1], device=device).repeat(7)
    rows = torch.arange(7, device=device).repeat_interleave(7)
    logprobs, is_argmax, is_usable = rate(logits, rows, token_ids)
    _, expected_usable, expected_argmax = rated(logits, rows, token_ids)
    if not torch.equal(is_usable, expected_usable):
        return float("inf")
    own = logprobs[is_usable].double()
    expected = logits.double().log_softmax(dim=-1)[rows, token_ids][is_usable]
    if not torch.equal(is_argmax[is_usable], expected_argmax[is_usable]):
        return float("inf")
    unit = torch.finfo(torch.float32).eps * expected.abs().clamp(min=1.0)
    gaps = torch.where(own == expected, 0.0, (own - expected).abs() / unit)  # -inf equals -inf
    return float(gaps.max().nan_to_num(nan=torch.inf))
