"""The keywords of `predict_proba` and `predict` in one object: built at once, checked, and handed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from backprompt.arguments import as_bool, as_choice, as_number
from backprompt.classify.completions import EndOfPrompt
from backprompt.classify.prompts import Prompt
from backprompt.classify.weighing import AGGREGATES, Aggregate
from backprompt.progress import check_show


class OptionTypes(TypedDict, total=False):
    """The types of the options of `predict_proba`, for its overloads; see `Options`."""

    prior: Sequence[float] | None
    normalize: bool
    end_of_prompt: EndOfPrompt
    aggregate: Aggregate
    discount_completions: float
    log_marg_probs_completions: Sequence[Sequence[float]] | None
    neutral_prompt: Prompt | None
    show_progress_bar: bool | None


@dataclass(frozen=True)
class Options:
    """The options of scoring and weighing completions; the docstring of `predict_proba` describes each.

    Raises:
        TypeError, ValueError: a value that is invalid for any prompts.

    """

    prior: Sequence[float] | None = None
    normalize: bool = True
    end_of_prompt: EndOfPrompt = "auto"
    aggregate: Aggregate = "mean"
    discount_completions: float = 0.0
    log_marg_probs_completions: Sequence[Sequence[float]] | None = None
    neutral_prompt: Prompt | None = None
    show_progress_bar: bool | None = None

    def __post_init__(self) -> None:
        discount = as_number(self.discount_completions, "discount_completions")
        object.__setattr__(self, "discount_completions", discount)
        as_choice(self.aggregate, "aggregate", AGGREGATES)
        as_bool(self.normalize, "normalize")
        check_show(self.show_progress_bar)
        if self.log_marg_probs_completions is not None and not discount:
            raise TypeError(
                "log_marg_probs_completions has no effect without discount_completions. Set both, or leave both out."
            )

    @classmethod
    def named(cls, given: Mapping[str, Any]) -> Options:
        """Return the options of these names, for `predict`.

        Raises:
            TypeError: a name is not an option.

        """
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"predict has no option {min(unknown)!r}; it has the options of predict_proba, and search.")
        return cls(**given)

    def check_for_examples(self) -> None:
        """Raise TypeError for options that examples set themselves or cannot have."""
        is_own = self.prior is not None or not self.normalize
        if is_own or self.discount_completions or self.neutral_prompt is not None:
            raise TypeError(
                "Each Example has its own prior and normalize: set them in the Example. discount_completions and "
                "neutral_prompt are for prompts with common completions, not for examples."
            )
