"""Results of the output head for wanted tokens, with gradients, a slice of rows at a time.

Logits beyond `HELD_BYTES` are not held until the backward: the backward computes their slices again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.logprobs import logprob_dtype
from backprompt.transfers import on_device

Ints: TypeAlias = "npt.NDArray[np.int64]"

SLICE_BYTES = 64 << 20
"""The size of a slice of logits, in float32."""

HELD_BYTES = 256 << 20
"""The size of the logits that are held until the backward, in float32: as many as a small batch has."""


@dataclass(frozen=True)
class Wanted:
    """Tokens, and the rows that predict them.

    Attributes:
        row_of: the row that predicts each token, `(tokens,)`.
        token_ids: the ids of the tokens, `(tokens,)`.
        asked: the results that are read for each token.

    """

    row_of: Ints
    token_ids: Ints
    asked: Asked


class _Slice(NamedTuple):
    """The results of a slice of rows: `(pairs,)`, `(rows,)`, `(rows, k)`; None for results that are not requested."""

    logprobs: Tensor
    entropies: Tensor | None
    top_logprobs: Tensor | None
    top_ids: Tensor | None


def read_distributions(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, vocab_size: int, wanted: Wanted
) -> Distributions:
    """Return the requested results for wanted tokens; each distinct pair of a row and a token is read once.

    Args:
        logits_of: the head, `(rows, hidden)` -> `(rows, vocab)`.
        hidden: the rows that predict the tokens, `(rows, hidden)`.
        vocab_size: the number of logits of a row.
        wanted: the tokens.

    """
    pairs, numbers = _pairs(wanted, vocab_size)
    slice_rows = max(1, SLICE_BYTES // (4 * vocab_size))
    found = []
    for first in range(0, max(len(hidden), 1), slice_rows):
        rows = hidden[first : first + slice_rows]
        start, stop = np.searchsorted(pairs[0], (first, first + len(rows)))
        own = on_device(pairs[:, start:stop] - [[first], [0]], hidden.device)
        if first * 4 * vocab_size < HELD_BYTES:
            found.append(_read(logits_of, rows, own, wanted.asked))
        else:
            recomputed = (logits_of, rows, own, wanted.asked)
            found.append(checkpoint(_read, *recomputed, use_reentrant=False, preserve_rng_state=False))
    logprobs = torch.cat([part.logprobs for part in found])[on_device(numbers, hidden.device)]
    row_of = on_device(wanted.row_of, hidden.device)

    def by_token(parts: list[Tensor | None]) -> Tensor | None:
        there = [part for part in parts if part is not None]
        return torch.cat(there)[row_of] if there else None

    return Distributions(
        logprobs[:, 0],
        by_token([part.entropies for part in found]),
        by_token([part.top_logprobs for part in found]),
        by_token([part.top_ids for part in found]),
        None if wanted.asked.given is None else logprobs[:, 1:],
    )


def _pairs(wanted: Wanted, vocab_size: int) -> tuple[Ints, Ints]:
    """Return the distinct pairs of a row and a token, sorted, `(2, pairs)`, and the index of each token's pairs.

    The index is `(tokens, 1 + k)`: the pair of the token itself, and the pairs of the tokens given in its place.
    """
    ids = wanted.token_ids[:, None]
    if wanted.asked.given is not None:
        ids = np.concatenate([ids, wanted.asked.given.cpu().numpy()], axis=1)
    distinct, numbers = np.unique(wanted.row_of[:, None] * vocab_size + ids, return_inverse=True)
    return np.stack(np.divmod(distinct, vocab_size)), numbers.reshape(ids.shape)


def _read(logits_of: Callable[[Tensor], Tensor], rows: Tensor, pairs: Tensor, asked: Asked) -> _Slice:
    logits = logits_of(rows)
    values = logits.to(logprob_dtype(logits.dtype))
    if asked.temperature != 1:
        values = values / asked.temperature
    log_sums = values.logsumexp(dim=-1)  # (rows,)
    row_idx, token_ids = pairs
    logprobs = values[row_idx, token_ids] - log_sums[row_idx]
    entropies = top_logprobs = top_ids = None
    if asked.entropy:
        # A token of probability 0 adds 0, and not 0 * -inf.
        least = torch.finfo(values.dtype).min
        entropies = log_sums - (values.softmax(dim=-1) * values.clamp_min(least)).sum(dim=-1)
    if asked.top_k is not None:
        top_values, top_ids = values.topk(asked.top_k, dim=-1)
        top_logprobs = top_values - log_sums[:, None]
    return _Slice(logprobs, entropies, top_logprobs, top_ids)
