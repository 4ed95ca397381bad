"""Generation: texts continued by the model, many at once or one as a stream.

A continuation is a text like any other (continued.py): a prompt and a segment of token ids, whose keys and values are
kept. The texts of a call are continued together (run.py); how a token is chosen is decoding.py's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from backprompt.arguments import as_int
from backprompt.bound import bound_lm
from backprompt.errors import GenerationError
from backprompt.generation.continued import GeneratedText
from backprompt.generation.decoding import Decoding
from backprompt.generation.run import Run, run_with_bar
from backprompt.generation.stops import StopStrings
from backprompt.lm import LM
from backprompt.progress import check_show
from backprompt.text.checks import as_texts
from backprompt.text.node import Text
from backprompt.tokens.decoded import Decoder
from backprompt.tokens.graph import flat


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
        self.run = Run(lm, [prompt], decoding)
        self._stops = decoding.stops
        self._decoder = Decoder(lm.tokenizer, lm.tokenizer.all_special_ids)
        self._decoded = self._decoder.begin(flat(self.run.prompts[0]))
        self._num_decoded = self._num_given = 0

    @property
    def text(self) -> GeneratedText:
        """The prompt and what was added so far."""
        ((text,),) = self.run.results()
        return text

    def __next__(self) -> str:
        while True:
            is_going_on = self.run.step()
            completion = self._stops.decided(self._settled()) if is_going_on else self.text.completion
            piece, self._num_given = completion[self._num_given :], len(completion)
            if piece:
                return piece
            if not is_going_on:
                raise StopIteration

    def _settled(self) -> str:
        """Return what of the completion no token to come changes."""
        ((found,),) = self.run.found()
        for choice in found.choices[self._num_decoded :]:
            self._decoded = self._decoder.with_token(self._decoded, choice.token_id)
        self._num_decoded = len(found.choices)
        return self._decoded.settled

    def close(self) -> None:
        """Stop; what was generated is kept."""
        self.run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
