"""The leaves of a tier: the rows that can be evicted next, in the order of eviction.

Rows can be evicted if no other rows of the tier need them (`Span.is_free`). A heap keeps such rows by rank. The heap
may lag behind the forest: spans that were used or computed are noted, and examined before the next row is taken; and an
entry that is taken is compared with its span. So no eviction walks over the forest: a row is examined only when it
becomes a leaf, when its span is used, and when it is evicted.

The leaves are unknown until the first eviction, after an error, and if many spans were used since an eviction. Then all
spans with rows must be given once.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from types import MappingProxyType
from typing import TypeAlias

from backprompt.forest.span import Kind, Pool, Span

Rank: TypeAlias = "tuple[float, int]"
"""The leaf of lowest rank is evicted first; among equals, the leaf that was known first."""

Ranking: TypeAlias = "Callable[[Kind, Span], Rank]"

_NO_USES: Mapping[Span, int] = MappingProxyType({})

MIN_NOTED = 1000
"""The least number of noted spans, or of stale entries, at which all leaves are forgotten, or stale entries removed."""


Leaf: TypeAlias = "tuple[float, int, int, Kind, Span]"
"""The rank of a span's rows of one kind, two numbers that order equal ranks, the kind, and the span."""


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
        spared: the spans that stay or go last in the present eviction, or the latest.
        highest: the highest rank, without the last use, of a leaf that was taken in turn.

    """

    def __init__(self, pool: Pool, rank: Ranking) -> None:
        self.highest = 0.0
        self.pool = pool
        self.rank = rank
        self._heap: list[Leaf] = []
        self._numbers = itertools.count()
        self._noted: dict[Span, None] | None = None
        self._max_noted = self._max_heap = MIN_NOTED
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
        self._heap, self._aside = [], []
        self._later, self.spared = {}, NOTHING_SPARED

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
        """Treat the leaves that the passes of a plan attended to like all others."""
        self._spare(NOTHING_SPARED)

    def begin_eviction(self, spared: Spared) -> None:
        """Examine the noted spans; from now on leaves may be taken, except those that are spared."""
        assert self._noted is not None, "`begin` was not called"
        for span in self._noted:
            # States are a leaf only without keys and values.
            self.offer("states" if span.rows_in("keys_values", self.pool) is None else "keys_values", span)
        self._noted.clear()
        self._spare(spared)
        if len(self._heap) > self._max_heap:
            self._sort_out()

    def take(self) -> Leaf | None:
        """Return the leaf of lowest rank, which must be evicted then; None if there is none.

        Leaves to which later passes attend come last, starting with those of the latest pass.
        """
        heap, pool, rank_of, spared = self._heap, self.pool, self.rank, self.spared
        while heap:
            leaf = heappop(heap)
            credit, last_used, _, kind, span = leaf
            if not span.is_free(kind, pool):
                continue
            if (credit, last_used) != rank_of(kind, span):
                self.offer(kind, span)
            elif spared.stays(span):
                self._aside.append(leaf)
            elif spared.is_needed_later(span):
                self._later.setdefault(spared.last_uses[span], deque()).append(leaf)
            else:
                if credit > self.highest:
                    self.highest = credit
                return leaf
        return self._take_later()

    def offer(self, kind: Kind, span: Span) -> None:
        """Add a row if it is a leaf."""
        if span.is_free(kind, self.pool):
            heappush(self._heap, (*self.rank(kind, span), next(self._numbers), kind, span))

    def end_eviction(self) -> None:
        """Let the leaves that stayed be taken again."""
        for leaf in self._aside:
            heappush(self._heap, leaf)
        self._aside = []

    def _spare(self, spared: Spared) -> None:
        """Treat the leaves to which no later pass attends any more like all others."""
        is_same_plan = spared.last_uses is self.spared.last_uses
        self.spared = spared
        for last_use in [use for use in self._later if use < spared.next_pass or not is_same_plan]:
            for leaf in self._later.pop(last_use):
                heappush(self._heap, leaf)

    def _take_later(self) -> Leaf | None:
        while self._later:
            latest = max(self._later)
            leaves = self._later[latest]
            while leaves:
                leaf = leaves.popleft()
                _, _, _, kind, span = leaf
                if self.spared.stays(span):
                    self._aside.append(leaf)
                elif span.is_free(kind, self.pool):
                    return leaf
            del self._later[latest]
        return None

    def _sort_out(self) -> None:
        """Remove entries of rows that are gone or have another rank."""
        leaves = dict.fromkeys((kind, span) for _, _, _, kind, span in sorted(self._heap))
        self._heap = []
        for kind, span in leaves:
            self.offer(kind, span)
        self._max_heap = 2 * len(self._heap) + MIN_NOTED
