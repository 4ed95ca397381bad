"""The result of a generation for one text: the added tokens, and the reason for the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from backprompt.evaluation.scores import TokenScore
from backprompt.generation.stops import Cut

Completion: TypeAlias = tuple[int, ...]
"""The token ids added to a text."""

FinishReason: TypeAlias = Literal["eos", "stop", "constraint", "length", "criteria", "interrupted"]


class Choice(NamedTuple):
    """A chosen token, and its log-probability in nats.

    Attributes:
        token_id: the token.
        logprob: its log-probability in the model's own distribution.
        is_argmax: whether no token had a higher one.
        constrained_logprob: its log-probability among the tokens that the text's constraint allowed; without a
            constraint equal to `logprob`.

    """

    token_id: int
    logprob: float
    is_argmax: bool
    constrained_logprob: float

    @property
    def score(self) -> TokenScore:
        """The log-probability and `is_argmax`, without the token."""
        return TokenScore(self.logprob, self.is_argmax)


@dataclass(frozen=True)
class Found:
    """A continuation: all chosen tokens, the reason for the end, and the part to keep if a stop string ended it."""

    choices: tuple[Choice, ...]
    finish_reason: FinishReason
    cut: Cut | None = None
