"""Fans: completions of a prompt, or of many prompts, laid out once and held behind each prompt as one span.

A *shape* is the trie of the token ids of some completions. Its layout is computed once: which tokens are forwarded, in
depth-first order, and where the score of each token of each completion lies. A completion's last token is scored by the
row before it. So the token is forwarded only if another completion continues behind it; otherwise it is a *leaf*.

    completions   "cancel order", "cancel card", "refund"
    rows          0: cancel                     (its parent is the prompt's last token)
    leaves        0: order, 1: card             (behind row 0)
                  2: refund                     (behind the prompt)

A *fan* is one span that stands for all rows of a shape behind one prompt: planned, placed and evicted as one. A fan is
the only child of its parent. Code that looks for single tokens behind the prompt *unfolds* the fan first
(`Forest.unfold`): ordinary spans take over its rows. No module here reads a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.forest.span import Span, pass_on_history
from backprompt.tokens.graph import common_length

Ints: TypeAlias = "npt.NDArray[np.int64]"


class Piece(NamedTuple):
    """A run of rows of a fan that becomes a span when the fan unfolds.

    Attributes:
        start, stop: the rows.
        depth: the number of rows on the way to its first row.
        parent_idx: the piece that it continues; None for the prompt.
        is_end: whether the last token of a completion comes right behind this piece.

    """

    start: int
    stop: int
    depth: int
    parent_idx: int | None
    is_end: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a shape, depth first; of the first tokens, the one with the most tokens behind it comes first.

    Attributes:
        token_ids: the token of each row.
        depths: the number of rows on the way to each row.
        until: the row after the last descendant of each row.
        parents: the row that each row continues; -1 is the prompt's last token.
        ends: the rows right behind which the last token of a completion comes, ascending.

    """

    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    until: tuple[int, ...]
    parents: tuple[int, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """The sources of the scores of a shape's completions.

    Attributes:
        token_ids: the rows' tokens, followed by the leaves' tokens, `(rows + leaves,)`.
        parents: the row that predicts each of these tokens; -1 is the prompt's last token, `(rows + leaves,)`.
        index: the index in `token_ids` of each token of each completion, one completion after the other, `(scores,)`.

    """

    token_ids: Ints
    parents: Ints
    index: Ints


class Shape:
    """The trie of some completions.

    Args:
        completions: the token ids of each completion, none of them empty.

    """

    def __init__(self, completions: Sequence[tuple[int, ...]]) -> None:
        self.completions = tuple(completions)

    @property
    def num_rows(self) -> int:
        """The number of tokens that are forwarded behind each prompt."""
        return len(self.rows.token_ids)

    @property
    def num_leaves(self) -> int:
        """The number of tokens that are scored but not forwarded."""
        return len(self.scores.token_ids) - self.num_rows

    @cached_property
    def num_scores(self) -> int:
        """The number of tokens of all completions."""
        return sum(map(len, self.completions))

    @cached_property
    def max_rows(self) -> int:
        """The largest number of tokens of one completion that are forwarded."""
        return max(map(len, self.completions), default=1) - 1

    @cached_property
    def has_rows(self) -> bool:
        """Whether any token is forwarded."""
        return self.max_rows > 0

    @property
    def rows(self) -> Rows:
        """The rows."""
        return self._layout[0]

    @property
    def scores(self) -> Scores:
        """The sources of the scores."""
        return self._layout[1]

    def ids_before(self, parent: int) -> tuple[int, ...]:
        """Return the tokens on the way to a row, its own token included; none for -1."""
        ids: list[int] = []
        while parent >= 0:
            ids.append(self.rows.token_ids[parent])
            parent = self.rows.parents[parent]
        return tuple(reversed(ids))

    def pieces(self) -> list[Piece]:
        """Return the pieces that the rows unfold into, each after the piece that it continues."""
        rows = self.rows
        parents, ends = rows.parents, set(rows.ends)
        firsts = {row for row, parent in enumerate(parents) if parent != row - 1 or parent in ends}
        bounds = sorted({0, self.num_rows} | firsts | {parents[row] + 1 for row in firsts})
        idx_of = {-1: None} | {stop - 1: idx for idx, stop in enumerate(bounds[1:])}
        return [
            Piece(start, stop, rows.depths[start], idx_of[parents[start]], stop - 1 in ends)
            for start, stop in itertools.pairwise(bounds)
        ]

    @cached_property
    def _layout(self) -> tuple[Rows, Scores]:
        """Lay out the completions without their last tokens, sorted by their ids, which is a trie's depth-first order.

        The first token with the most tokens behind it comes first, together with these tokens, because they join the
        prompt's causal run.
        """
        token_ids: list[int] = []
        depths: list[int] = []
        until: list[int] = []
        parents: list[int] = []
        way: list[int] = []  # the rows of the latest beginning
        way_of: dict[tuple[int, ...], list[int]] = {(): []}
        places: dict[tuple[int, int], int] = {}  # of tokens that do not follow the row before, by parent and token
        before: tuple[int, ...] = ()
        beginnings = {ids[:-1] for ids in self.completions} - {()}
        num_behind: dict[int, int] = {}
        for ids in beginnings:
            num_behind[ids[0]] = num_behind.get(ids[0], 0) + len(ids)
        for ids in sorted(beginnings, key=lambda ids: (-num_behind[ids[0]], ids)):
            num_common, row = common_length(before, ids, 0), len(token_ids)
            parent = way[num_common - 1] if num_common else -1
            places[parent, ids[num_common]] = row
            for done in way[num_common:]:
                until[done] = row
            stop = row + len(ids) - num_common
            token_ids += ids[num_common:]
            depths += range(num_common, len(ids))
            until += [-1] * (stop - row)
            parents.append(parent)
            parents += range(row, stop - 1)
            way = way_of[ids] = [*way[:num_common], *range(row, stop)]
            before = ids
        for done in way:
            until[done] = len(token_ids)
        ends = sorted({own[-1] for own in way_of.values() if own})
        rows = Rows(*map(tuple, (token_ids, depths, until, parents, ends)))
        index: list[int] = []
        for ids in self.completions:
            way = way_of[ids[:-1]]
            target = way[-1] if way else -1, ids[-1]
            if target not in places:
                places[target] = len(token_ids)
                parents.append(target[0])
                token_ids.append(ids[-1])
            index += way
            index.append(places[target])
        return rows, Scores(*(np.array(numbers, dtype=np.int64) for numbers in (token_ids, parents, index)))


class Fan(Span):
    """All rows of a shape behind one prompt; its token ids are those of the rows, depth first.

    Attributes:
        shape: the shape; it has rows.

    """

    __slots__ = ("shape",)

    def __init__(self, shape: Shape, parent: Span) -> None:
        super().__init__(shape.rows.token_ids, parent.stop, parent)
        self.shape = shape
        self.is_end = True

    @property
    def positions(self) -> Sequence[int]:
        """The position of each token."""
        return [self.position + depth for depth in self.shape.rows.depths]

    def unfolded(self) -> list[Span]:
        """Return new spans for the shape's rows, depth first. They hold no data, and their parents do not know them."""
        spans: list[Span] = []
        for piece in self.shape.pieces():
            parent = self.parent if piece.parent_idx is None else spans[piece.parent_idx]
            span = Span(self.token_ids[piece.start : piece.stop], self.position + piece.depth, parent)
            span.is_end = piece.is_end
            pass_on_history(self, span)
            spans.append(span)
        return spans


def without_fans(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of a row in its order, with spans in place of each fan; the fans themselves stay unchanged."""
    return [part for span in spans for part in (span.unfolded() if isinstance(span, Fan) else (span,))]
