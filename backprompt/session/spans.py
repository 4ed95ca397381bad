"""Spans of a text's tokens as callers give them: extents, slices, or other objects with a start and a stop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from backprompt.arguments import as_list, is_int
from backprompt.visible import abbreviated


class Bounds(Protocol):
    """The bounds of consecutive tokens, such as an `Extent` or a slice."""

    @property
    def start(self) -> Any:
        """The index of the first token."""

    @property
    def stop(self) -> Any:
        """The index of the token behind the last one."""


def bounds_of(over: Iterable[Bounds], num_tokens: int) -> tuple[tuple[int, int], ...]:
    """Return the start and stop of each span, within `0..num_tokens`; slices work as in Python.

    Raises:
        TextTypeError: `over` is not a sequence.
        ValueError: a span has no bounds or lies outside the text, or there is no span.

    """
    listed = as_list(over, "over must be spans of tokens in order, such as lm.extents([text])[0]")
    if not listed:
        raise ValueError("over must name at least one span, such as slice(0, 4).")
    return tuple(_bounds_of(span, f"over[{idx}]", num_tokens) for idx, span in enumerate(listed))


def _bounds_of(span: Any, name: str, num_tokens: int) -> tuple[int, int]:
    if isinstance(span, slice) and span.step in (None, 1):
        start, stop, _ = span.indices(num_tokens)
        return start, max(start, stop)
    bounds: list[Any] = [getattr(span, name, None) for name in ("start", "stop")]
    if all(map(is_int, bounds)) and getattr(span, "step", 1) == 1 and 0 <= bounds[0] <= bounds[1] <= num_tokens:
        return int(bounds[0]), int(bounds[1])
    raise ValueError(
        f"{name} must be a slice or have a start and a stop from 0 to {num_tokens}, not {abbreviated(span)}."
    )
