"""The report of a captured step: the few numbers that the host reads of a step, with one wait.

The graph writes the report to one tensor, `(numbers, rows)`, in the dtype of log-probabilities, which can hold all ids
of a vocabulary:

    0  1 if the step is finite
    1  whether a look at the weights found the numbers of before: 1 or 0; -1 where there is no look
    2  the most probable token behind each row, if the head is part of the graph
    3  its log-probability, nats
    4  its logit
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from backprompt.logprobs import logprob_dtype, most_probable

Numbers = npt.NDArray[Any]


def report_tensor(hidden: Tensor, are_weights_same: Tensor | None, logits: Tensor | None) -> Tensor:
    """Return the report of a step that is not known to be finite yet; see the head of this file.

    Args:
        hidden: `(rows, hidden)`.
        are_weights_same: `()`, bool; None where there is no look.
        logits: `(rows, vocab)`; None where the head is not part of the step.

    """
    dtype = logprob_dtype(hidden.dtype if logits is None else logits.dtype)
    report = torch.full((2 if logits is None else 5, len(hidden)), -1.0, dtype=dtype, device=hidden.device)
    if are_weights_same is not None:
        report[1] = are_weights_same
    if logits is not None:
        report[2], report[3], report[4] = most_probable(logits)
    return report


@dataclass(frozen=True)
class Report:
    """The report of the rows of a step.

    Attributes:
        numbers: `(numbers, rows)`; see the head of this file.

    """

    numbers: Numbers

    @property
    def is_finite(self) -> bool:
        """Whether all hidden states, keys and values of the step are finite."""
        return bool(self.numbers[0].all())

    @property
    def are_weights_same(self) -> bool | None:
        """Whether the look found the numbers of before; None where there is no look."""
        found = float(self.numbers[1, 0])
        return None if found < 0 else found > 0

    @cached_property
    def most_probable(self) -> MostProbable | None:
        """The most probable token behind each row; None if the head is not part of the graph."""
        if len(self.numbers) < 5:
            return None
        token_ids, logprobs, logits = self.numbers[2:].tolist()
        return MostProbable(list(map(int, token_ids)), logprobs, logits)

    def of(self, rows: Sequence[int]) -> Report:
        """Return the report of some rows."""
        return Report(self.numbers[:, rows])


@dataclass(frozen=True)
class MostProbable:
    """The most probable token behind each row, its log-probability in nats, and its logit."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    logits: Sequence[float]

    @property
    def are_of_distributions(self) -> bool:
        """Whether each row of logits is a distribution; see logprobs.py."""
        return all(map(math.isfinite, self.logits))
