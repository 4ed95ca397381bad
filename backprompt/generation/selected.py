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
    text = continue_as(SelectedText, prompt, token_ids, lm)
    text._aggregate, text._option = aggregate, option
    text._probabilities = dict(zip(listed, probabilities.tolist(), strict=True))
    return text
