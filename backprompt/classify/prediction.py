"""The probability of each completion behind a prompt, and the most probable completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np

from backprompt.arguments import as_choice
from backprompt.classify.completions import EndOfPrompt, checked_completions
from backprompt.classify.options import Options, OptionTypes
from backprompt.classify.prompts import Example, Prompt, Prompts, as_prompts
from backprompt.classify.scoring import PromptsWithCompletions
from backprompt.classify.weighed import WeighedCompletions
from backprompt.classify.weighing import Aggregate, Floats
from backprompt.lm import LM

if TYPE_CHECKING:
    from typing_extensions import Unpack

Strategy: TypeAlias = Literal["exhaustive", "best-first"]
STRATEGIES: tuple[Strategy, ...] = ("exhaustive", "best-first")


@overload
def predict_proba(
    prompts: Prompt | Sequence[Prompt],
    completions: Sequence[str],
    lm: LM | tuple[Any, Any] | None = None,
    **options: Unpack[OptionTypes],
) -> Floats: ...


@overload
def predict_proba(
    prompts: Example,
    completions: None = None,
    lm: LM | tuple[Any, Any] | None = None,
    **options: Unpack[OptionTypes],
) -> Floats: ...


@overload
def predict_proba(
    prompts: Sequence[Example],
    completions: None = None,
    lm: LM | tuple[Any, Any] | None = None,
    **options: Unpack[OptionTypes],
) -> list[Floats]: ...


def predict_proba(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    prior: Sequence[float] | None = None,
    normalize: bool = True,
    end_of_prompt: EndOfPrompt = "auto",
    aggregate: Aggregate = "mean",
    discount_completions: float = 0.0,
    log_marg_probs_completions: Sequence[Sequence[float]] | None = None,
    neutral_prompt: Prompt | None = None,
    show_progress_bar: bool | None = None,
) -> Floats | list[Floats]:
    """Return the probability of each completion behind each prompt.

    Args:
        prompts, completions, lm, end_of_prompt, show_progress_bar: see `log_probs`.
        prior: a probability for each completion; by default all are equal.
        normalize: whether the probabilities of the completions are scaled to sum to one.
        aggregate: the "mean" of a completion's token log-probabilities (as in CAPPr: long completions are not at a
            disadvantage) or their "sum" (the probability of the whole completion).
        discount_completions: a factor. The log-probability of each token without the prompt (given only the earlier
            tokens of the completion), times this factor, is added to the token's log-probability behind the prompt.
            A negative factor works against completions that are probable behind any prompt.
        log_marg_probs_completions: the log-probabilities without the prompt, if the caller has them already:
            `token_logprobs(completions, lm, end_of_prompt=...)`, with the same `end_of_prompt`.
        neutral_prompt: divide each completion's probability by its probability behind this prompt, such as "N/A"
            (domain-conditional normalisation, Holtzman et al. 2021, arXiv 2104.08315). With "auto", the space behind
            the neutral prompt depends on its own end, not on the ends of `prompts`.

    Returns:
        A float array, `(completions,)` for a single prompt and `(prompts, completions)` for a sequence; for a sequence
        of examples a list of arrays. A completion that the model or the prior excludes has probability 0.

    Raises:
        NonFiniteError: every completion behind a prompt has probability 0, so `normalize` is impossible; or a
            completion is possible behind a prompt, but the probability to divide by is 0.
        See `log_probs`.

    """
    options = Options(
        prior=prior,
        normalize=normalize,
        end_of_prompt=end_of_prompt,
        aggregate=aggregate,
        discount_completions=discount_completions,
        log_marg_probs_completions=log_marg_probs_completions,
        neutral_prompt=neutral_prompt,
        show_progress_bar=show_progress_bar,
    )
    pairs = PromptsWithCompletions.of(prompts, completions, lm, end_of_prompt)
    found = list(WeighedCompletions.of(pairs, options).probabilities())
    if pairs.is_single:
        return found[0]
    return found if pairs.are_examples else np.stack(found)


@overload
def predict(  # type: ignore[overload-overlap]  # a str is a sequence of str: the first one counts
    prompts: Prompt | Example,
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    search: Strategy = "exhaustive",
    **options: Unpack[OptionTypes],
) -> str: ...


@overload
def predict(
    prompts: Sequence[Prompt] | Sequence[Example],
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    search: Strategy = "exhaustive",
    **options: Unpack[OptionTypes],
) -> list[str]: ...


def predict(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    search: Strategy = "exhaustive",
    **options: Any,
) -> str | list[str]:
    """Return the most probable completion behind each prompt: a `str` for a single prompt, else a list of them.

    Args:
        prompts, completions, lm: see `log_probs`.
        search: "exhaustive" scores every completion. "best-first" finds the same completion, and scores only
            completions that may still win. It is for hundreds of completions or more, many with common beginnings.
        **options: the keywords of `predict_proba`.

    Raises:
        ValueError: there is only one completion.
        NonFiniteError: every completion behind a prompt has probability 0; see `predict_proba`.
        See `log_probs`.

    """
    as_choice(search, "search", STRATEGIES)
    named = Options.named(options)
    listed, is_single = as_prompts(prompts, "prompts")
    shared = None if completions is None else checked_completions(completions)
    _check_are_several([prompt.completions for prompt in listed if isinstance(prompt, Example)] or [shared or ()])
    pairs = PromptsWithCompletions.of(prompts if is_single else listed, shared, lm, named.end_of_prompt)
    weighed = WeighedCompletions.of(pairs, named)
    best = weighed.best_first() if search == "best-first" else weighed.exhaustive()
    found = [own.strings[idx] for own, idx in zip(pairs.completions, best, strict=True)]
    return found[0] if pairs.is_single else found


def _check_are_several(candidates: Sequence[Sequence[str]]) -> None:
    """Raise ValueError for a single completion."""
    if any(len(completions) == 1 for completions in candidates):
        raise ValueError(
            "With one completion there is nothing to predict. For its probability call predict_proba with "
            "normalize=False."
        )
