"""A run: texts that are continued together; a step is one packed pass of one token for each text.

Keeps the live texts, with the spans of their continuations, and the waiting texts. Finished texts leave the batch, and
waiting texts take their place. No text is padded, and samples of one prompt share its spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol, runtime_checkable

from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scores import TokenScore
from backprompt.evaluation.steps import Following
from backprompt.forest.span import Span
from backprompt.generation.advance import Advance, advance
from backprompt.generation.beams import BeamDecoding, choose_beams
from backprompt.generation.choosing import Logits, choose_next
from backprompt.generation.choosing import choose as choose_tokens
from backprompt.generation.continued import GeneratedText, generated_text
from backprompt.generation.decoding import Decoding, TextDecoding
from backprompt.generation.found import Choice, Completion, Found
from backprompt.generation.live import Live
from backprompt.generation.lookahead import MAX_PROPOSALS
from backprompt.lm import LM
from backprompt.progress import progress_bar, showing
from backprompt.session.sharing import Call
from backprompt.session.together import Needed, TextsCall
from backprompt.text.node import Text
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import TokenIds, flat, with_more

MAX_LIVE_TEXTS = 256
"""The largest number of texts that are continued at once; other texts wait until one is finished."""


class Running(Protocol):
    """Texts that are being continued, in this process or in others; see `Run`."""

    prompts: Sequence[TokenIds]
    decoding: Decoding

    @property
    def num_tokens_done(self) -> int:
        """The number of chosen tokens; a finished text counts with all tokens that were requested."""

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text so far; with beams, up to `num_each`."""

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the continuations of `found` as texts."""

    def step(self) -> bool:
        """Do a step; return whether any text is unfinished or waits."""

    def close(self) -> None:
        """End the live texts; waiting texts never begin."""


@runtime_checkable
class ContinuesTexts(Protocol):
    """An `LM` that continues texts in a way of its own, such as in other processes."""

    def running(self, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool) -> Running:
        """Return checked texts to be continued, without computing anything; `is_stream`: a step adds few tokens."""


def running(lm: LM, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool = False) -> Running:
    """Return checked texts to be continued, without computing anything."""
    if isinstance(lm, ContinuesTexts):
        return lm.running(texts, decoding, is_stream=is_stream)
    return Run(lm, texts, decoding)


@dataclass(eq=False)
class Run:
    """Texts that are being continued. Each `step` decides at least one token for every live text.

    Args:
        lm: the `LM` of all texts.
        texts: the texts to continue. A text that is listed several times is sampled several times.
        decoding: the options.
        prompts: the ids of the texts, if they are checked already; then the texts may be left out.

    """

    lm: LM
    texts: Sequence[Text]
    decoding: Decoding
    prompts: Sequence[TokenIds] = ()
    _decodings: list[TextDecoding | BeamDecoding] = field(init=False)
    live: list[Live] = field(init=False, default_factory=list)
    is_advancing: bool = field(init=False, default=False)  # in a pass with others that is not finished yet
    num_steps: int = field(init=False, default=0)
    _num_begun: int = field(init=False, default=0)
    _stop_of_begun: int = field(init=False, default=0)  # `_num_begun` after the step in progress
    _planned_at: int = field(init=False, default=-1)  # `Room.num_freed` when the step in progress looked for room
    _begun_at: int = field(init=False, default=-1)  # `_planned_at` when the last step was finished
    _evaluator: Evaluator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompts = self.prompts or self.lm.session.ids_to_continue(self.texts, self.decoding.max_new_tokens)
        num_samples: Counter[tuple[int, ...]] = Counter()
        self._decodings = []
        for idx, ids in enumerate(map(flat, self.prompts)):
            matching = self.decoding.matching(idx)
            if self.decoding.num_beams > 1:
                self._decodings.append(BeamDecoding(self.decoding, plain(ids), matching))
            else:
                self._decodings.append(TextDecoding(self.decoding, plain(ids), num_samples[ids], matching))
            num_samples[ids] += 1

    @property
    def num_tokens_done(self) -> int:
        """The number of chosen tokens; a finished text counts with all tokens that were requested."""
        num_finished = self._num_begun - len(self.live)
        return num_finished * self.decoding.max_new_tokens + sum(live.decoding.num_new for live in self.live)

    @property
    def ends(self) -> set[Span]:
        """The ends of the live texts' held continuations."""
        return {end for live in self.live for end in live.ends.values()}

    @property
    def prompts_to_hold(self) -> Sequence[TokenIds]:
        """The prompts of the texts of the next step: those of the live texts, and at least one if any is left."""
        stop = max(self._stop_of_begun, self._num_begun + (not self.live))
        return [*(live.prompt_ids for live in self.live), *self.prompts[self._num_begun : stop]]

    @property
    def num_new(self) -> int:
        """The largest number of tokens that are kept in memory for one text behind its prompt."""
        decoding = self.decoding
        return decoding.max_new_tokens * decoding.num_beams + MAX_PROPOSALS * decoding.num_lookup_tokens

    @property
    def max_texts(self) -> int:
        """The largest number of texts of the next step: the live ones, and those that may begin."""
        return min(MAX_LIVE_TEXTS, len(self.live) + len(self.prompts) - self._num_begun)

    @property
    def following(self) -> Following:
        """The expected tokens behind the next ones of the live texts, of which there must be one."""
        first, last = self.live[0].decoding, self.live[-1].decoding  # the first and the last one to begin
        takes_most_probable = isinstance(first, TextDecoding) and first.takes_most_probable
        is_last = last.num_new + 1 >= self.decoding.max_new_tokens
        return Following(takes_most_probable, self._num_begun == len(self.prompts) and not is_last)

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text so far; with beams, up to `num_each`."""
        return [decoding.found(num_each) for decoding in self._decodings]

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the continuations of `found` as texts."""
        return as_texts(self.lm, self.texts, self.found(num_each), self.decoding)

    def step(self) -> bool:
        """Choose the next tokens of every live text; return whether any text is unfinished or waits."""
        session = self.lm.session
        with session.room.stepping(self):
            while (is_going_on := session.answer(_Step(self))) is None:
                session.room.wait(self)
        return is_going_on

    def decide(self, found: Advance | None) -> bool | None:
        """Do a step, with the results `found` for it along with other steps, or None; the lock must be held.

        Returns:
            Whether any text is unfinished or waits; None if there is no room for the step yet.

        """
        session = self.lm.session
        may_wait = not session.is_nested
        with session.growing(self._evaluator) as evaluator:
            self.begin_with(evaluator)
            if not session.room.admit(self, evaluator, may_wait=may_wait):
                return None
            try:
                if found is None or found.num_steps != self.num_steps:  # another thread has taken the step
                    self._forget_grown()
                    tokens = self.next_tokens()
                    found = None if tokens is None else advance(evaluator, [(self, tokens)])[0]
                self.num_steps += 1
                if found is not None:
                    self._go_on(evaluator, found)
                else:
                    grown = self._grow(evaluator)
                    if self._num_begun < len(self.prompts):
                        self._note_begun(evaluator.continuations.begin(self._next_prompts(evaluator)))
                    self._choose(evaluator)
                    self._settle(evaluator, grown)
            except BaseException:  # the evaluator ends the live texts once it has recovered
                evaluator.continuations.abandoned.append(self.live[:])
                self.live.clear()
                session.room.leave(self)
                raise
            self._end(evaluator, [live for live in self.live if live.decoding.is_finished])
        return bool(self.live) or self._num_begun < len(self.prompts)

    def begin_with(self, evaluator: Evaluator) -> bool:
        """Bind the run to an evaluator at the first step; return whether the run is bound to this evaluator."""
        if self._evaluator is None:
            evaluator.continuations.let_grow(self, self.live)
            self._evaluator = evaluator
        return self._evaluator is evaluator

    def close(self) -> None:
        """End the live texts; waiting texts never begin."""
        if not self.live and self._num_begun == len(self.prompts):
            return
        with self.lm.session.exclusive():  # another thread may be in a step, or have found results for one
            self._num_begun = len(self.prompts)
            self.num_steps += 1
            if self._evaluator is not None:
                self._end(self._evaluator, self.live)
            self.lm.session.room.leave(self)

    def let_go(self) -> None:
        """Hold no texts until the next step, which computes dropped parts of live texts again; the lock is held."""
        ends = self.ends
        self.num_steps += 1  # results that were found for a step continue these ends
        for live in self.live:
            live.let_go()
        if self._evaluator is not None:
            self._evaluator.continuations.end(list(ends), are_stored=False)

    def next_tokens(self) -> list[Choice] | None:
        """Return the next token of every live text; None if a text has several continuations, or no text is left."""
        if self.decoding.num_beams > 1 or not (self.live or self._num_begun < len(self.prompts)):
            return None
        tokens = [token for live in self.live if (token := live.next_token) is not None]
        return tokens if len(tokens) == len(self.live) else None

    def not_held(self) -> list[tuple[Live, Completion]]:
        """Return the continuations after which logits are needed and which are not in memory."""
        held = [(live, live.ends) for live in self.live]
        return [(live, ids) for live, ends in held for ids in live.decoding.ahead if ids not in ends]

    def to_begin(self, evaluator: Evaluator) -> Sequence[TokenIds]:
        """Return the waiting texts that begin now."""
        is_full = self._begun_at == self.lm.session.room.num_freed or self._num_begun == len(self.prompts)
        return [] if is_full else self._next_prompts(evaluator)

    def _forget_grown(self) -> None:
        """Forget the ends that an unfinished step has changed; see `Live.forget_grown`."""
        if self.is_advancing:
            for live in self.live:
                live.forget_grown()
            self.is_advancing = False

    def _go_on(self, evaluator: Evaluator, found: Advance) -> None:
        """Continue the live texts from the ends that were found, and choose the next token of every live text."""
        before = [live.tip for live in self.live]
        for live, (end, stop) in zip(self.live, found.grown, strict=True):
            live.go_on(end, stop)
        if found.are_inserted:
            inserted = [  # the old and the new end, and the score of the last token
                (old, end, token.score)
                for live, old, token, (end, _) in zip(self.live, before, found.tokens, found.grown, strict=True)
                if old is not None and live.tip is end and end.is_held(with_keys_values=True)
            ]
            ends = [end for _, end, _ in inserted]
            scores: dict[Span, TokenScore] = {end: score for _, end, score in inserted}
            evaluator.continuations.settle(ends, [old for old, _, _ in inserted], scores)
        self._note_begun(found.begun)
        self.is_advancing = False
        rows = zip(self.live, found.rows, strict=True)
        texts = [(live.decoding, row) for live, row in rows if isinstance(live.decoding, TextDecoding)]
        choose_next(sorted(texts, key=itemgetter(1)), found.logits)  # rows in their order are not copied

    def _grow(self, evaluator: Evaluator) -> list[tuple[Live, Completion]]:
        """Forward the continuations after which logits are needed; return those that were not in memory before."""
        grown = self.not_held()
        if grown:
            ends = evaluator.continuations.grow(
                [live.beginning_of(ids) for live, ids in grown],
                lambda: [with_more(live.prompt_ids, live.forwarded(ids)) for live, ids in grown],
            )
            more: dict[Live, dict[Completion, Span]] = {}
            for (live, ids), end in zip(grown, ends, strict=True):
                more.setdefault(live, {})[ids] = end
            for live, new in more.items():
                live.hold({**live.ends, **new})
        return grown

    def _note_begun(self, ends: Sequence[Span]) -> None:
        """Make the next waiting texts live; `ends` are the ends of their prompts."""
        self.live += [
            Live(self.prompts[idx], self._decodings[idx], end) for idx, end in enumerate(ends, self._num_begun)
        ]
        self._num_begun += len(ends)
        self._begun_at = self._planned_at

    def _next_prompts(self, evaluator: Evaluator) -> Sequence[TokenIds]:
        """Return the waiting texts that fit the room; at least one if no text is live, since the run was admitted."""
        room, executor = self.lm.session.room, evaluator.executor
        first = self._num_begun
        self._stop_of_begun = stop = min(len(self.prompts), first + (not self.live))
        max_live = max(1, MAX_LIVE_TEXTS // self.decoding.num_beams)
        max_stop = min(len(self.prompts), first + max_live - len(self.live))
        self._planned_at, num_bytes = room.num_freed, room.num_bytes(evaluator)
        while stop < max_stop and not room.is_awaited:
            is_sample = stop > first and self.prompts[stop] == self.prompts[stop - 1]
            num_bytes += (self.num_new + (0 if is_sample else len(self.prompts[stop]))) * executor.token_bytes
            num_bytes += executor.snapshot_bytes
            if num_bytes > evaluator.memory.max_bytes:
                break
            stop += 1
        self._stop_of_begun = stop
        return self.prompts[first:stop]

    def _choose(self, evaluator: Evaluator) -> None:
        """Choose the next tokens of all live texts by the logits that they need."""
        wanted = [[(ids, ends[ids]) for ids in live.decoding.ahead] for live in self.live for ends in [live.ends]]
        row_of = {end: row for row, end in enumerate(dict.fromkeys(end for own in wanted for _, end in own))}
        logits = Logits(evaluator.readout.next_logits(list(row_of)), evaluator.executor.rows_in_a_slice)
        evaluator.computation.check_unchanged()  # before any token is chosen by these logits
        rows = [{ids: row_of[end] for ids, end in own} for own in wanted]
        choose: Callable[..., None] = choose_beams if self.decoding.num_beams > 1 else choose_tokens
        choose([live.decoding for live in self.live], rows, logits)

    def _settle(self, evaluator: Evaluator, grown: Sequence[tuple[Live, Completion]]) -> None:
        """Note the scores of forwarded tokens, and drop continuations that are no longer needed."""
        held = {live: live.ends for live in self.live}
        scores = {held[live][ids]: score for live, ids in grown if (score := live.decoding.score_of(ids)) is not None}
        dropped: list[Span] = []
        for live, ends in held.items():
            needed = live.decoding.needed()
            dropped += [end for ids, end in ends.items() if ids not in needed]
            live.hold({ids: end for ids, end in ends.items() if ids in needed})
        kept = [held[live][ids] for live, ids in grown if ids in live.ends]
        evaluator.continuations.settle(kept, dropped, scores)

    def _end(self, evaluator: Evaluator, finished: Sequence[Live]) -> None:
        if not finished:
            return
        room, ended = self.lm.session.room, dict.fromkeys(finished)
        self.live[:] = [live for live in self.live if live not in ended]  # in place: see `begin_with`
        evaluator.continuations.end([end for live in ended for end in live.ends.values()])
        if self.live:
            room.note_freed()
        else:
            room.leave(self)


def as_texts(
    lm: LM, prompts: Sequence[Text], found: Sequence[Sequence[Found]], decoding: Decoding
) -> list[list[GeneratedText]]:
    """Return the continuations of each prompt as texts."""
    return [
        [generated_text(lm, prompt, one, decoding.logprob_dtype) for one in row]
        for prompt, row in zip(prompts, found, strict=True)
    ]


def run_with_bar(run: Running, show: bool | None) -> None:
    """Continue texts, with a progress bar over their tokens, until all are finished or an error is raised."""
    total = len(run.prompts) * run.decoding.max_new_tokens
    with showing(show):
        bar = progress_bar(total, "generating", "tokens", is_long=run.decoding.max_new_tokens > 1)
    try:
        with bar, showing(False):  # one bar is enough
            is_going_on = True
            while is_going_on:
                is_going_on = run.step()
                bar.update(run.num_tokens_done - bar.n)
    finally:
        run.close()


class _Step(Call["bool | None"]):
    """A step of a run; another thread may do it along with a step of its own run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def finish(self) -> bool | None:
        """Do the rest of the step, or all of it; see `Run.decide`."""
        return self.run.decide(self.found if self.is_answered else None)

    def ahead(self) -> Sequence[TextsCall[None]]:
        """Return a call for the texts of the step."""
        session = self.run.lm.session
        return [TextsCall(lambda: None, lambda: self._needed(session.current()))]

    def _needed(self, evaluator: Evaluator) -> Needed | None:
        """Return the texts of the step, to be computed now along with those of other calls; None without any."""
        run = self.run
        if run.is_advancing or evaluator.archive is not None or not self._may_go_on(evaluator):
            return None  # with a store: continuations are stored only when they end
        wanted = run.not_held()
        parts = [live.beginning_of(ids) for live, ids in wanted]
        if not all(end.is_held(with_keys_values=True) for end, _ in parts):
            return None
        with evaluator.computation.extended(parts) as ends:
            texts = [with_more(live.prompt_ids, live.forwarded(ids)) for live, ids in wanted]
        prompts = run.to_begin(evaluator)
        items = [Wanted(ids, len(ids)) for ids in (*texts, *prompts)]
        return Needed(items, [*ends, *(None for _ in prompts)]) if items else None

    def _may_go_on(self, evaluator: Evaluator) -> bool:
        """Return whether the step may be done along with those of other runs now."""
        run = self.run
        return run.begin_with(evaluator) and run.lm.session.room.admit(run, evaluator, may_wait=True)

    @staticmethod
    def together(evaluator: Evaluator, calls: Sequence[_Step]) -> None:
        """Do steps of several runs together. Steps with beams or proposals are left to their own threads."""
        if any(call.run.next_tokens() is None and call._may_go_on(evaluator) for call in calls):  # else in place
            TextsCall.together(evaluator, [ahead for call in calls for ahead in call.ahead()])
        steps: list[_Step] = []
        tokens_of: dict[Run, list[Choice]] = {}
        num_texts = 0
        for call in calls:
            run = call.run
            may_advance = run not in tokens_of and not run.is_advancing and call._may_go_on(evaluator)
            tokens = run.next_tokens() if may_advance else None
            num_texts += 0 if tokens is None else run.max_texts
            if steps and num_texts > MAX_LIVE_TEXTS:  # all logits are in memory at once; later calls keep waiting
                break
            if tokens is None:
                call.is_alone = True
            else:
                steps.append(call)
                tokens_of[run] = tokens
                run.is_advancing = True
        if steps:
            for call, found in zip(steps, advance(evaluator, [*tokens_of.items()]), strict=True):
                call.found = found
