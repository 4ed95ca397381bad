"""A tier of memory: blocks within a budget of bytes, and what goes when it is exceeded.

Keys and values go first, states (hidden states and log-probabilities, much smaller) only when no keys and values are
left to go. Leaves go before what they continue, so what is held always has its ancestors.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from backprompt.cache import Block, BlockRows, compact
from backprompt.radix import Span

Kind: TypeAlias = Literal["rows", "states"]
"""Which of the two things a span holds: keys and values, or states."""

KINDS: tuple[Kind, ...] = ("states", "rows")
"""Both; a span holds the second only with the first."""

Slot: TypeAlias = Literal["rows", "states", "host_rows", "host_states"]
"""The attribute of a span that says where one of the two lies in one of the tiers."""

Places: TypeAlias = "dict[Span, BlockRows[Any]]"

Rank: TypeAlias = "tuple[int, float, int]"

Ranking: TypeAlias = "Callable[[Span], Rank | None]"
"""The rank of a span: of leaves the one with the lowest goes first, one without a rank stays."""


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

    def add(self, blocks: Iterable[Block | None]) -> None:
        """Count these blocks for as long as they live."""
        self._blocks.update(block for block in blocks if block is not None)

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
        keys_values = self._drop("rows", spans, excess, rank)
        excess -= num_bytes_of(keys_values)
        # Keys and values are left only where something stays that has no rank; its states, and all above, stay, too.
        states = self._drop("states", spans, excess, rank)
        return {"rows": keys_values, "states": states}

    def compact(self, spans: Sequence[Span]) -> None:
        """Make the blocks smaller of which only some rows are still held."""
        for kind in self._slots:
            places = self.held(kind, spans)
            self.hold(kind, compact({span: place for span, place in places.items() if place.block in self._blocks}))

    def _drop(self, kind: Kind, spans: Sequence[Span], excess: int, rank: Ranking) -> Places:
        dropped: Places = {}
        if excess <= 0:
            return dropped
        places = self.held(kind, spans)
        num_below = dict.fromkeys(places, 0)
        for span in places:
            for parent in span.parents:
                if parent in num_below:
                    num_below[parent] += 1
        order = itertools.count()  # among equals, first come first
        heap: list[tuple[Rank, int, Span]] = []

        def offer(span: Span) -> None:
            if num_below[span] == 0 and (ranked := rank(span)) is not None:
                heapq.heappush(heap, (ranked, next(order), span))

        for span in places:
            offer(span)
        while heap and excess > 0:
            _, _, span = heapq.heappop(heap)
            dropped[span] = places[span]
            excess -= places[span].num_bytes
            self.let_go(kind, span)
            for parent in span.parents:
                if parent in num_below:
                    parent.credit = max(parent.credit, span.credit)
                    parent.last_used = max(parent.last_used, span.last_used)
                    num_below[parent] -= 1
                    offer(parent)
        return dropped


def num_bytes_of(places: Mapping[Span, BlockRows[Any]]) -> int:
    """Return the bytes of these rows."""
    return sum(place.num_bytes for place in places.values())
