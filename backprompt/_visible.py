"""Strings for pictures: what cannot be seen is made visible, and long ones are shortened and cut into lines."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

LINE_WIDTH = 28

_REPLACED = {"\n": "↵", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # make up letters and emoji


def visible(string: str) -> str:
    """Return a string that shows what cannot be seen, and what would change how the rest is shown."""
    return "".join(map(_visible_character, string))


def _visible_character(character: str) -> str:
    if character in _REPLACED:
        return _REPLACED[character]
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") and character not in _JOINERS
    return ascii(character)[1:-1] if is_hidden else character


def shortened(string: str, limit: int) -> str:
    """Return a string with its middle left out where it is longer than `limit` characters."""
    if len(string) <= limit:
        return string
    return f"{string[: (limit + 1) // 2]}…{string[len(string) - limit // 2 :]}"


def wrapped(shown: str, width: int = LINE_WIDTH) -> Iterator[str]:
    """Yield lines at most `width` wide, cut behind a space or a line's end where there is one."""
    while shown:
        stop = _num_fitting(shown, width)
        space = max(shown.rfind(" ", 0, stop), shown.rfind("↵", 0, min(stop, len(shown) - 2))) + 1
        stop = space if stop < len(shown) and space > stop // 2 else stop
        yield shown[:stop]
        shown = shown[stop:]


def _num_fitting(shown: str, limit: int) -> int:
    width = 0
    for idx, character in enumerate(shown):
        width += 0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if width > limit:
            return max(1, idx)
    return len(shown)
