"""The distinct tokens of a batch of rows as flat arrays, depth first, and its cut into parts under a budget of tokens.

Rows are sorted, so that rows with a common beginning are neighbours: a row adds the tokens behind the longest beginning
that it shares with the row before it. The tokens that a row adds lie side by side, parents before children. So the
descendants of a token are the tokens right behind it, up to `until`:

    rows       a b c      a b d e      a b d f      x y
    tokens     a b c          d e            f      x y
    positions  0 1 2          2 3            3      0 1
    until      6 6 3          6 5            6      8 8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True)
class Trie:
    """Distinct tokens, depth first.

    Attributes:
        token_ids, positions: the id and the position of each token, `(tokens,)`.
        until: the token behind the last descendant of each token, `(tokens,)`.
        nodes: the tokens of each row, one array for each row, in the order of the given rows.

    """

    token_ids: Ints
    positions: Ints
    until: Ints
    nodes: tuple[Ints, ...]

    @classmethod
    def of(cls, rows: Sequence[Ints]) -> Trie:
        """Return the tokens of sorted rows of token ids; see `sort_order`."""
        shared = shared_beginnings(rows)
        num_new = [len(row) - num_shared for row, num_shared in zip(rows, shared, strict=True)]
        firsts = np.cumsum([0, *num_new]).tolist()
        until = np.full(firsts[-1], firsts[-1], dtype=np.int64)
        path = np.empty(0, dtype=np.int64)
        nodes = []
        for (first, stop), num_shared in zip(pairwise(firsts), shared, strict=True):
            until[path[num_shared:]] = first  # these have no descendants from here on
            path = np.concatenate([path[:num_shared], np.arange(first, stop)])
            nodes.append(path)
        return cls(
            np.concatenate([row[num:] for row, num in zip(rows, shared, strict=True)] or [path]),
            np.concatenate([np.arange(num, len(row)) for row, num in zip(rows, shared, strict=True)] or [path]),
            until,
            tuple(nodes),
        )

    @cached_property
    def edges(self) -> list[slice]:
        """The runs of tokens in which each token except the last has one child, the next token; depth first."""
        goes_on = (np.diff(self.positions) == 1) & (np.diff(self.until) == 0)
        cuts = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(self.token_ids)]
        return [slice(start, stop) for start, stop in pairwise(cuts) if start < stop]


def sort_order(rows: Sequence[Ints]) -> list[int]:
    """Return the order in which rows are sorted, beginnings first; equal rows keep their order."""
    keys = [row.astype(">u4").tobytes() for row in rows]  # big-endian bytes are sorted as the numbers are
    return sorted(range(len(rows)), key=keys.__getitem__)


def shared_beginnings(rows: Sequence[Ints]) -> list[int]:
    """Return how many tokens each row has in common with the row before it, from the beginning; 0 for the first."""
    return [0, *(_num_common(before, row) for before, row in pairwise(rows))][: len(rows)]


def num_distinct(rows: Sequence[Ints]) -> int:
    """Return the number of distinct tokens of rows, in any order."""
    ordered = [rows[idx] for idx in sort_order(rows)]
    return sum(map(len, rows)) - sum(shared_beginnings(ordered))


def _num_common(before: Ints, row: Ints) -> int:
    num = min(len(before), len(row))
    differs = before[:num] != row[:num]
    return int(differs.argmax()) if differs.any() else num


def cut(rows: Sequence[Ints], max_tokens: int) -> list[slice]:
    """Return parts of sorted rows, each with at most `max_tokens` distinct tokens, or those of the longest row if more.

    A part computes all tokens of its first row, including those that the previous part has. The cut with the fewest
    computed tokens is returned; of several, the one with the fewest parts.
    """
    shared = shared_beginnings(rows)
    if sum(map(len, rows)) - sum(shared) <= max_tokens:
        return [slice(0, len(rows))] if rows else []
    max_tokens = max(max_tokens, *map(len, rows))
    best = [(0, 0, 0)]  # for the first n rows: tokens, parts, and the first row of the last part
    for stop in range(1, len(rows) + 1):
        found = []
        num_new = 0  # tokens of rows[start + 1 : stop] that are not in the row before them
        for start in range(stop - 1, -1, -1):
            num_tokens = len(rows[start]) + num_new
            if num_tokens <= max_tokens:
                found.append((best[start][0] + num_tokens, best[start][1] + 1, start))
            num_new += len(rows[start]) - shared[start]
            if num_new > max_tokens:
                break
        best.append(min(found))
    parts = []
    stop = len(rows)
    while stop:
        start = best[stop][2]
        parts.append(slice(start, stop))
        stop = start
    return parts[::-1]
