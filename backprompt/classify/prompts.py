"""The prompts that completions stand behind: strings, texts and examples, checked and bound to one `LM`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from backprompt.arguments import as_bool, as_list, check_encodable
from backprompt.bound import as_lm
from backprompt.classify.completions import EndOfPrompt, check_end_of_prompt, checked_completions
from backprompt.classify.weighing import check_normalize, checked_prior
from backprompt.errors import MixedModelsError, TextTypeError, UnboundTextError
from backprompt.lm import LM
from backprompt.text.node import Text

Prompt: TypeAlias = str | Text


@dataclass(frozen=True)
class Example:
    """A prompt with completions of its own, for `log_probs`, `predict_proba` and `predict`.

    Args:
        prompt: the text before the completions.
        completions: the candidates.
        prior: a probability for each completion; by default all are equal.
        normalize: whether the probabilities of the completions are scaled to sum to one.
        end_of_prompt: the string between prompt and completion: "auto", " " or ""; see `log_probs`.

    Raises:
        TypeError, ValueError: the errors of `predict_proba` for such arguments.

    """

    prompt: Prompt
    completions: Sequence[str]
    prior: Sequence[float] | None = None
    normalize: bool = True
    end_of_prompt: EndOfPrompt = "auto"

    def __post_init__(self) -> None:
        check_prompt(self.prompt, "prompt")
        object.__setattr__(self, "completions", checked_completions(self.completions))
        check_end_of_prompt(self.end_of_prompt)
        object.__setattr__(self, "prior", checked_prior(self.prior, len(self.completions)))
        check_normalize(as_bool(self.normalize, "normalize"), len(self.completions))


Prompts: TypeAlias = Prompt | Example | Sequence[Prompt] | Sequence[Example]


def as_prompts(given: Any, name: str) -> tuple[list[Any], bool]:
    """Return prompts as a list of unchecked elements, and whether a single prompt was given."""
    if isinstance(given, (str, Text, Example)):
        return [given], True
    return as_list(given, f"{name} must be a string, a Text, or a sequence of them"), False


def check_prompts(prompts: Iterable[object], name: str, *, is_single: bool) -> None:
    """Raise for the first element that is not a prompt, naming the element; see `check_prompt`."""
    for idx, prompt in enumerate(prompts):
        check_prompt(prompt, name if is_single else f"{name}[{idx}]")


def check_prompt(prompt: object, name: str) -> None:
    """Raise TextTypeError, TokenizerError or ValueError for anything but a `Text` or a string with characters."""
    if not isinstance(prompt, (str, Text)):
        raise TextTypeError(f"{name} is a {type(prompt).__name__}, not a str or a Text.")
    if isinstance(prompt, str):
        check_encodable(prompt, name)
        if not prompt:
            raise ValueError(f"{name} is empty. A completion's first token needs something before it.")


def common_lm(prompts: Iterable[Prompt], given: LM | tuple[Any, Any] | None) -> LM:
    """Return the given `LM`, or that of the texts among the prompts.

    Raises:
        MixedModelsError: the prompts belong to several `LM`s, or to another `LM` than the given one.
        UnboundTextError: no `LM` is given, and no prompt has one.

    """
    lm = None if given is None else as_lm(given)
    for prompt in prompts:
        own = as_lm(prompt.lm) if isinstance(prompt, Text) and prompt.lm is not None else None
        if own is not None and lm is not None and own is not lm:
            raise MixedModelsError(
                f"{prompt!r} belongs to another LM than the one to score with. Use the same LM for all prompts."
            )
        lm = own if lm is None else lm
    if lm is None:
        raise UnboundTextError("No LM to score with: pass lm=..., or build prompts with Text(string, lm).")
    return lm


def bound(prompt: Prompt, lm: LM) -> Text:
    """Return a prompt as a text of this `LM`."""
    return Text(prompt, lm) if isinstance(prompt, str) else Text("", lm) + prompt
