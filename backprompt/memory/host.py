"""The second pool: where keys, values and states go that the device has no room for.

Nothing lies in both: rows move here when the device's budget is exceeded, and back when they are asked for. Over both
pools together what is held has its ancestors, and keys and values come with states. The order in which things go is the
device's; what goes from here is gone.

On both ways, what comes from one block goes to one block, with one copy a tensor. A block of which only some rows are
left stays as it is until the room is needed, or blocks are many and small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from backprompt.forest.forest import Forest
from backprompt.forest.span import KINDS, Kind, Span
from backprompt.memory.blocks import Block, Location
from backprompt.memory.span_rows import SpanRows, moved
from backprompt.memory.tier import Ranking, Tier, num_bytes_of
from backprompt.memory.visit import Visit


@dataclass(frozen=True)
class Fetch:
    """What is to move back to the device.

    Attributes:
        served: the ends of the texts that need nothing more of what lies here then.
        spans: which, each after what it continues.
        num_bytes: how many bytes that takes.

    """

    served: list[Span]
    spans: Mapping[Kind, Sequence[Span]]
    num_bytes: int

    @property
    def num_tokens(self) -> int:
        """Of how many tokens something moves."""
        return sum(len(span.token_ids) for span in {span for spans in self.spans.values() for span in spans})


class HostMemory(Tier):
    """Takes what the device's memory lets go of, and gives it back.

    Args:
        max_bytes: the budget; 0 for no second pool.
        here: where its blocks are made.
        device: where they are made that go back.

    """

    def __init__(self, max_bytes: int, here: Location, device: Location) -> None:
        super().__init__(max_bytes, "host")
        self._here = here
        self._device = device

    def take(self, spans: Sequence[Span], dropped: Mapping[Kind, SpanRows], rank: Ranking) -> None:
        """Hold what the device let go of, as far as it fits.

        What must go for it goes before anything is copied, so the budget is never exceeded, but by one tensor of a
        block that is made smaller. After an error blocks may be cut in part: see `Memory.evict`.

        Args:
            spans: all of them, each before what continues it.
            dropped: where it still lies on the device.
            rank: which of the spans go first.

        """
        if not self.max_bytes or not any(dropped.values()):
            return
        for kind, rows in dropped.items():
            self.hold(kind, rows)
        self._refuse(spans)
        num_held = sum(num_bytes_of(self.held(kind, spans)) for kind in dropped)
        self.shrink(spans, num_held - self.max_bytes, rank)
        coming = {kind: self.held(kind, rows) for kind, rows in dropped.items()}
        if self.num_bytes + sum(map(num_bytes_of, coming.values())) > self.max_bytes:
            self.compact(spans)
        for kind, rows in coming.items():
            copies = moved(rows, self._here)
            self.add(part.block for part in copies.values())
            self.hold(kind, copies)
        if self.is_scattered:
            self.compact(spans)

    def plan_fetch(self, ends: Sequence[Span], max_bytes: int, pinned: Set[Span], *, with_keys_values: bool) -> Fetch:
        """Choose what is to move back for the texts that end here, for as many of them as fit the device together.

        Changes nothing. What these texts need takes `max_bytes` and a span at most, what is there already included and
        `pinned` spans not; or it is one text's.
        """
        coming: dict[Kind, list[Span]] = {kind: [] for kind in KINDS}
        num_bytes = 0

        def bring(kind: Kind, span: Span) -> bool:
            nonlocal num_bytes
            if kind == "states" and span not in pinned:
                visit.room -= span.num_bytes("device")
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
        """Move back what was planned, and return the blocks on the device. If a copy fails all is still here."""
        copies = {kind: moved(self.held(kind, spans), self._device) for kind, spans in planned.spans.items()}
        with forest.changing():
            for kind, rows in copies.items():
                for span in planned.spans[kind]:  # each after what it continues
                    span.move(kind, rows[span], "device")
        return [part.block for rows in copies.values() for part in rows.values()]

    def _refuse(self, spans: Sequence[Span]) -> None:
        """Let go of what cannot stay, whatever else goes, and of what continues it.

        That is what exceeds the budget together with what it continues here: nothing else need go for it.
        """
        for kind in KINDS:
            held = self.held(kind, spans)
            num_above: dict[Span, float] = {
                root: 0 for span in spans[:1] for root in span.parents
            }  # of what is held in either pool: bytes here up to it
            for span in spans:
                own = held[span].num_bytes if span in held else 0
                # Of a junction's parents the largest: they may have beginnings in common.
                above = max((num_above.get(parent, math.inf) for parent in span.parents), default=math.inf)
                if above + own <= self.max_bytes and not span.is_empty:
                    if span in held or span.holds(kind):
                        num_above[span] = above + own
                else:
                    span.let_go(kind, "host")
