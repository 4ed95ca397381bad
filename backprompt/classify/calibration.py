"""Probabilities corrected for a prompt's preferences, and a threshold chosen by labelled data. Plain functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from backprompt.arguments import as_floats, as_list
from backprompt.classify.weighing import Floats


def calibrate(probabilities: npt.ArrayLike, neutral_probabilities: npt.ArrayLike) -> Floats:
    """Return probabilities corrected for the prompt's own preferences (contextual calibration).

    Probabilities are divided by those that `predict_proba` gave for neutral inputs ("N/A", "") in the same prompt, and
    normalized again (Zhao et al. 2021, arXiv 2102.09690).

    Args:
        probabilities: `(prompts, completions)` or `(completions,)`.
        neutral_probabilities: `(completions,)`, or `(neutral prompts, completions)`, whose mean is taken.

    Raises:
        TypeError: an argument holds something other than numbers.
        ValueError: the numbers of completions differ; an element is negative; a neutral probability is 0 where the
            probability to divide is not; or all probabilities of a row are 0.

    """
    given, neutral = (
        as_floats(probabilities, "probabilities"),
        as_floats(neutral_probabilities, "neutral_probabilities"),
    )
    neutral = neutral.mean(axis=0) if neutral.ndim == 2 else neutral
    if neutral.ndim != 1 or given.ndim not in (1, 2) or given.shape[-1] != len(neutral):
        raise ValueError(
            f"probabilities have the shape {given.shape} and neutral_probabilities {neutral.shape}, whose last "
            "sizes must be equal. Score the same completions in both calls."
        )
    for name, values in (("probabilities", given), ("neutral_probabilities", neutral)):
        if (values < 0).any():
            raise ValueError(f"{name} must be numbers of at least 0, as predict_proba returns them, not {values}.")
    is_possible = neutral > 0
    if (given[..., ~is_possible] > 0).any():
        raise ValueError("A neutral probability is 0, so nothing can be divided by it. Use other neutral prompts.")
    corrected: Floats = np.divide(given, neutral, out=np.zeros_like(given), where=is_possible)  # 0 / 0 is 0 here
    totals = corrected.sum(axis=-1, keepdims=True)
    if not ((totals > 0) & (totals < np.inf)).all():
        raise ValueError(
            "All completions of a row have probability 0, or a neutral probability is almost 0. Use "
            "other completions or other neutral prompts."
        )
    corrected /= totals
    return corrected


def best_threshold(probabilities: npt.ArrayLike, is_positive: npt.ArrayLike) -> float:
    """Return the threshold t for which `probability >= t` agrees with the most labels.

    The threshold lies midway between two neighbouring probabilities, unless it makes all examples positive, or none.

    Args:
        probabilities: those of the positive class, `(examples,)`.
        is_positive: whether each example is of that class, `(examples,)`.

    Raises:
        TypeError: probabilities that are not numbers, or labels that are neither booleans nor 0 and 1.
        ValueError: the arrays are empty or differ in shape; a probability is not finite.

    """
    given, labels = as_floats(probabilities, "probabilities"), _as_booleans(is_positive)
    if given.ndim != 1 or given.shape != labels.shape or not len(given):
        raise ValueError(
            f"probabilities and is_positive must be two lists of one length, not of shapes {given.shape} and "
            f"{labels.shape}."
        )
    order = np.unique(given)
    thresholds = np.concatenate([[order[0]], (order[1:] + order[:-1]) / 2, [np.nextafter(order[-1], np.inf)]])
    num_right = ((given[None] >= thresholds[:, None]) == labels[None]).sum(axis=1)
    return float(thresholds[int(num_right.argmax())])


def _as_booleans(given: Any) -> npt.NDArray[np.bool_]:
    listed = as_list(given, "is_positive must be booleans in order")
    for idx, value in enumerate(listed):
        if value not in (0, 1):
            raise TypeError(f"is_positive[{idx}] must be True or False, not {value!r}.")
    return np.array(listed, dtype=bool)
