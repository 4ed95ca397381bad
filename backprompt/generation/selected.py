"""Selected texts: a prompt continued by the most probable of some options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backprompt import classify
from backprompt.arguments import as_list
from backprompt.bound import bound_lm
from backprompt.classify.completions import EndOfPrompt, completion_ids, ends_behind
from backprompt.generation.continued import ContinuedText, continue_as
from backprompt.text.node import Text
from backprompt.tokens.constraints import Constraint, Grammar, JsonSchema, Regex
from backprompt.tokens.finite import strings_of


class SelectedText(ContinuedText):
    """The result of `select`: a prompt and the most probable option."""

    __slots__ = ("_aggregate", "_option", "_probabilities")

    _aggregate: classify.Aggregate
    _option: str
    _probabilities: dict[str, float]

    def __repr__(self) -> str:
        return f"<{super().__repr__()}, selected {self._option!r} by the {self._aggregate}>"

    @property
    def option(self) -> str:
        """The chosen option, as it was given."""
        return self._option

    @property
    def probabilities(self) -> dict[str, float]:
        """The probability of each option among all options, by the rule that `aggregate` names."""
        return dict(self._probabilities)

    @property
    def aggregate(self) -> classify.Aggregate:
        """The rule for an option's score: the "mean" or the "sum" of its token log-probabilities."""
        return self._aggregate


def select(
    prompt: Text,
    options: Iterable[str] | Constraint,
    *,
    end_of_prompt: EndOfPrompt = "auto",
    aggregate: classify.Aggregate = "mean",
    **scoring: Any,
) -> SelectedText:
    """Return a text continued by the most probable of some options.

    The probabilities are those of `classify.predict_proba(prompt, options)`.

    Args:
        prompt: the text to continue.
        options: the strings that may follow, or a constraint with finitely many strings, such as
            `Regex("(very )?(good|bad)")`.
        end_of_prompt: the string between the prompt and an option: "auto", " " or ""; see `classify.log_probs`.
        aggregate: the "mean" or the "sum" of an option's token log-probabilities; see `classify.predict_proba`.
        **scoring: other options of `classify.predict_proba`, such as `prior`.

    Raises:
        ValueError: there are more strings than `classify.probability_of` takes.
        The errors of `classify.predict_proba`.

    """
    lm = bound_lm(prompt, "a continuation")
    if isinstance(options, (Regex, JsonSchema, Grammar)):
        options = strings_of(options)
    listed = as_list(options, "options must be a sequence of strings or a constraint")
    probabilities = classify.predict_proba(prompt, listed, end_of_prompt=end_of_prompt, aggregate=aggregate, **scoring)
    option = listed[int(probabilities.argmax())]
    (end,) = ends_behind(lm, [(prompt, end_of_prompt)])
    (token_ids,) = completion_ids(lm, [(end, option)]).values()
    text = continue_as(SelectedText, prompt, token_ids, lm)
    text._aggregate, text._option = aggregate, option
    text._probabilities = dict(zip(listed, probabilities.tolist(), strict=True))
    return text
