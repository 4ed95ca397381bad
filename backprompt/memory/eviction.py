"""Eviction: the spans that leave the device when its byte budget is exceeded, and their order.

Leaves are evicted before their parents (tier.py). Among leaves the order is GreedyDual-Size (Cao and Irani 1997,
"Cost-Aware WWW Proxy Caching Algorithms"). On use, a span gets the credit `level + cost per byte`. The span of lowest
credit is evicted first, and the level rises to this credit. The cost of a token is that of its linear layers and of its
attention to earlier tokens. So of two spans last used at the same time, the span at the later position stays. States
save the same cost in far fewer bytes (in GPT-2 a 25th), so they outlive their keys and values by that ratio. In the end
states are evicted, too: otherwise old states would push out keys and values in use. Of spans with the same credit, the
most recently used span stays.

Evicted rows move to the second pool (host.py), which evicts its own rows in the same order. Pinned texts, and the spans
that the next pass attends to, are never evicted. The spans that a later pass of the same evaluation attends to are
evicted last, starting with those of the latest pass. If such a span is evicted, it is fetched or computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import replace

from backprompt.forest.forest import Forest
from backprompt.forest.span import Kind, Span
from backprompt.memory.host import HostMemory
from backprompt.memory.leaves import NOTHING_SPARED, Rank, Spared
from backprompt.memory.tier import Tier

logger = logging.getLogger(__name__)


class GreedyDual:
    """The order of eviction in all tiers.

    The cost of computing a token of a span, relative to the cost of its linear layers alone, is `1 + position / (6
    hidden)`. Multiplications in each layer: 12 hidden^2 in a token's linear layers, 2 hidden for each token before it.

    Args:
        hidden_size: the hidden size of the model.

    Attributes:
        times_smaller: the ratio of a token's bytes to those of its states; see `Layout.times_smaller`.

    """

    def __init__(self, hidden_size: int) -> None:
        self._tokens_of_a_layer = 6 * hidden_size
        self._level = 0.0
        self._clock = 0
        self.times_smaller = 1.0

    def touch(self, spans: Iterable[Span]) -> None:
        """Record that these spans are used now. Their ancestors count as used at the same time."""
        self._clock += 1
        for span in spans:
            span.last_used = self._clock
            span.credit = self._level + (1 + span.position / self._tokens_of_a_layer)

    def rank(self, kind: Kind, span: Span) -> Rank:
        """Return the rank of a span's rows."""
        if kind == "keys_values":
            return span.credit, span.last_used
        cost = 1 + span.position / self._tokens_of_a_layer
        return span.credit + (self.times_smaller - 1) * cost, span.last_used

    def raise_level(self, credit: float) -> None:
        """Record that rows of this credit were evicted."""
        self._level = max(self._level, credit)


class Memory(Tier):
    """The device's tier: the rows for passes and for results. Evicted rows go to the second pool."""

    def __init__(self, max_bytes: int, order: GreedyDual, host: HostMemory) -> None:
        super().__init__(max_bytes, "device", order.rank)
        self.order = order
        self.host = host

    def is_exceeded(self, num_coming_bytes: int = 0) -> bool:
        """Whether the held bytes together with the coming bytes exceed the budget."""
        return self.num_bytes + num_coming_bytes > self.max_bytes

    def touch(self, spans: Sequence[Span]) -> None:
        """Record that these spans are used now."""
        self.order.touch(spans)
        self.note(spans)
        self.host.note(spans)

    def forget(self) -> None:
        """Forget the spans, in both pools, because they have left the forest."""
        super().forget()
        self.host.forget()

    def end_plan(self) -> None:
        """End a plan of passes, in both pools: the spans that its passes attended to are no longer evicted last."""
        super().end_plan()
        self.host.end_plan()

    def evict(
        self, forest: Forest, held: Set[Span], spared: Spared = NOTHING_SPARED, num_coming_bytes: int = 0
    ) -> Collection[Span]:
        """Evict rows until the budget holds or no evictable row is left; join small blocks if there are many.

        An error may leave a block partly cut. Then the forest is no longer whole.

        Args:
            forest: all spans.
            held: the ends of texts in use.
            spared: the spans that must stay in one of the pools, with their ancestors, and the spans to evict last.
            num_coming_bytes: bytes to keep free for coming rows.

        Returns:
            The spans that have left the device.

        """
        excess = self.num_bytes + num_coming_bytes - self.max_bytes
        if excess <= 0:
            if self.is_scattered:
                with forest.changing():
                    self.compact()
            return ()
        num_held = self.num_bytes
        with forest.changing():
            dropped = self.shrink(forest, excess, replace(spared, stay=(*spared.stay, held)))
            self.order.raise_level(self._leaves.highest)
            self.host.take(forest, dropped, spared)
            gone = list(dropped["states"])
            del dropped  # the references keep blocks alive
            self.compact()
        logger.debug("Evicted %d bytes of %d; the budget is %d.", num_held - self.num_bytes, num_held, self.max_bytes)
        return gone
