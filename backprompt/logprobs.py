"""From logits to log-probabilities: their precision, and the logits for which they exist.

A logit of -inf is allowed: its token has probability 0 and log-probability -inf. A row with NaN or +inf, or with -inf
throughout, is not a distribution; the log-softmax of such a row would be NaN throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logprob_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-probabilities for a model in `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last axis, nats, of the same shape, in `logprob_dtype`."""
    return logits.to(logprob_dtype(logits.dtype)).log_softmax(dim=-1)


def rated(logits: Tensor, row_idx: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's log-probability, whether its row is a distribution, and whether it is its row's argmax.

    Args:
        logits: `(rows, vocab)`.
        row_idx: the row of each token, ascending, `(tokens,)`.
        token_ids: `(tokens,)`.

    Returns:
        Three tensors, each `(tokens,)`. The argmax is found in float32; of equal values, the first is the argmax.

    """
    values = logits.to(logprob_dtype(logits.dtype))
    logprobs = values.log_softmax(dim=-1)[row_idx, token_ids]
    is_usable = logprobs < math.inf  # NaN is not
    return logprobs, is_usable, first_of_largest(values.float())[row_idx] == token_ids


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the most probable token of each row, its log-probability, and its logit in float32, `(rows,)` each.

    Args:
        logits: `(rows, vocab)`. A row that is not a distribution has a logit that is not finite.

    """
    values = logits.float()
    token_ids = first_of_largest(values)
    return token_ids, log_softmax(logits).gather(1, token_ids[:, None])[:, 0], values.amax(dim=-1)


def first_of_largest(values: Tensor) -> Tensor:
    """Return `values.argmax(dim=-1)`, the index of the first of equal values.

    On the CPU numpy takes a tenth of the time that torch takes.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().argmax(axis=-1))
    return values.argmax(dim=-1)


def are_distributions(logits: Tensor) -> Tensor:
    """Return which rows of `(..., vocab)` have log-probabilities: no NaN, no +inf, and not -inf throughout."""
    return logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
