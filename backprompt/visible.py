"""Strings that are safe to show: the author of a text must not control the terminal or the page that shows it.

Invisible characters are made visible: control characters and escape sequences, marks that change the direction of
later characters, characters without width. For pictures, long strings are shortened and cut into lines. All strings of
texts, files and models that the library shows go through here, or through `repr`, which escapes the same and more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

LINE_WIDTH = 28

_GIVEN_CHARACTERS = 60

_REPLACED = {"\n": "↵", "\t": "⇥"}
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # combine characters into letters and emoji
_SELECTORS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # select a form of the preceding character
_BLANKS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"  # letters and marks without ink


def visible(string: str) -> str:
    """Return a string with visible replacements for characters that are invisible or change how others are shown."""
    if string.isascii() and string.isprintable():
        return string
    return "".join(map(_visible_character, string, f" {string}"))


def visible_lines(string: str) -> str:
    """Return the result of `visible` with line breaks kept."""
    return "\n".join(map(visible, string.split("\n")))


def visible_json(text: str) -> str:
    r"""Return JSON with hidden characters as \u escapes; the meaning stays the same."""
    return re.sub(r"[^ -~\t\r\n]", lambda found: _escape(found[0]) if _is_hidden(found[0]) else found[0], text)


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[start : start + 2].hex()}" for start in range(0, len(units), 2))


def _visible_character(character: str, before: str) -> str:
    if character in _REPLACED:
        return _REPLACED[character]
    if character in _JOINERS or _SELECTORS.match(character):
        is_hidden = not _is_shaped(before, character)
    else:
        is_hidden = _is_hidden(character) or character in _BLANKS
    return ascii(character)[1:-1] if is_hidden else character


def _is_hidden(character: str) -> bool:
    return character not in _JOINERS and unicodedata.category(character) in _HIDDEN_CATEGORIES


def _is_shaped(before: str, character: str) -> bool:
    """Return whether a joiner or selector stands in its normal place: behind a non-ASCII letter or an emoji.

    A joiner may also stand behind a selector. Anywhere else, joiners and selectors only make equal-looking strings
    differ.
    """
    if _SELECTORS.match(before):
        return character in _JOINERS
    return (not before.isascii() and before not in _JOINERS) or before in "0123456789#*"  # keycaps


def abbreviated(given: object) -> str:
    """Return the `repr` of a value, in ASCII for a string, shortened for an error message."""
    return shortened(ascii(given) if isinstance(given, str) else repr(given), _GIVEN_CHARACTERS)


def shortened(string: str, limit: int, gap: str = "…") -> str:
    """Return a string, with a gap in place of its middle if it is longer than `limit` characters."""
    if len(string) <= limit:
        return string
    return f"{string[: (limit + 1) // 2]}{gap}{string[len(string) - limit // 2 :]}"


def beginning(string: str, limit: int, end: str = "...") -> str:
    """Return a string cut to at most `limit` characters; `end` replaces the part that is cut off."""
    return string if len(string) <= limit else f"{string[: limit - len(end)]}{end}"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `one` for 1, else `many`, by default `one` with an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def wrapped(shown: str, width: int = LINE_WIDTH) -> Iterator[str]:
    """Yield lines at most `width` wide, cut behind a space or a line's end where possible."""
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
