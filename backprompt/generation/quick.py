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

MAX_SHARE_SORTED_ALONE = 1 / 8
"""The largest share of chosen scores for which only the chosen scores are sorted."""


def quickly_processed(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores as a processor changes them, `(rows, vocab)`; the given tensor may be changed, too."""
    quick = _QUICK.get(type(processor))
    if quick is None or scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
        found: Tensor = processor(ids, scores)
        return found
    return quick(processor, ids, scores)


def first_of_largest(scores: Tensor) -> Tensor:
    """Return `scores.argmax(dim=-1)`, the index of the first of equal scores."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def _top_k(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    if not bool(scores.amax(dim=-1).isfinite().all()):  # nan is neither more nor less than a score
        found: Tensor = processor(ids, scores)
        return found
    borders = _kth_largest(scores.numpy(), min(processor.top_k, scores.shape[1]))
    return _not_below(scores, torch.from_numpy(borders), processor.filter_value)


def _top_p(processor: Any, ids: Tensor, scores: Tensor) -> Tensor:
    ascending = torch.from_numpy(in_rising_order(scores.numpy()))
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
    kept = _not_below(scores, border, processor.filter_value)
    is_tied = (num_removed > 0) & (border == ascending.gather(1, (num_removed - 1).clamp_(min=0)))
    if bool(is_tied.any()):  # only some of equal scores are kept, chosen by the order of torch's sort
        tied = is_tied[:, 0].nonzero()[:, 0]
        kept[tied] = processor(ids, scores[tied])
    return kept


def _kth_largest(scores: Scores, k: int) -> Scores:
    """Return the k-th largest score of each row, `(rows, 1)`; no score may be NaN.

    The scores are divided into groups. The k-th largest of the groups' maxima is a lower bound, and only the few scores
    from this bound up are sorted.
    """
    num_groups = 4 * k
    num_grouped = scores.shape[1] // num_groups * num_groups
    if num_grouped:
        maxima = scores[:, :num_grouped].reshape(len(scores), -1, num_groups).max(axis=1)
        is_large = scores >= np.partition(maxima, -k, axis=-1)[:, -k, None]
        if _are_few(is_large):
            return _sorted_alone(scores, is_large)[:, -k, None]
    return np.partition(scores, -k, axis=-1)[:, -k, None]


def in_rising_order(scores: Scores) -> Scores:
    """Return the scores of each row in rising order; after top-k most are -inf, and only the others are sorted."""
    is_possible = scores != -np.inf
    if not _are_few(is_possible):
        return np.sort(scores, axis=-1)
    possible = _sorted_alone(scores, is_possible)
    ascending = np.full_like(scores, -np.inf)
    ascending[:, scores.shape[1] - possible.shape[1] :] = possible
    return ascending


def _are_few(are_chosen: npt.NDArray[np.bool_]) -> bool:
    return bool(np.count_nonzero(are_chosen) <= MAX_SHARE_SORTED_ALONE * are_chosen.size)


def _sorted_alone(scores: Scores, are_chosen: npt.NDArray[np.bool_]) -> Scores:
    """Return the chosen scores of each row in rising order; rows with fewer than others begin with -inf."""
    num_rows, vocab = scores.shape
    places = np.flatnonzero(are_chosen)
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


def _not_below(scores: Tensor, borders: Tensor, filter_value: float) -> Tensor:
    """Return scores with `filter_value` for all scores below the border of their row, `(rows, 1)`."""
    found = torch.full_like(scores, filter_value)
    kept = np.flatnonzero(scores.numpy() >= borders.numpy())  # a mask of all tokens takes twice as long
    np.put(found.numpy(), kept, scores.numpy().take(kept))
    return found


_QUICK: dict[type, Callable[[Any, Tensor, Tensor], Tensor]] = {
    kinds.MinLengthLogitsProcessor: _min_length,
    kinds.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    kinds.TopKLogitsWarper: _top_k,
    kinds.TopPLogitsWarper: _top_p,
}
