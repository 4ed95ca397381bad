"""Questions that a text asks its model: tokens, representations, continuations, pictures.

A text passes each question to its engine, or to a function that is registered under a name (engine.py). So this module
imports neither an engine nor these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from backprompt.errors import UnboundTextError
from backprompt.text.engine import Engine, Pinned, Representation, Shown, TextStream, outside
from backprompt.text.extents import Join

if TYPE_CHECKING:
    from torch import Tensor

    from backprompt import GeneratedText, SelectedText  # the root's names: a text knows no module that generates
    from backprompt.drawing import Drawing


class Questions:
    """The part of a `Text` that asks its engine."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def lm(self) -> Engine[Any] | None:
            """The engine of the text."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids that the model sees, including special tokens. Needs a tokenizer, not a forward pass."""
        return bound_engine(self, "token ids").tokens(self)

    def joins(self) -> list[Join]:
        """Return every join whose tokens differ from those of both sides encoded separately."""
        return bound_engine(self, "joins").joins(self)

    @property
    def model_repr(self) -> Representation:
        """The model's representation of this text, a `ModelRepr`, computed on access if it is not cached."""
        return bound_engine(self, "a representation").representation(self)

    def __call__(self) -> Representation:
        """Evaluate now and return the `ModelRepr`."""
        return self.model_repr

    @property
    def logits(self) -> Tensor:
        """Next-token logits, shape `(vocab,)`, in the model's dtype.

        Raises:
            GroupError: the text ends in a group, so it has no last token.

        """
        return bound_engine(self, "a representation").result(self, "logits")

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probability of each token given the tokens that it sees, `(tokens,)`, nats.

        The dtype is float64 for a model in float64, else float32. The first token, and the first token behind a group,
        have nan; a token of probability 0 has -inf.
        """
        return bound_engine(self, "a representation").result(self, "token_logprobs")

    def entropies(self, *, temperature: float = 1.0) -> Tensor:
        """Return the entropy of the distribution that predicts each token, `(tokens,)`, nats.

        Evaluates the text if needed. For each token a row of the output head is computed, and dropped afterwards. The
        entropy is nan for a token without a prediction. `lm.entropies` takes many texts at a time.

        Args:
            temperature: divides the logits.

        Raises:
            ValueError: the temperature is not above 0.
            All errors of `backprompt.evaluate`.

        """
        found: Tensor = outside("entropies")(self, temperature)
        return found

    def top_logprobs(self, k: int, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and ids of the most probable tokens at each token's position.

        Args:
            k: the number of tokens at each position.
            temperature: divides the logits.

        Returns:
            Log-probabilities `(tokens, k)`, nats, highest first, and ids `(tokens, k)`; nan and -1 for a token without
            a prediction. See `lm.top_logprobs`, which takes many texts at a time.

        Raises:
            ValueError: `k` is not an int from 1 to the size of the vocabulary.
            All errors of `entropies`.

        """
        found: tuple[Tensor, Tensor] = outside("top_logprobs")(self, k, temperature)
        return found

    @overload
    def generate(self, *, max_new_tokens: int, n: None = None, **options: Any) -> GeneratedText: ...

    @overload
    def generate(self, *, max_new_tokens: int, n: int, **options: Any) -> list[GeneratedText]: ...

    def generate(self, **options: Any) -> GeneratedText | list[GeneratedText]:
        r"""Return this text continued by the model; takes the arguments of `backprompt.generate`.

            text.generate(max_new_tokens=32, stop="\n", temperature=0.7, seed=1)

        Returns:
            A `GeneratedText`, or a list of them if `n` is given.

        """
        found: GeneratedText | list[GeneratedText] = outside("generate")(self, **options)
        return found

    def select(self, options: Any, **scoring: Any) -> SelectedText:
        """Return this text continued by the most probable of several strings, or of the strings of a finite constraint.

            answer = (text + "Is it a review? Answer:").select(["yes", "no"])
            answer.option, answer.probabilities

        The probabilities and errors are those of `classify.predict_proba(text, options)`, whose other arguments are
        also allowed: `aggregate="sum"` uses the probability of each whole option, not the mean over its tokens.

        Returns:
            A `SelectedText`.

        """
        selected: SelectedText = outside("select")(self, options, **scoring)
        return selected

    def probability_of(self, language: Any, **options: Any) -> float:
        """Return the probability that the model continues this text with a string of a finite language.

            text.probability_of(Regex("(very )?(good|great)"))

        The other arguments and the errors are those of `classify.probability_of`.
        """
        found: float = outside("probability_of")(self, language, **options)
        return found

    def stream(
        self,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] | None = None,
        include_stop: bool = False,
        seed: int | None = None,
        constraint: Any = None,
        sample_idx: int = 0,
        **generation_config: Any,
    ) -> TextStream:
        """Return a `Stream`, an iterator over the strings that the model adds, each as soon as it is final.

            for piece in text.stream(max_new_tokens=100):
                print(piece, end="", flush=True)

        No piece contains a part of a stop string that is left out: a possible beginning of a stop string is held back
        until later tokens decide. `Stream.text` is the text so far, a `GeneratedText`. Arguments and errors are those
        of `backprompt.generate`. With a seed, `sample_idx` selects one of the samples that `generate` returns for `n`,
        counted from 0.
        """
        found: TextStream = outside("stream")(
            self,
            max_new_tokens=max_new_tokens,
            stop=stop,
            include_stop=include_stop,
            seed=seed,
            constraint=constraint,
            sample_idx=sample_idx,
            **generation_config,
        )
        return found

    def draw(self, **options: Any) -> Drawing:
        """Return a picture of this text's segments; takes the options of `backprompt.draw`."""
        drawing: Drawing = outside("draw")(self, **options)
        return drawing

    def show(
        self,
        *,
        top: int = 5,
        attention_from: int | None = None,
        layers: int | slice | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
    ) -> Shown:
        """Evaluate this text and return it with tokens coloured by log-probability, or by attention: a `ShownText`.

        Notebooks display the result, with the most probable alternatives under the mouse pointer; `print` it in
        terminals (without colours if `NO_COLOR` is set or the output is no terminal).

        Args:
            top: the number of alternatives for each token; above 0, a row of the output head is computed for each
                token.
            attention_from: the index of a token in `text.tokens`. Colours then show the share of attention that this
                token pays to each token, as the mean over layers and heads.
            layers, heads: the layers and heads of that mean; see `ModelRepr.attention`.

        Raises:
            ValueError: `top` is negative, or there is no such token, layer or head.
            All errors of `backprompt.evaluate`, and of `ModelRepr.attention` if `attention_from` is given.

        """
        found: Shown = outside("show")(self, top=top, attention_from=attention_from, layers=layers, heads=heads)
        return found

    def pin(self) -> Pinned:
        """Evaluate now and return a `Pin`, which holds the results until `.release()` or the end of a `with` block.

        Raises:
            MemoryBudgetError: the pinned texts together do not fit the `LM`'s `memory_bytes`.

        """
        return bound_engine(self, "a representation").pin(self)

    def save(self) -> None:
        """Write the representation to the `LM`'s store, whatever its size; a missing one is computed first.

        Raises:
            NoStoreError: the `LM` was made without `store=`.
            EntryTooLargeError: the entry is larger than the whole store may be.
            OSError: the store cannot be written to.

        """
        bound_engine(self, "a representation").save(self)


def bound_engine(text: Questions, what: str) -> Engine[Any]:
    """Return the engine of a text; `what` names the result that needs the engine.

    Raises:
        UnboundTextError: the text has no engine.

    """
    if text.lm is None:
        raise UnboundTextError(
            f"{text!r} has no model, so {what} cannot be computed. "
            "Build the text with Text(string, lm), or join it with a text that has an LM."
        )
    return text.lm
