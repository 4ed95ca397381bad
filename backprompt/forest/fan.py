"""Fans: completions that many prompts share, laid out once and held behind each prompt as one span.

A *shape* is the trie of the token ids of some completions. Its layout is computed once: which tokens are forwarded, in
depth-first order, and where the score of each token of each completion lies. A completion's last token is scored by the
row before it, so the token is forwarded only where another completion goes on behind it; else the token is a *leaf*.

    completions   "cancel order", "cancel card", "refund"
    rows          0: cancel                     (its parent is the prompt's last token)
    leaves        0: order, 1: card             (behind row 0)
                  2: refund                     (behind the prompt)

A *fan* is one span that stands for all rows of a shape behind one prompt: planned, placed and evicted as one. A fan is
the only child of its parent. Whatever looks for single tokens behind the prompt *unfolds* the fan first
(`Forest.unfold`): ordinary spans take over its rows. No module here looks into a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.forest.span import Span, pass_on_history

Ints: TypeAlias = "npt.NDArray[np.int64]"


class Piece(NamedTuple):
    """A run of rows of a fan that becomes a span when the fan unfolds.

    Attributes:
        start, stop: the rows.
        depth: the number of rows on the way to its first row.
        parent_idx: the piece that it continues; None for the prompt.
        is_end: whether the last token of a completion stands behind it.

    """

    start: int
    stop: int
    depth: int
    parent_idx: int | None
    is_end: bool


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a shape, depth first; a child with more rows comes before its smaller siblings.

    Attributes:
        token_ids: the token of each row.
        depths: the number of rows on the way to each row.
        until: the row after the last descendant of each row.
        parents: the row before each row; -1 is the prompt's last token.
        pieces: the spans that the rows unfold into.

    """

    token_ids: tuple[int, ...]
    depths: tuple[int, ...]
    until: tuple[int, ...]
    parents: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, eq=False)
class Scores:
    """Where the scores of a shape's completions come from; the first tokens are those of the rows, then the leaves.

    Attributes:
        token_ids: the rows' tokens and the leaves' tokens, `(rows + leaves,)`.
        parents: the row that predicts each of them; -1 is the prompt's last token, `(rows + leaves,)`.
        index: which of them is each token of each completion, one completion behind the other, `(scores,)`.

    """

    token_ids: Ints
    parents: Ints
    index: Ints


class _Node:
    """A node of the trie: a token of a row, and the nodes behind it."""

    __slots__ = ("children", "num_rows", "row")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.num_rows = 0  # of the node and of all nodes behind it; 0 for a leaf
        self.row = -1


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
        """The number of tokens that are scored and not forwarded."""
        return len(self.scores.token_ids) - self.num_rows

    @cached_property
    def num_scores(self) -> int:
        """The number of tokens of all completions."""
        return sum(map(len, self.completions))

    @cached_property
    def has_rows(self) -> bool:
        """Whether any token is forwarded."""
        return any(len(ids) > 1 for ids in self.completions)

    @cached_property
    def rows(self) -> Rows:
        """The rows."""
        ends = {node.row for ids in self.completions if (node := self._node_of(ids[:-1])) is not self._trie}
        token_ids: list[int] = []
        depths: list[int] = []
        until: list[int] = []
        parents: list[int] = []
        pieces: list[Piece] = []
        piece_of: dict[int, int | None] = {-1: None}  # by last row
        for node, token_id, parent, depth in _depth_first(self._trie):
            row = node.row
            token_ids.append(token_id)
            depths.append(depth)
            until.append(row + node.num_rows)
            parents.append(parent.row)
            inner = [child for child in parent.children.values() if child.num_rows]
            if pieces and pieces[-1].stop == row and parent.row == row - 1 and len(inner) == 1 and row - 1 not in ends:
                last = pieces[-1]
                pieces[-1] = last._replace(stop=row + 1, is_end=row in ends)
                piece_of[row] = piece_of.pop(row - 1)
            else:
                piece_of[row] = len(pieces)
                pieces.append(Piece(row, row + 1, depth, piece_of[parent.row], row in ends))
        return Rows(tuple(token_ids), tuple(depths), tuple(until), tuple(parents), tuple(pieces))

    @cached_property
    def scores(self) -> Scores:
        """Where the scores come from."""
        rows = self.rows
        token_ids, parents, index = list(rows.token_ids), list(rows.parents), []
        leaves: dict[_Node, int] = {}
        for ids in self.completions:
            node = self._trie
            for token_id in ids:
                before, node = node, node.children[token_id]
                if node.num_rows:
                    index.append(node.row)
                    continue
                if node not in leaves:
                    leaves[node] = len(token_ids)
                    token_ids.append(token_id)
                    parents.append(before.row)
                index.append(leaves[node])
        return Scores(*(np.array(numbers, dtype=np.int64) for numbers in (token_ids, parents, index)))

    def ids_before(self, parent: int) -> tuple[int, ...]:
        """Return the tokens of a completion up to a row; none for -1."""
        ids: list[int] = []
        while parent >= 0:
            ids.append(self.rows.token_ids[parent])
            parent = self.rows.parents[parent]
        return tuple(reversed(ids))

    @cached_property
    def _trie(self) -> _Node:
        """The root of all tokens, the rows numbered depth first."""
        root = _Node()
        nodes: list[_Node] = []  # each before those behind it
        for ids in self.completions:
            node = root
            for token_id in ids:
                child = node.children.get(token_id)
                if child is None:
                    child = node.children[token_id] = _Node()
                    nodes.append(child)
                node = child
        for node in reversed(nodes):
            if node.children:
                node.num_rows = 1 + sum(child.num_rows for child in node.children.values())
        for row, (node, *_) in enumerate(_depth_first(root)):
            node.row = row
        return root

    def _node_of(self, ids: tuple[int, ...]) -> _Node:
        node = self._trie
        for token_id in ids:
            node = node.children[token_id]
        return node


def _depth_first(root: _Node) -> list[tuple[_Node, int, _Node, int]]:
    """Return the nodes that have a row, each with its token, the node before it and its depth."""
    found: list[tuple[_Node, int, _Node, int]] = []
    stack = [(root, -1, root, -1)]
    while stack:
        entry = stack.pop()
        node, _, _, depth = entry
        if node is not root:
            found.append(entry)
        inner = [(token_id, child) for token_id, child in node.children.items() if child.num_rows]
        inner.sort(key=lambda item: item[1].num_rows)  # the last is taken first
        stack += ((child, token_id, node, depth + 1) for token_id, child in inner)
    return found


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
        """Return new spans for the rows, depth first. They hold nothing, and are no children yet."""
        spans: list[Span] = []
        for piece in self.shape.rows.pieces:
            parent = self.parent if piece.parent_idx is None else spans[piece.parent_idx]
            span = Span(self.token_ids[piece.start : piece.stop], self.position + piece.depth, parent)
            span.is_end = piece.is_end
            pass_on_history(self, span)
            spans.append(span)
        return spans


def without_fans(spans: Sequence[Span]) -> list[Span]:
    """Return the spans of a row in its order, each fan replaced by what it unfolds into; the fans stay as they are."""
    return [part for span in spans for part in (span.unfolded() if isinstance(span, Fan) else (span,))]
