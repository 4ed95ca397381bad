"""Predicting rows: which rows of spans predict the wanted tokens of texts, each distinct row with a number.

A row is known by its span and its place there. So its number is valid before the row is computed, and after the row was
dropped and computed again. A span may be split meanwhile. The span then becomes its lower part, so its rows are found
from its end upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.evaluation.predictions import ranges
from backprompt.evaluation.reading import spans_from
from backprompt.forest.forest import Forest
from backprompt.forest.span import Span
from backprompt.tokens.graph import TokenIds

Ints: TypeAlias = "npt.NDArray[np.int64]"


class Piece(NamedTuple):
    """Wanted rows `start..stop` of a span as it is now, and the number of the first of them."""

    span: Span
    start: int
    stop: int
    number: int


class PredictingRows:
    """The rows that predict wanted tokens.

    The wanted rows of a span are neighbours: the rows of tokens up to the span's end, or up to the last but one.
    """

    def __init__(self) -> None:
        self._bounds: dict[Span, tuple[int, int]] = {}  # the wanted rows of each span
        self._lengths: dict[Span, int] = {}  # of the same spans, before any was split
        self._runs: list[tuple[Span | None, int, int]] = []  # of all wanted tokens in order: the rows that predict them
        self._text_runs = [0]  # where the runs of each text start
        self._numbers: dict[Span, int] = {}  # of the first wanted row of each span, once all texts are added

    def add(self, forest: Forest, end: Span, token_ids: TokenIds, start: int, num_candidates: int) -> None:
        """Add the wanted tokens of the text that ends here: those from `start` on, and `num_candidates` behind it."""
        for span, first_row in spans_from(forest, end, token_ids, start):
            num_tokens = len(span.token_ids)
            if first_row == 0:
                assert span.parent is not None
                self._add_last(span.parent)
            self._add_run(span, max(0, first_row - 1), num_tokens - 1)
        for _ in range(num_candidates):
            self._add_last(end)
        self._text_runs.append(len(self._runs))

    def _add_last(self, span: Span) -> None:
        """Add a token that the last row of a span predicts; behind the root or a junction no row predicts it."""
        num_tokens = len(span.token_ids)
        if num_tokens:
            self._add_run(span, num_tokens - 1, num_tokens)
        else:
            self._runs.append((None, -1, 0))

    def _add_run(self, span: Span, first: int, stop: int) -> None:
        if first < stop:
            known = self._bounds.get(span, (first, stop))
            self._bounds[span] = min(first, known[0]), max(stop, known[1])
            self._lengths[span] = len(span.token_ids)
            self._runs.append((span, first, stop))

    def spans_of(self, text_idx: int) -> Sequence[Span]:
        """Return the spans whose rows predict the wanted tokens of a text; a span may occur twice."""
        runs = self._runs[self._text_runs[text_idx] : self._text_runs[text_idx + 1]]
        return [span for span, _, _ in runs if span is not None]

    @property
    def num_rows(self) -> int:
        """The number of distinct rows; their numbers count from 0."""
        return sum(stop - first for first, stop in self._bounds.values())

    def numbers(self) -> Ints:
        """Return, for each wanted token, the number of the row that predicts it, `(tokens,)`; -1 if no row does."""
        self._number_spans()
        starts, stops = [], []
        for span, first, stop in self._runs:
            shift = 0 if span is None else self._numbers[span] - self._bounds[span][0]
            starts.append(first + shift)
            stops.append(stop + shift)
        return ranges(np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64))

    def pieces_of(self, span: Span) -> Iterator[Piece]:
        """Yield the wanted rows of a span, from its end upwards; call `numbers` first."""
        first, last = self._bounds[span]
        piece, piece_stop = span, self._lengths[span]
        while piece_stop > first:
            piece_start = piece_stop - len(piece.token_ids)
            start, stop = max(first, piece_start), min(last, piece_stop)
            if start < stop:
                yield Piece(piece, start - piece_start, stop - piece_start, self._numbers[span] + start - first)
            assert piece.parent is not None
            piece, piece_stop = piece.parent, piece_start

    def _number_spans(self) -> None:
        number = 0
        for span, (first, stop) in self._bounds.items():
            self._numbers[span] = number
            number += stop - first
