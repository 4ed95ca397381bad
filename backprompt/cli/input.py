"""Input: a file or a pipe of prompts, as JSONL or CSV, read a row at a time; errors name the line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from backprompt.cli.prompts import Template
from backprompt.cli.rows import PIPE, Format, Row, shown
from backprompt.errors import CommandError
from backprompt.visible import counted

PROMPT_FIELDS = ("prompt", "prompts", "parts")
"""The fields that may hold a prompt if no field is named: a string, or a list of strings that `+` joins."""

_MAX_CSV_FIELD = 2**31 - 1  # csv's own limit is 131,072 characters
_OTHER_DELIMITERS = (";", "\t", "|")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Input:
    """A source of prompts.

    Args:
        path: a file, or "-" for standard input.
        format: the format of its rows.
        field: the field or column that holds the prompt; by default the one of `PROMPT_FIELDS` that the row has.
        template: makes the prompt of several fields instead.
        encoding: the encoding of the text; by default UTF-8.
        delimiter: the character between values of CSV.

    """

    path: str
    format: Format
    field: str | None = None
    template: Template | None = None
    encoding: str | None = None
    delimiter: str = ","

    @property
    def is_file(self) -> bool:
        """Whether the input can be read more than once."""
        return self.path != PIPE and os.path.isfile(self.path)

    @property
    def name(self) -> str:
        """The name of the input in messages."""
        return "standard input" if self.path == PIPE else self.path

    def rows(self) -> Iterator[Row]:
        """Yield the rows as they are read.

        Raises:
            CommandError: the input cannot be opened, or a row is invalid; the message names the line.

        """
        with self._opened() as file:
            lines = file if self.encoding is None else self._recoded(file, self.encoding)
            yield from self._json_rows(lines) if self.format == "jsonl" else self._csv_rows(lines)

    def _recoded(self, file: BinaryIO, encoding: str) -> Iterator[bytes]:
        r"""Yield the lines of a file in UTF-8; a line ends with \n."""
        text = io.TextIOWrapper(file, encoding, newline="\n")
        try:
            for line in text:
                yield line.encode()
        except UnicodeError as error:
            raise CommandError(f"{self.name} is not {encoding}: {error}.") from error
        finally:
            text.detach()  # the code that opened the file closes it

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        if self.path == PIPE:
            if sys.stdin is None:
                raise CommandError("standard input is closed. Name a file of prompts.")
            yield sys.stdin.buffer
            return
        try:
            file = open(self.path, "rb")  # noqa: SIM115  # closed below; errors of reading are not those of opening
        except OSError as error:
            raise CommandError(f"{self.path} cannot be read: {error.strerror}.") from error
        with file:
            yield file

    def _json_rows(self, file: Iterable[bytes]) -> Iterator[Row]:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {self.name}"
            string = decoded(line, where, may_have_mark=number == 1)
            if not string.strip():
                continue
            try:
                value = json.loads(
                    string, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_without_repeats
                )
                if "\\u" in string:
                    json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise CommandError(f"{where} holds half of a surrogate pair, which is not a character.") from error
            except json.JSONDecodeError as error:
                raise CommandError(
                    f"{where} is not JSON: {error.msg} (column {error.colno}). JSONL has a JSON value a line."
                ) from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise CommandError(f"{where} is JSON that cannot be read: {error}.") from error
            source = string.strip() if isinstance(value, dict) else None
            fields = {self.field or PROMPT_FIELDS[0]: value} if isinstance(value, str) else value
            if not isinstance(fields, dict):
                raise CommandError(f"{where} is neither a JSON object nor a JSON string, but {shown(value)}.")
            yield Row(where, self._parts(fields, where), fields, source)

    def _csv_rows(self, file: Iterable[bytes]) -> Iterator[Row]:
        csv.field_size_limit(_MAX_CSV_FIELD)
        reader = csv.reader(self._csv_lines(file), delimiter=self.delimiter, strict=True)
        try:
            names = next(reader, [])
            hint = _delimiter_hint(names)
            repeated = [name for idx, name in enumerate(names) if name in names[:idx]]
            if repeated:
                raise CommandError(f"{self.name} has two columns called {repeated[0]!r}. Rename one.")
            for values in reader:
                where = f"line {reader.line_num} of {self.name}"
                if not values:
                    continue
                if len(values) != len(names):
                    num_values = counted(len(values), "value")
                    num_columns = counted(len(names), "column")
                    raise CommandError(f"{where} has {num_values} for the {num_columns} of the header.{hint}")
                fields = dict(zip(names, values, strict=True))
                try:
                    parts = self._parts(fields, where)
                except CommandError as error:
                    raise CommandError(f"{error}{hint}") from error
                yield Row(where, parts, fields)
        except csv.Error as error:
            raise CommandError(f"line {reader.line_num} of {self.name} is not CSV: {error}.") from error

    def _csv_lines(self, file: Iterable[bytes]) -> Iterator[str]:
        r"""Yield lines with their ends, which are \n, \r\n or \r."""
        for number, line in enumerate(file, 1):
            text = decoded(line, f"line {number} of {self.name}", may_have_mark=number == 1)
            yield from re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)

    def _parts(self, fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
        if self.template is not None:
            return self.template.parts(fields, where)
        candidates = PROMPT_FIELDS if self.field is None else (self.field,)
        found = [name for name in candidates if name in fields]
        what = "column" if self.format == "csv" else "field"
        if len(found) != 1:
            is_there = f"both {found[0]!r} and {found[1]!r}" if found else f"no {what} {candidates[0]!r}"
            others = f" It has {', '.join(map(repr, fields))}." if fields else ""
            raise CommandError(f"{where} has {is_there}. Say which {what} holds the prompt: --column NAME.{others}")
        value = fields[found[0]]
        parts = value if isinstance(value, list) else [value]
        wrong = next((part for part in parts if not isinstance(part, str)), None)
        if wrong is not None or value is None:
            raise CommandError(
                f"{where}: {found[0]!r} must be a string or a list of strings, and holds {shown(wrong)}."
            )
        if not any(parts):
            raise CommandError(f"{where}: {found[0]!r} is empty.")
        return tuple(parts)


def decoded(data: bytes, where: str, *, may_have_mark: bool = True) -> str:
    """Return text from UTF-8, without the byte-order mark that it may begin with.

    Raises:
        CommandError: the data is not UTF-8, or holds NUL, which only other encodings of text have.

    """
    try:
        text = data.decode("utf-8-sig" if may_have_mark else "utf-8")
    except UnicodeDecodeError as error:
        is_utf_16 = data[:2] in _UTF_16 or b"\0" in data
        hint = "It looks like UTF-16: --encoding utf-16." if is_utf_16 else "Name its encoding: --encoding cp1252."
        raise CommandError(f"{where} is not UTF-8. {hint}") from error
    if "\0" in text:
        raise CommandError(
            f"{where} holds NUL bytes. If the encoding is UTF-16, add --encoding utf-16-le; JSON writes the "
            "character NUL as "
            "\\u0000."
        )
    return text


def _delimiter_hint(names: Sequence[str]) -> str:
    """Return advice if the header has a single column, whose name contains another delimiter; else ""."""
    found = [character for character in _OTHER_DELIMITERS if len(names) == 1 and character in names[0]]
    if not found:
        return ""
    delimiter = repr(found[0])
    return f" The file seems to be separated by {delimiter}: --delimiter {delimiter}."


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object for `json.loads`, which by itself would silently keep the last value of a repeated name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for idx, name in enumerate(names) if name in names[:idx])
        raise ValueError(f"an object has two fields called {repeated!r}")
    return fields


def _finite(number: str) -> float:
    """Return a float for `json.loads`, which by itself accepts NaN and numbers that are too large for a float."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value
