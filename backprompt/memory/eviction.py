"""Eviction: the spans that leave the device when its byte budget is exceeded, and in which order.

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
from collections.abc import Iterable, Mapping, Set

from backprompt.forest.forest import Forest
from backprompt.forest.span import Kind, Span
from backprompt.memory.blocks import keys_values_of, states_of
from backprompt.memory.host import HostMemory
from backprompt.memory.tier import Rank, Tier

logger = logging.getLogger(__name__)


class Memory(Tier):
    """The device's tier: the rows for passes and for results. Evicted rows go to the second pool."""

    def __init__(self, max_bytes: int, hidden_size: int, host: HostMemory) -> None:
        super().__init__(max_bytes, "device")
        self._hidden_size = hidden_size
        self.host = host
        self._level = 0.0
        self._clock = 0
        self.has_evicted = False  # since somebody reset this

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
                self.compact(list(forest.held_spans()))
            return
        num_held = self.num_bytes
        last_uses = last_uses or {}

        spans = list(forest.held_spans())
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
            self.has_evicted = True
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
