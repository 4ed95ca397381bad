"""Checks of the texts that callers pass to public functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backprompt.arguments import as_list
from backprompt.errors import TextTypeError, UnboundTextError
from backprompt.text.engine import Engine
from backprompt.text.node import Text
from backprompt.visible import abbreviated


def as_texts(texts: Any, function: str) -> list[Text]:
    """Return one or several texts as a list; `function` names the caller in errors.

    Raises:
        TextTypeError: see `as_list`; or an element is not a `Text`.

    """
    needed = f"{function} takes a Text or several in a list"
    if isinstance(texts, Text):
        return [texts]
    if isinstance(texts, str):
        raise TextTypeError(f"{needed}, not the str {abbreviated(texts)}. Wrap the string: Text(string, lm).")
    listed = as_list(texts, needed)
    return [as_text(text, f"texts[{idx}]") for idx, text in enumerate(listed)]


def listed_texts(texts: Text | Iterable[Text], what: str) -> list[Text]:
    """Return one or several texts as a list; `what` names the caller in errors.

    Raises:
        ValueError: the list is empty.
        TextTypeError: the value is a string, or not iterable.

    """
    listed = as_texts(texts, what)
    if not listed:
        raise ValueError(f"{what} needs at least one text.")
    return listed


def as_text(given: object, name: str) -> Text:
    """Return the value if it is a `Text`; `name` names the value in errors.

    Raises:
        TextTypeError: the value is not a `Text`.

    """
    if not isinstance(given, Text):
        raise TextTypeError(f"{name} is a {type(given).__name__}, not a Text. Wrap strings: Text(string, lm).")
    return given


def engine_of(given: object, idx: int) -> Engine[Text]:
    """Return the engine of an element of `texts`.

    Raises:
        TextTypeError: the element is not a `Text`.
        UnboundTextError: the text has no model.

    """
    text = as_text(given, f"texts[{idx}]")
    if text.lm is None:
        raise UnboundTextError(
            f"texts[{idx}], {text!r}, has no model. Build it with Text(string, lm), or join it with a text that "
            "has one."
        )
    return text.lm
