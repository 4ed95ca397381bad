"""The evaluator: everything computed with one state of a model's weights.

It holds the forest of spans, the executor that computes them, and pools of logit rows and of scores. When the weights
change, the `LM` drops its evaluator, with all of this, and makes a new one.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn

from backprompt.archive import Archive
from backprompt.cache import CandidatePool, LogitPool, States, TokenScore, gather, keys_values_of, states_of
from backprompt.errors import MemoryBudgetError, NonFiniteError, StaleRepresentationError, UnsupportedModelError
from backprompt.executor import Executor
from backprompt.growth import Growth
from backprompt.host import HostMemory
from backprompt.logprobs import are_distributions, log_softmax
from backprompt.lookup import Aside, Sketch
from backprompt.memory import Memory
from backprompt.passes import cut_into_passes, missing_spans
from backprompt.plan import TILE_TOKENS, plan_pass
from backprompt.probe import probe
from backprompt.progress import GrowingBar, progress_bar
from backprompt.radix import NOTHING, Forest, Junction, Place, Span
from backprompt.token_graph import TokenGraph, TokenIds, flat, without_last

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

DEFAULT_TOKENS_PER_FORWARD = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Larger passes cost activation memory and win nothing: on the CPU packs of 512 to 1,024 tokens measured best."""


LOG_SOFTMAX_BYTES = 4 << 20

MAX_CANDIDATE_BYTES = 64 << 20
"""Bound of the pool of log-probabilities of tokens that were scored and not forwarded."""

MAX_EMPTY_SPANS = 10_000
"""Spans of which nothing is held any more stay in the forest up to this number, to tell what is computed again."""

MAX_EMPTY_TOKENS = 1_000_000
"""And up to this number of tokens, whose ids take 40 bytes each."""

ReadAhead: TypeAlias = "Callable[[], list[Place]]"
"""Returns other texts that will probably be asked for next; called only if something must be computed."""


@dataclass
class Counters:
    """Work done so far; `LM.stats` is a frozen copy."""

    tokens_requested: int = 0
    tokens_computed: int = 0
    tokens_recomputed: int = 0
    tokens_fetched: int = 0
    tokens_loaded: int = 0
    forward_passes: int = 0
    logit_rows: int = 0
    seconds: float = 0.0

    @property
    def work(self) -> tuple[int, int]:
        """What was computed with the model's weights."""
        return self.forward_passes, self.logit_rows


@dataclass(frozen=True)
class TokenScores:
    """How a model rates given tokens, each given those before it.

    Attributes:
        logprobs: log-probabilities, `(tokens,)`, nats, float64 for a model in float64 and else float32; -inf for a
            token of probability 0, nan for a token that nothing predicts.
        is_argmax: whether greedy decoding would have chosen the token, `(tokens,)`, bool. Of tokens whose logits are
            equal in float32 the one with the lowest id is chosen; False where nothing predicts.

    """

    logprobs: Tensor
    is_argmax: Tensor

    @classmethod
    def of(cls, scores: Sequence[TokenScore], dtype: torch.dtype, device: torch.device) -> TokenScores:
        """Return these as tensors on a device, log-probabilities in this dtype."""
        logprobs = torch.tensor([score.logprob for score in scores], dtype=dtype, device=device)
        return cls(logprobs, torch.tensor([score.is_argmax for score in scores], dtype=torch.bool, device=device))

    def __getitem__(self, rows: slice) -> TokenScores:
        return TokenScores(self.logprobs[rows], self.is_argmax[rows])

    def followed_by(self, others: TokenScores) -> TokenScores:
        """Return these with others behind them."""
        return TokenScores(torch.cat([self.logprobs, others.logprobs]), torch.cat([self.is_argmax, others.is_argmax]))


class Growing(Protocol):
    """A text that grows."""

    @property
    def ends(self) -> Mapping[Any, Span]:
        """The ends of its continuations that are held."""
        ...


@dataclass(eq=False)
class PinnedText:
    """A text that is held for as long as its pin is not released, and the span at which it ends."""

    token_ids: TokenIds = ()
    end: Span | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be scored: a text's tokens from `start` on, and tokens that may follow it and are not forwarded."""

    token_ids: TokenIds
    start: int
    candidates: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a text's tokens from `start` on, and of each candidate."""

    tokens: TokenScores
    candidates: Mapping[int, TokenScore]


def split_to_score(token_ids: TokenIds, start: int) -> tuple[TokenIds, int] | None:
    """Return what is forwarded of a text that is scored from `start` on, and its last token, which is not.

    None where all of it is forwarded: nothing is scored, or no one token stands before the last one.
    """
    return without_last(token_ids) if start < len(token_ids) else None


class Evaluator:
    """Computes spans, and from their hidden states logits and log-probabilities, each once."""

    def __init__(
        self,
        model: nn.Module,
        has_changed: Callable[[], bool],
        counters: Counters,
        max_tokens_per_forward: int | None,
        memory_bytes: int,
        host: HostMemory,
        max_result_bytes: int,
        decode: Callable[[Sequence[int]], str],
        archive: Archive | None = None,
        *,
        pack_weights: bool = False,
    ) -> None:
        self._model = model
        self._has_changed = has_changed  # whether the weights are others now
        self.executor = Executor(model, decode, pack_weights=pack_weights)
        self.forest = Forest()
        self.counters = counters
        self._checked_work = counters.work
        self._max_tokens = max_tokens_per_forward or DEFAULT_TOKENS_PER_FORWARD.get(self.executor.device.type, 1024)
        self._pool = LogitPool(max_result_bytes)
        self._candidates = CandidatePool(MAX_CANDIDATE_BYTES)
        self.host = host
        self.memory = Memory(memory_bytes, self.executor.hidden_size, host)
        self._archive = archive
        self._growth = Growth(self.forest)
        self.abandoned: deque[Sequence[Growing]] = deque()
        """Texts that were growing when whoever let them grow failed or was discarded, by any thread at any time."""
        self.is_closed = False
        self._pins: dict[PinnedText, None] = {}
        self._growing: WeakKeyDictionary[object, Sequence[Growing]] = WeakKeyDictionary()  # by who lets them grow
        self._in_use: dict[object, Sequence[Span]] = {}  # ends of what is being computed or read
        self.tile_tokens = TILE_TOKENS
        self._is_probed = False
        # Spans refer to each other: without this, their tensors would wait for the cycle collector.
        finalize(self, self.forest.clear).atexit = False

    @property
    def result_bytes_held(self) -> int:
        """Bytes of the rows of logits, and of the log-probabilities of candidates, in their pools."""
        return self._pool.num_bytes + self._candidates.num_bytes

    def clear(self) -> None:
        """Forget all that was computed, pinned texts included."""
        self._pins.clear()
        self._forget()

    def check_unchanged(self) -> None:
        """Raise StaleRepresentationError if weights have changed since what was computed last was begun.

        Then it may be of no one state of them, and all is forgotten: they may change back without that showing.
        """
        if self.counters.work != self._checked_work:
            self._raise_if_changed()
            self._checked_work = self.counters.work

    def _raise_if_changed(self) -> None:
        if self._has_changed():
            self.clear()
            raise StaleRepresentationError(
                "The model's weights have changed while they were used, so what was computed is of no one state of "
                "them. Nothing of it is kept. Call again, and let other threads change weights between calls."
            )

    def close(self) -> None:
        """Forget everything for good: whoever still refers to this must not keep copies of weights alive."""
        self.is_closed = True
        self.clear()
        self.executor.close()

    def recover(self) -> None:
        """Make everything right again after an error, wherever it came; docs/design.md, "Failures", says how.

        Where the forest is whole all that was computed is kept, and what was to be computed leaves it. Else everything
        is forgotten; `hold_pins` computes again what pins hold.
        """
        self._in_use.clear()
        if not self.forest.is_whole:
            self._forget()
        self._prune()
        spans = list(self.forest.spans())
        for tier in (self.memory, self.host):
            tier.recount(spans)
        self._make_room()

    def hold_pins(self) -> None:
        """Compute what pins hold where it was forgotten."""
        lost = [pin for pin in self._pins if pin.end is None or not _is_held(pin.end, with_keys=True)]
        if lost:
            with self._inserted([pin.token_ids for pin in lost]) as ends, self._using(ends):
                self._compute(ends, with_keys=True)
                for pin, end in zip(lost, ends, strict=True):
                    pin.end = end

    def held_ends(self) -> set[Span]:
        """Return the ends of all texts that must stay: those of pins, those that grow, and what is in use now.

        Asked of those who hold them each time, and kept nowhere else, so it cannot disagree with them.
        """
        held = {pin.end for pin in self._pins if pin.end is not None}
        for texts in self._growing.values():
            held.update(end for text in texts for end in text.ends.values())
        return held.union(*self._in_use.values())

    @property
    def archive(self) -> Archive | None:
        """What connects the forest with a store, if there is one."""
        return self._archive

    @property
    def max_tokens_per_forward(self) -> int:
        """How many tokens one packed pass forwards at most."""
        return self._max_tokens

    def count_evaluation(self) -> None:
        """Begin another evaluation: what was computed before is reused from now on."""
        self.forest.evaluation += 1

    def sketch(self, texts: Iterable[TokenIds], asides: Iterable[Aside] = ()) -> Sketch:
        """Return what is held of texts, in a forest of their own; changes, loads and forwards nothing."""
        return Sketch(self.forest, texts, self._archive, asides)

    def evaluate(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Compute what is missing of texts given by their token ids, and return the spans at which they end.

        Over the budget, results are dropped again: `held` brings one back. If a pass fails, the passes before it stay
        computed, and `recover` removes the rest.
        """
        with self._inserted(texts) as ends:
            self._compute(ends)
        return ends

    @contextmanager
    def held(self, token_ids: TokenIds, end: Span, *, with_keys: bool = False) -> Iterator[Span]:
        """Keep a text's states (`with_keys`: and its keys and values) for as long as the context lasts.

        What was dropped of them is computed again. Yields the span at which the text ends; `end` is the last one known.
        """
        if _is_held(end, with_keys):
            with self._using([end]):
                yield end
            return
        self.counters.tokens_requested += len(token_ids)
        with self._computed(token_ids, with_keys=with_keys) as end:
            yield end

    def pin(self, pin: PinnedText) -> None:
        """Compute a text and hold all of it until `unpin`.

        Raises:
            MemoryBudgetError: it does not fit the budget, beside what is pinned already.

        """
        with self._inserted([pin.token_ids]) as ends, self._using(ends):
            (pin.end,) = ends
            num_bytes = self._num_bytes(_on_the_way([*self._pinned_ends(), *ends]))
            if num_bytes > self.memory.max_bytes:
                raise MemoryBudgetError(
                    f"With this text of {len(pin.token_ids)} tokens pins would hold {num_bytes:,} bytes, more than the "
                    f"LM's budget of {self.memory.max_bytes:,}. Release other pins, or give the LM more: "
                    "LM(..., memory_bytes=...)."
                )
            self._compute(ends, with_keys=True)
            self._pins[pin] = None

    def let_grow(self, owner: object, texts: Sequence[Growing]) -> None:
        """Hold the ends of these texts, as they are at any time, for as long as their owner lives."""
        self._growing[owner] = texts
        # Whoever drops a stream does not say so: what it has grown is ended when the evaluator next looks.
        finalize(owner, self.abandoned.append, texts).atexit = False

    def begin(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Compute all of texts that are to grow. The caller notes the ends where `let_grow` says, and so holds them."""
        self.count_evaluation()
        with self._inserted(texts) as ends, self._using(ends):
            self._compute(ends, with_keys=True)
        return ends

    def grow(self, texts: Sequence[TokenIds]) -> list[Span]:
        """Forward what texts have more than those that are held, in one pass; the caller notes the ends as well.

        Nothing of it is stored until the growth ends.
        """
        num_before = self.counters.tokens_computed
        with self._inserted(texts, are_ends=False) as ends, self._using(ends):
            new = [end for end in dict.fromkeys(ends) if end.rows is None]
            self._compute(ends, with_keys=True, use_store=False)
        self.counters.tokens_requested += max(len(texts), self.counters.tokens_computed - num_before)
        for end in new:
            self._growth.note_pass(end)
        return ends

    def settle(self, grown: Sequence[Span], dropped: Sequence[Span], scores: Mapping[Span, TokenScore]) -> None:
        """Go on with some of the texts that are held.

        Args:
            grown: ends that `grow` returned last and that stay held; they absorb what they continue.
            dropped: ends that are not needed any more. Where nobody else knows of them and nothing continues them, they
                are forgotten.
            scores: of the last tokens of some that were grown.

        """
        new = {end: score for end, score in scores.items() if not _is_scored(end, len(end.token_ids) - 1)}
        targets = [_Target(0, 0, _HeldRow(states_of(end).block, states_of(end).stop - 1)) for end in new]
        _write_scores(targets, self._as_tensors(list(new.values())))
        held = self.held_ends()
        for end in dropped:
            self.forest.discard(end, held)
        self.memory.add(self._growth.absorb(list(dict.fromkeys(grown)), held))

    def end_growth(self, ends: Sequence[Span]) -> None:
        """Finish texts that have grown and that nobody holds any more: they are from now on like all others."""
        for end in ends:
            end.is_end = True
        for end in dict.fromkeys(ends):
            self.memory.add(self._growth.finish(end))
            if self._archive is not None and end.rows is not None:
                self._archive.save_new([end])
        self._make_room()

    def end_abandoned(self) -> None:
        """Finish what grew for somebody who is no more, or who failed."""
        while self.abandoned:
            self.end_growth([end for text in self.abandoned.popleft() for end in text.ends.values()])

    def next_logits(self, ends: Sequence[Span]) -> list[Tensor]:
        """Return the logits after texts that are held, `(vocab,)` each.

        Raises:
            NonFiniteError: a row is no distribution.

        """
        rows: dict[Span, Tensor] = {}
        for group in _slices(list(dict.fromkeys(ends)), self.executor.rows_in_a_slice):
            logits = self._logits(torch.stack([_last_hidden(end) for end in group]))
            rows.update(zip(group, logits, strict=True))
            for idx in _unusable_rows(logits):
                raise self.executor.logits_error(logits[idx], _ids_up_to(group[idx]))
        return [rows[end] for end in ends]

    @property
    def token_bytes(self) -> int:
        """Bytes of all that is held of one token; the first use runs the probe."""
        self._probe_once()
        return self.executor.token_bytes

    def num_bytes_to_hold(self, ends: Collection[Span]) -> int:
        """Return the bytes of all that must be held for these texts and for what is pinned."""
        self._probe_once()  # how many bytes a token takes is known from then on
        return self._num_bytes(_on_the_way([*self._pinned_ends(), *ends]))

    def save(self, token_ids: TokenIds) -> None:
        """Write a text to the store, computed if need be."""
        assert self._archive is not None
        with self._computed(token_ids, with_keys=True) as end:
            self._archive.save(end)

    def is_pinned(self, pin: PinnedText) -> bool:
        """Return whether a text is still held; after `clear` none is."""
        return pin in self._pins

    def unpin(self, pin: PinnedText) -> None:
        """Hold a text no more; one that is not held may be given, too."""
        self._pins.pop(pin, None)
        self._make_room()

    def pooled_logits(self, end: Span) -> Tensor | None:
        """Return a copy of the next-token logits after `end`, `(vocab,)`, if they were computed and are still held."""
        row = self._pool.get(end)
        return None if row is None else row.clone()

    def last_logits(self, end: Span, ahead: ReadAhead) -> Tensor:
        """Return the next-token logits after `end`, `(vocab,)`; those of `ahead()` are computed along with it.

        It must not be a junction, which has no last row; those among `ahead()` are left out.

        Raises:
            NonFiniteError: the row is no distribution. Those of others may be none: they are not kept.

        """
        if (pooled := self.pooled_logits(end)) is not None:
            return pooled
        ends = dict.fromkeys([end, *(place.end for place in ahead() if place.end.token_ids)])
        missing = [other for other in ends if self._pool.get(other) is None]
        missing = missing[: max(1, self._pool.max_bytes // self.executor.logit_row_bytes)]
        first: Tensor | None = None
        for group in _slices(missing, self.executor.rows_in_a_slice):
            logits = self._logits(torch.stack([_last_hidden(other) for other in group]))
            unusable = set(_unusable_rows(logits))
            if first is None:  # the row of `end`
                if 0 in unusable:
                    raise self.executor.logits_error(logits[0], _ids_up_to(end))
                first = logits[0].clone()
            for idx, (other, row) in enumerate(zip(group, logits, strict=True)):
                if idx not in unusable:
                    self._pool.put(other, row)
        assert first is not None
        return first

    def all_logits(self, place: Place, start: int, stop: int) -> Tensor:
        """Return the logits after the tokens `start..stop` of the text, `(tokens, vocab)`.

        Raises:
            NonFiniteError: a row is no distribution.

        """
        hidden = self.hidden_states(place)[start:stop]
        pieces = [self._logits(piece) for piece in torch.split(hidden, self.executor.rows_in_a_slice)]
        logits = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        for idx in _unusable_rows(logits):
            raise self.executor.logits_error(logits[idx], flat(place.token_ids)[: start + idx + 1])
        return logits

    def hidden_states(self, place: Place) -> Tensor:
        """Return a copy of the text's final hidden states, `(tokens, hidden)`, in written order."""
        return gather(map(states_of, self.forest.in_order(place)), lambda states: states.hidden, dim=0)

    def keys_values(self, end: Span) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies of the text's keys and values, for each layer `(kv_heads, tokens, head_dim)`."""
        places = [keys_values_of(span) for span in end.path()]
        num_layers = len(places[0].block.keys)
        keys = [gather(places, lambda block, i=i: block.keys[i], dim=1) for i in range(num_layers)]  # type: ignore[misc]
        values = [gather(places, lambda block, i=i: block.values[i], dim=1) for i in range(num_layers)]  # type: ignore[misc]
        return keys, values

    def token_logprobs(self, place: Place, ahead: ReadAhead) -> Tensor:
        """Return the text's log-probabilities, `(tokens,)`; those of `ahead()` are computed along with them."""
        if not all(map(_is_scored, self.forest.in_order(place))):
            self.score([(place, 0)], ahead=ahead())
        return self.scores_from(place, 0).logprobs

    def score(
        self,
        texts: Sequence[tuple[Place, int]],
        candidates: Mapping[Span, Collection[int]] | None = None,
        ahead: Iterable[Place] = (),
    ) -> dict[Span, dict[int, TokenScore]]:
        """Compute the log-probabilities of computed texts from a token of each on, counted in written order.

        Each row that predicts several tokens is computed once, and none that predicts only tokens before the start.

        Args:
            texts: each with the first token to be scored.
            candidates: tokens to score as well that may follow the texts that end there; theirs are returned.
            ahead: other texts to be scored along with them.

        Raises:
            NonFiniteError: a row that predicts a token of `texts`, or a candidate, is no distribution. What such rows
                predict stays unscored.

        """
        first_rows: dict[Span, int] = {}  # of each span that holds wanted tokens, the first of them
        for place, start in (*texts, *((other, 0) for other in ahead)):
            for span, first_row in self._spans_from(place, start):
                first_rows[span] = min(first_row, first_rows.get(span, first_row))
        predictions = _Predictions()
        for span, first_row in first_rows.items():
            if first_row == 0:
                self._recall(span)
            if not _is_scored(span, first_row):
                predictions.add(span, first_row)
        candidates = candidates or {}
        found: dict[Span, dict[int, TokenScore]] = {end: {} for end in candidates}
        for end, token_ids in candidates.items():
            pooled = self._candidates.get(end)
            for token_id in token_ids:
                if token_id in pooled:
                    found[end][token_id] = pooled[token_id]
                elif (child := _held_child(end, token_id)) is None:
                    predictions.add_candidate(end, token_id)
                elif not _has_first_score(child):
                    predictions.add_branches(end)
        unusable: dict[_HeldRow | Span, Tensor] = {}  # logits that are no distribution, by what they should score
        num_rows, rows_in_a_slice = predictions.num_rows, self.executor.rows_in_a_slice
        with progress_bar(num_rows, "scoring", "tokens", is_long=num_rows > rows_in_a_slice) as bar:
            for rows, targets in predictions.slices(rows_in_a_slice):
                logits = self._logits(rows)
                rows_left_out = set(_unusable_rows(logits))
                if rows_left_out:
                    unusable |= {t.sink: logits[t.row_idx] for t in targets if t.row_idx in rows_left_out}
                    targets = [target for target in targets if target.row_idx not in rows_left_out]
                row_idx = torch.tensor([target.row_idx for target in targets], dtype=torch.long)
                token_ids = torch.tensor([target.token_id for target in targets], dtype=torch.long)
                scores = _picked_scores(logits, row_idx, token_ids)
                for end, scored in _write_scores(targets, scores).items():
                    self._candidates.put(end, scored)
                    found[end] |= scored
                bar.update(len(rows))
        if unusable:
            self._check_wanted(texts, candidates, unusable)
        held: list[tuple[Span, int, Span]] = []
        for end, token_ids in candidates.items():
            held += [(end, t, child) for t in token_ids if t not in found[end] and (child := _held_child(end, t))]
        for (end, token_id, _), score in zip(held, _first_scores([child for _, _, child in held]), strict=True):
            found[end][token_id] = score
        return found

    def _check_wanted(
        self,
        texts: Sequence[tuple[Place, int]],
        candidates: Iterable[Span],
        unusable: Mapping[_HeldRow | Span, Tensor],
    ) -> None:
        """Raise if what was wanted of texts, or behind the ends of some, was to be scored by `unusable` logits."""
        for place, start in texts:
            for span, first_row in self._spans_from(place, start):
                rows = states_of(span)
                for idx in range(first_row, len(span.token_ids)):
                    logits = unusable.get(_HeldRow(rows.block, rows.start + idx))
                    if logits is not None:
                        assert span.parent is not None
                        raise self.executor.logits_error(logits, _ids_up_to(span.parent) + span.token_ids[:idx])
        for end in candidates:
            children = [child for child in end.children.values() if child.token_ids and child.states is not None]
            sinks: list[_HeldRow | Span] = [end]
            sinks += (_HeldRow(states_of(child).block, states_of(child).start) for child in children)
            for sink in sinks:
                if sink in unusable:
                    raise self.executor.logits_error(unusable[sink], _ids_up_to(end))

    def _recall(self, span: Span) -> None:
        """Write what was known of a span's first token before it was forwarded to where that is held."""
        assert span.parent is not None
        score = self._candidates.get(span.parent).get(span.token_ids[0])
        if score is not None and not _has_first_score(span):
            rows = states_of(span)
            rows.block.logprobs[rows.start] = score.logprob
            rows.block.is_argmax[rows.start] = score.is_argmax
            rows.block.has_logprobs[rows.start] = True

    def scores_from(self, place: Place, start: int) -> TokenScores:
        """Return a copy of a scored text's scores from token `start` on, `(tokens - start,)`."""
        spans = self._spans_from(place, start)
        if not spans:
            return self._as_tensors([])
        _, first_row = spans[0]
        rows = [states_of(span) for span, _ in spans]
        logprobs = gather(rows, lambda states: states.logprobs, dim=0)[first_row:]
        return TokenScores(logprobs, gather(rows, lambda states: states.is_argmax, dim=0)[first_row:])

    def _spans_from(self, place: Place, start: int) -> list[tuple[Span, int]]:
        """Return the spans of a text's tokens from `start` on, in written order, each with its first such row."""
        if not isinstance(place.token_ids, TokenGraph):
            return [(span, max(0, start - span.position)) for span in _path_from(place.end, start)]
        spans, num_before = [], 0
        for span in self.forest.in_order(place):
            stop = num_before + len(span.token_ids)
            if stop > start:
                spans.append((span, max(0, start - num_before)))
            num_before = stop
        return spans

    def token_scores_of(self, texts: Sequence[tuple[TokenIds, int]]) -> list[TokenScores]:
        """Return the scores of texts' tokens, from a token of each on.

        A text's last token is scored by the row before it; it is not forwarded unless something continues it.
        """
        splits = [split_to_score(token_ids, start) for token_ids, start in texts]
        wanted = [
            Wanted(token_ids, start) if split is None else Wanted(split[0], start, split[1:])
            for (token_ids, start), split in zip(texts, splits, strict=True)
        ]
        found = self.scored(wanted)
        lasts = self._as_tensors([s for scored in found for s in scored.candidates.values()])
        ends = itertools.accumulate(len(scored.candidates) for scored in found)
        return [
            scored.tokens.followed_by(lasts[end - len(scored.candidates) : end])
            for scored, end in zip(found, ends, strict=True)
        ]

    def scored(self, wanted: Sequence[Wanted]) -> list[Scored]:
        """Evaluate texts and score what is wanted of each."""
        found: dict[int, Scored] = {}
        with self._inserted([text.token_ids for text in wanted]) as ends:
            places = [Place(end, text.token_ids) for end, text in zip(ends, wanted, strict=True)]

            def collect() -> None:
                """Read off what is there, before any of it is dropped."""
                ready = [idx for idx, place in enumerate(places) if idx not in found and place.end.states is not None]
                candidates: dict[Span, dict[int, None]] = {}
                for idx in ready:
                    if wanted[idx].candidates:
                        candidates.setdefault(places[idx].end, {}).update(dict.fromkeys(wanted[idx].candidates))
                scored = self.score([(places[idx], wanted[idx].start) for idx in ready], candidates)
                for idx in ready:
                    following = {token_id: scored[places[idx].end][token_id] for token_id in wanted[idx].candidates}
                    found[idx] = Scored(self.scores_from(places[idx], wanted[idx].start), following)

            self._compute(ends, before_eviction=collect)
            collect()
        return [found[idx] for idx in range(len(wanted))]

    @contextmanager
    def _computed(self, token_ids: TokenIds, *, with_keys: bool) -> Iterator[Span]:
        """Compute what is missing of a text and hold it for as long as the context lasts."""
        with self._inserted([token_ids]) as ends:
            with self._using(ends):
                self._compute(ends, with_keys=with_keys)
                yield ends[0]
            self._make_room()

    @contextmanager
    def _using(self, ends: Sequence[Span]) -> Iterator[None]:
        """Hold the texts that end here for as long as the context lasts."""
        use = object()
        self._in_use[use] = ends
        try:
            yield
        finally:
            self._in_use.pop(use, None)  # `recover` may have taken it away

    def _pinned_ends(self) -> list[Span]:
        return [pin.end for pin in self._pins if pin.end is not None]

    @contextmanager
    def _inserted(self, texts: Sequence[TokenIds], *, are_ends: bool = True) -> Iterator[list[Span]]:
        """Yield the ends of texts in the forest."""
        self._probe_once()
        ends = [self.forest.insert(token_ids, is_end=are_ends) for token_ids in texts]
        self.memory.touch(ends)
        yield ends
        if self.memory.num_empty_spans > MAX_EMPTY_SPANS or self.memory.num_empty_tokens > MAX_EMPTY_TOKENS:
            self._prune(MAX_EMPTY_SPANS * 9 // 10, MAX_EMPTY_TOKENS * 9 // 10)  # not again at the next evaluation
            self.memory.num_empty_spans = self.memory.num_empty_tokens = 0

    def _prune(self, max_spans: int = 0, max_tokens: int = 0) -> None:
        """Forget spans of which nothing is held, but for the latest, and results by which they would stay alive."""
        self.forest.prune(max_spans, max_tokens)
        spans = set(self.forest.spans())
        self._pool.retain(spans)
        self._candidates.retain(spans)

    def _compute(
        self,
        ends: Iterable[Span],
        *,
        with_keys: bool = False,
        before_eviction: Callable[[], None] | None = None,
        use_store: bool = True,
    ) -> None:
        """Forward what is missing, pass by pass, within the budget."""
        with GrowingBar("evaluating", "tokens") as bar:
            self._compute_all(ends, bar, with_keys=with_keys, before_eviction=before_eviction, use_store=use_store)

    def _compute_all(
        self,
        ends: Iterable[Span],
        bar: GrowingBar,
        *,
        with_keys: bool,
        before_eviction: Callable[[], None] | None,
        use_store: bool,
    ) -> None:
        """Do so; what is dropped although a later pass needs it comes back or is planned and forwarded again."""
        waiting = dict.fromkeys(end for end in ends if not _is_held(end, with_keys))
        if waiting and use_store:  # the steps of a generation are one evaluation, which `begin` counted
            self.count_evaluation()
        is_stuck = False  # then one text alone goes on
        while waiting:
            num_waiting = len(waiting)
            asked = list(waiting)[: 1 if is_stuck else None]
            group = self._bring_back(asked, before_eviction, with_keys=with_keys, use_store=use_store)
            for end in group:
                if _is_held(end, with_keys):
                    del waiting[end]
            passes = cut_into_passes(self.forest, missing_spans(group, with_keys=with_keys), self._max_tokens)
            bar.expect(sum(map(_num_tokens, passes)), is_long=len(passes) > 1)
            last_uses = _last_uses(passes)
            for pass_idx, spans in enumerate(passes):
                needed = {parent for span in spans for parent in span.parents}
                if is_stuck:  # what one pass computed of a group may be what another drops
                    needed |= _on_the_way(group)
                self._make_room(before_eviction, needed, last_uses, pass_idx)
                if _is_cut_off(spans):
                    break
                self._forward(spans, use_store=use_store)
                bar.update(_num_tokens(spans))
                for span in spans:
                    waiting.pop(span, None)
            else:
                self._make_room(before_eviction)
            is_stuck = len(waiting) == num_waiting

    def _bring_back(
        self, ends: Sequence[Span], before_eviction: Callable[[], None] | None, *, with_keys: bool, use_store: bool
    ) -> Sequence[Span]:
        """Bring what the second pool and the store have of the way to `ends`.

        Returns the ends of the texts that there was room for, at least one, in the order of `ends`, in which a sketch
        plans, too: what these still miss is to be forwarded.
        """
        archive = self._archive if use_store else None
        given = ends
        if self.host.num_bytes or archive is not None:
            asked = set(ends)
            ends = [span for span in missing_spans(ends, with_keys=with_keys) if span in asked]  # in depth-first order
        if self.host.num_bytes:
            pinned = _on_the_way(self._pinned_ends())
            room = self.memory.max_bytes - self._num_bytes(pinned)
            planned = self.host.plan_fetch(ends, room, pinned, with_keys=with_keys)
            if planned.num_bytes:
                needed = _on_the_way([*planned.served, *planned.spans["states"], *planned.spans["rows"]])
                self._make_room(before_eviction, needed, num_coming_bytes=planned.num_bytes)
                self.memory.add(self.host.fetch(self.forest, planned))
                self.counters.tokens_fetched += planned.num_tokens
            ends = planned.served
        if archive is not None:
            free = max(0, self.memory.max_bytes - self.memory.num_bytes)
            room = free + self._max_tokens * self.executor.token_bytes
            layout = self.executor.layout
            assert layout is not None, "the probe ran a pass"
            loaded = archive.load(self.forest, ends, room, self.memory, layout, with_keys=with_keys)
            self.counters.tokens_loaded += loaded.num_tokens
            if loaded.num_tokens:
                logger.debug("Loaded %d tokens from the store.", loaded.num_tokens)
            ends = loaded.served
        served = set(ends)
        return [end for end in given if end in served]

    def _forward(self, spans: Sequence[Span], *, use_store: bool) -> None:
        started = time.perf_counter()
        with_rows = [span for span in spans if span.token_ids]
        computed = None
        if with_rows:
            with self._blaming_weights():
                computed = self.executor.compute(plan_pass(with_rows, self.tile_tokens))
        num_tokens = _num_tokens(with_rows)
        num_recomputed = _num_tokens(span for span in with_rows if span.was_computed)
        with self.forest.changing():
            if computed is not None:
                for span in computed.states_of:
                    if span.error:  # read back inexactly once, and so may be rows of logits that were computed with it
                        span.error = 0.0
                        self._forget_results()
                computed.place()
            for span in spans:
                if isinstance(span, Junction):
                    span.rows = span.states = NOTHING
                span.was_computed = True
                span.computed_in = self.forest.evaluation
                span.host_rows = span.host_states = None  # states may have gone there since the pass was planned
            if computed is not None:
                self.memory.add((computed.keys_values, computed.states))
        self.counters.forward_passes += bool(with_rows)
        self.counters.tokens_computed += num_tokens
        self.counters.tokens_recomputed += num_recomputed
        self.counters.seconds += time.perf_counter() - started
        if self._archive is not None and use_store:
            self._archive.save_new(with_rows)

    def _make_room(
        self,
        before_eviction: Callable[[], None] | None = None,
        needed: Set[Span] = frozenset(),
        last_uses: Mapping[Span, int] | None = None,
        next_pass: int = 0,
        num_coming_bytes: int = 0,
    ) -> None:
        """Let go of what is over the budget; see `Memory.evict`."""
        is_exceeded = self.memory.is_exceeded(num_coming_bytes)
        if not is_exceeded and not self.memory.is_scattered:
            return
        if is_exceeded and before_eviction is not None:
            before_eviction()
        self.memory.evict(self.forest, self.held_ends(), needed, last_uses, next_pass, num_coming_bytes)

    def _forget(self) -> None:
        self.forest.clear()
        self._forget_results()

    def _as_tensors(self, scores: Sequence[TokenScore]) -> TokenScores:
        return TokenScores.of(scores, self.executor.logprob_dtype, self.executor.device)

    def _forget_results(self) -> None:
        self._pool.clear()
        self._candidates.clear()

    def _num_bytes(self, spans: Collection[Span]) -> int:
        """Return the bytes that all of these spans take."""
        return _num_tokens(spans) * self.executor.token_bytes

    @contextmanager
    def _blaming_weights(self) -> Iterator[None]:
        """Whatever the model does wrong while its weights change is not the model's fault."""
        try:
            yield
        except (NonFiniteError, UnsupportedModelError):
            self._raise_if_changed()
            raise

    def _probe_once(self) -> None:
        if not self._is_probed:
            with self._blaming_weights():
                probe(self._model, self.executor)
            self._is_probed = True

    def _logits(self, hidden: Tensor) -> Tensor:
        """Apply the head to `(rows, hidden)`, and count the rows."""
        started = time.perf_counter()
        with self._blaming_weights():
            logits = self.executor.logits(hidden)
        self.counters.logit_rows += hidden.shape[0]
        self.counters.seconds += time.perf_counter() - started
        return logits


@dataclass(frozen=True, slots=True)
class _HeldRow:
    """Where the log-probability of a forwarded token goes."""

    block: States
    row: int


@dataclass(frozen=True, slots=True)
class _Target:
    """A token to be scored: by which row of the slice, and where that goes, for a candidate by what it follows."""

    row_idx: int
    token_id: int
    sink: _HeldRow | Span


@dataclass
class _Predictions:
    """Rows of hidden states that predict tokens, each once, with all that they predict."""

    _rows: dict[tuple[States, int], list[tuple[int, _HeldRow | Span]]] = field(default_factory=dict)
    _branched: set[Span] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        """How many rows predict something."""
        return len(self._rows)

    def add(self, span: Span, first_row: int) -> None:
        """Add what is not scored yet of a computed span from `first_row` on.

        Its first token is predicted by what it continues. The row before a branching predicts the first tokens of all
        its branches, so they are added together.
        """
        rows = states_of(span)
        is_scored = rows.block.has_logprobs[rows.start : rows.stop].tolist()
        assert span.parent is not None
        if first_row == 0 and not is_scored[0]:
            if not span.parent.token_ids:
                rows.block.logprobs[rows.start] = torch.nan  # nothing predicts a first token, or one behind a junction
                rows.block.has_logprobs[rows.start] = True
            else:
                self.add_branches(span.parent)
        for idx in range(max(1, first_row), len(is_scored)):
            if not is_scored[idx]:
                held_row = _HeldRow(rows.block, rows.start + idx)
                self._rows[rows.block, held_row.row - 1] = [(span.token_ids[idx], held_row)]

    def add_candidate(self, end: Span, token_id: int) -> None:
        """Add a token that may follow a computed span and is not forwarded."""
        self._predicted_by(end).append((token_id, end))

    def add_branches(self, parent: Span) -> None:
        """Add the first tokens of all that was forwarded behind a computed span."""
        if parent not in self._branched:
            self._branched.add(parent)
            held = [span for span in parent.children.values() if span.token_ids and span.states is not None]
            starts = [(span.token_ids[0], states_of(span)) for span in held]
            self._predicted_by(parent).extend((token_id, _HeldRow(at.block, at.start)) for token_id, at in starts)

    def _predicted_by(self, end: Span) -> list[tuple[int, _HeldRow | Span]]:
        """Return what the last row of a span predicts, to be added to."""
        rows = states_of(end)
        return self._rows.setdefault((rows.block, rows.stop - 1), [])

    def slices(self, rows_in_a_slice: int) -> Iterable[tuple[Tensor, list[_Target]]]:
        """Yield hidden states `(rows, hidden)` and what they predict."""
        for group in _slices(list(self._rows), rows_in_a_slice):
            targets = [
                _Target(row_idx, token_id, sink)
                for row_idx, row in enumerate(group)
                for token_id, sink in self._rows[row]
            ]
            yield _hidden_rows(group), targets


def _hidden_rows(rows: Sequence[tuple[States, int]]) -> Tensor:
    """Return the hidden states of the rows, in their order, `(rows, hidden)`."""
    by_block: dict[States, list[int]] = {}
    for idx, (block, _) in enumerate(rows):
        by_block.setdefault(block, []).append(idx)
    first = rows[0][0].hidden
    hidden = first.new_empty((len(rows), first.shape[1]))
    for block, indices in by_block.items():
        source = torch.tensor([rows[idx][1] for idx in indices], device=hidden.device)
        hidden[torch.tensor(indices, device=hidden.device)] = block.hidden[source]
    return hidden


def _picked_scores(logits: Tensor, row_idx: Tensor, token_ids: Tensor) -> TokenScores:
    """Return `log_softmax(logits)[row_idx, token_ids]`, and whether each is its row's argmax in float32.

    `row_idx` is sorted. A few rows at a time: what fits the cache takes a fifth of the time that all rows at once take.
    """
    picked, is_argmax = [], []
    num_rows = max(1, LOG_SOFTMAX_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], num_rows):
        piece = logits[start : start + num_rows]
        logprobs = log_softmax(piece)
        first, last = torch.searchsorted(row_idx, torch.tensor([start, start + num_rows])).tolist()
        rows, tokens = (row_idx[first:last] - start).to(logits.device), token_ids[first:last].to(logits.device)
        picked.append(logprobs[rows, tokens])
        is_argmax.append(piece.float().argmax(dim=-1)[rows] == tokens)
    return TokenScores(torch.cat(picked), torch.cat(is_argmax))


def _write_scores(targets: Sequence[_Target], scores: TokenScores) -> dict[Span, dict[int, TokenScore]]:
    """Write those of forwarded tokens to where they are held, and return those of candidates."""
    by_block: dict[States, list[tuple[int, int]]] = {}
    candidates: dict[Span, list[int]] = {}
    for idx, target in enumerate(targets):
        if isinstance(target.sink, _HeldRow):
            by_block.setdefault(target.sink.block, []).append((idx, target.sink.row))
        else:
            candidates.setdefault(target.sink, []).append(idx)
    for block, pairs in by_block.items():
        indices, block_rows = torch.tensor(pairs).unbind(dim=1)
        rows, chosen = block_rows.to(scores.logprobs.device), indices.to(scores.logprobs.device)
        block.logprobs[rows] = scores.logprobs[chosen]
        block.is_argmax[rows] = scores.is_argmax[chosen]
        block.has_logprobs[block_rows] = True
    if not candidates:
        return {}
    values = list(map(TokenScore, scores.logprobs.tolist(), scores.is_argmax.tolist()))
    return {end: {targets[idx].token_id: values[idx] for idx in indices} for end, indices in candidates.items()}


def _unusable_rows(logits: Tensor) -> list[int]:
    """Return which rows of `(rows, vocab)` have no log-probabilities."""
    is_usable = are_distributions(logits)
    return [] if bool(is_usable.all()) else (~is_usable).nonzero()[:, 0].tolist()


def _ids_up_to(end: Span) -> tuple[int, ...]:
    """Return the ids of the text that ends here, those of groups before it left out."""
    return tuple(token_id for span in end.path() for token_id in span.token_ids)


def _is_held(end: Span, with_keys: bool) -> bool:
    return end.states is not None and not (with_keys and end.rows is None)


def _num_tokens(spans: Iterable[Span]) -> int:
    return sum(len(span.token_ids) for span in spans)


def _on_the_way(ends: Iterable[Span]) -> set[Span]:
    """Return the spans on the way to all of `ends`."""
    spans: set[Span] = set()
    for end in ends:
        spans.update(end.closure(known=spans))
    return spans


def _last_uses(passes: Sequence[Sequence[Span]]) -> dict[Span, int]:
    """Return, for each span that passes attend to, the number of the last such pass."""
    last_uses: dict[Span, int] = {}
    for pass_idx, spans in enumerate(passes):
        stack = [parent for span in spans for parent in span.parents]
        while stack:
            ancestor = stack.pop()
            if last_uses.get(ancestor) != pass_idx:
                last_uses[ancestor] = pass_idx
                stack += ancestor.parents
    return last_uses


def _is_cut_off(spans: Sequence[Span]) -> bool:
    """Return whether something that a pass continues was dropped since it was planned."""
    own = set(spans)
    return any(
        parent.parent is not None and parent.rows is None and parent not in own
        for span in spans
        for parent in span.parents
    )


def _is_scored(span: Span, first_row: int = 0) -> bool:
    rows = states_of(span)
    return bool(rows.block.has_logprobs[rows.start + first_row : rows.stop].all())


def _held_child(end: Span, token_id: int) -> Span | None:
    """Return what directly continues a span with this token, if its states are held."""
    child = end.children.get(token_id)
    return None if child is None or child.states is None else child


def _has_first_score(span: Span) -> bool:
    rows = states_of(span)
    return bool(rows.block.has_logprobs[rows.start])


def _first_scores(spans: Sequence[Span]) -> list[TokenScore]:
    """Return the scores of spans' first tokens; two transfers a block, however many spans."""
    by_block: dict[States, list[int]] = {}
    for idx, span in enumerate(spans):
        by_block.setdefault(states_of(span).block, []).append(idx)
    found: dict[int, TokenScore] = {}
    for block, indices in by_block.items():
        rows = torch.tensor([states_of(spans[idx]).start for idx in indices], device=block.logprobs.device)
        scores = map(TokenScore, block.logprobs[rows].tolist(), block.is_argmax[rows].tolist())
        found.update(zip(indices, scores, strict=True))
    return [found[idx] for idx in range(len(spans))]


def _path_from(end: Span, start: int) -> list[Span]:
    """Return the spans of a text, in order, that hold tokens from `start` on."""
    spans: list[Span] = []
    span = end
    while span.parent is not None and span.position + len(span.token_ids) > start:
        spans.append(span)
        span = span.parent
    spans.reverse()
    return spans


def _last_hidden(end: Span) -> Tensor:
    rows = states_of(end)
    return rows.block.hidden[rows.stop - 1]


def _slices(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
