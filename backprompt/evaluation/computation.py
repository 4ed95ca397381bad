"""Computing: texts go into the forest, and their missing spans are fetched, loaded or forwarded, within the budget.

Keeps the forest of spans, the executor that forwards them, the tiers of memory with their rows, the pools of results
that were read off them, and the holders of texts. All of these belong to one state of the model's weights: if the
weights change during the work, all results are forgotten.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import finalize

from torch import Tensor, nn

from backprompt.errors import NonFiniteError, StaleRepresentationError, UnsupportedModelError
from backprompt.evaluation.archive import Archive
from backprompt.evaluation.counters import Counters
from backprompt.evaluation.holders import Holders
from backprompt.evaluation.pools import Pools
from backprompt.evaluation.probed import Probed
from backprompt.forest.fan import Fan
from backprompt.forest.forest import Forest
from backprompt.forest.passes import (
    cut_into_passes,
    is_cut_off,
    last_uses,
    missing_spans,
    num_tokens_of,
    on_the_way,
)
from backprompt.forest.plan import TILE_TOKENS, plan_pass
from backprompt.forest.span import NOTHING, Junction, Span
from backprompt.memory.eviction import Memory
from backprompt.memory.leaves import NOTHING_SPARED, Spared
from backprompt.memory.snapshots import keep_snapshot
from backprompt.model.executor import Executor
from backprompt.model.forwarded import Work
from backprompt.model.levels import check_packed
from backprompt.model.probe import probe
from backprompt.progress import GrowingBar
from backprompt.tokens.graph import TokenGraph, TokenIds

logger = logging.getLogger(__name__)

MAX_EMPTY_SPANS = 10_000
"""The largest number of spans without rows that stay in the forest, to count the tokens that are computed again."""

MAX_EMPTY_TOKENS = 1_000_000
"""The largest number of tokens in such spans; each id takes 40 bytes."""


@dataclass(frozen=True, slots=True)
class Request:
    """The options of a computation, besides the texts.

    Attributes:
        with_keys_values: whether the texts' ends must hold keys and values, too.
        is_step: whether this is a step of a generation: part of the evaluation that began the generation, without
            reading from the store or writing to it.
        before_eviction: called before an eviction over the budget, to read off results while their states are held.
        arrived: a list to which each text's end is added once its states have come; ends that hold their states at the
            beginning are left out.

    """

    with_keys_values: bool = False
    is_step: bool = False
    before_eviction: Callable[[], None] | None = None
    arrived: list[Span] | None = None

    def note_arrival(self, end: Span) -> None:
        """Note that the states of an end have come."""
        if self.arrived is not None:
            self.arrived.append(end)


@dataclass(slots=True)
class _Empty:
    """Upper bounds for the number of spans without rows, and for the number of their tokens."""

    num_spans: int = 0
    num_tokens: int = 0

    @property
    def is_too_much(self) -> bool:
        """Whether the spans may exceed the bounds."""
        return self.num_spans > MAX_EMPTY_SPANS or self.num_tokens > MAX_EMPTY_TOKENS

    def add(self, spans: Iterable[Span]) -> None:
        """Count spans that may have lost their rows."""
        for span in spans:
            self.num_spans += 1
            self.num_tokens += len(span.token_ids)


@dataclass(frozen=True)
class Means:
    """The parts that a computation works with.

    Attributes:
        model: the user's model, for the probe.
        has_changed: whether the model's weights have changed.
        has_moved: the same, but without a look at the numbers in them.
        executor: runs passes and the output head.
        memory: the device's tier, with the second pool below it.
        pools: the pools of results.
        archive: the connection of the forest with a store, if there is one.
        counters: the counters of the `LM`.
        max_tokens_per_forward: the largest number of tokens in a pass; None for the device's default.

    """

    model: nn.Module
    has_changed: Callable[[], bool]
    has_moved: Callable[[], bool]
    executor: Executor
    memory: Memory
    pools: Pools
    archive: Archive | None
    counters: Counters
    max_tokens_per_forward: int | None


def _checked(token_ids: TokenIds, executor: Executor) -> TokenIds:
    """Return the ids of a text; raise UnsupportedModelError if it has groups and the model cannot evaluate them."""
    if isinstance(token_ids, TokenGraph):
        check_packed(executor.levels, "Groups and frozen segments")
    return token_ids


def _note_unfolded(pools: Pools, memory: Memory, fan: Fan, spans: Sequence[Span]) -> None:
    """Note that spans took the place of a fan; the forest calls this, and must not keep a computation alive."""
    pools.unfold(fan, spans)
    memory.note(spans)
    memory.host.note(spans)


class Computation:
    """Computes spans, each once for as long as it is held.

    Attributes:
        probed: the findings of the probe; None before it ran.

    """

    def __init__(self, means: Means) -> None:
        self._model = means.model
        self._has_changed = means.has_changed
        self._has_moved = means.has_moved
        self.executor = means.executor
        self.memory = means.memory
        self.pools = means.pools
        self.archive = means.archive
        self.counters = means.counters
        self.max_tokens = means.max_tokens_per_forward or self.executor.tokens_per_forward()
        self.forest = Forest(on_unfold=partial(_note_unfolded, means.pools, means.memory))
        self.holders = Holders()
        self.tile_tokens = TILE_TOKENS
        self._checked_work = self.counters.work
        self.probed: Probed | None = None
        self._empty = _Empty()
        # Spans refer to each other: without this, their tensors would wait for the cycle collector.
        finalize(self, self.forest.clear).atexit = False

    @property
    def token_bytes(self) -> int:
        """The bytes of all rows held for one token; the first use runs the probe."""
        self.probe_once()
        return self.executor.token_bytes

    def num_bytes_of(self, ends: Iterable[Span]) -> int:
        """Return the bytes that all of these texts take together, in the device's memory."""
        spans = on_the_way(ends)
        return num_tokens_of(spans) * self.token_bytes + len(spans) * self.executor.snapshot_bytes

    def inserted(
        self, texts: Iterable[TokenIds], known: Iterable[Span | None] | None = None, *, are_ends: bool = True
    ) -> AbstractContextManager[list[Span]]:
        """Yield the ends of texts in the forest; `known`: each text's end, or None; `are_ends`: see `Forest.insert`."""
        return self._in_forest(
            self.forest.insert(_checked(token_ids, self.executor), is_end=are_ends) if end is None else end
            for token_ids, end in zip(texts, itertools.repeat(None) if known is None else known, strict=False)
        )

    def extended(self, texts: Iterable[tuple[Span, tuple[int, ...]]]) -> AbstractContextManager[list[Span]]:
        """Yield the ends of texts that continue spans of the forest; the ends are not marked as `is_end`."""
        return self._in_forest(self.forest.extend(end, end.stop, more) for end, more in texts)

    @contextmanager
    def _in_forest(self, ends_of_texts: Iterable[Span]) -> Iterator[list[Span]]:
        self.probe_once()
        ends = list(ends_of_texts)
        self.memory.touch(ends)
        yield ends
        if self._empty.is_too_much:
            self._empty = _Empty(*self.forest.count_empty())
            if self._empty.is_too_much:
                self._prune(MAX_EMPTY_SPANS * 9 // 10, MAX_EMPTY_TOKENS * 9 // 10)  # the next evaluation need not prune

    @contextmanager
    def held(self, texts: Sequence[TokenIds], request: Request) -> Iterator[list[Span]]:
        """Compute the missing spans of texts and hold the texts for as long as the context lasts; yield their ends."""
        with self.inserted(texts) as ends, self.holders.using(ends):
            self.compute(ends, request)
            yield ends

    def compute(self, ends: Iterable[Span], request: Request) -> None:
        """Compute the missing spans of the texts that end here, pass by pass, within the budget.

        A span that is dropped although a later pass needs it is fetched, or planned and forwarded again.
        """
        waiting = dict.fromkeys(end for end in ends if not end.is_held(with_keys_values=request.with_keys_values))
        if waiting and not request.is_step:
            self.forest.begin_evaluation()
        is_stuck = False  # whether the last round finished no text: then the next round takes one text alone
        with GrowingBar("evaluating", "tokens") as bar:
            while waiting:
                num_waiting = len(waiting)
                self._compute_some(waiting, request, bar, is_stuck=is_stuck)
                self.memory.end_plan()
                is_stuck = len(waiting) == num_waiting

    def _compute_some(self, waiting: dict[Span, None], request: Request, bar: GrowingBar, *, is_stuck: bool) -> None:
        """Compute the texts that there is room for, or only the first; remove finished texts from `waiting`."""
        asked = list(waiting)[: 1 if is_stuck else None]
        group = self._bring_back(asked, request)
        for end in group:
            if end.is_held(with_keys_values=request.with_keys_values):
                del waiting[end]
                request.note_arrival(end)
        missing = missing_spans(group, with_keys_values=request.with_keys_values)
        passes = cut_into_passes(self.forest, missing, self.max_tokens)
        bar.expect(sum(map(num_tokens_of, passes)), is_long=len(passes) > 1)
        uses = last_uses(passes)
        for pass_idx, spans in enumerate(passes):
            needed = {parent for span in spans for parent in span.parents}
            if is_stuck:  # otherwise one pass may drop rows that another has computed for the group
                needed |= on_the_way(group)
            self._make_room_for(Spared((needed,), uses, pass_idx), request)
            if is_cut_off(spans):
                return
            self._forward(spans)
            if self.archive is not None and not request.is_step:
                self.archive.save_new(span for span in spans if span.token_ids)
            bar.update(num_tokens_of(spans))
            for span in spans:
                if span in waiting:
                    del waiting[span]
                    request.note_arrival(span)
        self._make_room_for(NOTHING_SPARED, request)

    def _bring_back(self, ends: Sequence[Span], request: Request) -> Sequence[Span]:
        """Fetch the rows that the texts need from the second pool, and load rows from the store.

        Returns the ends of the texts that there was room for, at least one, in the order of `ends`. A sketch plans in
        this order, too. The spans that are still missing must be forwarded.
        """
        archive = None if request.is_step else self.archive
        served = ends
        if self.memory.host.num_bytes or archive is not None:
            asked, in_order = set(ends), missing_spans(ends, with_keys_values=request.with_keys_values)
            served = [span for span in in_order if span in asked]  # depth first
        if self.memory.host.num_bytes:
            served = self._fetch(served, request)
        if archive is not None:
            served = self._load(archive, served, request)
        brought = set(served)
        return [end for end in ends if end in brought]

    def _fetch(self, ends: Sequence[Span], request: Request) -> Sequence[Span]:
        """Move rows back from the second pool; return the ends of the texts that there was room for."""
        host = self.memory.host
        pinned = on_the_way(self.holders.pinned_ends())
        room = self.memory.max_bytes - self.num_bytes_of(pinned)
        planned = host.plan_fetch(ends, room, pinned, with_keys_values=request.with_keys_values)
        if planned.num_bytes:
            needed = on_the_way([*planned.served, *planned.spans["states"], *planned.spans["keys_values"]])
            self._make_room_for(Spared((needed,)), request, planned.num_bytes)
            self.memory.add(host.fetch(self.forest, planned))
            self.memory.note([span for spans in planned.spans.values() for span in spans])
            self.counters.tokens_fetched += planned.num_tokens
        return planned.served

    def _load(self, archive: Archive, ends: Sequence[Span], request: Request) -> Sequence[Span]:
        """Load rows from the store; return the ends of the texts that there was room for."""
        free = max(0, self.memory.max_bytes - self.memory.num_bytes)
        room = free + self.max_tokens * self.executor.token_bytes
        layout = self.executor.layout
        assert layout is not None, "the probe ran a pass"
        loaded = archive.load(self.forest, ends, room, self.memory, layout, with_keys_values=request.with_keys_values)
        self.counters.tokens_loaded += loaded.num_tokens
        if loaded.num_tokens:
            logger.debug("Loaded %d tokens from the store.", loaded.num_tokens)
        return loaded.served

    def _forward(self, spans: Sequence[Span]) -> None:
        """Forward the spans in one pass, and let them hold the results."""
        started = time.perf_counter()
        with_tokens = [span for span in spans if span.token_ids]
        computed = None
        if with_tokens:
            with self.blaming_weights():
                computed = self.executor.compute(plan_pass(with_tokens, self.tile_tokens))
        num_tokens = num_tokens_of(with_tokens)
        num_recomputed = num_tokens_of(span for span in with_tokens if span.was_computed)
        with self.forest.changing():
            evaluation = self.forest.stamp()
            if computed is not None:
                for span in computed.states_of:
                    if span.error:  # it was loaded inexactly once, and pooled logits may depend on it
                        span.error = 0.0
                        self.pools.clear()
                computed.place()
                self.memory.add((computed.keys_values, computed.states))
            for span in spans:
                if isinstance(span, Junction):
                    span.place(keys_values=NOTHING, states=NOTHING)
                span.was_computed = True
                span.computed_in = evaluation
            self.memory.note(spans)
        if computed is not None:
            self.note_work(computed.work)
        self.counters.tokens_computed += num_tokens
        self.counters.tokens_recomputed += num_recomputed
        self.counters.seconds += time.perf_counter() - started

    def note_work(self, work: Work) -> None:
        """Count a pass, and keep the snapshots that it has restored.

        Rows of pinned texts are never evicted, so pinned spans get snapshots only within the budget.
        """
        self.counters.note_pass(work)
        if not work.restored:
            return
        pinned = {span for end in self.holders.pinned_ends() for span in end.closure()}
        for span, snapshot in work.restored.items():
            if span not in pinned or not self.memory.is_exceeded(snapshot.nbytes):
                self.memory.add([keep_snapshot(span, snapshot)])

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head to `(rows, hidden)`, and count the rows."""
        started = time.perf_counter()
        with self.blaming_weights():
            logits = self.executor.logits(hidden)
        self.counters.logit_rows += hidden.shape[0]
        self.counters.seconds += time.perf_counter() - started
        return logits

    def make_room(self) -> None:
        """Evict rows over the budget."""
        self._make_room_for(NOTHING_SPARED, Request())

    def _make_room_for(self, spared: Spared, request: Request, num_coming_bytes: int = 0) -> None:
        """Evict rows over the budget, including rows to come; see `Memory.evict`."""
        is_exceeded = self.memory.is_exceeded(num_coming_bytes)
        layout = self.executor.layout
        if layout is None or not (is_exceeded or self.memory.is_scattered):
            return  # without a layout, the first pass failed, and nothing is held
        if is_exceeded and request.before_eviction is not None:
            request.before_eviction()
        self.memory.order.times_smaller = layout.times_smaller
        self._empty.add(self.memory.evict(self.forest, self.holders.ends(), spared, num_coming_bytes))

    def recover(self) -> None:
        """Restore a consistent state after any error: "Failures" in docs/design/evaluation.md.

        If the forest is whole, all computed spans are kept, and spans that were never computed leave it. Else all
        results are forgotten.
        """
        self.holders.stop_using()
        self.executor.abandon()
        self.forest.next_step = None
        if not self.forest.is_whole:
            self._forget()
        self._prune(MAX_EMPTY_SPANS, MAX_EMPTY_TOKENS)
        spans = list(self.forest.spans())
        for tier in (self.memory, self.memory.host):
            tier.recount(spans)
        self.make_room()

    def clear(self) -> None:
        """Forget all results, those of pinned texts and graphs of steps included."""
        self.holders.unpin_all()
        self.executor.forget_graphs()
        self._forget()

    def _forget(self) -> None:
        self.forest.clear()
        self.memory.forget()
        self.pools.clear()
        self._empty = _Empty()

    def _prune(self, max_spans: int, max_tokens: int) -> None:
        """Forget spans without rows, except the latest, and results that would keep such spans alive."""
        self.forest.prune(max_spans, max_tokens)
        self._empty = _Empty(max_spans, max_tokens)
        self.pools.retain(set(self.forest.spans()))

    def probe_once(self, known: Probed | None = None) -> None:
        """Compare a small tree with plain calls, once; from then on a token's bytes are known.

        `known`: the findings of the probe about a model with the same parts, so that it need not run.
        """
        if self.probed is not None:
            return
        if known is None:
            with self.blaming_weights():
                probe(self._model, self.executor)
            known = Probed.of(self.executor)
        else:
            known.hand_to(self.executor)
        self.probed = known

    def check_unchanged(self, are_numbers_same: bool | None = None) -> None:
        """Raise StaleRepresentationError if weights have changed since the work that was checked last.

        The work since then may mix states of the weights, so all results are forgotten: weights may change
        back unnoticed.

        Args:
            are_numbers_same: the result of a look at the numbers that was part of the work; None if there was no look.

        """
        if self.counters.work != self._checked_work:
            self._raise_if_changed(are_numbers_same)
            self._checked_work = self.counters.work

    def _raise_if_changed(self, are_numbers_same: bool | None = None) -> None:
        if self._has_changed() if are_numbers_same is None else self._has_moved() or not are_numbers_same:
            self.clear()
            raise StaleRepresentationError(
                "The model's weights have changed while they were used, so the results mix two states of the "
                "weights, and none is kept. Call again, and let other threads change weights only between calls."
            )

    @contextmanager
    def blaming_weights(self) -> Iterator[None]:
        """Replace errors of the model by StaleRepresentationError if its weights have changed."""
        try:
            yield
        except (NonFiniteError, UnsupportedModelError):
            self._raise_if_changed()
            raise
