"""Processors of transformers on the CPU: the same scores to the bit, in a fraction of the time.

Top-k needs the k-th largest score of a row, and top-p the sorted scores of a row. numpy finds these with vector
instructions, several times as fast as `topk` and `sort` of torch. The tokens' own order matters only among equal
scores. The shares of the sorted scores are computed by the torch functions that transformers calls, from the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.generation import logits_process as kinds

Scores: TypeAlias = "npt.NDArray[Any]"
"""Scores, `(rows, vocab)`."""

Places: TypeAlias = "npt.NDArray[np.int64]"
"""Indices of scores, counted through all rows, in rising order."""

MAX_SHARE_SORTED_ALONE = 1 / 8
"""The largest share of chosen scores for which only the chosen scores are sorted."""


def quickly_processed(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores as a processor changes them, `(rows, vocab)`; the given tensor may be changed, too."""
    quick = _QUICK.get(type(processor))
    if quick is None or scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        found: Tensor = processor(ids, scores)
        return found
    return quick(processor, ids, scores)


def _top_k(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    if not bool(scores.amax(dim=-1).isfinite().all()):  # nan is neither more nor less than a score
        found: Tensor = processor(ids, scores)
        return found
    numbers, k = scores.numpy(), min(processor.top_k, scores.shape[1])
    large = _few_with_k_largest(numbers, k)
    largest = np.partition(numbers, -k, axis=-1) if large is None else _sorted_alone(numbers, large)
    return _not_below(scores, largest[:, -k, None], processor.filter_value, large)


def _top_p(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    numbers = scores.numpy()
    possible = few(numbers != -np.inf)
    ascending = torch.from_numpy(in_rising_order(numbers, possible))
    if not bool(ascending[:, -1].isfinite().all()):
        found: Tensor = processor(ids, scores)
        return found
    impossible = ascending.new_full((len(ascending), 1), -torch.inf)
    num_impossible = int(torch.searchsorted(ascending, impossible, right=True).min())
    shares = ascending.softmax(dim=-1)[:, num_impossible:].cumsum(dim=-1)  # from the left, so zeros may be left out
    allowed = shares.new_full((len(shares), 1), 1 - processor.top_p)
    num_removed = torch.searchsorted(shares, allowed, right=True) + num_impossible
    num_removed.clamp_(max=max(0, scores.shape[1] - processor.min_tokens_to_keep))
    border = ascending.gather(1, num_removed)
    among = possible if processor.filter_value == -np.inf else None
    kept = _not_below(scores, border.numpy(), processor.filter_value, among)
    is_tied = (num_removed > 0) & (border == ascending.gather(1, (num_removed - 1).clamp_(min=0)))
    if bool(is_tied.any()):  # only some of equal scores are kept, chosen by the order of torch's sort
        tied = is_tied[:, 0].nonzero()[:, 0]
        kept[tied] = processor(ids, scores[tied])
    return kept


def _few_with_k_largest(scores: Scores, k: int) -> Places | None:
    """Return a few places that have the k largest scores of each row; None if there are many; no score may be NaN.

    The scores are divided into groups. The k-th largest of the groups' maxima is a lower bound of the k-th largest
    score.
    """
    num_groups = 4 * k
    num_grouped = scores.shape[1] // num_groups * num_groups
    if not num_grouped:
        return None
    maxima = scores[:, :num_grouped].reshape(len(scores), -1, num_groups).max(axis=1)
    return few(scores >= np.partition(maxima, -k, axis=-1)[:, -k, None])


def in_rising_order(scores: Scores, possible: Places | None) -> Scores:
    """Return the scores of each row in rising order; `possible`: the places of scores above -inf, if these are few."""
    if possible is None:
        return np.sort(scores, axis=-1)
    alone = _sorted_alone(scores, possible)
    ascending = np.full_like(scores, -np.inf)
    ascending[:, scores.shape[1] - alone.shape[1] :] = alone
    return ascending


def few(are_chosen: npt.NDArray[np.bool_]) -> Places | None:
    """Return the places of chosen scores, `(rows, vocab)`, if these are few, else None."""
    are_few = np.count_nonzero(are_chosen) <= MAX_SHARE_SORTED_ALONE * are_chosen.size
    return np.flatnonzero(are_chosen) if are_few else None


def _sorted_alone(scores: Scores, places: Places) -> Scores:
    """Return the scores of each row at these places in rising order; rows with fewer than others begin with -inf."""
    num_rows, vocab = scores.shape
    starts = np.searchsorted(places, np.arange(num_rows + 1) * vocab)
    nums = np.diff(starts)
    found = np.full((num_rows, nums.max()), -np.inf, dtype=scores.dtype)
    found[places // vocab, np.arange(len(places)) - np.repeat(starts[:-1], nums)] = scores.take(places)
    found.sort(axis=-1)
    return found


def _without_ends(processor: Any, _: Tensor, scores: Tensor) -> Tensor:
    """Exclude the tokens that end a text."""
    ends = processor.eos_token_id.numpy()
    scores.numpy()[:, ends[(ends >= 0) & (ends < scores.shape[1])]] = -np.inf
    return scores


def _min_length(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    return _without_ends(processor, ids, scores) if ids.shape[1] < processor.min_length else scores


def _min_new_tokens(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    num_new = ids.shape[1] - processor.prompt_length_to_skip
    return _without_ends(processor, ids, scores) if num_new < processor.min_new_tokens else scores


def _not_below(scores: Tensor, borders: Scores, filter_value: float, among: Places | None) -> Tensor:
    """Return scores with `filter_value` for all scores below the border of their row, `(rows, 1)`.

    `among`: places that have all scores not below the borders, if there are few; else None.
    """
    found, numbers = torch.full_like(scores, filter_value), scores.numpy()
    if among is None:
        kept = np.flatnonzero(numbers >= borders)  # a mask of all tokens takes twice as long
    else:
        kept = among[numbers.take(among) >= borders.take(among // scores.shape[1])]
    np.put(found.numpy(), kept, numbers.take(kept))
    return found


_QUICK: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    kinds.MinLengthLogitsProcessor: _min_length,
    kinds.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    kinds.TopKLogitsWarper: _top_k,
    kinds.TopPLogitsWarper: _top_p,
}
