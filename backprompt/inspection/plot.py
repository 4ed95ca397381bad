"""Charts: the probabilities of completions, and attention. Need matplotlib: pip install matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from backprompt.arguments import as_floats, as_indices, as_int, as_list
from backprompt.bound import bound_lm
from backprompt.errors import MissingDependencyError
from backprompt.inspection.show import strings_of
from backprompt.tokens.adapted import plain
from backprompt.visible import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from backprompt.text.node import Text

_GREY = "#7d8590"  # shows on white and on black
_MOST_PROBABLE, _OTHERS = "#c2410c", "#1d5fa8"
_MAX_LABELS = 80
"""The axis of a heat map with more tokens than this shows numbers, not strings."""


def plot_probabilities(
    probabilities: Mapping[str, float] | Sequence[float] | Any,
    completions: Sequence[str] | None = None,
    *,
    top: int = 20,
    ax: Axes | None = None,
) -> Axes:
    """Draw the probabilities of completions behind one prompt as bars, the most probable at the top.

        bp.plot_probabilities(predict_proba(prompt, labels, lm), labels)
        bp.plot_probabilities(text.select(labels).probabilities)

    Args:
        probabilities: an array `(completions,)`, or a mapping from completions to their probabilities.
        completions: the completions with these probabilities; left out for a mapping.
        top: at most this many completions are drawn, the most probable ones.
        ax: the axes of matplotlib to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TypeError: `probabilities` are not numbers, or `completions` is not a sequence.
        ValueError: `probabilities` belong to several prompts, differ in number from `completions`, or are not between 0
            and 1.

    """
    values, names = _checked(probabilities, completions)
    top = as_int(top, "top", at_least=1)
    order = np.argsort(-values, kind="stable")[:top]
    if ax is None:
        ax = _new_axes("plot_probabilities", (6, 0.8 + 0.32 * len(order)))
    labels = [shortened(visible(names[idx]), 40) for idx in order]
    bars = ax.barh(range(len(order)), values[order], color=[_MOST_PROBABLE, *[_OTHERS] * (len(order) - 1)])
    ax.bar_label(bars, labels=[f"{values[idx]:.1%}" for idx in order], padding=3, color=_GREY)
    ax.set_yticks(range(len(order)), labels, parse_math=False, usetex=False)  # a $ is a $
    ax.invert_yaxis()
    ax.margins(x=0.15)
    left_out = f", {len(names) - len(order):,} more left out" if len(order) < len(names) else ""
    ax.set_xlabel(f"probability{left_out}", color=_GREY)
    _make_grey(ax)
    for name, spine in ax.spines.items():
        spine.set_visible(name in ("left", "bottom"))
    return ax


def plot_attention(
    text: Text,
    layer: int,
    head: int | None = None,
    *,
    rows: int | slice | Iterable[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention of a text's tokens in one layer as a heat map: a row for each token that attends.

        bp.plot_attention(text, -1, 3)
        bp.plot_attention(text, -1, rows=slice(-5, None))

    Args:
        text: a text with a model; evaluated if need be.
        layer: the index of the layer.
        head: the index of the head; None for the mean over all heads.
        rows: the indices of the tokens that attend; None for all.
        ax: the axes of matplotlib to draw on; new ones by default.

    Returns:
        The axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        All errors of `ModelRepr.attention`.

    """
    lm = bound_lm(text, "attention")
    if ax is None:
        _pyplot("plot_attention")  # an error shows before anything is computed
    model_repr = text.model_repr
    indices = as_indices(rows, "rows", model_repr.num_tokens)
    weights = model_repr.attention(layer, head, indices).mean(dim=(0, 1)).cpu().numpy()  # (rows, keys)
    strings = [
        shortened(visible(string), 20) for string in strings_of(lm.session.private_tokenizer, plain(text.tokens))
    ]
    if ax is None:
        ax = _new_axes("plot_attention", tuple(2 + 0.2 * min(size, _MAX_LABELS) for size in weights.shape[::-1]))
    image = ax.imshow(weights, aspect="auto", vmin=0, interpolation="nearest")
    for axis, tokens in ((ax.xaxis, range(len(strings))), (ax.yaxis, indices)):
        if len(tokens) <= _MAX_LABELS:
            labels = [strings[token] for token in tokens]
            axis.set_ticks(range(len(tokens)), labels, parse_math=False, usetex=False)
    ax.tick_params(axis="x", labelrotation=90)
    ax.set_xlabel("keys", color=_GREY)
    ax.set_ylabel("tokens that attend", color=_GREY)
    _make_grey(ax)
    _make_grey(ax.figure.colorbar(image, ax=ax, label="attention").ax)
    return ax


def _checked(probabilities: Any, completions: Sequence[str] | None) -> tuple[Any, list[str]]:
    """Return an array `(completions,)` and the completions."""
    if isinstance(probabilities, Mapping):
        if completions is not None:
            raise ValueError("The keys of a mapping are its completions: leave `completions` out.")
        completions, probabilities = list(probabilities), list(probabilities.values())
    values = as_floats(probabilities, "probabilities")
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"plot_probabilities takes the probabilities of one prompt, (completions,), not {values.shape}. "
            "Choose a row: probabilities[0]."
        )
    names = [] if completions is None else as_list(completions, "completions must be a sequence of strings")
    if len(names) != len(values):
        raise ValueError(
            f"There are {len(values)} probabilities; give as many completions, not {len(names) or 'none'}."
        )
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("Probabilities are between 0 and 1. Take the exponential of log-probabilities first.")
    return values, names


def _new_axes(function: str, size: tuple[float, ...]) -> Axes:
    """Return axes of this width and height in inches, with a transparent background."""
    ax: Axes
    figure, ax = _pyplot(function).subplots(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    ax.set_facecolor("none")
    return ax


def _pyplot(function: str) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependencyError(
            f"{function} needs matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return pyplot


def _make_grey(ax: Axes) -> None:
    ax.tick_params(colors=_GREY)
    ax.yaxis.label.set_color(_GREY)
    for spine in ax.spines.values():
        spine.set_color(_GREY)
