"""Generation: texts continued by the model, many at once or one as a stream.

A continuation is an ordinary text (continued.py): a prompt and a segment of token ids, whose keys and values are kept.
The texts of a call are continued together (run.py), by the rules of decoding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

from backprompt.arguments import as_int
from backprompt.bound import bound_lm
from backprompt.errors import GenerationError
from backprompt.generation.constrained import Constraints, constraints_of
from backprompt.generation.continued import GeneratedText
from backprompt.generation.decoding import Decoding
from backprompt.generation.run import run_with_bar, running
from backprompt.generation.stops import StopStrings
from backprompt.lm import LM
from backprompt.progress import check_show
from backprompt.text.checks import as_texts
from backprompt.text.node import Text
from backprompt.tokens.adapted import plain
from backprompt.tokens.constraints import Constraint
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
    constraint: Constraint | Sequence[Constraint | None] | None = None,
    show_progress_bar: bool | None = None,
    **generation_config: Any,
) -> GeneratedText | list[GeneratedText] | list[list[GeneratedText]]:
    r"""Return texts continued by the model, all together.

    Decoding is greedy, unless `do_sample=True` or a field for sampling (`temperature`, `top_p`, ...) is given. The
    rules are those of transformers. Options that are not given come from the model's `generation_config`.

    Args:
        texts: a text or many of one `LM`, with or without common parts; a text may have groups, but not end in one.
        max_new_tokens: the largest number of tokens to add to each text.
        n: the number of samples of each text; by default one.
        stop: a string or strings; a text ends with the first one that is generated. Characters of the prompt do not
            count: behind a prompt that ends in "\n", the stop string "\n\n" needs two generated line breaks. If one
            character completes several stop strings, the longest counts. (transformers' `stop_strings` also searches
            the prompt, and keeps the token that completes a stop string.)
        include_stop: keep the stop string, which is otherwise left out of the text and its completion.
        seed: the seed of sampling. A sample depends on the seed, the text's ids, the options, and the number of the
            sample among those of equal ids in the call; it does not depend on other texts. By default each call has a
            seed of its own.
        constraint: a `Regex`, a `JsonSchema` or a `Grammar` that each completion must match; or a list with one, or
            None, for each text. An end token may follow only where the completion may end. A text that has not ended
            within `max_new_tokens` ends with the reason "length". Needs llguidance.
        show_progress_bar: whether to show a bar; by default on a terminal if generation takes longer than two seconds.
        **generation_config: fields of transformers' `GenerationConfig`.

    Returns:
        A `GeneratedText` for one text, or a list of them for a list of texts. With `n`, each is replaced by a list of
        `n` (of beams, the best first; fewer than `n` if no more were found).

    Raises:
        GenerationError: options contradict each other or do not exist; there is no room for `max_new_tokens`;
            llguidance refuses a constraint, or no token can come first under it.
        MissingDependencyError: there is a constraint, and llguidance is not installed.
        TokenizerError: there is a constraint, and llguidance does not know what the tokenizer's tokens stand for.
        GroupError: a text ends in a group, so there is no last token to continue.
        The errors of `evaluate`. All errors above are raised before any token is computed.
        GenerationError, during generation: the options exclude every token that may follow, or make scores NaN.
        NonFiniteError, during generation: the model returned NaN or infinity; the message names the text.
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
    constraints = constraints_of(lm, constraint, len(listed))
    decoding = _decoding(lm, stops, max_new_tokens, seed, constraints, generation_config)
    if not decoding.is_sampling and num_each > decoding.num_beams:
        if decoding.num_beams == 1:
            raise GenerationError(f"Greedy decoding gives one continuation, not {n}. Ask for sampling: do_sample=True.")
        raise GenerationError(
            f"{decoding.num_beams} beams cannot give {n} continuations. Ask for more beams: num_beams={n}."
        )
    asked = [text for text in listed for _ in range(num_each)] if decoding.is_sampling else listed
    run = running(lm, asked, decoding.repeated(num_each) if decoding.is_sampling else decoding)
    run_with_bar(run, show_progress_bar)
    found = run.results(num_each)
    if decoding.is_sampling:
        samples = [text for (text,) in found]
        found = [samples[start : start + num_each] for start in range(0, len(samples), num_each)]
    if n is None:
        return found[0][0] if is_single else [row[0] for row in found]
    return found[0] if is_single else found


def _decoding(
    lm: LM,
    stops: StopStrings,
    max_new_tokens: int,
    seed: int | None,
    constraints: Constraints,
    given: Mapping[str, Any],
    first_sample: int = 0,
) -> Decoding:
    return Decoding(
        lm.session.causal_lm,
        lm.tokenizer,
        max_new_tokens=max_new_tokens,
        stops=stops,
        seed=seed,
        given=given,
        refused=refused_ids(lm),
        constraints=constraints,
        first_sample=first_sample,
    )


def refused_ids(lm: LM) -> Callable[[], frozenset[int]]:
    """Return a function that returns the ids that no text may have, as known at the time of its call."""

    def found() -> frozenset[int]:
        limits = lm.session.limits.model
        return limits.placeholders.union(range(limits.num_embeddings, lm.session.vocab_size))

    return found


def stream(
    prompt: Text,
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] | None = None,
    include_stop: bool = False,
    seed: int | None = None,
    constraint: Constraint | None = None,
    sample_idx: int = 0,
    **generation_config: Any,
) -> Stream:
    """Return an iterator over the strings that the model adds to a text; see `Text.stream`."""
    lm = bound_lm(prompt, "a continuation")
    stops = StopStrings(stop, lm.tokenizer, include_stop=include_stop)
    constraints = constraints_of(lm, constraint, 1)
    decoding = _decoding(lm, stops, max_new_tokens, seed, constraints, generation_config, sample_idx)
    return Stream(lm, prompt, decoding)


class Stream(Iterator[str]):
    """An iterator over the continuation of one text, string by string as each is decided; see `Text.stream`.

    `stream.text` is the text so far at any time, and stays available if the iteration stops early.
    """

    def __init__(self, lm: LM, prompt: Text, decoding: Decoding) -> None:
        if decoding.num_beams > 1:
            raise GenerationError("Beam search decides at the end, so it has no pieces to stream. Use generate.")
        self._lm = lm
        self._prompt = prompt
        self.run = running(lm, [prompt], decoding, is_stream=True)
        self._stops = decoding.stops
        self._decoder = Decoder(lm.tokenizer, lm.tokenizer.all_special_ids)
        self._decoded = self._decoder.begin(plain(flat(self.run.prompts[0])))
        self._num_decoded = self._num_given = 0

    @property
    def text(self) -> GeneratedText:
        """The prompt and its continuation so far."""
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
        """Return the part of the completion that later tokens cannot change."""
        ((found,),) = self.run.found()
        for choice in found.choices[self._num_decoded :]:
            self._decoded = self._decoder.with_token(self._decoded, choice.token_id)
        self._num_decoded = len(found.choices)
        return self._decoded.settled

    def close(self) -> None:
        """Stop; the generated text is kept."""
        self.run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
