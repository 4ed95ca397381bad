"""From logits to log-probabilities: their precision, and the logits for which they exist.

A logit of -inf is allowed: its token has probability 0 and log-probability -inf. A row with NaN or +inf, or with -inf
throughout, is no distribution; the log-softmax of such a row would be NaN throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logprob_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-probabilities for a model in `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last axis, nats, of the same shape, in `logprob_dtype`."""
    return logits.to(logprob_dtype(logits.dtype)).log_softmax(dim=-1)


def rated(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of `(rows, vocab)` the log-probabilities, which rows have them, and each row's argmax in float32."""
    values = logits.to(logprob_dtype(logits.dtype))
    largest, argmax = values.max(dim=-1)  # of equal values the first; NaN where a row has one
    if values.dtype != torch.float32:
        argmax = values.float().argmax(dim=-1)
    return values.log_softmax(dim=-1), largest.isfinite(), argmax


def are_distributions(logits: Tensor) -> Tensor:
    """Return which rows of `(..., vocab)` have log-probabilities: no NaN, no +inf, and not -inf throughout."""
    return logits.amax(dim=-1).isfinite()  # the maximum of a row with NaN is NaN
