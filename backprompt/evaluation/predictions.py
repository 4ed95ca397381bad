"""Predictions: which rows of hidden states predict the tokens to be scored, and where the scores go.

The rows of several blocks are numbered as if the blocks lay one behind the other (`NumberedRows`). So a scoring is a
few flat arrays, whatever the number of its texts. A forwarded token's score lies in the block of its span's states. The
score of a *candidate*, a token that may follow a text and is not forwarded, has a negative number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.evaluation.scores import TokenScore, TokenScores
from backprompt.forest.span import Span
from backprompt.memory.blocks import States, states_of
from backprompt.tokens.adapted import plain_array
from backprompt.transfers import index_on

Item = TypeVar("Item")
Ints: TypeAlias = "npt.NDArray[np.int64]"


class NumberedRows:
    """The rows of several blocks of states, numbered block after block, in the order of the first use of each block."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._first: dict[States, int] = {}

    def first_of(self, span: Span) -> int:
        """Return the number of a computed span's first row."""
        rows = states_of(span)
        first = self._first.get(rows.block)
        if first is None:
            first = self._first[rows.block] = self.num_rows
            self.num_rows += rows.block.num_rows
        return first + rows.start

    def last_of(self, span: Span) -> int:
        """Return the number of a computed span's last row."""
        return self.first_of(span) + len(span.token_ids) - 1

    def are_scored(self) -> npt.NDArray[np.bool_]:
        """Return whether each row's token has its score, `(rows,)`."""
        flags = [block.has_logprobs.numpy() for block in self._first]
        return np.concatenate(flags) if flags else np.zeros(0, dtype=bool)

    def by_block(self, numbers: Ints) -> Iterator[tuple[States, Ints, slice]]:
        """Yield, for ascending row numbers: each block, its rows among them, and their slice of `numbers`."""
        blocks, firsts = list(self._first), np.fromiter(self._first.values(), dtype=np.int64)
        if len(blocks) == 1:  # its first row is row 0
            if len(numbers):
                yield blocks[0], numbers, slice(0, len(numbers))
            return
        bounds = [*np.searchsorted(numbers, firsts).tolist(), len(numbers)]
        for block, first, start, stop in zip(blocks, firsts.tolist(), bounds[:-1], bounds[1:], strict=True):
            if start < stop:
                yield block, numbers[start:stop] - first, slice(start, stop)

    def hidden(self, numbers: Ints) -> Tensor:
        """Return a copy of the hidden states of rows, `(rows, hidden)`, to which a head may write.

        `numbers`: the rows in ascending order.
        """
        parts = [block.hidden[index_on(rows, block.hidden.device)] for block, rows, _ in self.by_block(numbers)]
        return torch.cat(parts)  # consecutive rows are a view until here

    def write(self, numbers: Ints, scores: TokenScores) -> None:
        """Write the scores of the rows with these distinct numbers into their blocks; candidates are left out."""
        order = np.argsort(numbers)[np.count_nonzero(numbers < 0) :]
        if not len(order):
            return
        places = index_on(order, scores.logprobs.device)
        logprobs, is_argmax = scores.logprobs[places], scores.is_argmax[places]
        for block, rows, where in self.by_block(numbers[order]):
            block.write_scores(rows, logprobs[where], is_argmax[where])

    def write_values(self, scores: Mapping[int, TokenScore]) -> None:
        """Write scores that are known already, by row number."""
        if scores:
            first = next(iter(self._first)).logprobs
            values = TokenScores.of(list(scores.values()), first.dtype, first.device)
            self.write(np.array(list(scores), dtype=np.int64), values)

    def note_unpredicted(self, numbers: Iterable[int]) -> None:
        """Note that no row predicts the tokens of these rows."""
        for block, rows, _ in self.by_block(np.array(sorted(numbers), dtype=np.int64)):
            block.note_unpredicted(rows)

    def scores(self, numbers: Ints, candidates: TokenScores | None) -> TokenScores:
        """Return the scores with these numbers, in their order; the numbers of candidates are -1, -2, ..."""
        parts = [TokenScores(block.logprobs, block.is_argmax) for block in self._first]
        if candidates is not None:
            parts.append(candidates)
        index = np.where(numbers < 0, self.num_rows - 1 - numbers, numbers)
        if len(parts) == 1:
            return parts[0].at(index)
        together = TokenScores.concatenated(parts)
        return together if np.array_equal(index, np.arange(len(together.logprobs))) else together.at(index)


@dataclass(frozen=True)
class Targets:
    """Tokens to be scored by a slice of rows of hidden states.

    Attributes:
        rows: the numbers of the rows, ascending, `(rows,)`.
        row_idx: for each token, the index in `rows` of the row that predicts it, ascending, `(tokens,)`.
        token_ids: the ids of the tokens, `(tokens,)`.
        numbers: the number of each token's score, `(tokens,)`; negative for candidates.

    """

    rows: Ints
    row_idx: Ints
    token_ids: Ints
    numbers: Ints


class Predictions:
    """The tokens of one scoring that have no score yet. Each row that predicts some of them is computed once.

    The row before a branching predicts the first tokens of all its branches: first tokens without a score are scored
    along with the requested one.

    Args:
        rows: the rows of the blocks of all spans.

    """

    def __init__(self, rows: NumberedRows) -> None:
        self._rows = rows
        self._known_rows: list[tuple[Ints, Ints, Ints]] = []  # rows that predict, token ids, numbers
        self._branched: dict[Span, list[int]] = {}  # numbers of first tokens, by the span that they continue
        self._candidates: list[tuple[int, int, int]] = []  # the row, the id, the number

    def add_inner(self, token_ids: Iterable[int], numbers: Ints) -> None:
        """Add tokens that are not the first of their span, so that the row before each predicts it."""
        self.add(numbers - 1, np.fromiter(token_ids, dtype=np.int64, count=len(numbers)), numbers)

    def add(self, predicting: Ints, token_ids: Ints, numbers: Ints) -> None:
        """Add tokens, each with the row that predicts it."""
        self._known_rows.append((predicting, token_ids, numbers))

    def add_first(self, parent: Span, number: int) -> None:
        """Add the first token of a span that continues `parent`."""
        self._branched.setdefault(parent, []).append(number)

    def add_candidate(self, end: Span, token_id: int, number: int) -> None:
        """Add a token that may follow a computed span and is not forwarded."""
        self._candidates.append((self._rows.last_of(end), token_id, number))

    def slices(self, rows_in_a_slice: int) -> list[Targets]:
        """Return all tokens without a score, in slices of `rows_in_a_slice` rows."""
        predicting, token_ids, numbers = self._all()
        if (predicting[1:] > predicting[:-1]).all():  # those of one text
            rows, row_idx = predicting, np.arange(len(predicting))
        else:
            rows, row_idx = np.unique(predicting, return_inverse=True)
            order = np.argsort(row_idx, kind="stable")
            row_idx, token_ids, numbers = row_idx[order], token_ids[order], numbers[order]
        starts = range(0, len(rows), rows_in_a_slice)
        bounds = np.searchsorted(row_idx, [*starts, len(rows)]).tolist()
        return [
            Targets(rows[start : start + rows_in_a_slice], row_idx[a:b] - start, token_ids[a:b], numbers[a:b])
            for start, a, b in zip(starts, bounds[:-1], bounds[1:], strict=True)
        ]

    def _all(self) -> tuple[Ints, Ints, Ints]:
        """Return, of all tokens without a score, the row that predicts each, its id, and the number of its score."""
        branches = [
            (self._rows.last_of(parent), child.token_ids[0], self._rows.first_of(child))
            for parent in self._branched
            for child in held_children(parent)
        ]
        singles = np.array([*self._candidates, *branches], dtype=np.int64).reshape(-1, 3)
        parts = [*self._known_rows, (singles[:, 0], singles[:, 1], singles[:, 2])]
        predicting, token_ids, numbers = map(np.concatenate, zip(*parts, strict=True))
        token_ids = plain_array(token_ids)
        is_left = ~np.append(self._rows.are_scored(), False)[np.maximum(numbers, -1)]  # the last is for candidates
        if branches:
            asked = list(itertools.chain.from_iterable(self._branched.values()))
            is_asked = np.ones(len(numbers), dtype=bool)
            is_asked[len(numbers) - len(branches) :] = np.isin(singles[len(self._candidates) :, 2], asked)
            is_left &= np.isin(predicting, predicting[is_left & is_asked])
        return predicting[is_left], token_ids[is_left], numbers[is_left]


def ranges(starts: Ints, stops: Ints) -> Ints:
    """Return the numbers from each start up to its stop, one range after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    numbers: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return numbers


def is_scored(span: Span) -> bool:
    """Return whether all tokens of a computed span have their scores."""
    rows = states_of(span)
    return rows.block.is_scored(rows.start, rows.stop)


def held_children(end: Span) -> list[Span]:
    """Return the spans that continue this one and hold their states, junctions left out."""
    return [child for child in end.children.values() if child.token_ids and child.is_held()]


def held_child(end: Span, token_id: int) -> Span | None:
    """Return the span that directly continues this one with a token, if its states are held."""
    child = end.children.get(token_id)
    return child if child is not None and child.is_held() else None


def slices(items: list[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size` items; the last list may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
