"""Generation: texts continued by the model, many at once, each step one packed pass of one token a text.

A continuation is a text like any other: a prompt and a segment of token ids, whose keys and values are kept. Texts that
are finished leave the batch and waiting ones take their place; nothing is padded, and samples of one prompt share it.
How a token is chosen is decoding.py's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from backprompt import classify
from backprompt.arguments import as_int, as_list
from backprompt.beams import BeamDecoding, choose_beams
from backprompt.bound import bound_lm
from backprompt.choosing import Logits
from backprompt.choosing import choose as choose_tokens
from backprompt.classify.completions import EndOfPrompt, completion_ids, ends_behind
from backprompt.decoded import Decoder
from backprompt.decoding import Completion, Decoding, FinishReason, Found, TextDecoding
from backprompt.errors import GenerationError
from backprompt.lm import LM
from backprompt.lookahead import MAX_PROPOSALS
from backprompt.progress import check_show, progress_bar, showing
from backprompt.radix import Span
from backprompt.stops import StopStrings
from backprompt.text import Text, lazily
from backprompt.texts import as_texts
from backprompt.token_graph import TokenIds, flat, with_more
from backprompt.tokens import added

if TYPE_CHECKING:
    from backprompt.evaluator import Evaluator

Continued = TypeVar("Continued", bound="ContinuedText")

MAX_LIVE_TEXTS = 256
"""Of more texts the others wait until one is finished."""


class ContinuedText(Text):
    """A prompt and what follows it, a segment of token ids. Joined with `+` it gives a plain `Text`."""

    # Behind the ids may stand a string: see `stops.Cut`.

    __slots__ = ("_completion", "_prompt")

    _prompt: Text
    _completion: Text

    @classmethod
    def _of(cls: type[Continued], prompt: Text, token_ids: Sequence[int], lm: LM, rest: str = "") -> Continued:
        with lazily():
            completion = Text.from_tokens(token_ids, lm) + rest
            plain = prompt + completion
        text = cls.__new__(cls)
        for name in ("_segment", "_add_special_tokens", "_left", "_right", "_lm", "_num_segments", "_hash"):
            setattr(text, name, getattr(plain, name))
        text._prompt, text._completion = prompt, completion
        return text

    @property
    def prompt(self) -> Text:
        """What was continued."""
        return self._prompt

    @property
    def completion_text(self) -> Text:
        """What was added, as a text of its own: the ids, and the string behind them where a stop string cut a token."""
        return self._completion

    @property
    def completion_tokens(self) -> tuple[int, ...]:
        """The ids that were added, an end token included.

        Of what a stop string ended, those before the token in which the stop string begins.
        """
        ids = [segment for segment in self._completion.segments if isinstance(segment, tuple)]
        return ids[0] if ids else ()

    @property
    def completion(self) -> str:
        """What was added, as a string, special tokens such as an end token left out."""
        lm = bound_lm(self, "the string of token ids")
        special = set(lm.tokenizer.all_special_ids)
        kept = [token_id for token_id in self.completion_tokens if token_id not in special]
        with lazily():
            whole, before = (self._prompt + Text.from_tokens(kept, lm)).string, self._prompt.string
        return added(before, whole) + self.completion_rest  # a prompt may end within a character

    @property
    def completion_rest(self) -> str:
        """The string behind `completion_tokens` where a stop string cut a token; else empty."""
        segments = self._completion.segments
        return segments[-1] if segments and isinstance(segments[-1], str) else ""

    def _plain(self) -> Text:
        with lazily():
            return self._prompt + self._completion


class GeneratedText(ContinuedText):
    """What `generate` returns: a prompt and what the model added to it, a segment of token ids.

    A stop string is cut off (with `include_stop=True`, what stands behind it). Where the cut is within a token, the
    tokens before it stay as they were generated, and the rest of that token's string stands behind them as a string,
    encoded as any string is: `text.tokens` has ids for it, `completion_tokens` and `completion_logprobs` have none.
    """

    __slots__ = ("_finish_reason", "_logprob_dtype", "_logprobs")

    _logprobs: tuple[float, ...]
    _logprob_dtype: torch.dtype
    _finish_reason: FinishReason

    @property
    def completion_logprobs(self) -> Tensor:
        """Log-probability of each of `completion_tokens` in the model's own distribution, `(tokens,)`, nats.

        In float64 for a model in float64, else in float32. Temperature, penalties and whatever else changed what was
        chosen do not show here.
        """
        return torch.tensor(self._logprobs, dtype=self._logprob_dtype)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended.

        "eos": an end token; "stop": a stop string; "length": `max_new_tokens`; "criteria": another criterion of the
        options, such as `max_time`; "interrupted": nobody asked for more.
        """
        return self._finish_reason


class SelectedText(ContinuedText):
    """What `select` returns: a prompt and the most probable of the options."""

    __slots__ = ("_aggregate", "_option", "_probabilities")

    _aggregate: classify.Aggregate
    _option: str
    _probabilities: dict[str, float]

    def __repr__(self) -> str:
        return f"<{super().__repr__()}, selected {self._option!r} by the {self._aggregate}>"

    @property
    def option(self) -> str:
        """The option that was chosen, as it was given."""
        return self._option

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each option among them, by the rule that `aggregate` names."""
        return dict(self._probabilities)

    @property
    def aggregate(self) -> classify.Aggregate:
        """How an option's token log-probabilities became its own: by their "mean" or their "sum"."""
        return self._aggregate


def select(
    prompt: Text,
    options: Iterable[str],
    *,
    end_of_prompt: EndOfPrompt = "auto",
    aggregate: classify.Aggregate = "mean",
    **scoring: Any,
) -> SelectedText:
    """Return a text continued by the most probable of some options.

    The probabilities are those of `classify.predict_proba(prompt, options)`.

    Args:
        prompt: what to continue.
        options: what may follow.
        end_of_prompt: "auto", " " or "": stands between the prompt and an option; see `classify.log_probs`.
        aggregate: of an option's token log-probabilities, the "mean" or the "sum"; see `classify.predict_proba`.
        **scoring: other options of `classify.predict_proba`, such as `prior`.

    Raises:
        What `classify.predict_proba` raises.

    """
    lm = bound_lm(prompt, "a continuation")
    listed = as_list(options, "options must be a sequence of strings")
    probabilities = classify.predict_proba(prompt, listed, end_of_prompt=end_of_prompt, aggregate=aggregate, **scoring)
    option = listed[int(probabilities.argmax())]
    (end,) = ends_behind(lm, [(prompt, end_of_prompt)])
    (token_ids,) = completion_ids(lm, [(end, option)]).values()
    text = SelectedText._of(prompt, token_ids, lm)
    text._aggregate, text._option = aggregate, option
    text._probabilities = dict(zip(listed, probabilities.tolist(), strict=True))
    return text


def _generated(lm: LM, prompt: Text, found: Found, dtype: torch.dtype) -> GeneratedText:
    kept = found.choices if found.cut is None else found.choices[: found.cut.num_tokens]
    rest = "" if found.cut is None else found.cut.rest
    text = GeneratedText._of(prompt, [choice.token_id for choice in kept], lm, rest)
    text._logprobs, text._logprob_dtype = tuple(choice.logprob for choice in kept), dtype
    text._finish_reason = found.finish_reason
    return text


@overload
def generate(texts: Text, *, max_new_tokens: int, n: None = None, **options: Any) -> GeneratedText: ...


@overload
def generate(texts: Text, *, max_new_tokens: int, n: int, **options: Any) -> list[GeneratedText]: ...


@overload
def generate(texts: Iterable[Text], *, max_new_tokens: int, n: None = None, **options: Any) -> list[GeneratedText]: ...


@overload
def generate(texts: Iterable[Text], *, max_new_tokens: int, n: int, **options: Any) -> list[list[GeneratedText]]: ...


def generate(
    texts: Text | Iterable[Text],
    *,
    max_new_tokens: int,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    include_stop: bool = False,
    seed: int | None = None,
    show_progress_bar: bool | None = None,
    **generation_config: Any,
) -> Any:
    r"""Let the model continue texts, all together.

    Greedy unless sampling is asked for, by `do_sample=True` or one of its fields (`temperature`, `top_p`, ...). The
    rules are those of transformers: what is not given comes from the model's `generation_config`.

    Args:
        texts: a text or many, of one `LM`, whatever they share; they may have groups, but not end in one.
        max_new_tokens: how many tokens to add to each at most.
        n: how many samples of each text; by default one.
        stop: a string or strings; a text ends with the first one that is generated. What stands in the prompt does not
            count: of "\n\n" behind a prompt that ends in "\n", both line breaks must be generated. Of several that are
            complete with one character, the longest counts. (transformers' `stop_strings` looks at the prompt, too, and
            the text keeps the token that completes one.)
        include_stop: keep the stop string, which is otherwise left out of the text and its completion.
        seed: of sampling. A text's samples depend on the seed, its ids, the options and the number of the sample (of
            the same ids in the call), and not on what else is generated. By default each call has a seed of its own.
        show_progress_bar: by default on a terminal where it takes longer than two seconds.
        **generation_config: fields of transformers' `GenerationConfig`.

    Returns:
        A `GeneratedText` for a text, a list for a sequence; with `n` a list of `n` in place of each (of beams the best
        first, and fewer where there are no more).

    Raises:
        GenerationError: options that contradict each other or that are not there; no room for `max_new_tokens`.
        GroupError: a text ends in a group, so there is no last token to continue.
        What `evaluate` raises. All of it before anything is computed.
        GenerationError, on the way: the options exclude every token that may follow, or make scores NaN.
        NonFiniteError, on the way: the model returned NaN or infinity; names the text.
        StaleRepresentationError: the model's weights change meanwhile.

    """
    is_single = isinstance(texts, Text)
    listed = as_texts(texts, "generate")
    check_show(show_progress_bar)
    num_each = 1 if n is None else as_int(n, "n", at_least=1, error=GenerationError)
    if not listed:
        return []
    lm = bound_lm(listed[0], "a continuation")
    stops = StopStrings(stop, lm.tokenizer, include_stop=include_stop)
    decoding = _decoding(lm, stops, max_new_tokens, seed, generation_config)
    if not decoding.is_sampling and num_each > decoding.num_beams:
        if decoding.num_beams == 1:
            raise GenerationError(f"Greedy decoding gives one continuation, not {n}. Ask for sampling: do_sample=True.")
        raise GenerationError(f"{decoding.num_beams} beams give no {n} continuations. Ask for more: num_beams={n}.")
    run = Run(lm, [text for text in listed for _ in range(num_each)] if decoding.is_sampling else listed, decoding)
    run_with_bar(run, show_progress_bar)
    found = run.results(num_each)
    if decoding.is_sampling:
        samples = [text for (text,) in found]
        found = [samples[start : start + num_each] for start in range(0, len(samples), num_each)]
    results: list[Any] = [row[0] for row in found] if n is None else found
    return results[0] if is_single else results


def _decoding(lm: LM, stops: StopStrings, max_new_tokens: int, seed: int | None, given: Mapping[str, Any]) -> Decoding:
    return Decoding(
        lm.session.causal_lm, lm.tokenizer, max_new_tokens=max_new_tokens, stops=stops, seed=seed, given=given
    )


def run_with_bar(run: Run, show: bool | None) -> None:
    """Let texts grow until all are finished, or an error comes, under a bar over their tokens."""
    total = len(run.texts) * run.decoding.max_new_tokens
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


def stream(
    prompt: Text,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    include_stop: bool = False,
    seed: int | None = None,
    **generation_config: Any,
) -> Stream:
    """Return an iterator over the strings that the model adds to a text; see `Text.stream`."""
    lm = bound_lm(prompt, "a continuation")
    stops = StopStrings(stop, lm.tokenizer, include_stop=include_stop)
    decoding = _decoding(lm, stops, max_new_tokens, seed, generation_config)
    return Stream(lm, prompt, decoding)


class Stream(Iterator[str]):
    """The continuation of one text, piece by piece as it is decided; see `Text.stream`.

    An iterator of strings. What was generated so far is `stream.text` at any time, and is kept when nobody asks for
    more.
    """

    def __init__(self, lm: LM, prompt: Text, decoding: Decoding) -> None:
        if decoding.num_beams > 1:
            raise GenerationError("Beams are decided on at the end, so there are no pieces to stream. Use generate.")
        self._lm = lm
        self._prompt = prompt
        self._run = Run(lm, [prompt], decoding)
        self._stops = decoding.stops
        self._decoder = Decoder(lm.tokenizer, lm.tokenizer.all_special_ids)
        self._decoded = self._decoder.begin(flat(self._run.prompts[0]))
        self._num_decoded = self._num_given = 0

    @property
    def text(self) -> GeneratedText:
        """The prompt and what was added so far."""
        ((text,),) = self._run.results()
        return text

    def __next__(self) -> str:
        while True:
            is_going_on = self._run.step()
            completion = self._stops.decided(self._settled()) if is_going_on else self.text.completion
            piece, self._num_given = completion[self._num_given :], len(completion)
            if piece:
                return piece
            if not is_going_on:
                raise StopIteration

    def _settled(self) -> str:
        """Return what of the completion no token to come changes."""
        ((found,),) = self._run.found()
        for choice in found.choices[self._num_decoded :]:
            self._decoded = self._decoder.with_token(self._decoded, choice.token_id)
        self._num_decoded = len(found.choices)
        return self._decoded.settled

    def close(self) -> None:
        """Stop; what was generated is kept."""
        self._run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(eq=False)
class _Live:
    """A text that grows: its prompt, and the spans at which those of its continuations end that are held."""

    prompt_ids: TokenIds
    decoding: TextDecoding | BeamDecoding
    ends: dict[Completion, Span]


@dataclass(eq=False)
class Run:
    """Texts that are being continued. Each `step` decides at least one token for every live one.

    Args:
        lm: of all texts.
        texts: what to continue. One that is there several times is sampled several times.
        decoding: the options.

    """

    lm: LM
    texts: Sequence[Text]
    decoding: Decoding
    _decodings: list[TextDecoding | BeamDecoding] = field(init=False)
    prompts: list[TokenIds] = field(init=False)
    _live: list[_Live] = field(init=False, default_factory=list)
    _num_begun: int = field(init=False, default=0)
    _evaluator: Evaluator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompts = self.lm.session.ids_to_continue(self.texts, self.decoding.max_new_tokens)
        num_samples: Counter[tuple[int, ...]] = Counter()
        self._decodings = []
        for ids in map(flat, self.prompts):
            if self.decoding.num_beams > 1:
                self._decodings.append(BeamDecoding(self.decoding, ids))
            else:
                self._decodings.append(TextDecoding(self.decoding, ids, num_samples[ids]))
            num_samples[ids] += 1

    @property
    def num_tokens_done(self) -> int:
        """How many tokens are decided on; all that were asked for where a text is finished."""
        num_finished = self._num_begun - len(self._live)
        return num_finished * self.decoding.max_new_tokens + sum(live.decoding.num_new for live in self._live)

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text, with what was added so far; of beams up to `num_each`."""
        return [decoding.found(num_each) for decoding in self._decodings]

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the same as texts."""
        return [
            [_generated(self.lm, text, found, self.decoding.logprob_dtype) for found in row]
            for text, row in zip(self.texts, self.found(num_each), strict=True)
        ]

    def step(self) -> bool:
        """Decide what comes next for every live text; return whether any goes on, or waits."""
        with self.lm.session.growing(self._evaluator) as evaluator:
            if self._evaluator is None:
                evaluator.continuations.let_grow(self, self._live)
                self._evaluator = evaluator
            try:
                grown = self._grow(evaluator)
                self._admit(evaluator)
                self._choose(evaluator)
                self._settle(evaluator, grown)
            except BaseException:  # the evaluator ends them once it has recovered
                evaluator.continuations.abandoned.append(self._live[:])
                self._live.clear()
                raise
            self._end(evaluator, [live for live in self._live if live.decoding.is_finished])
        return bool(self._live) or self._num_begun < len(self.texts)

    def close(self) -> None:
        """Let go of what is live, and begin with nothing more."""
        self._num_begun = len(self.texts)
        if self._live and self._evaluator is not None:
            with self.lm.session.exclusive():
                self._end(self._evaluator, self._live)

    def _grow(self, evaluator: Evaluator) -> list[tuple[_Live, Completion]]:
        """Forward the continuations after which the logits are wanted; return those that were not held before."""
        grown = [(live, ids) for live in self._live for ids in live.decoding.ahead if ids not in live.ends]
        if grown:
            ends = evaluator.continuations.grow([with_more(live.prompt_ids, ids) for live, ids in grown])
            for (live, ids), end in zip(grown, ends, strict=True):
                live.ends[ids] = end
        return grown

    def _admit(self, evaluator: Evaluator) -> None:
        """Begin with as many of the waiting texts as there is room for, at least one if none is live."""
        first, stop = self._num_begun, self._num_begun
        if first == len(self.texts):
            return
        num_new = self.decoding.max_new_tokens * self.decoding.num_beams
        num_new += MAX_PROPOSALS * self.decoding.num_lookup_tokens
        num_bytes = evaluator.num_bytes_to_hold([end for live in self._live for end in live.ends.values()])
        num_bytes += len(self._live) * num_new * evaluator.executor.token_bytes
        max_live = max(1, MAX_LIVE_TEXTS // self.decoding.num_beams)
        while stop < len(self.texts) and len(self._live) + stop - first < max_live:
            is_sample = stop > first and self.prompts[stop] == self.prompts[stop - 1]
            num_bytes += (num_new + (0 if is_sample else len(self.prompts[stop]))) * evaluator.executor.token_bytes
            if num_bytes > evaluator.memory.max_bytes and (stop > first or self._live):
                break
            stop += 1
        ends = evaluator.continuations.begin(self.prompts[first:stop])
        self._live += [_Live(self.prompts[idx], self._decodings[idx], {(): end}) for idx, end in enumerate(ends, first)]
        self._num_begun = stop

    def _choose(self, evaluator: Evaluator) -> None:
        """Let all live texts go on by the logits that they want."""
        wanted = (live.ends[ids] for live in self._live for ids in live.decoding.ahead)
        row_of = {end: row for row, end in enumerate(dict.fromkeys(wanted))}
        logits = Logits(evaluator.readout.next_logits(list(row_of)), evaluator.executor.rows_in_a_slice)
        evaluator.check_unchanged()  # before anything is chosen by them
        rows = [{ids: row_of[live.ends[ids]] for ids in live.decoding.ahead} for live in self._live]
        choose: Callable[..., None] = choose_beams if self.decoding.num_beams > 1 else choose_tokens
        choose([live.decoding for live in self._live], rows, logits)

    def _settle(self, evaluator: Evaluator, grown: Sequence[tuple[_Live, Completion]]) -> None:
        """Note what was learnt of what was forwarded, and let go of what is not needed to go on."""
        scores = {live.ends[ids]: score for live, ids in grown if (score := live.decoding.score_of(ids)) is not None}
        dropped: list[Span] = []
        for live in self._live:
            needed = live.decoding.needed()
            dropped += [end for ids, end in live.ends.items() if ids not in needed]
            live.ends = {ids: end for ids, end in live.ends.items() if ids in needed}
        evaluator.continuations.settle([live.ends[ids] for live, ids in grown if ids in live.ends], dropped, scores)

    def _end(self, evaluator: Evaluator, finished: Sequence[_Live]) -> None:
        ended = dict.fromkeys(finished)
        self._live[:] = [live for live in self._live if live not in ended]  # in place: see `step`
        evaluator.continuations.end([end for live in ended for end in live.ends.values()])
