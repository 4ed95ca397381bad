"""Scores of tokens: the log-probability of each, and whether it is the most probable token at its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.transfers import index_on, on_device


class TokenScore(NamedTuple):
    """The log-probability of a token in nats, and whether it is the most probable one."""

    logprob: float
    is_argmax: bool


@dataclass(frozen=True)
class TokenScores:
    """How a model rates given tokens, each given those before it.

    Attributes:
        logprobs: log-probabilities, `(tokens,)`, nats, float64 for a model in float64 and else float32; -inf for a
            token of probability 0, nan for a token without a prediction.
        is_argmax: whether greedy decoding would have chosen the token, `(tokens,)`, bool. Of tokens whose logits are
            equal in float32 the one with the lowest id is chosen; False for a token without a prediction.

    """

    logprobs: Tensor
    is_argmax: Tensor

    @classmethod
    def of(cls, scores: Sequence[TokenScore], dtype: torch.dtype, device: torch.device) -> TokenScores:
        """Return these as tensors on a device, log-probabilities in this dtype."""
        logprobs = np.array([score.logprob for score in scores], dtype=np.float64)
        is_argmax = np.array([score.is_argmax for score in scores], dtype=np.bool_)
        return cls.of_arrays(logprobs, is_argmax, dtype, device)

    @classmethod
    def of_arrays(
        cls,
        logprobs: npt.NDArray[np.float64],
        is_argmax: npt.NDArray[np.bool_],
        dtype: torch.dtype,
        device: torch.device,
    ) -> TokenScores:
        """Return arrays, `(tokens,)` each, as tensors on a device, log-probabilities in this dtype."""
        narrow = logprobs if dtype == torch.float64 else logprobs.astype(np.float32)
        return cls(on_device(narrow, device), on_device(is_argmax, device))

    @classmethod
    def concatenated(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """Return the scores of all parts, one part behind the other."""
        return cls(torch.cat([part.logprobs for part in parts]), torch.cat([part.is_argmax for part in parts]))

    def at(self, index: npt.NDArray[np.int64]) -> TokenScores:
        """Return copies of the scores at these places, in this order."""
        places = index_on(index, self.logprobs.device)
        if isinstance(places, slice):
            return TokenScores(self.logprobs[places].clone(), self.is_argmax[places].clone())
        return TokenScores(self.logprobs[places], self.is_argmax[places])

    def split(self, lengths: Sequence[int]) -> list[TokenScores]:
        """Return the scores in parts of these lengths, one behind the other, as views."""
        parts = zip(torch.split(self.logprobs, list(lengths)), torch.split(self.is_argmax, list(lengths)), strict=True)
        return [TokenScores(*part) for part in parts]
