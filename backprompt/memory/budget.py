"""The byte budget: the amount held on the device between passes, and the order of eviction when it is exceeded.

Leaves are evicted before their parents (tier.py). Among leaves the order is GreedyDual-Size (Cao and Irani 1997,
"Cost-Aware WWW Proxy Caching Algorithms"): on use, a span gets the credit `level + cost a byte`; the lowest credit is
evicted first, and the level rises to it. The cost of a token is that of its linear layers and of attention to earlier
tokens, so of two spans last used at the same time the span at the later position stays. States save the same cost in
far fewer bytes (in GPT-2 a 25th), so they outlive their keys and values by that ratio. They are evicted in the end, or
old states would push out keys and values in use. Among equals the most recently used span stays.

Evicted rows move to the second pool (host.py), which evicts its own rows in the same order. Pinned texts, and the spans
that the next pass attends to, are never evicted. The spans that a later pass of the same evaluation attends to are
evicted last, those of the latest pass first, and are fetched or computed again.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

import torch

from backprompt.arguments import is_int
from backprompt.forest.forest import Forest
from backprompt.forest.span import Kind, Span
from backprompt.memory.blocks import keys_values_of, states_of
from backprompt.memory.host import HostMemory
from backprompt.memory.tier import Rank, Tier

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.5
"""The default budget, as a share of the free memory of the device."""

DEFAULT_HOST_SHARE = 0.25
"""The default budget of the second pool, as a share of the free host memory."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


class Memory(Tier):
    """The device's tier: the rows for passes and for results. Evicted rows go to the second pool."""

    def __init__(self, max_bytes: int, hidden_size: int, host: HostMemory) -> None:
        super().__init__(max_bytes, "device")
        self._hidden_size = hidden_size
        self.host = host
        self._level = 0.0
        self._clock = 0
        self.num_empty_spans = self.num_empty_tokens = 0  # of the forest, at the last eviction

    def is_exceeded(self, num_coming_bytes: int = 0) -> bool:
        """Whether the bytes held, with those to come, exceed the budget."""
        return self.num_bytes + num_coming_bytes > self.max_bytes

    def touch(self, spans: Iterable[Span]) -> None:
        """Record that these spans are used now. Their ancestors count as used at the same time."""
        self._clock += 1
        for span in spans:
            span.last_used = self._clock
            span.credit = self._level + self._cost(span)

    def evict(
        self,
        forest: Forest,
        held: Set[Span],
        needed: Set[Span] = frozenset(),
        last_uses: Mapping[Span, int] | None = None,
        next_pass: int = 0,
        num_coming_bytes: int = 0,
    ) -> None:
        """Evict rows until the budget holds or no evictable row is left; join small blocks if there are many.

        After an error, blocks may be partly cut: the forest is not whole any more.

        Args:
            forest: all spans.
            held: the ends of texts in use.
            needed: spans that must stay, with their ancestors.
            last_uses: for the spans that later passes attend to, the index of the last such pass.
            next_pass: the index of the next pass.
            num_coming_bytes: bytes to keep free for coming rows.

        """
        excess = self.num_bytes + num_coming_bytes - self.max_bytes
        if excess <= 0:
            if self.is_scattered:
                self.compact(list(forest.spans()))
            return
        num_held = self.num_bytes
        last_uses = last_uses or {}

        spans = list(forest.spans())
        smaller = _times_smaller(spans)

        def rank(kind: Kind, span: Span) -> Rank | None:
            if span in needed:
                return None
            last_use = last_uses.get(span, -1)
            if last_use >= next_pass:
                return (1, -last_use, 0)
            worth = (smaller - 1) * self._cost(span) if kind == "states" else 0.0
            return (0, span.credit + worth, span.last_used)

        with forest.changing():
            dropped = self.shrink(spans, excess, lambda kind, span: None if span in held else rank(kind, span))
            ranks = [rank(kind, span) for kind, rows in dropped.items() for span in rows]
            self._level = max([self._level, *(found[1] for found in ranks if found is not None and found[0] == 0)])
            self.host.take(spans, dropped, rank)
            empty = [span for span in spans if span.is_empty]
            self.num_empty_spans, self.num_empty_tokens = len(empty), sum(len(span.token_ids) for span in empty)
            del dropped  # the references keep blocks alive
            self.compact(spans)
        logger.debug("Evicted %d bytes of %d; the budget is %d.", num_held - self.num_bytes, num_held, self.max_bytes)

    def _cost(self, span: Span) -> float:
        """Return the cost of computing a token of the span, in units of its linear layers.

        Multiplications in each layer: 12 hidden^2 in a token's linear layers, 2 hidden for each token before it.
        """
        return 1 + span.position / (6 * self._hidden_size)


def _times_smaller(spans: Iterable[Span]) -> float:
    """Return the ratio of a token's bytes, keys and values included, to those of its states."""
    for span in spans:
        if span.token_ids and span.is_held(with_keys_values=True):
            states_bytes = states_of(span).num_bytes
            return (keys_values_of(span).num_bytes + states_bytes) / states_bytes
    return 1.0


def parse_bytes(given: int | str, name: str = "memory_bytes") -> int:
    """Return a number of bytes given as an int or as text: "2 GB" is 2 * 10**9, "2 GiB" is 2 * 2**30.

    Raises:
        ValueError: the value is neither, or negative.

    """
    if isinstance(given, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", given.lower())
        if match is not None and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    elif is_int(given) and given >= 0:
        return int(given)
    raise ValueError(f'{name} must be a number of bytes such as 2_000_000_000 or "2 GB", not {given!r}.')


def default_max_bytes(device: torch.device) -> int:
    """Return the default budget: `DEFAULT_SHARE` of the memory that is free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    else:
        free = _free_host_bytes()
    return int(free * DEFAULT_SHARE)


def default_host_bytes(device: torch.device) -> int:
    """Return the default budget of the second pool: `DEFAULT_HOST_SHARE` of the host memory that is free now.

    The budget is 0 if the device has no memory of its own.
    """
    return 0 if device.type in ("cpu", "mps") else int(_free_host_bytes() * DEFAULT_HOST_SHARE)


def _free_host_bytes() -> int:
    """Return the bytes that programs may still take, also within a container's limit if there is one."""
    free = _available_bytes()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the file is missing, or says "max"
        return free
    return max(0, min(free, limit - used + int(counts.get("inactive_file", 0))))  # cached files can be reclaimed


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: total memory is the best estimate without more dependencies
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
