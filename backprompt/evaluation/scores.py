"""Scores of tokens: the log-probability of each, and whether it is the most probable token at its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The log-probability of a token in nats, and whether it is the most probable one."""

    logprob: float
    is_argmax: bool


@dataclass(frozen=True)
class TokenScores:
    """How a model rates given tokens, each given those before it.

    Attributes:
        logprobs: log-probabilities, `(tokens,)`, nats, float64 for a model in float64 and else float32; -inf for a
            token of probability 0, nan for a token that nothing predicts.
        is_argmax: whether greedy decoding would have chosen the token, `(tokens,)`, bool. Of tokens whose logits are
            equal in float32 the one with the lowest id is chosen; False where nothing predicts.

    """

    logprobs: Tensor
    is_argmax: Tensor

    @classmethod
    def of(cls, scores: Sequence[TokenScore], dtype: torch.dtype, device: torch.device) -> TokenScores:
        """Return these as tensors on a device, log-probabilities in this dtype."""
        logprobs = torch.tensor([score.logprob for score in scores], dtype=dtype, device=device)
        return cls(logprobs, torch.tensor([score.is_argmax for score in scores], dtype=torch.bool, device=device))

    def __getitem__(self, rows: slice) -> TokenScores:
        return TokenScores(self.logprobs[rows], self.is_argmax[rows])

    def followed_by(self, others: TokenScores) -> TokenScores:
        """Return these with others behind them."""
        return TokenScores(torch.cat([self.logprobs, others.logprobs]), torch.cat([self.is_argmax, others.is_argmax]))
