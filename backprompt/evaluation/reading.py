"""A reading: the scores of held texts' tokens, where each lies, and which of them are not there yet.

Keeps flat lists for all texts of a call. A score is known by a number: that of the row in which a forwarded token's
score lies (predictions.py), or a negative one for a candidate, whose score lies in the reading itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from backprompt.evaluation.pools import CandidatePool
from backprompt.evaluation.predictions import Ints, NumberedRows, Predictions, held_child, ranges
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.forest import Forest
from backprompt.forest.span import Inserted, Span
from backprompt.tokens.graph import TokenGraph

_NOT_YET = TokenScore(float("nan"), False)


class Ready(NamedTuple):
    """A text whose states are held, and what of it is scored: tokens from `start` on, and tokens that may follow."""

    text: Inserted
    start: int
    candidates: Sequence[int] = ()


class Reading:
    """Reads scores of held texts.

    Args:
        forest: of the texts' spans.
        pool: of candidates that were scored before.

    Attributes:
        rows: those in which scores of forwarded tokens lie.

    """

    def __init__(self, forest: Forest, pool: CandidatePool) -> None:
        self._forest = forest
        self._pool = pool
        self.rows = NumberedRows()
        self._starts: list[int] = []  # runs of numbers, one text behind the other
        self._stops: list[int] = []
        self._first_rows: dict[Span, int] = {}  # of each span that holds wanted tokens, the first of them
        self._candidates: dict[tuple[Span, int], int] = {}  # their numbers
        self._held: list[tuple[Span, int]] = []  # candidates that were forwarded: what they follow, their number
        self._missing: dict[int, tuple[Span, int]] = {}  # candidates to be scored, by their number
        self._values: list[TokenScore] = []  # of the candidates -1, -2, ...

    def add(self, text: Ready) -> int:
        """Add a text; return how many scores are read of it."""
        num_scores = len(text.candidates)
        for span, first_row in spans_from(self._forest, text.text, text.start):
            first, num_tokens = self.rows.first_of(span), len(span.token_ids)
            self._starts.append(first + first_row)
            self._stops.append(first + num_tokens)
            self._want(span, first_row)
            num_scores += num_tokens - first_row
        for token_id in text.candidates:
            number = self._number_of(text.text.end, token_id)
            self._starts.append(number)
            self._stops.append(number + 1)
        return num_scores

    def add_ahead(self, text: Inserted) -> None:
        """Let a text be scored without being read."""
        for span, _ in spans_from(self._forest, text, 0):
            self._want(span, 0)

    def predictions(self) -> Predictions:
        """Return what must be computed; scores that are known elsewhere are written to their rows."""
        predictions = Predictions(self.rows)
        self._add_spans(predictions)
        for end, number in self._held:
            predictions.add_first(end, number)
        for number, (end, token_id) in self._missing.items():
            predictions.add_candidate(end, token_id, number)
        return predictions

    def write(self, numbers: Ints, scores: TokenScores, on_host: npt.NDArray[Any]) -> None:
        """Write computed scores to where they are held, those of candidates into the pool as well.

        `on_host`: the log-probabilities and `is_argmax` of the scores, in the host's memory.
        """
        self.rows.write(numbers, scores)
        is_candidate = numbers < 0
        logprobs, is_argmax = on_host[:, is_candidate]
        by_end: dict[Span, dict[int, TokenScore]] = {}
        values = map(TokenScore, logprobs.tolist(), is_argmax.astype(np.bool_).tolist())
        for number, score in zip(numbers[is_candidate].tolist(), values, strict=True):
            end, token_id = self._missing[number]
            self._values[-1 - number] = score
            by_end.setdefault(end, {})[token_id] = score
        for end, own in by_end.items():
            self._pool.put(end, own)

    def scores(self, dtype: torch.dtype, device: torch.device) -> TokenScores:
        """Return all scores, one text behind the other; log-probabilities in this dtype, on this device."""
        numbers = ranges(np.array(self._starts, dtype=np.int64), np.array(self._stops, dtype=np.int64))
        return self.rows.scores(numbers, TokenScores.of(self._values, dtype, device))

    def numbers_of(self, text: Ready) -> Iterator[tuple[int, Callable[[], tuple[int, ...]]]]:
        """Yield the number of each score of a text, and what returns the ids of all that stands before the token."""
        for span, first_row in spans_from(self._forest, text.text, text.start):
            for idx in range(first_row, len(span.token_ids)):
                yield self.rows.first_of(span) + idx, partial(_ids_before, span, idx)
        end = text.text.end
        for token_id in text.candidates:
            yield self._number_of(end, token_id), partial(ids_up_to, end)

    def _want(self, span: Span, first_row: int) -> None:
        known = self._first_rows.get(span)
        if known is None or first_row < known:
            self._first_rows[span] = first_row

    def _number_of(self, end: Span, token_id: int) -> int:
        number = self._candidates.get((end, token_id))
        if number is None:
            pooled = self._pool.get(end).get(token_id)
            child = held_child(end, token_id) if pooled is None else None
            if child is not None:
                number = self.rows.first_of(child)
                self._held.append((end, number))
            else:
                self._values.append(_NOT_YET if pooled is None else pooled)
                number = -len(self._values)
                if pooled is None:
                    self._missing[number] = (end, token_id)
            self._candidates[end, token_id] = number
        return number

    def _add_spans(self, predictions: Predictions) -> None:
        """Add the wanted tokens of spans that have no score yet.

        A first token is predicted by what its span continues, and by nothing behind the root or a junction. It may have
        been scored before it was forwarded.
        """
        wanted = list(self._first_rows.items())
        first_rows = np.fromiter(self._first_rows.values(), dtype=np.int64, count=len(wanted))
        firsts = np.array([self.rows.first_of(span) for span in self._first_rows], dtype=np.int64)
        stops = firsts + np.array([len(span.token_ids) for span in self._first_rows], dtype=np.int64)
        are_scored = self.rows.are_scored()
        num_scored = np.append(0, np.cumsum(are_scored))
        starts = firsts + first_rows
        left = np.flatnonzero(num_scored[stops] - num_scored[starts] < stops - starts)
        unpredicted: list[int] = []
        recalled: dict[int, TokenScore] = {}
        for idx in left[(first_rows[left] == 0) & ~are_scored[starts[left]]].tolist():
            (span, _), number = wanted[idx], int(starts[idx])
            assert span.parent is not None
            if not span.parent.token_ids:
                unpredicted.append(number)
            elif (pooled := self._pool.get(span.parent).get(span.token_ids[0])) is not None:
                recalled[number] = pooled
            else:
                predictions.add_first(span.parent, number)
        self.rows.note_unpredicted(unpredicted)
        self.rows.write_values(recalled)
        inner = (wanted[idx] for idx in left.tolist())
        token_ids = itertools.chain.from_iterable(span.token_ids[max(1, first_row) :] for span, first_row in inner)
        predictions.add_inner(token_ids, ranges((firsts + np.maximum(1, first_rows))[left], stops[left]))


def spans_from(forest: Forest, text: Inserted, start: int) -> list[tuple[Span, int]]:
    """Return the spans of a text's tokens from `start` on, in written order, each with its first such row."""
    spans: list[tuple[Span, int]] = []
    if isinstance(text.token_ids, TokenGraph):
        num_before = 0
        for span in forest.in_order(text):
            stop = num_before + len(span.token_ids)
            if stop > start:
                spans.append((span, max(0, start - num_before)))
            num_before = stop
        return spans
    span = text.end
    while span.parent is not None and span.position + len(span.token_ids) > start:
        spans.append((span, max(0, start - span.position)))
        span = span.parent
    spans.reverse()
    return spans


def ids_up_to(end: Span) -> tuple[int, ...]:
    """Return the ids of the text that ends here, those of groups before it left out."""
    return tuple(token_id for span in end.path() for token_id in span.token_ids)


def _ids_before(span: Span, idx: int) -> tuple[int, ...]:
    assert span.parent is not None
    return ids_up_to(span.parent) + span.token_ids[:idx]
