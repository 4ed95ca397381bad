"""A tier of memory: blocks within a budget of bytes, and what goes when it is exceeded.

Leaves go before what they continue, so what is held always has its ancestors, and a span's keys and values go before
its states (hidden states and log-probabilities, much smaller). Which leaf goes first is for the caller to say.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from backprompt.cache import Block, BlockRows, compact, joined
from backprompt.radix import Span

Kind: TypeAlias = Literal["rows", "states"]
"""Which of the two things a span holds: keys and values, or states."""

MAX_SMALL_BLOCKS = 128
"""More of them are too many: a long run of evaluations of a few tokens each would leave two a piece."""

KINDS: tuple[Kind, ...] = ("states", "rows")
"""Both; a span holds the second only with the first."""

Slot: TypeAlias = Literal["rows", "states", "host_rows", "host_states"]
"""The attribute of a span that says where one of the two lies in one of the tiers."""

Places: TypeAlias = "dict[Span, BlockRows[Any]]"

Rank: TypeAlias = "tuple[int, float, int]"

Ranking: TypeAlias = "Callable[[Kind, Span], Rank | None]"
"""The rank of either of what a span holds: of leaves the one with the lowest goes first, one without a rank stays."""


class Tier:
    """Counts the bytes of all its blocks that are alive, and lets go of spans' rows.

    Args:
        max_bytes: the budget.
        rows, states: the attributes of spans that say where their keys and values, and their states, lie in it.

    """

    def __init__(self, max_bytes: int, rows: Slot, states: Slot) -> None:
        self.max_bytes = max_bytes
        self._slots: Mapping[Kind, Slot] = {"rows": rows, "states": states}
        self._blocks: WeakSet[Block] = WeakSet()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, hidden states and log-probabilities that are alive."""
        return sum(block.num_bytes for block in self._blocks)

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks that are counted here and alive."""
        return list(self._blocks)

    def add(self, blocks: Iterable[Block | None]) -> None:
        """Count these blocks for as long as they live."""
        self._blocks.update(block for block in blocks if block is not None)

    def recount(self, spans: Sequence[Span]) -> None:
        """Count the blocks that these spans refer to, and no others any more."""
        places = (place for kind in KINDS for place in self.held(kind, spans).values())
        self._blocks = WeakSet(place.block for place in places if place.block is not None)

    def held(self, kind: Kind, spans: Iterable[Span]) -> Places:
        """Return where the spans' rows lie, of those that have any here."""
        slot = self._slots[kind]
        return {span: place for span in spans if (place := getattr(span, slot)) is not None}

    def hold(self, kind: Kind, places: Mapping[Span, BlockRows[Any]]) -> None:
        """Let spans refer to rows here."""
        for span, place in places.items():
            setattr(span, self._slots[kind], place)

    def let_go(self, kind: Kind, span: Span) -> None:
        """Let a span refer to nothing here any more."""
        setattr(span, self._slots[kind], None)

    def shrink(self, spans: Sequence[Span], excess: int, rank: Ranking) -> dict[Kind, Places]:
        """Let go of rows until `excess` bytes are gone or nothing is left that may go.

        Returns where the rows lie that spans refer to no more; their blocks stay alive for as long as this does.
        """
        if excess <= 0:
            return {"rows": {}, "states": {}}
        places = {kind: self.held(kind, spans) for kind in KINDS}
        num_above = {kind: dict.fromkeys(places[kind], 0) for kind in KINDS}  # what must go before it
        for kind in KINDS:
            for span in places[kind]:
                for before in _goes_after(kind, span, places):
                    num_above[before[0]][before[1]] += 1
        dropped: dict[Kind, Places] = {"rows": {}, "states": {}}
        order = itertools.count()  # among equals, first come first
        heap: list[tuple[Rank, int, Kind, Span]] = []

        def offer(kind: Kind, span: Span) -> None:
            if num_above[kind][span] == 0 and (ranked := rank(kind, span)) is not None:
                heapq.heappush(heap, (ranked, next(order), kind, span))

        for kind in KINDS:
            for span in places[kind]:
                offer(kind, span)
        while heap and excess > 0:
            _, _, kind, span = heapq.heappop(heap)
            dropped[kind][span] = places[kind][span]
            excess -= places[kind][span].num_bytes
            self.let_go(kind, span)
            for next_kind, waiting in _goes_after(kind, span, places):
                if waiting is not span:
                    waiting.credit = max(waiting.credit, span.credit)
                    waiting.last_used = max(waiting.last_used, span.last_used)
                num_above[next_kind][waiting] -= 1
                offer(next_kind, waiting)
        return dropped

    @property
    def is_scattered(self) -> bool:
        """Whether it has so many small blocks that their tensors cost more than they should."""
        return sum(block.is_small for block in self._blocks) > MAX_SMALL_BLOCKS

    def compact(self, spans: Sequence[Span]) -> None:
        """Make the blocks smaller of which only some rows are still held, and small ones fewer where they are many."""
        for kind in self._slots:
            self.hold(kind, compact(self._own(kind, spans)))
        if self.is_scattered:
            for kind in self._slots:
                self.hold(kind, joined(self._own(kind, spans)))

    def _own(self, kind: Kind, spans: Sequence[Span]) -> Places:
        """Return where the spans' rows lie that were added here."""
        return {span: place for span, place in self.held(kind, spans).items() if place.block in self._blocks}


def _goes_after(kind: Kind, span: Span, places: Mapping[Kind, Places]) -> list[tuple[Kind, Span]]:
    """Return what can go only when this has gone: the same of what it continues, and a span's states."""
    after: list[tuple[Kind, Span]] = [(kind, parent) for parent in span.parents if parent in places[kind]]
    if kind == "rows" and span in places["states"]:
        after.append(("states", span))
    return after


def num_bytes_of(places: Mapping[Span, BlockRows[Any]]) -> int:
    """Return the bytes of these rows."""
    return sum(place.num_bytes for place in places.values())
