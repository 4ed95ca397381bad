"""A reading: the scores of held texts' tokens, the place of each score, and the missing scores.

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

from backprompt.evaluation.pools import LeafScores, Pools
from backprompt.evaluation.predictions import Ints, NumberedRows, Predictions, held_child, ranges
from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.fan import Fan, Shape
from backprompt.forest.forest import Forest
from backprompt.forest.span import Inserted, Span
from backprompt.tokens.graph import TokenGraph, TokenIds


class Wanted(NamedTuple):
    """A text to be scored: its tokens from `start` on, and tokens that may follow it and are not forwarded."""

    token_ids: TokenIds
    start: int
    candidates: Sequence[int] = ()


class Reading:
    """Reads scores of held texts.

    Args:
        forest: the forest of the texts' spans.
        pools: the pools with the scores of candidates and leaves that were scored before.

    Attributes:
        rows: the rows in which the scores of forwarded tokens lie.

    """

    def __init__(self, forest: Forest, pools: Pools) -> None:
        self._forest = forest
        self._pools = pools
        self.rows = NumberedRows()
        self._starts: list[int] = []  # runs of numbers, one text behind the other
        self._stops: list[int] = []
        self._fans: list[tuple[Fan, int]] = []  # in the order of texts: each with the number of runs before it
        self._alike: list[_AlikeFans] = []  # the distinct fans, once all texts are added
        self._firsts: dict[Span, int] = {}  # the number of the first row of each span that holds wanted tokens
        self._first_rows: dict[Span, int] = {}  # the first wanted row of each
        self._candidates: dict[tuple[Span, int], int] = {}  # their numbers
        self._held: list[
            tuple[Span, int]
        ] = []  # candidates that were forwarded: the span that they follow, their number
        self._missing: dict[int, tuple[Span, int]] = {}  # candidates to be scored, by their number
        self._known: dict[int, TokenScore] = {}  # candidates that were scored before, by their number
        self._num_candidates = 0  # with leaves; their numbers are -1, -2, ...
        self._logprobs = np.zeros(0)  # of candidates, once all texts are added
        self._are_argmax = np.zeros(0, dtype=bool)

    def add(self, item: Wanted | Fan, end: Span) -> int:
        """Add a text that ends here, or the completions of a fan; return the number of scores that are read of it."""
        if isinstance(item, Fan):
            self._fans.append((item, len(self._starts)))
            return item.shape.num_scores
        return self._add_text(item, end)

    def _add_text(self, text: Wanted, end: Span) -> int:
        num_scores = len(text.candidates)
        for span, first_row in spans_from(self._forest, end, text.token_ids, text.start):
            first, num_tokens = self._want(span, first_row), len(span.token_ids)
            self._starts.append(first + first_row)
            self._stops.append(first + num_tokens)
            num_scores += num_tokens - first_row
        for token_id in text.candidates:
            number = self._number_of(end, token_id)
            self._starts.append(number)
            self._stops.append(number + 1)
        return num_scores

    def add_ahead(self, text: Inserted) -> None:
        """Add a text whose missing scores are computed along with the others, but not returned."""
        for span, _ in spans_from(self._forest, text.end, text.token_ids, 0):
            self._want(span, 0)

    def predictions(self) -> Predictions:
        """Return the scores to compute. Scores of forwarded tokens that a pool knows are written to their rows."""
        self._number_fans()
        self._logprobs = np.full(self._num_candidates, np.nan)
        self._are_argmax = np.zeros(self._num_candidates, dtype=bool)
        for number, score in self._known.items():
            self._logprobs[-1 - number], self._are_argmax[-1 - number] = score
        predictions = Predictions(self.rows)
        self._add_spans(predictions)
        for end, number in self._held:
            predictions.add_first(end, number)
        for number, (end, token_id) in self._missing.items():
            predictions.add_candidate(end, token_id, number)
        for alike in self._alike:
            self._add_fans(alike, predictions)
        return predictions

    def _number_fans(self) -> None:
        """Number the scores of fans, all fans of a shape together."""
        by_shape: dict[Shape, list[Fan]] = {}
        for fan in dict(self._fans):
            by_shape.setdefault(fan.shape, []).append(fan)
        for shape, fans in by_shape.items():
            rows = np.array([self.rows.first_of(fan) for fan in fans])[:, None] + np.arange(shape.num_rows)
            leaves = np.arange(self._num_candidates, self._num_candidates + len(fans) * shape.num_leaves)
            self._num_candidates += len(leaves)
            numbers = np.concatenate([rows, -1 - leaves.reshape(len(fans), -1)], axis=1)
            self._alike.append(_AlikeFans(shape, fans, numbers))

    def _add_fans(self, alike: _AlikeFans, predictions: Predictions) -> None:
        """Add the tokens of fans to the predictions to compute, without leaves that were scored before."""
        scores, numbers = alike.shape.scores, alike.numbers
        ends = np.array([self.rows.last_of(fan.parent) for fan in alike.fans if fan.parent is not None])
        predicting = np.where(scores.parents < 0, ends[:, None], numbers[:, :1] + scores.parents)
        is_left = np.ones(numbers.shape, dtype=bool)
        for idx, fan in enumerate(alike.fans):
            known = self._pools.leaves.get(fan)
            if known is not None:
                self._logprobs[alike.leaves[idx]], self._are_argmax[alike.leaves[idx]] = known
                is_left[idx, alike.shape.num_rows :] = False
        token_ids = np.broadcast_to(scores.token_ids, numbers.shape)
        predictions.add(predicting[is_left], token_ids[is_left], numbers[is_left])

    def write(self, numbers: Ints, scores: TokenScores, on_host: npt.NDArray[Any]) -> None:
        """Write computed scores to where they are held, those of candidates into the pool as well.

        `on_host`: the log-probabilities and `is_argmax` of the scores, in the host's memory.
        """
        self.rows.write(numbers, scores)
        is_candidate = numbers < 0
        places = -1 - numbers[is_candidate]
        self._logprobs[places], self._are_argmax[places] = on_host[:, is_candidate]
        for place in places.tolist() if self._missing else ():
            if (missing := self._missing.get(-1 - place)) is not None:
                end, token_id = missing
                score = TokenScore(float(self._logprobs[place]), bool(self._are_argmax[place]))
                self._pools.candidates.put(end, [(token_id, score)])

    def keep_leaves(self) -> None:
        """Put the scores of all leaves into their pool; all of them must have been computed."""
        for alike in self._alike:
            found = self._logprobs[alike.leaves], self._are_argmax[alike.leaves]
            for fan, logprobs, are_argmax in zip(alike.fans, *found, strict=True):
                self._pools.leaves.put(fan, LeafScores(logprobs.copy(), are_argmax.copy()))

    def scores(self, dtype: torch.dtype, device: torch.device) -> TokenScores:
        """Return all scores, one text behind the other; log-probabilities in this dtype, on this device."""
        starts, stops = (np.array(bounds, dtype=np.int64) for bounds in (self._starts, self._stops))
        run_stops = np.append(0, np.cumsum(stops - starts))
        of_texts, num_read = ranges(starts, stops), 0
        of_fan = {fan: own for alike in self._alike for fan, own in zip(alike.fans, alike.of_scores, strict=True)}
        parts: list[Ints] = []
        for (fan, _), num_before in zip(self._fans, run_stops[[num_runs for _, num_runs in self._fans]], strict=True):
            parts += [of_texts[num_read:num_before], of_fan[fan]]
            num_read = num_before
        numbers = np.concatenate([*parts, of_texts[num_read:]])
        candidates = None
        if self._num_candidates or not self.rows.num_rows:
            candidates = TokenScores.of_arrays(self._logprobs, self._are_argmax, dtype, device)
        return self.rows.scores(numbers, candidates)

    def numbers_of(self, item: Wanted | Fan, end: Span) -> Iterator[tuple[int, Callable[[], tuple[int, ...]]]]:
        """Yield the number of each added score, and a function that returns the ids before the scored token."""
        if isinstance(item, Fan):
            (numbers,) = (own.numbers[own.fans.index(item)] for own in self._alike if own.shape is item.shape)
            for number, parent in zip(numbers.tolist(), item.shape.scores.parents, strict=True):
                yield number, partial(_ids_in_fan, item, int(parent))
            return
        for span, first_row in spans_from(self._forest, end, item.token_ids, item.start):
            for idx in range(first_row, len(span.token_ids)):
                yield self.rows.first_of(span) + idx, partial(_ids_before, span, idx)
        for token_id in item.candidates:
            yield self._number_of(end, token_id), partial(ids_up_to, end)

    def _want(self, span: Span, first_row: int) -> int:
        """Add a span's tokens from a row on; return the number of its first row."""
        first = self._firsts.get(span)
        if first is None:
            first = self._firsts[span] = self.rows.first_of(span)
            self._first_rows[span] = first_row
        elif first_row < self._first_rows[span]:
            self._first_rows[span] = first_row
        return first

    def _number_of(self, end: Span, token_id: int) -> int:
        number = self._candidates.get((end, token_id))
        if number is None:
            pooled = self._pools.candidates.get(end, token_id)
            child = held_child(end, token_id) if pooled is None else None
            if child is not None:
                number = self.rows.first_of(child)
                self._held.append((end, number))
            else:
                self._num_candidates += 1
                number = -self._num_candidates
                if pooled is None:
                    self._missing[number] = (end, token_id)
                else:
                    self._known[number] = pooled
            self._candidates[end, token_id] = number
        return number

    def _add_spans(self, predictions: Predictions) -> None:
        """Add the wanted tokens of spans that have no score yet.

        The first token of a span is predicted by the end of the parent, and by no row behind the root or a junction.
        Such a token may have been scored before it was forwarded.
        """
        wanted = list(self._first_rows.items())
        first_rows = np.fromiter(self._first_rows.values(), dtype=np.int64, count=len(wanted))
        firsts = np.fromiter(self._firsts.values(), dtype=np.int64, count=len(wanted))
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
            elif (pooled := self._pools.candidates.get(span.parent, span.token_ids[0])) is not None:
                recalled[number] = pooled
            else:
                predictions.add_first(span.parent, number)
        self.rows.note_unpredicted(unpredicted)
        self.rows.write_values(recalled)
        inner = (wanted[idx] for idx in left.tolist())
        token_ids = itertools.chain.from_iterable(span.token_ids[max(1, first_row) :] for span, first_row in inner)
        predictions.add_inner(token_ids, ranges((firsts + np.maximum(1, first_rows))[left], stops[left]))


class _AlikeFans(NamedTuple):
    """The distinct fans of one shape, and where their scores lie.

    Attributes:
        shape: their shape.
        fans: the fans.
        numbers: the numbers of the scores of each fan's rows, then of its leaves, `(fans, rows + leaves)`.

    """

    shape: Shape
    fans: list[Fan]
    numbers: Ints

    @property
    def leaves(self) -> Ints:
        """The places of the scores of each fan's leaves among those of candidates, `(fans, leaves)`."""
        return -1 - self.numbers[:, self.shape.num_rows :]

    @property
    def of_scores(self) -> Ints:
        """The numbers of the scores of each fan's completions, one behind the other, `(fans, scores)`."""
        return self.numbers[:, self.shape.scores.index]


def spans_from(forest: Forest, end: Span, token_ids: TokenIds, start: int) -> list[tuple[Span, int]]:
    """Return the spans of a text's tokens from `start` on, in written order, each with its first such row."""
    spans: list[tuple[Span, int]] = []
    if isinstance(token_ids, TokenGraph):
        num_before = 0
        for span in forest.in_order(Inserted(end, token_ids)):
            stop = num_before + len(span.token_ids)
            if stop > start:
                spans.append((span, max(0, start - num_before)))
            num_before = stop
        return spans
    span = end
    while span.parent is not None and span.position + len(span.token_ids) > start:
        spans.append((span, start - span.position if start > span.position else 0))
        span = span.parent
    spans.reverse()
    return spans


def ids_up_to(end: Span) -> tuple[int, ...]:
    """Return the ids of the text that ends here, without the ids of groups before it."""
    return tuple(token_id for span in end.path() for token_id in span.token_ids)


def _ids_in_fan(fan: Fan, row: int) -> tuple[int, ...]:
    assert fan.parent is not None
    return ids_up_to(fan.parent) + fan.shape.ids_before(row)


def _ids_before(span: Span, idx: int) -> tuple[int, ...]:
    assert span.parent is not None
    return (*ids_up_to(span.parent), *span.token_ids[:idx])
