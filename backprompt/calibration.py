"""What is done with probabilities once they are there: correcting them, and choosing a threshold. Plain functions."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = "npt.NDArray[np.floating[Any]]"


def calibrate(probabilities: npt.ArrayLike, neutral_probabilities: npt.ArrayLike) -> Floats:
    """Return probabilities corrected for what the prompt prefers whatever is asked (contextual calibration).

    Zhao et al. 2021, arXiv 2102.09690: divided by what `predict_proba` gave for neutral inputs ("N/A", "") in the same
    prompt, and normalized again.

    Args:
        probabilities: `(prompts, completions)` or `(completions,)`.
        neutral_probabilities: `(completions,)`, or `(neutral prompts, completions)`, whose mean is taken.

    Raises:
        ValueError: the numbers of completions differ; an element is no probability; a neutral probability is 0 where
            the other one is not, or all of a row are 0.

    """
    given, neutral = np.asarray(probabilities, dtype=float), np.asarray(neutral_probabilities, dtype=float)
    neutral = neutral.mean(axis=0) if neutral.ndim == 2 else neutral
    if neutral.ndim != 1 or given.shape[-1] != len(neutral):
        raise ValueError(
            f"probabilities have {given.shape[-1]} completions and neutral_probabilities the shape {neutral.shape}. "
            "Score the same completions in both."
        )
    for name, values in (("probabilities", given), ("neutral_probabilities", neutral)):
        if not ((values >= 0) & (values < np.inf)).all():
            raise ValueError(f"{name} must be numbers of at least 0, as predict_proba returns them, not {values}.")
    is_possible = neutral > 0
    if (given[..., ~is_possible] > 0).any():
        raise ValueError("A neutral probability is 0, so nothing can be divided by it. Use other neutral prompts.")
    corrected: Floats = np.divide(given, neutral, out=np.zeros_like(given), where=is_possible)  # 0 / 0 is 0 here
    totals = corrected.sum(axis=-1, keepdims=True)
    if not ((totals > 0) & (totals < np.inf)).all():
        raise ValueError("All completions of a row have probability 0, or one a neutral probability of almost 0.")
    corrected /= totals
    return corrected


def best_threshold(probabilities: npt.ArrayLike, is_positive: npt.ArrayLike) -> float:
    """Return the threshold t at which `probability >= t` is most often right on labelled data; the middle of a gap.

    Args:
        probabilities: of the positive class, `(examples,)`.
        is_positive: whether each example is of it, `(examples,)`.

    Raises:
        ValueError: they are empty or differ in shape; a probability is NaN.

    """
    given, labels = np.asarray(probabilities, dtype=float), np.asarray(is_positive, dtype=bool)
    if given.ndim != 1 or given.shape != labels.shape or not len(given):
        raise ValueError(
            f"probabilities and is_positive must be two lists of one length, not of shapes {given.shape} and "
            f"{labels.shape}."
        )
    if np.isnan(given).any():
        raise ValueError(f"probabilities[{int(np.isnan(given).argmax())}] is NaN, which no threshold tells apart.")
    order = np.unique(given)
    thresholds = np.concatenate([[order[0]], (order[1:] + order[:-1]) / 2, [np.nextafter(order[-1], np.inf)]])
    num_right = ((given[None] >= thresholds[:, None]) == labels[None]).sum(axis=1)
    return float(thresholds[int(num_right.argmax())])
