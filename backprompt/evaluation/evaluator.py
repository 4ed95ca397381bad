"""The evaluator: all results of one state of a model's weights, and the parts that compute them.

Keeps the computation (inserting, computing, evicting), and above it scoring, reading out and continuations. When the
weights change, the `LM` drops its evaluator with all these parts, and makes a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from backprompt.errors import MemoryBudgetError
from backprompt.evaluation.attention_maps import AttentionMaps
from backprompt.evaluation.computation import Computation, Means, Request
from backprompt.evaluation.continuations import Continuations
from backprompt.evaluation.holders import PinnedText
from backprompt.evaluation.lookup import Aside, Sketch
from backprompt.evaluation.readout import Readout
from backprompt.evaluation.scoring import Scoring
from backprompt.forest.forest import Forest
from backprompt.forest.span import Span
from backprompt.tokens.graph import TokenIds


class Evaluator:
    """Evaluates texts and holds them.

    Attributes:
        forest: all spans.
        executor: runs passes and the output head.
        memory: the device's tier.
        host: the second pool.
        pools: the pools of results that no block holds.
        archive: the connection of the forest with a store, if there is one.
        holders: the pins, growing texts and uses that hold texts.
        max_tokens_per_forward: the largest number of tokens in a packed pass.
        computation: inserts texts, computes their missing spans, evicts.
        scoring: log-probabilities of tokens.
        readout: logits, hidden states, keys and values.
        attention_maps: weights of attention.
        continuations: texts that grow.
        is_closed: whether all results were forgotten for good.

    """

    def __init__(self, means: Means) -> None:
        self.computation = Computation(means)
        self.executor = means.executor
        self.memory = means.memory
        self.host = means.memory.host
        self.pools = means.pools
        self.archive = means.archive
        self.forest = self.computation.forest
        self.holders = self.computation.holders
        self.max_tokens_per_forward = self.computation.max_tokens
        self.scoring = Scoring(self.computation)
        self.readout = Readout(self.computation, self.scoring)
        self.attention_maps = AttentionMaps(self.computation)
        self.continuations = Continuations(self.computation, self.scoring)
        self.is_closed = False

    def sketch(self, texts: Iterable[TokenIds], asides: Iterable[Aside] = ()) -> Sketch:
        """Return the held parts of texts, in a forest of their own; no row is changed, loaded or forwarded."""
        return Sketch(self.forest, texts, self.archive, asides)

    def evaluate(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Compute the missing spans of texts given by their token ids, and return the ends of the texts.

        Results over the budget are dropped again; `held` restores those of a text. If a pass fails, the passes before
        it stay computed, and `recover` removes the rest.
        """
        with self.computation.inserted(texts) as ends:
            self.computation.compute(ends, Request())
        return ends

    @contextmanager
    def held(self, token_ids: TokenIds, end: Span, *, with_keys_values: bool = False) -> Iterator[Span]:
        """Keep a text's states (`with_keys_values`: and its keys and values) for as long as the context lasts.

        Dropped spans are computed again. Yields the text's end; `end` is the last known end.
        """
        if end.is_held(with_keys_values=with_keys_values):
            with self.holders.using([end]):
                yield end
            return
        self.computation.counters.tokens_requested += len(token_ids)
        with self._computed(token_ids, Request(with_keys_values=with_keys_values)) as end:
            yield end

    def save(self, token_ids: TokenIds) -> None:
        """Write a text to the store, computed if need be."""
        assert self.archive is not None
        with self._computed(token_ids, Request(with_keys_values=True)) as end:
            self.archive.save(end)

    @contextmanager
    def _computed(self, token_ids: TokenIds, request: Request) -> Iterator[Span]:
        """Compute the missing spans of a text and hold the text for as long as the context lasts."""
        with self.computation.inserted([token_ids]) as ends:
            with self.holders.using(ends):
                self.computation.compute(ends, request)
                yield ends[0]
            self.computation.make_room()

    def pin(self, pin: PinnedText) -> None:
        """Compute a text and hold all of it until `unpin`.

        Raises:
            MemoryBudgetError: the text does not fit the budget, beside the texts that are pinned already.

        """
        with self.computation.inserted([pin.token_ids]) as ends, self.holders.using(ends):
            (pin.end,) = ends
            num_bytes = self.num_bytes_to_hold(ends)
            if num_bytes > self.memory.max_bytes:
                raise MemoryBudgetError(
                    f"With this text of {len(pin.token_ids)} tokens, pins would hold {num_bytes:,} bytes, more "
                    "than the "
                    f"LM's budget of {self.memory.max_bytes:,}. Release other pins, or give the LM more: "
                    "LM(..., memory_bytes=...)."
                )
            self.computation.compute(ends, Request(with_keys_values=True))
            self.holders.pin(pin)

    def is_pinned(self, pin: PinnedText) -> bool:
        """Return whether a text is still pinned; after `clear` no text is."""
        return pin in self.holders.pins

    def unpin(self, pin: PinnedText) -> None:
        """Release a pinned text; a text that is not pinned may be given, too."""
        self.holders.unpin(pin)
        self.computation.make_room()

    def hold_pins(self) -> None:
        """Compute pinned texts again where they were forgotten."""
        lost = [pin for pin in self.holders.pins if pin.end is None or not pin.end.is_held(with_keys_values=True)]
        if lost:
            with self.computation.held([pin.token_ids for pin in lost], Request(with_keys_values=True)) as ends:
                for pin, end in zip(lost, ends, strict=True):
                    pin.end = end

    def num_bytes_to_hold(self, ends: Collection[Span]) -> int:
        """Return the bytes of all rows that these texts and the pinned texts need."""
        return self.computation.num_bytes_of([*self.holders.pinned_ends(), *ends])

    def num_bytes_to_grow(self, prompts: Sequence[TokenIds], num_new: int) -> int:
        """Return the bytes that prompts and the pinned texts need if the prompts grow by `num_new` tokens in all.

        Where even the sum over all texts fits the budget, this is the sum; else common beginnings count once.
        """
        texts = [*prompts, *(pin.token_ids for pin in self.holders.pins)]
        grown = num_new * self.computation.token_bytes + len(prompts) * self.executor.snapshot_bytes
        apart = sum(map(len, texts)) * self.computation.token_bytes + 2 * len(texts) * self.executor.snapshot_bytes
        if grown + apart <= self.memory.max_bytes:
            return grown + apart
        forest = Forest()
        num_bytes = self.computation.num_bytes_of(list(map(forest.insert, texts)))
        forest.clear()  # spans refer to each other
        return grown + num_bytes

    def close(self) -> None:
        """Forget all results for good, so that no reference to the evaluator keeps copies of weights alive."""
        self.is_closed = True
        self.computation.clear()
        self.executor.close()
