"""Generation: texts continued by the model, many at once, each step one packed pass of one token a text.

A continuation is a text like any other: a prompt and a segment of token ids, whose keys and values are kept. Texts that
are finished leave the batch and waiting ones take their place; nothing is padded, and samples of one prompt share it.
How a token is chosen is decoding.py's business.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import finalize

import torch
from torch import Tensor
from tqdm import tqdm

from backprompt import classify
from backprompt.cache import TokenScore
from backprompt.decoding import Decoding, FinishReason, TextDecoding
from backprompt.errors import GenerationError, TextTypeError
from backprompt.progress import progress_bar, showing
from backprompt.radix import Span
from backprompt.text import Text, lazily
from backprompt.token_graph import TokenIds, flat, with_more
from backprompt.tokens import added

if TYPE_CHECKING:
    from backprompt.evaluator import Evaluator
    from backprompt.lm import LM

Continued = TypeVar("Continued", bound="ContinuedText")

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's, for bytes that no other token has

MAX_LIVE_TEXTS = 256
"""Of more texts the others wait until one is finished."""
MIN_TEXTS_FOR_A_BAR = 5


class ContinuedText(Text):
    """A prompt and what follows it, a segment of token ids. Joined with `+` it gives a plain `Text`."""

    __slots__ = ("_completion", "_prompt")

    _prompt: Text
    _completion: Text

    @classmethod
    def _of(cls: type[Continued], prompt: Text, token_ids: Sequence[int], lm: LM) -> Continued:
        with lazily():
            completion = Text.from_tokens(token_ids, lm)
            plain = prompt + completion
        text = cls.__new__(cls)
        for name in ("_segment", "_left", "_right", "_lm", "_num_segments", "_hash"):
            setattr(text, name, getattr(plain, name))
        text._prompt, text._completion = prompt, completion
        return text

    @property
    def prompt(self) -> Text:
        """What was continued."""
        return self._prompt

    @property
    def completion_tokens(self) -> tuple[int, ...]:
        """The ids that were added, an end token included."""
        segments = self._completion.segments  # one, or none where nothing was added
        return segments[0] if segments and isinstance(segments[0], tuple) else ()

    @property
    def completion(self) -> str:
        """What was added, as a string, special tokens such as an end token left out."""
        lm = self._require_lm("the string of token ids")
        special = set(lm.tokenizer.all_special_ids)
        kept = [token_id for token_id in self.completion_tokens if token_id not in special]
        with lazily():
            whole, before = (self._prompt + Text.from_tokens(kept, lm)).string, self._prompt.string
        return added(before, whole)  # a prompt may end within a character

    def _plain(self) -> Text:
        with lazily():
            return self._prompt + self._completion


class GeneratedText(ContinuedText):
    """What `generate` returns: a prompt and what the model added to it."""

    __slots__ = ("_finish_reason", "_logprobs")

    _logprobs: tuple[float, ...]
    _finish_reason: FinishReason

    @property
    def completion_logprobs(self) -> Tensor:
        """Log-probability of each added token in the model's own distribution, `(new tokens,)`, nats, float32.

        Temperature, penalties and whatever else changed what was chosen do not show here.
        """
        return torch.tensor(self._logprobs, dtype=torch.float32)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended.

        "eos": an end token; "stop": a stop string; "length": `max_new_tokens`; "criteria": another criterion of the
        options, such as `max_time`; "interrupted": nobody asked for more.
        """
        return self._finish_reason


class SelectedText(ContinuedText):
    """What `select` returns: a prompt and the most probable of the options."""

    __slots__ = ("_option", "_probabilities")

    _option: str
    _probabilities: dict[str, float]

    @property
    def option(self) -> str:
        """The option that was chosen, as it was given."""
        return self._option

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each option among them."""
        return dict(self._probabilities)


def select(prompt: Text, options: Sequence[str], *, end_of_prompt: str = " ", **scoring: Any) -> SelectedText:
    """Return a text continued by the most probable of some options.

    The probabilities are those of `classify.predict_proba(prompt, options, aggregate="sum")`.

    Args:
        prompt: what to continue.
        options: what may follow.
        end_of_prompt: " " or "": stands between the prompt and an option; see `classify.log_probs`.
        **scoring: other options of `classify.predict_proba`, such as `prior`.

    Raises:
        What `classify.predict_proba` raises.

    """
    lm = prompt._require_lm("a continuation")
    scoring = {"aggregate": "sum", **scoring}
    probabilities = classify.predict_proba(prompt, options, end_of_prompt=end_of_prompt, **scoring)
    best = int(probabilities.argmax())
    space = end_of_prompt if lm.needs_space_between else ""
    (token_ids,) = lm.completion_ids([space + options[best]])
    text = SelectedText._of(prompt, token_ids, lm)
    text._option, text._probabilities = options[best], dict(zip(options, probabilities.tolist(), strict=True))
    return text


def _generated(lm: LM, prompt: Text, decoding: TextDecoding) -> GeneratedText:
    text = GeneratedText._of(prompt, decoding.completion_ids, lm)
    text._logprobs = tuple(choice.logprob for choice in decoding.choices)
    text._finish_reason = decoding.finish_reason or "interrupted"
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
    seed: int | None = None,
    show_progress_bar: bool | None = None,
    **generation_config: Any,
) -> Any:
    """Let the model continue texts, all together.

    Greedy unless sampling is asked for, by `do_sample=True` or one of its fields (`temperature`, `top_p`, ...). The
    rules are those of transformers: what is not given comes from the model's `generation_config`.

    Args:
        texts: a text or many, of one `LM`, whatever they share; they may have groups, but not end in one.
        max_new_tokens: how many tokens to add to each at most.
        n: how many samples of each text; by default one.
        stop: a string or strings; a text ends with the token that completes one of them.
        seed: of sampling. A text's samples depend on the seed, its ids, the options and the number of the sample (of
            the same ids in the call), and not on what else is generated. By default each call has a seed of its own.
        show_progress_bar: by default where there are at least 5 continuations, or it takes longer than two seconds.
        **generation_config: fields of transformers' `GenerationConfig`.

    Returns:
        A `GeneratedText` for a text, a list for a sequence; with `n` a list of `n` in place of each.

    Raises:
        GenerationError: options that contradict each other or that are not there; no room for `max_new_tokens`.
        GroupError: a text ends in a group, so there is no last token to continue.
        What `evaluate` raises. All of it before anything is computed.
        StaleRepresentationError: the model's weights change meanwhile.

    """
    is_single = isinstance(texts, Text)
    listed = [texts] if isinstance(texts, Text) else list(texts)
    for idx, text in enumerate(listed):
        if not isinstance(text, Text):
            raise TextTypeError(f"texts[{idx}] is a {type(text).__name__}, not a Text. Wrap strings: Text(string, lm).")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise GenerationError(f"n must be an int of at least 1, not {n!r}.")
    if not listed:
        return []
    lm = listed[0]._require_lm("a continuation")
    decoding = lm.decoding(max_new_tokens=max_new_tokens, stop=stop, seed=seed, given=generation_config)
    if n is not None and n > 1 and not decoding.is_sampling:
        raise GenerationError(f"Greedy decoding gives one continuation, not {n}. Ask for sampling: do_sample=True.")
    run = Run(lm, [text for text in listed for _ in range(n or 1)], decoding)
    _run_with_bar(run, show_progress_bar)
    found: list[Any] = run.results()
    if n is not None:
        found = [found[start : start + n] for start in range(0, len(found), n)]
    return found[0] if is_single else found


def _run_with_bar(run: Run, show: bool | None) -> None:
    """Let texts grow until all are finished; of a few texts the bar counts tokens."""
    if show or (show is None and len(run.texts) >= MIN_TEXTS_FOR_A_BAR):
        bar, done = tqdm(total=len(run.texts), desc="texts"), attrgetter("num_finished")
    else:
        max_new_tokens = run.decoding.max_new_tokens
        with showing(show):
            bar = progress_bar(len(run.texts) * max_new_tokens, "generating", "tokens", is_long=max_new_tokens > 1)
        done = attrgetter("num_new_tokens")
    with bar, showing(False):  # one bar is enough
        while run.step():
            bar.update(done(run) - bar.n)
        bar.update(done(run) - bar.n)


class Stream(Iterator[str]):
    """The continuation of one text, piece by piece as it is decided; see `Text.stream`.

    An iterator of strings. What was generated so far is `stream.text` at any time, and is kept when nobody asks for
    more.
    """

    def __init__(self, lm: LM, prompt: Text, decoding: Decoding) -> None:
        self._lm = lm
        self._prompt = prompt
        self._run = Run(lm, [prompt], decoding)
        self._num_given = 0

    @property
    def text(self) -> GeneratedText:
        """The prompt and what was added so far."""
        return self._run.results()[0]

    def __next__(self) -> str:
        while True:
            is_going_on = self._run.step()
            completion = self._settled() if is_going_on else self.text.completion
            if is_going_on and completion.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # a character whose other bytes are still to come
            piece, self._num_given = completion[self._num_given :], len(completion)
            if piece:
                return piece
            if not is_going_on:
                raise StopIteration

    def _settled(self) -> str:
        """Return the completion without the run of byte tokens at its end, which decoders decode as a whole."""
        token_ids = list(self.text.completion_tokens)
        tokens = self._lm.tokenizer.convert_ids_to_tokens(token_ids)
        special = set(self._lm.tokenizer.all_special_ids)  # they are left out, so bytes around them meet
        while token_ids and (token_ids[-1] in special or _BYTE_TOKEN.fullmatch(tokens[len(token_ids) - 1] or "")):
            token_ids.pop()
        return ContinuedText._of(self._prompt, token_ids, self._lm).completion

    def close(self) -> None:
        """Stop; what was generated is kept."""
        self._run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(eq=False)
class _Live:
    """A text that grows: its ids up to the last token that was forwarded, and the span at which that ends."""

    idx: int
    token_ids: TokenIds
    decoding: TextDecoding
    end: Span


@dataclass(eq=False)
class Run:
    """Texts that are being continued. Each `step` decides a token for every live one.

    Args:
        lm: of all texts.
        texts: what to continue. One that is there several times is sampled several times.
        decoding: the options.

    """

    lm: LM
    texts: Sequence[Text]
    decoding: Decoding
    _decodings: list[TextDecoding] = field(init=False)
    _prompts: list[TokenIds] = field(init=False)
    _live: list[_Live] = field(init=False, default_factory=list)
    _num_begun: int = field(init=False, default=0)
    _evaluator: Evaluator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._prompts = self.lm.ids_to_continue(self.texts, self.decoding.max_new_tokens)
        num_samples: Counter[tuple[int, ...]] = Counter()
        self._decodings = []
        for ids in map(flat, self._prompts):
            self._decodings.append(self.decoding.for_text(ids, num_samples[ids]))
            num_samples[ids] += 1

    @property
    def num_finished(self) -> int:
        """How many texts are finished."""
        return self._num_begun - len(self._live)

    @property
    def num_new_tokens(self) -> int:
        """How many tokens were added to all texts."""
        return sum(len(decoding.choices) for decoding in self._decodings)

    def results(self) -> list[GeneratedText]:
        """Return all texts, with what was added so far."""
        return [_generated(self.lm, text, decoding) for text, decoding in zip(self.texts, self._decodings, strict=True)]

    def step(self) -> bool:
        """Decide a token for every live text; return whether any goes on, or waits."""
        with self.lm.growing(self._evaluator) as evaluator:
            if self._evaluator is None:
                self._evaluator = evaluator
                # Whoever drops a stream does not say so: what it holds is let go of when the evaluator next looks.
                finalize(self, evaluator.abandoned.append, self._live).atexit = False
            try:
                self._grow(evaluator)
                self._admit(evaluator)
                for live, logits in zip(
                    self._live, evaluator.next_logits([live.end for live in self._live]), strict=True
                ):
                    live.decoding.choose(logits)
            except BaseException:
                self._end(evaluator, self._live)
                raise
            self._end(evaluator, [live for live in self._live if live.decoding.finish_reason is not None])
        return bool(self._live) or self._num_begun < len(self.texts)

    def close(self) -> None:
        """Let go of what is live, and begin with nothing more."""
        self._num_begun = len(self.texts)
        if self._live and self._evaluator is not None:
            with self.lm._exclusive():
                self._end(self._evaluator, self._live)

    def _grow(self, evaluator: Evaluator) -> None:
        """Forward the token that was decided last for each live text."""
        if not self._live:
            return
        grown = [with_more(live.token_ids, (live.decoding.choices[-1].token_id,)) for live in self._live]
        scores = [
            TokenScore(choice.logprob, choice.is_argmax)
            for choice in (live.decoding.choices[-1] for live in self._live)
        ]
        ends = evaluator.grow(grown, [live.end for live in self._live], scores)
        for live, token_ids, end in zip(self._live, grown, ends, strict=True):
            live.token_ids, live.end = token_ids, end

    def _admit(self, evaluator: Evaluator) -> None:
        """Begin with as many of the waiting texts as there is room for, at least one if none is live."""
        first, stop = self._num_begun, self._num_begun
        if first == len(self.texts):
            return
        num_bytes = evaluator.num_bytes_to_hold([live.end for live in self._live])
        num_bytes += len(self._live) * self.decoding.max_new_tokens * evaluator.executor.token_bytes
        while stop < len(self.texts) and len(self._live) + stop - first < MAX_LIVE_TEXTS:
            is_sample = stop > first and self._prompts[stop] == self._prompts[stop - 1]
            num_new = self.decoding.max_new_tokens + (0 if is_sample else len(self._prompts[stop]))
            num_bytes += num_new * evaluator.executor.token_bytes
            if num_bytes > evaluator.memory.max_bytes and (stop > first or self._live):
                break
            stop += 1
        ends = evaluator.begin(self._prompts[first:stop])
        self._live += [_Live(idx, self._prompts[idx], self._decodings[idx], end) for idx, end in enumerate(ends, first)]
        self._num_begun = stop

    def _end(self, evaluator: Evaluator, finished: Sequence[_Live]) -> None:
        ended = list(finished)
        self._live[:] = [live for live in self._live if live not in ended]  # in place: see `step`
        evaluator.end_growth([live.end for live in ended])
