"""A run: texts that are continued together, each step one packed pass of one token per text.

Keeps the live texts, with the spans of their continuations, and the waiting texts. Finished texts leave the batch and
waiting texts take their place; nothing is padded, and samples of one prompt share its spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch

from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.scores import TokenScore
from backprompt.evaluation.steps import Token
from backprompt.forest.span import Span
from backprompt.generation.beams import BeamDecoding, choose_beams
from backprompt.generation.choosing import Logits, choose_next
from backprompt.generation.choosing import choose as choose_tokens
from backprompt.generation.continued import GeneratedText, generated_text
from backprompt.generation.decoding import Decoding, TextDecoding
from backprompt.generation.found import Choice, Completion, Found
from backprompt.generation.lookahead import MAX_PROPOSALS
from backprompt.lm import LM
from backprompt.progress import progress_bar, showing
from backprompt.text.node import Text
from backprompt.tokens.adapted import base_of, plain
from backprompt.tokens.graph import TokenIds, flat, with_more

MAX_LIVE_TEXTS = 256
"""The largest number of texts that grow at once; other texts wait until one is finished."""


class _Live:
    """A growing text.

    Attributes:
        prompt_ids: its prompt; what is added is under the adapter of the last of these tokens.
        base_id: the id of token 0 under this adapter.
        decoding: its tokens so far.
        tip: the end of its one held continuation; None if it has several.

    """

    def __init__(self, prompt_ids: TokenIds, decoding: TextDecoding | BeamDecoding, end: Span) -> None:
        self.prompt_ids = prompt_ids
        self.base_id = base_of(flat(prompt_ids)[-1])
        self.decoding = decoding
        self.tip: Span | None = end
        self._num_held = 0  # the number of tokens of the one held continuation
        self._ends: dict[Completion, Span] = {(): end}  # of several

    @property
    def ends(self) -> Mapping[Completion, Span]:
        """The ends of the held continuations."""
        if self.tip is None or isinstance(self.decoding, BeamDecoding):
            return self._ends
        return {self.decoding.completion[: self._num_held]: self.tip}

    def hold(self, ends: dict[Completion, Span]) -> None:
        """Hold these continuations and no others."""
        self._ends = ends
        self.tip = None
        if len(ends) == 1 and isinstance(self.decoding, TextDecoding):
            ((completion, end),) = ends.items()
            self.tip, self._num_held = end, len(completion)

    @property
    def next_token(self) -> Choice | None:
        """The one token with which the text goes on behind its one held continuation; None where there are more."""
        decoding = self.decoding
        if self.tip is None or isinstance(decoding, BeamDecoding) or decoding.proposals:
            return None
        return decoding.last if decoding.num_new == self._num_held + 1 else None

    def forwarded(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return ids of the continuation under its adapter."""
        return tuple(self.base_id + token_id for token_id in token_ids)

    def go_on(self, end: Span) -> None:
        """Note that the held continuation has grown by `next_token`, and ends here now."""
        self.tip = end
        self._num_held += 1

    def beginning_of(self, completion: Completion) -> tuple[Span, Completion]:
        """Return the end of the longest held beginning of a continuation, and the ids to forward behind it."""
        ends = self.ends
        num_held = next(num for num in range(len(completion) - 1, -1, -1) if completion[:num] in ends)
        return ends[completion[:num_held]], self.forwarded(completion[num_held:])


class Running(Protocol):
    """Texts that are being continued, wherever that is done; see `Run`."""

    prompts: Sequence[TokenIds]
    decoding: Decoding

    @property
    def num_tokens_done(self) -> int:
        """The number of tokens decided on; a finished text counts with all tokens that were asked for."""

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text so far; with beams, up to `num_each`."""

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the continuations of `found` as texts."""

    def step(self) -> bool:
        """Go on; return whether any text goes on or waits."""

    def close(self) -> None:
        """End the live texts, and begin no more texts."""


@runtime_checkable
class ContinuesTexts(Protocol):
    """An `LM` that continues texts in a way of its own."""

    def running(self, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool) -> Running:
        """Return texts to be continued, checked, with nothing computed; `is_stream`: a step adds few tokens."""


def running(lm: LM, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool = False) -> Running:
    """Return texts to be continued, checked, with nothing computed."""
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
        prompts: the ids of the texts, where they are checked already; then the texts may be left out.

    """

    lm: LM
    texts: Sequence[Text]
    decoding: Decoding
    prompts: Sequence[TokenIds] = ()
    _decodings: list[TextDecoding | BeamDecoding] = field(init=False)
    _live: list[_Live] = field(init=False, default_factory=list)
    _num_begun: int = field(init=False, default=0)
    _may_begin: bool = field(init=False, default=True)  # whether there may be room for waiting texts
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
        """The number of tokens decided on; a finished text counts with all tokens that were asked for."""
        num_finished = self._num_begun - len(self._live)
        return num_finished * self.decoding.max_new_tokens + sum(live.decoding.num_new for live in self._live)

    @property
    def ends(self) -> set[Span]:
        """The ends of the held parts of growing texts."""
        return {end for live in self._live for end in live.ends.values()}

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text so far; with beams, up to `num_each`."""
        return [decoding.found(num_each) for decoding in self._decodings]

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the continuations of `found` as texts."""
        return as_texts(self.lm, self.texts, self.found(num_each), self.decoding)

    def step(self) -> bool:
        """Decide the next tokens of every live text; return whether any text goes on or waits."""
        with self.lm.session.growing(self._evaluator) as evaluator:
            if self._evaluator is None:
                evaluator.continuations.let_grow(self, self._live)
                self._evaluator = evaluator
            try:
                if not self._step_in_place(evaluator):
                    grown = self._grow(evaluator)
                    self._admit(evaluator)
                    self._choose(evaluator)
                    self._settle(evaluator, grown)
            except BaseException:  # the evaluator ends the live texts once it has recovered
                evaluator.continuations.abandoned.append(self._live[:])
                self._live.clear()
                raise
            self._end(evaluator, [live for live in self._live if live.decoding.is_finished])
        return bool(self._live) or self._num_begun < len(self.prompts)

    def close(self) -> None:
        """End the live texts, and begin no more texts."""
        self._num_begun = len(self.prompts)
        if self._live and self._evaluator is not None:
            with self.lm.session.exclusive():
                self._end(self._evaluator, self._live)

    def _step_in_place(self, evaluator: Evaluator) -> bool:
        """Decide the next token of every live text where each has grown by one; return False if that is not so."""
        by_token: dict[Token, list[_Live]] = {}
        tokens: dict[Token, TokenScore] = {}
        for live in self._live:
            choice = live.next_token
            if choice is None or live.tip is None:
                return False
            token = live.tip, live.base_id + choice.token_id
            tokens[token] = choice.score
            by_token.setdefault(token, []).append(live)
        stepped = evaluator.continuations.extend(self, tokens, len(self._live))
        if stepped is None:
            return False
        rows: list[tuple[TextDecoding | BeamDecoding, int]] = []
        for row, (token, end) in enumerate(zip(stepped.tokens, stepped.ends, strict=True)):
            for live in by_token[token]:
                live.go_on(end)
                rows.append((live.decoding, row))
        ends, hidden = list(stepped.ends), stepped.hidden
        if self._may_begin and self._num_begun < len(self.prompts):
            num_before = len(self._live)
            self._admit(evaluator)
            begun = self._live[num_before:]
            new = list(dict.fromkeys(live.tip for live in begun if live.tip is not None))
            rows += [(live.decoding, len(ends) + new.index(live.tip)) for live in begun if live.tip is not None]
            hidden = torch.cat([hidden, evaluator.readout.last_hidden(new)]) if new else hidden
            ends += new
        logits = Logits(evaluator.readout.logits_after(ends, hidden), evaluator.executor.rows_in_a_slice)
        evaluator.computation.check_unchanged()  # before any token is chosen by these logits
        choose_next([(text, row) for text, row in rows if isinstance(text, TextDecoding)], logits)
        return True

    def _grow(self, evaluator: Evaluator) -> list[tuple[_Live, Completion]]:
        """Forward the continuations after which logits are wanted; return those that were not held before."""
        grown: list[tuple[_Live, Completion]] = []
        for live in self._live:
            held = live.ends
            grown += [(live, ids) for ids in live.decoding.ahead if ids not in held]
        if grown:
            ends = evaluator.continuations.grow(
                [live.beginning_of(ids) for live, ids in grown],
                lambda: [with_more(live.prompt_ids, live.forwarded(ids)) for live, ids in grown],
            )
            more: dict[_Live, dict[Completion, Span]] = {}
            for (live, ids), end in zip(grown, ends, strict=True):
                more.setdefault(live, {})[ids] = end
            for live, new in more.items():
                live.hold({**live.ends, **new})
        return grown

    def _admit(self, evaluator: Evaluator) -> None:
        """Begin as many of the waiting texts as there is room for, at least one if none is live."""
        first, stop = self._num_begun, self._num_begun
        if first == len(self.prompts):
            return
        num_new = self.decoding.max_new_tokens * self.decoding.num_beams
        num_new += MAX_PROPOSALS * self.decoding.num_lookup_tokens
        num_bytes = evaluator.num_bytes_to_hold([end for live in self._live for end in live.ends.values()])
        num_bytes += len(self._live) * num_new * evaluator.executor.token_bytes
        max_live = max(1, MAX_LIVE_TEXTS // self.decoding.num_beams)
        while stop < len(self.prompts) and len(self._live) + stop - first < max_live:
            is_sample = stop > first and self.prompts[stop] == self.prompts[stop - 1]
            num_bytes += (num_new + (0 if is_sample else len(self.prompts[stop]))) * evaluator.executor.token_bytes
            num_bytes += evaluator.executor.snapshot_bytes
            if num_bytes > evaluator.memory.max_bytes and (stop > first or self._live):
                break
            stop += 1
        ends = evaluator.continuations.begin(self.prompts[first:stop])
        self._live += [_Live(self.prompts[idx], self._decodings[idx], end) for idx, end in enumerate(ends, first)]
        self._num_begun = stop
        self._may_begin = False  # until a text is finished

    def _choose(self, evaluator: Evaluator) -> None:
        """Choose the next tokens of all live texts by the logits that they want."""
        wanted = [[(ids, ends[ids]) for ids in live.decoding.ahead] for live in self._live for ends in [live.ends]]
        row_of = {end: row for row, end in enumerate(dict.fromkeys(end for own in wanted for _, end in own))}
        logits = Logits(evaluator.readout.next_logits(list(row_of)), evaluator.executor.rows_in_a_slice)
        evaluator.computation.check_unchanged()  # before any token is chosen by these logits
        rows = [{ids: row_of[end] for ids, end in own} for own in wanted]
        choose: Callable[..., None] = choose_beams if self.decoding.num_beams > 1 else choose_tokens
        choose([live.decoding for live in self._live], rows, logits)

    def _settle(self, evaluator: Evaluator, grown: Sequence[tuple[_Live, Completion]]) -> None:
        """Note the scores of forwarded tokens, and drop continuations that are not needed to go on."""
        held = {live: live.ends for live in self._live}
        scores = {held[live][ids]: score for live, ids in grown if (score := live.decoding.score_of(ids)) is not None}
        dropped: list[Span] = []
        for live, ends in held.items():
            needed = live.decoding.needed()
            dropped += [end for ids, end in ends.items() if ids not in needed]
            live.hold({ids: end for ids, end in ends.items() if ids in needed})
        kept = [held[live][ids] for live, ids in grown if ids in live.ends]
        evaluator.continuations.settle(kept, dropped, scores)

    def _end(self, evaluator: Evaluator, finished: Sequence[_Live]) -> None:
        if not finished:
            return
        self._may_begin = True
        ended = dict.fromkeys(finished)
        self._live[:] = [live for live in self._live if live not in ended]  # in place: see `step`
        evaluator.continuations.end([end for live in ended for end in live.ends.values()])


def as_texts(
    lm: LM, prompts: Sequence[Text], found: Sequence[Sequence[Found]], decoding: Decoding
) -> list[list[GeneratedText]]:
    """Return the continuations of each prompt as texts."""
    return [
        [generated_text(lm, prompt, one, decoding.logprob_dtype) for one in row]
        for prompt, row in zip(prompts, found, strict=True)
    ]


def run_with_bar(run: Running, show: bool | None) -> None:
    """Let texts grow, under a bar over their tokens, until all are finished or an error is raised."""
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
