"""Rating: the log-probabilities of given tokens by rows of logits, and whether each token is its row's argmax.

On CUDA a kernel in Triton reads each logit once, where Triton is installed and the kernel agrees with torch's functions
(rating_triton.py). Elsewhere, and in float64, torch's functions read the logits a few times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.evaluation.scores import TokenScores
from backprompt.logprobs import rated
from backprompt.transfers import on_device

Ints: TypeAlias = "npt.NDArray[np.int64]"

LOG_SOFTMAX_BYTES = 4 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rated:
    """The scores of tokens, and whether the row behind each score is a distribution, `(tokens,)`, on the device."""

    scores: TokenScores
    is_usable: Tensor

    @classmethod
    def concatenated(cls, parts: Sequence[Rated]) -> Rated:
        """Return the tokens of all parts, one part behind the other."""
        if len(parts) == 1:
            return parts[0]
        scores = TokenScores.concatenated([part.scores for part in parts])
        return cls(scores, torch.cat([part.is_usable for part in parts]))

    def on_host(self) -> npt.NDArray[Any]:
        """Return log-probabilities, `is_argmax` and `is_usable` as numbers, `(3, tokens)`; the host waits once."""
        logprobs = self.scores.logprobs
        columns = [logprobs, self.scores.is_argmax.to(logprobs.dtype), self.is_usable.to(logprobs.dtype)]
        found: npt.NDArray[Any] = torch.stack(columns).cpu().numpy()
        return found


Rate: TypeAlias = "Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]"
"""Returns the log-probabilities of tokens, whether each is the argmax of its row, and whether each row is usable.

The arguments are logits, `(rows, vocab)`, and the row and the id of each token, `(tokens,)` each, all on one device.
"""


def rated_tokens(logits: Tensor, row_idx: Ints, token_ids: Ints) -> Rated:
    """Return, for each token, `log_softmax(logits)[row_idx, token_id]`, and whether it is its row's argmax in float32.

    The tokens are sorted by their rows. The CPU takes a few rows at a time: rows that fit the cache take a fifth of the
    time that all rows at once take.
    """
    rate = rate_for(logits.device.type, logits.dtype, is_aligned=logits.shape[1] % 16 == 0)
    is_cpu = logits.device.type == "cpu"
    num_rows = max(1, LOG_SOFTMAX_BYTES // (4 * logits.shape[1])) if is_cpu else logits.shape[0]
    starts = range(0, logits.shape[0], num_rows)
    bounds = np.searchsorted(row_idx, [*starts, logits.shape[0]]).tolist()
    rows, tokens = on_device(np.stack([row_idx % num_rows, token_ids]), logits.device)
    found = []
    for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
        own = rate(logits[start : start + num_rows], rows[first:last], tokens[first:last])
        found.append(Rated(TokenScores(*own[:2]), own[2]))
    return Rated.concatenated(found)


def rate_by_torch(logits: Tensor, rows: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `Rate`."""
    logprobs, is_usable, is_argmax = rated(logits, rows, token_ids)
    return logprobs, is_argmax, is_usable


@lru_cache(maxsize=16)
def rate_for(device_type: str, dtype: torch.dtype, *, is_aligned: bool) -> Rate:
    """Return the way of rating for a type of devices and a dtype of logits.

    `is_aligned`: whether the number of columns is a multiple of 16. The kernel is compiled and compared for each case.
    """
    if device_type != "cuda" or dtype == torch.float64:
        return rate_by_torch
    try:
        kernel = import_module("backprompt.evaluation.rating_triton")
    except ImportError as error:
        logger.info("Tokens are rated by torch: no triton: %s", error)
        return rate_by_torch
    reason = kernel.reason_against(torch.device(device_type), dtype, is_aligned)
    if reason is None:
        chosen: Rate = kernel.rate
        return chosen
    logger.info("Tokens are rated by torch: %s", reason)
    return rate_by_torch
