"""The byte budget: how much is held between passes, and what goes first when it is exceeded.

Keys and values go first, states (hidden states and log-probabilities, much smaller) only when no keys and values are
left to drop. Leaves go before what they continue, so what is held always has its ancestors. Among leaves the order is
GreedyDual-Size (Cao and Irani 1997, "Cost-Aware WWW Proxy Caching Algorithms"): when it is used, a span is given the
credit `level + cost a byte`; the lowest credit goes first, and the level rises to it. A token costs its linear layers
and attention to what stands before it, so of two spans used equally long ago the one that stands further behind stays.
Of equals the one that was used last stays.

Never dropped: pinned texts, and what the next pass attends to. What a later pass of the same evaluation attends to goes
last, the latest first, and is computed again.
"""

from __future__ import annotations

import heapq
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

import torch

from backprompt.cache import Block, BlockRows
from backprompt.radix import Forest, Span

DEFAULT_SHARE = 0.5
"""The budget, where none is given, as a share of the memory that is free on the device."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}

_Rank: TypeAlias = "tuple[int, float, int]"
_Kind: TypeAlias = Literal["rows", "states"]
"""Which of the two things a span holds: keys and values, or states. The names of its attributes."""


class Memory:
    """Counts the bytes of all blocks that are alive, and drops spans' rows over the budget."""

    def __init__(self, max_bytes: int, hidden_size: int) -> None:
        self.max_bytes = max_bytes
        self._hidden_size = hidden_size
        self._blocks: WeakSet[Block] = WeakSet()
        self._level = 0.0
        self._clock = 0
        self.num_empty_spans = 0  # of the forest, when something was last dropped

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, hidden states and log-probabilities that are alive."""
        return sum(block.num_bytes for block in self._blocks)

    @property
    def is_exceeded(self) -> bool:
        """Whether more is held than the budget allows."""
        return self.num_bytes > self.max_bytes

    def add(self, blocks: Iterable[Block | None]) -> None:
        """Count these blocks for as long as they live."""
        self._blocks.update(block for block in blocks if block is not None)

    def touch(self, spans: Iterable[Span]) -> None:
        """Note that these spans are used now. Their ancestors are taken to be used whenever they are."""
        self._clock += 1
        for span in spans:
            span.last_used = self._clock
            # Multiplications a layer: 12 hidden^2 in a token's linear layers, 2 hidden for each token before it.
            span.credit = self._level + 1 + span.position / (6 * self._hidden_size)

    def evict(self, forest: Forest, last_uses: Mapping[Span, int], next_pass: int, next_spans: Iterable[Span]) -> None:
        """Drop rows until the budget holds, or nothing that may go is left.

        Args:
            forest: all spans.
            last_uses: of the spans that passes to come attend to, the number of the last such pass.
            next_pass: the number of the next pass.
            next_spans: what it forwards.

        """
        excess = self.num_bytes - self.max_bytes
        if excess <= 0:
            return
        needed_next = {span.parent for span in next_spans}

        def rank(span: Span) -> _Rank | None:
            if span.num_pins or span in needed_next:
                return None
            last_use = last_uses.get(span, -1)
            return (0, span.credit, span.last_used) if last_use < next_pass else (1, -last_use, 0)

        spans = list(forest.spans())
        excess -= self._drop("rows", [span for span in spans if span.rows is not None], excess, rank)
        if excess > 0:
            without_keys = [span for span in spans if span.states is not None]
            self._drop("states", without_keys, excess, lambda span: rank(span) if span.rows is None else None)
        self.num_empty_spans = sum(span.states is None for span in spans)
        _compact("rows", spans)
        _compact("states", spans)

    def _drop(self, kind: _Kind, holders: list[Span], excess: int, rank: Callable[[Span], _Rank | None]) -> int:
        """Let go of what leaves among `holders` hold until `excess` bytes are dropped; return how many were."""
        num_below = {
            span: sum(getattr(child, kind) is not None for child in span.children.values()) for span in holders
        }
        order = itertools.count()  # among equals, first come first
        heap: list[tuple[_Rank, int, Span]] = []

        def offer(span: Span) -> None:
            if num_below[span] == 0 and (ranked := rank(span)) is not None:
                heapq.heappush(heap, (ranked, next(order), span))

        for span in holders:
            offer(span)
        num_dropped = 0
        while heap and num_dropped < excess:
            _, _, span = heapq.heappop(heap)
            num_dropped += getattr(span, kind).num_bytes
            setattr(span, kind, None)
            self._level = max(self._level, span.credit)
            parent = span.parent
            assert parent is not None
            if parent in num_below:
                parent.credit = max(parent.credit, span.credit)
                parent.last_used = max(parent.last_used, span.last_used)
                num_below[parent] -= 1
                offer(parent)
        return num_dropped


def _compact(kind: _Kind, spans: Iterable[Span]) -> None:
    """Make the blocks smaller of which only some rows are still held."""
    holders: dict[Block, list[Span]] = {}
    for span in spans:
        place: BlockRows[Any] | None = getattr(span, kind)
        if place is not None:
            holders.setdefault(place.block, []).append(span)
    for block, held_by in holders.items():
        held_by.sort(key=lambda span: getattr(span, kind).start)
        places = [getattr(span, kind) for span in held_by]
        if sum(place.stop - place.start for place in places) == block.num_rows:
            continue
        block.keep([slice(place.start, place.stop) for place in places])
        start = 0
        for span, place in zip(held_by, places, strict=True):
            stop = start + place.stop - place.start
            setattr(span, kind, BlockRows(block, start, stop))
            start = stop


def parse_bytes(given: int | str, name: str = "memory_bytes") -> int:
    """Return a number of bytes given as an int or as text: "2 GB" is 2 * 10**9, "2 GiB" is 2 * 2**30.

    Raises:
        ValueError: it is neither, or negative.

    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", given.lower())
        if match is not None and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return given
    raise ValueError(f'{name} must be a number of bytes such as 2_000_000_000 or "2 GB", not {given!r}.')


def default_max_bytes(device: torch.device) -> int:
    """Return the budget where none is given: `DEFAULT_SHARE` of what is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        free = _free_host_bytes()
    return int(free * DEFAULT_SHARE)


def _free_host_bytes() -> int:
    """Return the bytes that programs may still take, also within a container's limit where there is one."""
    free = _available_bytes()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file; "max"
        return free
    return max(0, min(free, limit - used + int(counts.get("inactive_file", 0))))  # less what is only cached files


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: all memory is the best that can be said without more dependencies
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
