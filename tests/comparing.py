"""The results of texts, compared with the slow reference; and the number of distinct tokens of texts.

Nothing here imports the library: a text is whatever has `tokens`, `logits`, `token_logprobs` and `model_repr`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from reference import ATOL, plain_logits, token_logprobs_of


def assert_close(found: torch.Tensor, expected: torch.Tensor, atol: float | None = None) -> None:
    """The same dtype and shape, nan where the other is, and no further from it than ATOL says of the dtype."""
    atol = ATOL[found.dtype] if atol is None else atol
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=atol, equal_nan=True)


def assert_equals_plain(model: PreTrainedModel, texts: Iterable[Any], atol: float | None = None) -> None:
    """P1: logits and log-probabilities are those of the plain call on each text's ids."""
    atol = ATOL[model.dtype] if atol is None else atol
    close = {"rtol": 0, "atol": atol, "equal_nan": True}
    for text in texts:
        logits = plain_logits(model, text.tokens)
        close["msg"] = lambda gap, text=text: f"{text!r}: {gap}"
        torch.testing.assert_close(text.logits.cpu(), logits[-1], **close)
        torch.testing.assert_close(text.token_logprobs.cpu(), token_logprobs_of(logits, text.tokens), **close)
        torch.testing.assert_close(text.model_repr.all_logits().cpu(), logits, **close)


def num_distinct(texts: Iterable[Any]) -> int:
    """Distinct tokens of a forest of texts: all that must be computed of it."""
    return num_distinct_ids(text.tokens for text in texts)


def num_distinct_ids(rows: Iterable[Sequence[int]]) -> int:
    """Distinct tokens of rows of ids, in time linear in these: a token is known by its id and by the one before it."""
    numbers: dict[tuple[int, int], int] = {}
    for ids in rows:
        number = 0
        for token_id in ids:
            number = numbers.setdefault((number, token_id), len(numbers) + 1)
    return len(numbers)


def beginnings(rows: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """All non-empty beginnings of rows of ids: the distinct tokens, each named by its path."""
    return {ids[:stop] for ids in rows for stop in range(1, len(ids) + 1)}
