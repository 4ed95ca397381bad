"""Weights of completions from token log-probabilities, and probabilities from weights. Pure numpy.

A *weight* is the logarithm of a completion's probability, up to a constant that all completions of a prompt share:

    mean or sum of (token log-probabilities + discounts) - weight behind the neutral prompt + log(prior)

A completion that the model or the prior excludes has the weight -inf, whatever its probability is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.arguments import as_floats
from backprompt.errors import NonFiniteError

Floats: TypeAlias = npt.NDArray[np.float64]
Aggregate: TypeAlias = Literal["mean", "sum"]
AGGREGATES: tuple[Aggregate, ...] = ("mean", "sum")


@dataclass(frozen=True)
class Weighing:
    """How a prompt's completions are weighed.

    Attributes:
        aggregate: the "mean" or the "sum" of a completion's token log-probabilities.
        discounts: for each completion an array `(tokens,)`, added to its token log-probabilities.
        neutral_weights: each completion's weight behind the neutral prompt, which is subtracted.
        log_prior: each completion's log-prior, which is added.
        normalize: whether the probabilities of the completions are scaled to sum to one.

    """

    aggregate: Aggregate
    discounts: Sequence[Floats] | None = None
    neutral_weights: Sequence[float] | None = None
    log_prior: Sequence[float] | None = None
    normalize: bool = True

    def weight(self, completion_idx: int, logprobs: Floats) -> float:
        """Return the weight of a completion whose tokens have these log-probabilities, `(tokens,)`.

        The weight is inf for a possible completion whose probability is to be divided by 0.
        """
        log_prior = 0.0 if self.log_prior is None else self.log_prior[completion_idx]
        if -np.inf in (log_prior, logprobs.min()):
            return -np.inf
        discounted = logprobs if self.discounts is None else logprobs + self.discounts[completion_idx]
        weight = float(discounted.mean() if self.aggregate == "mean" else discounted.sum())
        if self.neutral_weights is not None and weight > -np.inf:
            weight -= self.neutral_weights[completion_idx]
        return float(weight + log_prior)

    def weights(self, lengths: npt.NDArray[np.int64], logprobs: Floats) -> Floats:
        """Return the weight of each completion behind each of some prompts, `(prompts, completions)`; see `weight`.

        Args:
            lengths: the number of tokens of each completion.
            logprobs: the log-probabilities of the tokens of all completions, `(prompts, tokens)`.

        """
        found: Floats = np.empty((len(logprobs), len(lengths)))
        starts = np.cumsum(lengths) - lengths
        for length in set(lengths.tolist()):  # numpy adds the numbers of each row as it adds those of one completion
            own = np.flatnonzero(lengths == length)
            found[:, own] = self._weights(own, logprobs[:, starts[own, None] + np.arange(length)])
        return found

    def _weights(self, completion_idxs: npt.NDArray[np.int64], logprobs: Floats) -> Floats:
        """Return the weights of completions of one length; `logprobs`: `(prompts, completions, tokens)`."""
        log_prior = 0.0 if self.log_prior is None else np.asarray(self.log_prior)[completion_idxs]
        is_excluded = (logprobs.min(axis=-1) == -np.inf) | (log_prior == -np.inf)
        if is_excluded.any():
            logprobs = np.where(is_excluded[..., None], 0.0, logprobs)
        if self.discounts is not None:
            logprobs = logprobs + np.stack([self.discounts[idx] for idx in completion_idxs])
        weights: Floats = logprobs.mean(axis=-1) if self.aggregate == "mean" else logprobs.sum(axis=-1)
        if self.neutral_weights is not None:
            neutral = np.asarray(self.neutral_weights)[completion_idxs]
            weights = np.subtract(weights, neutral, out=weights, where=weights > -np.inf)
        return np.where(is_excluded, -np.inf, weights + log_prior)

    def probabilities(self, weights: Floats) -> Floats:
        """Return the probability of each completion, `(..., completions)`: Bayes' rule, no underflow if normalized."""
        if not self.normalize:
            return np.exp(weights)
        probabilities: Floats = np.exp(weights - weights.max(axis=-1, keepdims=True))
        probabilities /= probabilities.sum(axis=-1, keepdims=True)
        return probabilities


def finite_weight(weight: float, completion: str) -> float:
    """Return the weight of a completion, or raise if the weight is inf; -inf is allowed.

    Raises:
        NonFiniteError: the weight is inf.

    """
    if weight == np.inf:
        raise NonFiniteError(
            f"The completion {completion!r} is possible behind a prompt, but has probability 0 by itself or behind the "
            "neutral prompt, and nothing can be divided by 0. Leave the completion out, use another neutral "
            "prompt, or a discount_completions of at least 0."
        )
    return weight


def log_of_prior(prior: Sequence[float] | None) -> Any:
    """Return the logarithm of each probability, `(completions,)`; -inf for a probability of 0."""
    with np.errstate(divide="ignore"):
        return None if prior is None else np.log(prior)


def checked_prior(prior: Sequence[float] | None, num_completions: int) -> Any:
    """Return a prior as an array `(completions,)`, or None if no prior is given.

    Raises:
        TypeError, ValueError: the prior is not a probability for each completion, or its sum is not 1.

    """
    if prior is None:
        return None
    given = as_floats(prior, "prior")
    if given.shape != (num_completions,):
        raise ValueError(
            f"prior has the shape {given.shape} for {num_completions} completions; give a number for each completion."
        )
    if not ((given >= 0) & (given <= 1)).all() or not np.isclose(given.sum(), 1):
        raise ValueError(f"prior must be probabilities that sum to 1, not {given.tolist()} (sum {given.sum():.6g}).")
    return given


def check_normalize(normalize: bool, num_completions: int) -> None:
    """Raise ValueError for a single completion whose probability would be normalized to 1."""
    if normalize and num_completions == 1:
        raise ValueError(
            "With one completion the normalized probability is always 1. Set normalize=False, or give more completions."
        )
