"""The second pool: keys, values and states for which the device has no room.

No data lies in both pools: rows move here when the device's budget is exceeded, and back on demand. Over both pools
together, the ancestors of held rows are held, and keys and values are held only with states. Rows are evicted from this
pool in the device's order, and are then lost.

In both directions, the rows of one block move to one block, with one copy for each tensor. A block that is only partly
in use stays unchanged until its room is needed, or until there are many small blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from backprompt.forest.forest import Forest
from backprompt.forest.span import KINDS, Kind, Span
from backprompt.memory.blocks import Block
from backprompt.memory.leaves import Ranking, Spared
from backprompt.memory.location import Location
from backprompt.memory.span_rows import SpanRows, moved
from backprompt.memory.tier import Tier, num_bytes_of
from backprompt.memory.visit import Visit


@dataclass(frozen=True)
class Fetch:
    """A plan to move rows back to the device.

    Attributes:
        served: the ends of the texts that need no other rows of this pool once these have moved.
        spans: the spans of each kind of data, each after its parents.
        num_bytes: the bytes of the rows.

    """

    served: list[Span]
    spans: Mapping[Kind, Sequence[Span]]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the spans that have rows in the plan."""
        return sum(len(span.token_ids) for span in {span for spans in self.spans.values() for span in spans})


class HostMemory(Tier):
    """Takes rows evicted from the device, and gives them back.

    Args:
        max_bytes: the budget; 0 for no second pool.
        here: the location of the pool's blocks.
        device: the location of blocks that move back.

    """

    def __init__(self, max_bytes: int, rank: Ranking, here: Location, device: Location) -> None:
        super().__init__(max_bytes, "host", rank)
        self._here = here
        self._device = device
        self._longest = 0  # the number of tokens of the longest text that has come here

    def take(self, forest: Forest, dropped: Mapping[Kind, SpanRows], spared: Spared) -> None:
        """Hold the rows evicted from the device, if they fit.

        Rows are evicted from here before any copy, so the budget is never exceeded, except by one tensor of a block
        that is being made smaller. After an error, blocks may be partly cut: see `Memory.evict`.

        Args:
            forest: all spans.
            dropped: the rows, still on the device.
            spared: see `Memory.evict`.

        """
        if not self.max_bytes or not any(dropped.values()):
            return
        for kind, rows in dropped.items():
            self.hold(kind, rows)
            self.note(rows)
        self._refuse(forest, dropped)
        num_coming = sum(num_bytes_of(self.held(kind, rows)) for kind, rows in dropped.items())
        self.shrink(forest, self.num_held_bytes + num_coming - self.max_bytes, spared)
        coming = {kind: self.held(kind, rows) for kind, rows in dropped.items()}
        if self.num_bytes + sum(map(num_bytes_of, coming.values())) > self.max_bytes:
            self.compact()
        for kind, rows in coming.items():
            copies = moved(rows, self._here)
            self.hold(kind, copies)
            self.add(dict.fromkeys(part.block for part in copies.values()))
        if self.is_scattered:
            self.compact()

    def plan_fetch(self, ends: Sequence[Span], max_bytes: int, pinned: Set[Span], *, with_keys_values: bool) -> Fetch:
        """Choose the rows to move back for the texts that end here, for as many texts as fit the device together.

        No row is moved. The chosen rows and the rows of these texts that are on the device already, `pinned` spans left
        out, exceed `max_bytes` by at most one span, unless they belong to a single text.
        """
        coming: dict[Kind, list[Span]] = {kind: [] for kind in KINDS}
        num_bytes = 0

        def bring(kind: Kind, span: Span) -> bool:
            nonlocal num_bytes
            if kind == "states" and span not in pinned:
                on_device = (span.rows_in(kind, "device") for kind in KINDS)
                visit.room -= sum(rows.num_bytes for rows in on_device if rows is not None)
            rows = span.rows_in(kind, "host")
            if rows is None:
                return span.holds(kind)
            coming[kind].append(span)
            num_bytes += rows.num_bytes
            visit.room -= rows.num_bytes
            return True

        visit = Visit(max_bytes, bring)
        served = visit.serve(ends, with_keys_values=with_keys_values)
        return Fetch(served, coming, num_bytes)

    def fetch(self, forest: Forest, planned: Fetch) -> list[Block]:
        """Move the planned rows back, and return the blocks on the device. If a copy fails, all rows are still here."""
        copies = {kind: moved(self.held(kind, spans), self._device) for kind, spans in planned.spans.items()}
        with forest.changing():
            for kind, rows in copies.items():
                for span in planned.spans[kind]:  # each after its parents
                    span.move(kind, rows[span], "device")
        return [part.block for rows in copies.values() for part in rows.values()]

    def _refuse(self, forest: Forest, dropped: Mapping[Kind, SpanRows]) -> None:
        """Drop rows that cannot fit, and their descendants' rows.

        Rows cannot fit if they exceed the budget together with their ancestors' rows here, even with all other rows
        evicted. While the longest text that has come here would fit alone, all rows can fit.
        """
        self._longest = max(self._longest, *(span.stop for rows in dropped.values() for span in rows))
        kinds = [kind for kind, rows in dropped.items() if self._longest * _token_bytes(rows) > self.max_bytes]
        spans = list(forest.held_spans()) if kinds else []
        for kind in kinds:
            self._refuse_some(kind, spans, forest.root)

    def _refuse_some(self, kind: Kind, spans: Sequence[Span], root: Span) -> None:
        held = self.held(kind, spans)
        num_above: dict[Span, float] = {root: 0}  # for spans held in either pool: bytes here up to the span
        for span in spans:
            own = held[span].num_bytes if span in held else 0
            # Of a junction's parents, the largest: they may share ancestors.
            above = max((num_above.get(parent, math.inf) for parent in span.parents), default=math.inf)
            if above + own <= self.max_bytes and not span.is_empty:
                if span in held or span.holds(kind):
                    num_above[span] = above + own
            else:
                span.let_go(kind, "host")
                self.note((span, *span.parents))


def _token_bytes(rows: SpanRows) -> float:
    """Return the bytes of a token's rows."""
    return max((part.num_bytes / (part.stop - part.start) for part in rows.values() if part.num_bytes), default=0.0)
