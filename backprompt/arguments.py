"""Checks of arguments that public functions share.

Each raises an error that says what was given, what was needed and what to do, before anything is computed.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def as_int(given: Any, name: str, *, at_least: int, error: type[ValueError] = ValueError) -> int:
    """Return a whole number as an int; a bool is none.

    Raises:
        ValueError: as `error`: it is no whole number, or too small.

    """
    if isinstance(given, bool) or not isinstance(given, Integral) or given < at_least:
        raise error(f"{name} must be an int of at least {at_least}, not {given!r}.")
    return int(given)


def as_number(given: Any, name: str, *, bounds: tuple[float, float], error: type[ValueError] = ValueError) -> float:
    """Return a finite number as a float; a bool is none.

    Raises:
        ValueError: as `error`: it is no number, or not within the bounds.

    """
    low, high = bounds
    number = math.nan if isinstance(given, bool) or not isinstance(given, Real) else float(given)
    if not math.isfinite(number) or not low <= number <= high:
        where = "" if bounds == (-math.inf, math.inf) else f" of at least {low:g}"
        where = where if high == math.inf else f" from {low:g} to {high:g}"
        raise error(f"{name} must be a finite number{where}, not {given!r}.")
    return number


def as_bool(given: Any, name: str, *, error: type[ValueError] = ValueError) -> bool:
    """Return True or False; a number or a string is neither.

    Raises:
        ValueError: as `error`.

    """
    if not isinstance(given, bool):
        raise error(f"{name} must be True or False, not {given!r}.")
    return given
