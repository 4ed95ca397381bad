"""Checks of the texts that public functions are given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backprompt.arguments import as_list
from backprompt.errors import TextTypeError, UnboundTextError
from backprompt.text.engine import Engine
from backprompt.text.node import Text
from backprompt.visible import abbreviated


def as_texts(texts: Any, function: str) -> list[Text]:
    """Return a text or several as a list; `function` takes them.

    Raises:
        TextTypeError: see `as_list`; or an element is not a `Text`.

    """
    needed = f"{function} takes a Text or several in a list"
    if isinstance(texts, Text):
        return [texts]
    if isinstance(texts, str):
        raise TextTypeError(f"{needed}, not the str {abbreviated(texts)}. Wrap it: Text(string, lm).")
    listed = as_list(texts, needed)
    return [as_text(text, f"texts[{idx}]") for idx, text in enumerate(listed)]


def listed_texts(texts: Text | Iterable[Text], what: str) -> list[Text]:
    """Return a text or several as a list; `what` takes them.

    Raises:
        ValueError: there are none.
        TextTypeError: it is a string, or nothing that one can go through.

    """
    listed = as_texts(texts, what)
    if not listed:
        raise ValueError(f"{what} needs at least one text.")
    return listed


def as_text(given: object, name: str) -> Text:
    """Return what is a `Text`; `name` says where it stands.

    Raises:
        TextTypeError: it is none.

    """
    if not isinstance(given, Text):
        raise TextTypeError(f"{name} is a {type(given).__name__}, not a Text. Wrap strings: Text(string, lm).")
    return given


def engine_of(given: object, idx: int) -> Engine[Text]:
    """Return the engine of an element of `texts`.

    Raises:
        TextTypeError: it is no `Text`.
        UnboundTextError: it has no model.

    """
    text = as_text(given, f"texts[{idx}]")
    if text.lm is None:
        raise UnboundTextError(
            f"texts[{idx}], {text!r}, has no model. Build it with Text(string, lm), or join it with a text that "
            "has one."
        )
    return text.lm
