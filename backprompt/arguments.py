"""Checks and conversions of arguments that public functions share.

Each check raises an error that names the given value, the needed value and the next step, before any computation.
Iteration over a table gives the names of its columns, over a mapping its keys, and over a set elements without an
order. So all three are refused where a sequence is needed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Reversible, Sequence, Set
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from backprompt.errors import TextTypeError, TokenizerError
from backprompt.visible import abbreviated

Choice = TypeVar("Choice")


def as_list(given: Any, needed: str, *, any_order: bool = False) -> list[Any]:
    """Return an iterable as a list, its elements unchecked.

    Args:
        given: a list, tuple, array, series, generator and the like.
        needed: the beginning of the error message, such as "completions must be a sequence of strings".
        any_order: whether a set is allowed.

    Raises:
        TextTypeError: the value is a string, bytes, a mapping, a data frame, a set, or not iterable.

    """
    if type(given) in (list, tuple):
        return list(given)
    kind = type(given).__name__
    if isinstance(given, (str, bytes, bytearray, memoryview)):
        raise TextTypeError(f"{needed}, not the {kind} {abbreviated(given)}. Put a single string in a list.")
    if isinstance(given, Mapping):
        raise TextTypeError(
            f"{needed}, not a mapping ({kind}): iterating over it gives only its keys. Give list(d.values()), or "
            "one of the values, d[key]."
        )
    if hasattr(type(given), "columns") or hasattr(type(given), "column_names"):
        raise TextTypeError(
            f"{needed}, not a table ({kind}): iterating over it gives only the names of its columns. Give one "
            "column, such "
            'as df["text"].'
        )
    if isinstance(given, Set) and not isinstance(given, Reversible) and not any_order:
        raise TextTypeError(f"{needed}; a {kind} has no order. Use a list.")
    try:
        elements = iter(given)
    except TypeError as error:
        raise TextTypeError(f"{needed}, not {kind}: {abbreviated(given)}.") from error
    return list(elements)


def as_string(given: Any, name: str) -> str:
    """Return a string that can be encoded; `name` names the argument in errors.

    Raises:
        TextTypeError: the value is not a string.
        TokenizerError: the string holds a lone surrogate.

    """
    if not isinstance(given, str):
        raise TextTypeError(f"{name} must be a string, not {type(given).__name__}: {abbreviated(given)}.")
    check_encodable(given, name)
    return given


def check_encodable(string: str, name: str) -> None:
    """Raise TokenizerError for a lone surrogate; `name` names the string in the error."""
    position = lone_surrogate(string)
    if position is not None:
        raise TokenizerError(surrogate_message(f"{name}, {abbreviated(string)},", position))


def lone_surrogate(string: str) -> int | None:
    """Return the position of the first lone surrogate, half of a UTF-16 pair, which cannot be encoded; None without."""
    try:
        _ = string.isascii() or string.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def surrogate_message(shown: str, position: int) -> str:
    """Return the error message about a lone surrogate."""
    return (
        f"{shown} holds a lone surrogate at character {position}: half of a UTF-16 pair, which is not a "
        "character. Decode "
        "the source as UTF-8, or replace it with string.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
    )


def as_int(given: Any, name: str, *, at_least: int, error: type[ValueError] = ValueError) -> int:
    """Return a whole number as an int; a bool does not count as a number.

    Raises:
        ValueError: or `error`: the value is not a whole number, or too small.

    """
    if not is_int(given) or given < at_least:
        raise error(f"{name} must be an int of at least {at_least}, not {abbreviated(given)}.")
    return int(given)


def is_int(given: Any) -> bool:
    """Return whether the value is a whole number, of Python or numpy; a bool does not count."""
    return isinstance(given, Integral) and not isinstance(given, bool)


def is_python_int(given: Any) -> bool:
    """Return whether the value is a Python int; a bool, or an element of an array or a tensor, does not count."""
    return isinstance(given, int) and not isinstance(given, bool)


def as_indices(given: Any, name: str, num_items: int | None = None) -> tuple[int, ...]:
    """Return indices of items, counted from 0, in the given order.

    Args:
        given: an int, a slice, ints in order, or None for all items.
        name: the argument's name, for messages.
        num_items: the number of items. If it is None (unknown), ints are returned unchanged.

    Raises:
        ValueError: an index is not an int or is out of range, or no indices are given.

    """
    if num_items is not None and (given is None or isinstance(given, slice)):
        listed: list[Any] = list(range(num_items)[slice(None) if given is None else given])
    else:
        listed = [given] if is_int(given) else as_list(given, f"{name} must be an int or ints in order")
    for index in listed:
        if not is_int(index):
            raise ValueError(f"{name} must be ints, not {abbreviated(index)}.")
        if num_items is not None and not -num_items <= index < num_items:
            raise ValueError(f"{name} must be ints from {-num_items} to {num_items - 1}, not {index}.")
    if not listed:
        raise ValueError(f"{name} must name at least one.")
    return tuple(int(index) if num_items is None else int(index) % num_items for index in listed)


def as_number(
    given: Any,
    name: str,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    error: type[Exception] | None = None,
) -> float:
    """Return a finite number as a float; a bool does not count as a number.

    Raises:
        TypeError: or `error`: the value is not a number.
        ValueError: or `error`: the number is nan, infinite, or not within the bounds.

    """
    low, high = bounds
    is_number = isinstance(given, Real) and not isinstance(given, (bool, np.bool_))
    if is_number and math.isfinite(given) and low <= given <= high:
        return float(given)
    where = "" if bounds == (-math.inf, math.inf) else f" of at least {low:g}"
    where = where if high == math.inf else f" from {low:g} to {high:g}"
    kind = error or (ValueError if is_number else TypeError)
    raise kind(f"{name} must be a finite number{where}, not {abbreviated(given)}.")


def as_bool(given: Any, name: str, *, error: type[Exception] = ValueError) -> bool:
    """Return True or False, of Python or numpy, as a bool; numbers and strings are refused.

    Raises:
        ValueError: or `error`: the value is neither.

    """
    if not isinstance(given, (bool, np.bool_)):
        raise error(f"{name} must be True or False, not {abbreviated(given)}.")
    return bool(given)


def as_choice(given: Any, name: str, choices: Sequence[Choice], *, advice: str = "") -> Choice:
    """Return one of the choices.

    Raises:
        ValueError: the value is not one of the choices; the message ends with the advice.

    """
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {given!r}.{advice}")
    chosen: Choice = given
    return chosen


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the choice most similar to `given`, or an empty string if none is similar."""
    close = difflib.get_close_matches(given, choices, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def as_floats(given: Any, name: str) -> npt.NDArray[np.float64]:
    """Return finite numbers as an array of float64.

    Args:
        given: an array, a tensor, a series, a sequence of numbers, or nested sequences.
        name: the argument's name, for messages.

    Raises:
        TypeError: the value is something else, or has elements that are not numbers.
        ValueError: rows are of different lengths, or a number is nan or infinite.

    """
    needed = f"{name} must be numbers in order"
    if hasattr(given, "detach"):
        given = given.detach().cpu().double().numpy()  # a torch tensor; numpy lacks some of its dtypes
    elif not hasattr(given, "__array__"):
        given = as_list(given, needed)
    try:
        array = np.asarray(given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{needed}, in rows of one length: {error}.") from error
    if array.dtype.kind == "O" and all(isinstance(value, Real) for value in array.flat):
        array = array.astype(float)
    if array.dtype.kind not in "fiu" and array.size:
        odd = next((value for value in array.flat if not isinstance(value, Real)), array.flat[0])
        raise TypeError(f"{needed}, not {type(odd).__name__}: {abbreviated(odd)}.")
    floats = array.astype(float)
    if not np.isfinite(floats).all():
        raise ValueError(f"{needed} that are finite, not {floats[~np.isfinite(floats)][0]}.")
    return floats
