"""Rows as prompts: a template over the fields of a row, a conversation, strings split where they diverge."""

from __future__ import annotations

import argparse
import bisect
import itertools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backprompt.arguments import did_you_mean
from backprompt.cli.records import cell
from backprompt.cli.rows import Row
from backprompt.errors import CommandError
from backprompt.text.node import Text

if TYPE_CHECKING:
    from backprompt.lm import LM

_WORD = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")


@dataclass(frozen=True)
class Template:
    """A prompt with the names of fields in braces, such as "Review: {review}".

    Attributes:
        pieces: strings, each with the name of the field behind it; None behind the last one.

    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, given: str) -> Template:
        r"""Return a template; for `type=` of argparse. \n and \t are escapes as in C, {{ and }} are braces.

        Raises:
            ArgumentTypeError: braces are not closed, or have no name between them.

        """
        try:
            found = list(string.Formatter().parse(unescaped(given)))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{given}: {error}; {{{{ and }}}} are braces of the prompt itself"
            ) from error
        pieces = tuple((text, name) for text, name, _, _ in found)
        if any(name == "" or spec or conversion for _, name, spec, conversion in found) or not any(
            name for _, name in pieces
        ):
            raise argparse.ArgumentTypeError(
                f"{given}: it must have names of fields in braces, as in 'Review: {{review}}'"
            )
        return cls(pieces)

    def parts(self, fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """Return the parts of a row's prompt.

        Raises:
            CommandError: the row lacks a field.

        """
        parts = []
        for text, name in self.pieces:
            if name is not None and name not in fields:
                raise CommandError(
                    f"{where} has no {name!r}, which --template names.{did_you_mean(name, fields)} It has "
                    f"{', '.join(map(repr, fields))}."
                )
            parts += [text, "" if name is None else cell(fields[name])]
        if not any(parts):
            raise CommandError(f"{where}: the prompt is empty.")
        return tuple(filter(None, parts))


def unescaped(given: str) -> str:
    r"""Return a string with \n, \t and \\ replaced, since line breaks are hard to write in most shells."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], given)


def texts_of(rows: Sequence[Row], lm: LM | None, arguments: argparse.Namespace) -> list[Text]:
    """Return the prompts of rows as texts, as conversations if --chat is given."""
    prompts = [Text("", lm).join(row.parts) for row in rows]
    if not arguments.chat:
        return prompts
    from backprompt import chat

    assert lm is not None
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    return [chat(lm, [*system, {"role": "user", "content": prompt}]) for prompt in prompts]


def check_chat(arguments: argparse.Namespace) -> None:
    """Raise CommandError for a conversation without a model, and for a system message without a conversation."""
    if arguments.system is not None and not arguments.chat:
        raise CommandError("--system is the first message of a conversation: give --chat, too.")
    if arguments.chat and arguments.model is None:
        raise CommandError("--chat uses the chat template of a model: add --model NAME.")


def split_at_common_beginnings(strings: Sequence[str]) -> list[tuple[str, ...]]:
    """Return each string in parts, cut between words where another string with the same beginning ends or diverges.

        ["a b c", "a b d"]  ->  [("a b", " c"), ("a b", " d")]

    Neighbours in sorted order have the longest common beginnings. So a string is cut where its common beginning with
    either neighbour ends, and at those cuts of the neighbour that lie before this place.
    """
    words = [_WORD.findall(string) for string in strings]
    order = sorted(range(len(words)), key=lambda idx: words[idx])
    cuts: list[set[int]] = [set() for _ in words]
    for walk in (order, order[::-1]):
        open_cuts: list[int] = []
        for before, idx in itertools.pairwise(walk):
            common = _num_common(words[before], words[idx])
            open_cuts = [*open_cuts[: bisect.bisect_left(open_cuts, common)], common]
            cuts[idx].update(open_cuts)
    return [tuple(_cut(own, sorted(at))) for own, at in zip(words, cuts, strict=True)]


def _num_common(left: Sequence[str], right: Sequence[str]) -> int:
    differing = (idx for idx, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(left), len(right)))


def _cut(words: Sequence[str], stops: Sequence[int]) -> Iterator[str]:
    for start, stop in itertools.pairwise([0, *stops, len(words)]):
        if start < stop:
            yield "".join(words[start:stop])
