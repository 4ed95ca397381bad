"""The leaves of a tier: the rows that can be evicted next, in the order of eviction.

Rows can be evicted if no other rows of the tier need them (`IS_FREE`). Such rows lie in queues by rank, and a heap
orders the ranks. The spans that are evaluated together have few ranks, so many leaves share a queue. The queues may lag
behind the forest: spans that were used or computed are noted, and are examined at the beginning of the next eviction. A
leaf taken from a queue is first compared with its span. So no eviction walks over the forest: rows are examined only
when they become leaves, when their span is used, and when they are evicted.

The leaves are unknown before the first eviction, after an error, and when many spans were used since the last eviction.
Then `begin` must get all spans with rows once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import MappingProxyType
from typing import TypeAlias

from backprompt.forest.span import IS_FREE, Kind, Pool, Span

Rank: TypeAlias = "tuple[float, int]"
"""The credit of a span and its last use. The leaf of lowest rank is evicted first; of equals, the first offered one."""

Ranking: TypeAlias = "Callable[[Kind, Span], Rank]"

_NO_USES: Mapping[Span, int] = MappingProxyType({})

MIN_NOTED = 1000
"""Up to this number of noted spans, leaves are never forgotten; up to this number of entries, none is sorted out."""


Leaf: TypeAlias = "tuple[Kind, Span]"
"""Rows of a span: their kind, and the span."""


@dataclass(frozen=True)
class Spared:
    """The spans that stay, with all their ancestors, and the spans that are evicted last.

    Attributes:
        stay: spans whose rows stay.
        last_uses: for the spans that later passes attend to, the index of the last such pass.
        next_pass: the index of the next pass.

    """

    stay: tuple[Container[Span], ...] = ()
    last_uses: Mapping[Span, int] = field(default_factory=lambda: _NO_USES)
    next_pass: int = 0

    def is_needed_later(self, span: Span) -> bool:
        """Whether a later pass attends to a span."""
        return self.last_uses.get(span, -1) >= self.next_pass

    def stays(self, span: Span) -> bool:
        """Whether the rows of a span stay."""
        for spans in self.stay:  # noqa: SIM110, a generator costs as much as the rest of a look at a leaf
            if span in spans:
                return True
        return False


NOTHING_SPARED = Spared()


class Leaves:
    """The leaves of one tier.

    Args:
        pool: the tier's pool.
        rank: the order; if the rank of a span becomes lower, the span must be noted.

    Attributes:
        pool, rank: as given.
        spared: the spans that stay or are evicted last, in the present or the latest eviction.
        highest: the highest credit of a leaf that was taken in order of rank; leaves evicted last do not count.

    """

    def __init__(self, pool: Pool, rank: Ranking) -> None:
        self.highest = 0.0
        self.pool = pool
        self.rank = rank
        self._is_free = IS_FREE[pool]
        self._queues: dict[Rank, deque[Leaf]] = {}
        self._ranks: list[Rank] = []  # a heap of the ranks that have a queue
        self._num_queued = 0
        self._noted: dict[Span, None] | None = None
        self._max_noted = self._max_queued = MIN_NOTED
        self._aside: list[Leaf] = []  # leaves that stay in this eviction
        self._later: dict[int, deque[Leaf]] = {}  # leaves that later passes attend to, by their last use
        self.spared = NOTHING_SPARED

    @property
    def are_known(self) -> bool:
        """Whether the leaves are known; else `begin` must be called before one is taken."""
        return self._noted is not None

    def forget(self) -> None:
        """Forget all leaves: from now on they are unknown."""
        self._noted = None
        self._queues, self._ranks, self._num_queued = {}, [], 0
        self._aside, self._later, self.spared = [], {}, NOTHING_SPARED

    def begin(self, spans: Iterable[Span]) -> None:
        """Find the leaves among all spans with rows."""
        self.forget()
        self._noted = dict.fromkeys(spans)
        self._max_noted = max(MIN_NOTED, len(self._noted))

    def note(self, spans: Iterable[Span]) -> None:
        """Note that spans hold other rows than before, have become leaves, or have another rank."""
        if self._noted is not None:
            self._noted.update(dict.fromkeys(spans))
            if len(self._noted) > self._max_noted:
                self.forget()

    def end_plan(self) -> None:
        """End a plan: from now on the leaves that its passes attended to are treated like all others."""
        self._spare(NOTHING_SPARED)

    def begin_eviction(self, spared: Spared) -> None:
        """Examine the noted spans; from now on leaves may be taken, except those that are spared."""
        assert self._noted is not None, "`begin` was not called"
        for span in self._noted:
            # States are a leaf only without keys and values.
            self.offer("states" if span.rows_in("keys_values", self.pool) is None else "keys_values", span)
        self._noted.clear()
        self._spare(spared)
        if self._num_queued > self._max_queued:
            self._sort_out()

    def take(self) -> Leaf | None:
        """Return the leaf of lowest rank, which the caller must evict; None if no leaf is left.

        Leaves to which later passes attend come last, starting with those of the latest pass.
        """
        ranks, is_free, rank_of, spared = self._ranks, self._is_free, self.rank, self.spared
        while ranks:
            rank = ranks[0]
            queue = self._queues[rank]
            if not queue:
                del self._queues[heappop(ranks)]
                continue
            leaf = kind, span = queue.popleft()
            self._num_queued -= 1
            if not is_free[kind](span):
                continue
            if rank_of(kind, span) != rank:
                self.offer(kind, span)
            elif spared.stays(span):
                self._aside.append(leaf)
            elif spared.is_needed_later(span):
                self._later.setdefault(spared.last_uses[span], deque()).append(leaf)
            else:
                self.highest = max(self.highest, rank[0])
                return leaf
        return self._take_later()

    def offer(self, kind: Kind, span: Span) -> None:
        """Add a span's rows of one kind if they are a leaf."""
        if not self._is_free[kind](span):
            return
        rank = self.rank(kind, span)
        queue = self._queues.get(rank)
        if queue is None:
            queue = self._queues[rank] = deque()
            heappush(self._ranks, rank)
        queue.append((kind, span))
        self._num_queued += 1

    def end_eviction(self) -> None:
        """Put the leaves that stayed back into their queues, for later evictions."""
        for leaf in self._aside:
            self.offer(*leaf)
        self._aside = []

    def _spare(self, spared: Spared) -> None:
        """Set the spared spans; leaves to which no later pass attends any more go back into their queues."""
        is_same_plan = spared.last_uses is self.spared.last_uses
        self.spared = spared
        for last_use in [use for use in self._later if use < spared.next_pass or not is_same_plan]:
            for leaf in self._later.pop(last_use):
                self.offer(*leaf)

    def _take_later(self) -> Leaf | None:
        while self._later:
            latest = max(self._later)
            leaves = self._later[latest]
            while leaves:
                leaf = kind, span = leaves.popleft()
                if self.spared.stays(span):
                    self._aside.append(leaf)
                elif self._is_free[kind](span):
                    return leaf
            del self._later[latest]
        return None

    def _sort_out(self) -> None:
        """Remove entries of rows that are gone or have another rank."""
        leaves = dict.fromkeys(leaf for rank in sorted(self._ranks) for leaf in self._queues[rank])
        self._queues, self._ranks, self._num_queued = {}, [], 0
        for leaf in leaves:
            self.offer(*leaf)
        self._max_queued = 2 * self._num_queued + MIN_NOTED
