"""The `LM` that texts are bound to, and the evaluation of texts of one `LM` or several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import Tensor

from backprompt.errors import MixedModelsError, TextTypeError
from backprompt.lm import LM
from backprompt.session.representation import ModelRepr
from backprompt.text.checks import as_texts, engine_of
from backprompt.text.engine import Engine, as_engine
from backprompt.text.node import Text
from backprompt.text.questions import bound_engine


@overload
def evaluate(texts: Text, *, show_progress_bar: bool | None = None) -> ModelRepr: ...


@overload
def evaluate(texts: Iterable[Text], *, show_progress_bar: bool | None = None) -> list[ModelRepr]: ...


def evaluate(texts: Text | Iterable[Text], *, show_progress_bar: bool | None = None) -> ModelRepr | list[ModelRepr]:
    """Evaluate a text, or many texts with one plan for all of them, and return their representations.

    Each distinct token that is not cached is forwarded exactly once. Texts of several `LM` objects are evaluated one
    `LM` at a time.

    Args:
        texts: a text, or many.
        show_progress_bar: by default a bar shows on a terminal if evaluation takes several passes and over two seconds.

    Returns:
        A `ModelRepr` for one text, or a list of `ModelRepr` in the order of `texts`.

    Raises:
        See `LM.evaluate`.

    """
    if isinstance(texts, Text):
        return bound_lm(texts, "a representation").evaluate([texts], show_progress_bar=show_progress_bar)[0]
    listed = as_texts(texts, "evaluate")
    by_engine: dict[Engine[Text] | None, list[int]] = {}
    for idx, text in enumerate(listed):
        by_engine.setdefault(text.lm, []).append(idx)
    by_lm = [(lm_of(listed[indices[0]], indices[0]), indices) for indices in by_engine.values()]
    reprs: dict[int, ModelRepr] = {}
    for lm, indices in by_lm:
        own = [listed[idx] for idx in indices]
        reprs.update(zip(indices, lm.evaluate(own, show_progress_bar=show_progress_bar), strict=True))
    return [reprs[idx] for idx in range(len(listed))]


def lm_of(text: object, idx: int) -> LM:
    """Return the `LM` of an element of `texts`."""
    return as_lm(engine_of(text, idx))


def one_lm(texts: Sequence[Text]) -> LM:
    """Return the `LM` that all texts belong to.

    Raises:
        TextTypeError, UnboundTextError, MixedModelsError: an element is not a text, has no `LM`, or has another `LM`.

    """
    for idx, text in enumerate(texts):
        if lm_of(text, idx) is not texts[0].lm:
            raise MixedModelsError(
                f"texts[{idx}], {text!r}, belongs to another LM than texts[0]. Pass the texts of one LM in each call."
            )
    return lm_of(texts[0], 0)


def bound_lm(text: Text, what: str) -> LM:
    """Return the `LM` of a text; `what` names the result that needs the `LM`, for the error.

    Raises:
        UnboundTextError: the text has no `LM`.

    """
    return as_lm(bound_engine(text, what))


def as_lm(given: Any) -> LM:
    """Return an `LM`; for a `(model, tokenizer)` tuple, return the `LM` that all such tuples share.

    Raises:
        TextTypeError: the value is neither.
        All errors that `LM` raises for the model and the tokenizer.

    """
    engine = given if isinstance(given, LM) else as_engine(given)
    if not isinstance(engine, LM):
        raise TextTypeError(
            f"An LM is needed here, not {type(engine).__name__}. Pass backprompt.load(name) or LM(model, tokenizer)."
        )
    return engine


def entropies(text: Text, temperature: float) -> Tensor:
    """Return the entropies of one text; see `Text.entropies`."""
    return bound_lm(text, "entropies").entropies([text], temperature=temperature).entropies


def top_logprobs(text: Text, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the most probable tokens at the positions of one text's tokens; see `Text.top_logprobs`."""
    found = bound_lm(text, "log-probabilities").top_logprobs([text], k, temperature=temperature)
    return found.logprobs, found.token_ids
