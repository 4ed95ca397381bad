"""A tier of memory: blocks within a budget of bytes, and eviction of rows when the budget is exceeded.

Leaves are evicted before their parents, so the ancestors of held rows are held. A span's keys and values are evicted
before its states (hidden states and log-probabilities, much smaller). The caller ranks the leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from backprompt.forest.forest import Forest
from backprompt.forest.span import KINDS, Kind, Pool, Span
from backprompt.memory.blocks import Block, BlockRows, Watch
from backprompt.memory.counted import CountedBlocks
from backprompt.memory.leaves import Leaves, Ranking, Spared
from backprompt.memory.span_rows import SpanRows, compact, joined

MAX_SMALL_BLOCKS = 128
"""The largest number of small blocks. Without a limit, each evaluation of a few tokens would leave two more."""


class Tier:
    """Counts the bytes of all its blocks that are alive, and evicts spans' rows.

    Args:
        max_bytes: the budget.
        pool: the pool of this tier, as spans name it.
        rank: the order of eviction.

    """

    def __init__(self, max_bytes: int, pool: Pool, rank: Ranking) -> None:
        self.max_bytes = max_bytes
        self._pool = pool
        self._leaves = Leaves(pool, rank)
        self._blocks = CountedBlocks()
        self._watch = Watch()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, hidden states and log-probabilities that are alive."""
        return self._blocks.num_bytes

    @property
    def num_held_bytes(self) -> int:
        """The bytes of the rows that spans hold."""
        return self.num_bytes - sum(block.num_unheld_bytes for block in self._watch.loose)

    @property
    def blocks(self) -> Sequence[Block]:
        """The counted blocks that are alive."""
        return list(self._blocks)

    def add(self, blocks: Iterable[Block | None]) -> None:
        """Count these blocks while they live; the spans must hold the blocks' rows already."""
        for block in blocks:
            if block is not None:
                self._count(block)
                self._leaves.note(block.spans)

    def note(self, spans: Iterable[Span]) -> None:
        """Note spans that hold other rows than before, have become leaves, or have another rank.

        The spans that blocks have noted meanwhile (`Watch.takers`) are noted, too.
        """
        if self._leaves.are_known:
            self._leaves.note(spans)
            self._leaves.note(self._watch.takers)
        self._watch.takers.clear()

    def recount(self, spans: Sequence[Span]) -> None:
        """Count only the blocks that these spans refer to."""
        held = (rows for kind in KINDS for rows in self.held(kind, spans).values())
        self._blocks, self._watch = CountedBlocks(), Watch()
        for block in dict.fromkeys(rows.block for rows in held if rows.block is not None):
            self._count(block)
        self._leaves.forget()

    def end_plan(self) -> None:
        """End a plan of passes: the spans that its passes attended to are no longer evicted last."""
        self._leaves.end_plan()

    def forget(self) -> None:
        """Forget the spans, because they have left the forest."""
        self._leaves.forget()
        self._watch.takers.clear()

    def held(self, kind: Kind, spans: Iterable[Span]) -> SpanRows:
        """Return the rows in this tier by span; spans without rows here are left out."""
        found = {span: rows for span in spans if (rows := span.rows_in(kind, self._pool)) is not None}
        return cast("SpanRows", found)

    def hold(self, kind: Kind, rows: Mapping[Span, BlockRows[Any]]) -> None:
        """Let spans refer to these rows of this tier."""
        for span, part in rows.items():
            span.move(kind, part, self._pool)

    def shrink(self, forest: Forest, excess: int, spared: Spared) -> dict[Kind, SpanRows]:
        """Evict rows until `excess` bytes are gone or no evictable row is left.

        Returns the evicted rows; their blocks stay alive while the result is referenced.
        """
        dropped: dict[Kind, SpanRows] = {kind: {} for kind in KINDS}
        if excess <= 0:
            return dropped
        self.note(())
        if not self._leaves.are_known:
            self._leaves.begin(forest.held_spans())
        self._leaves.begin_eviction(spared)
        pool = self._pool
        while excess > 0 and (leaf := self._leaves.take()) is not None:
            kind, span = leaf
            rows = dropped[kind][span] = cast("BlockRows[Any]", span.let_go(kind, pool))
            excess -= rows.num_bytes
            self._unblock(kind, span)
        self._leaves.end_eviction()
        return dropped

    def _unblock(self, kind: Kind, span: Span) -> None:
        """Offer the rows that an eviction may have made leaves: those of the parents, and the span's own states."""
        for parent in span.parents:
            if parent.credit < span.credit:
                parent.credit = span.credit
            if parent.last_used < span.last_used:
                parent.last_used = span.last_used
            self._leaves.offer(kind, parent)
        if kind == "keys_values":
            self._leaves.offer("states", span)

    @property
    def is_scattered(self) -> bool:
        """Whether the overhead of many small blocks is too large."""
        return self._blocks.num_small > MAX_SMALL_BLOCKS

    def compact(self) -> None:
        """Remove unused rows from blocks, and join small blocks if there are many."""
        self.note(())
        loose = list(self._watch.loose)
        self._watch.loose.clear()
        for kind in reversed(KINDS):  # larger blocks first
            self.hold(kind, compact(self._rows_in(kind, loose)))
        self._blocks.count(loose)
        del loose
        if self.is_scattered:
            small = [block for block in self._blocks if block.is_small]
            for kind in reversed(KINDS):
                self.hold(kind, joined(self._rows_in(kind, small)))
            self._blocks.count(small)
        self._watch.takers.clear()  # they hold the same rows as before

    def _rows_in(self, kind: Kind, blocks: Iterable[Block]) -> SpanRows:
        """Return all rows of one kind in these blocks that spans hold."""
        held = ((block, self.held(kind, block.spans)) for block in blocks)
        return {span: part for block, rows in held for span, part in rows.items() if part.block is block}

    def _count(self, block: Block) -> None:
        self._blocks.count([block])
        block.watch = self._watch
        if block.spans and block.num_held < block.num_rows:
            self._watch.loose.add(block)


def num_bytes_of(rows: Mapping[Span, BlockRows[Any]]) -> int:
    """Return the bytes of these rows."""
    return sum(part.num_bytes for part in rows.values())
