"""A tier of memory: blocks within a budget of bytes, and eviction of rows when the budget is exceeded.

Leaves are evicted before their parents, so the ancestors of held rows are held. A span's keys and values are evicted
before its states (hidden states and log-probabilities, much smaller). The caller ranks the leaves.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast
from weakref import WeakSet

from backprompt.forest.span import KINDS, Kind, Pool, Span, rows_of
from backprompt.memory.blocks import Block, BlockRows
from backprompt.memory.span_rows import SpanRows, compact, joined

MAX_SMALL_BLOCKS = 128
"""The largest number of small blocks: a long series of evaluations of few tokens would leave two blocks each."""

Rank: TypeAlias = "tuple[int, float, int]"

Ranking: TypeAlias = "Callable[[Kind, Span], Rank | None]"
"""The rank of a span's rows of one kind: the leaf of lowest rank is evicted first, a leaf without a rank stays."""


class Tier:
    """Counts the bytes of all its blocks that are alive, and evicts spans' rows.

    Args:
        max_bytes: the budget.
        pool: the pool of this tier, as spans name it.

    """

    def __init__(self, max_bytes: int, pool: Pool) -> None:
        self.max_bytes = max_bytes
        self._pool = pool
        self._blocks: WeakSet[Block] = WeakSet()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, hidden states and log-probabilities that are alive."""
        return sum(block.num_bytes for block in self._blocks)

    @property
    def blocks(self) -> Sequence[Block]:
        """The counted blocks that are alive."""
        return list(self._blocks)

    def add(self, blocks: Iterable[Block | None]) -> None:
        """Count these blocks while they live."""
        self._blocks.update(block for block in blocks if block is not None)

    def recount(self, spans: Sequence[Span]) -> None:
        """Count the blocks that these spans refer to, and no others."""
        held = (rows for kind in KINDS for rows in self.held(kind, spans).values())
        self._blocks = WeakSet(rows.block for rows in held if rows.block is not None)

    def held(self, kind: Kind, spans: Iterable[Span]) -> SpanRows:
        """Return the rows of the spans that have any here."""
        return cast("SpanRows", rows_of(spans, kind, self._pool))

    def hold(self, kind: Kind, rows: Mapping[Span, BlockRows[Any]]) -> None:
        """Let spans refer to rows here."""
        for span, part in rows.items():
            span.move(kind, part, self._pool)

    def shrink(self, spans: Sequence[Span], excess: int, rank: Ranking) -> dict[Kind, SpanRows]:
        """Evict rows until `excess` bytes are gone or no evictable row is left.

        Returns the evicted rows; their blocks stay alive while the result is referenced.
        """
        if excess <= 0:
            return {kind: {} for kind in KINDS}
        rows = {kind: self.held(kind, spans) for kind in KINDS}
        num_before = {kind: dict.fromkeys(rows[kind], 0) for kind in KINDS}  # number of rows to evict before these
        for kind in KINDS:
            for span in rows[kind]:
                for next_kind, waiting in _unblocked(kind, span, rows):
                    num_before[next_kind][waiting] += 1
        dropped: dict[Kind, SpanRows] = {kind: {} for kind in KINDS}
        order = itertools.count()  # among equals, first come first
        heap: list[tuple[Rank, int, Kind, Span]] = []

        def offer(kind: Kind, span: Span) -> None:
            if num_before[kind][span] == 0 and (ranked := rank(kind, span)) is not None:
                heapq.heappush(heap, (ranked, next(order), kind, span))

        for kind in KINDS:
            for span in rows[kind]:
                offer(kind, span)
        while heap and excess > 0:
            _, _, kind, span = heapq.heappop(heap)
            dropped[kind][span] = rows[kind][span]
            excess -= rows[kind][span].num_bytes
            span.let_go(kind, self._pool)
            for next_kind, waiting in _unblocked(kind, span, rows):
                if waiting is not span:
                    waiting.credit = max(waiting.credit, span.credit)
                    waiting.last_used = max(waiting.last_used, span.last_used)
                num_before[next_kind][waiting] -= 1
                offer(next_kind, waiting)
        return dropped

    @property
    def is_scattered(self) -> bool:
        """Whether the overhead of many small blocks is too large."""
        return sum(block.is_small for block in self._blocks) > MAX_SMALL_BLOCKS

    def compact(self, spans: Sequence[Span]) -> None:
        """Remove unused rows from blocks, and join small blocks if there are many."""
        for kind in reversed(KINDS):  # larger blocks first
            self.hold(kind, compact(self._own(kind, spans)))
        if self.is_scattered:
            for kind in reversed(KINDS):
                self.hold(kind, joined(self._own(kind, spans)))

    def _own(self, kind: Kind, spans: Sequence[Span]) -> SpanRows:
        """Return the spans' rows in blocks that were added here."""
        return {span: part for span, part in self.held(kind, spans).items() if part.block in self._blocks}


def _unblocked(kind: Kind, span: Span, rows: Mapping[Kind, SpanRows]) -> list[tuple[Kind, Span]]:
    """Return the rows that this eviction unblocks: those of the same kind of the span's parents, and its states."""
    unblocked: list[tuple[Kind, Span]] = [(kind, parent) for parent in span.parents if parent in rows[kind]]
    if kind == "keys_values" and span in rows["states"]:
        unblocked.append(("states", span))
    return unblocked


def num_bytes_of(rows: Mapping[Span, BlockRows[Any]]) -> int:
    """Return the bytes of these rows."""
    return sum(part.num_bytes for part in rows.values())
