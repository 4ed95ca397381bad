"""Rows: prompts in, results out, as JSONL or CSV, through files or pipes.

A row of input is a prompt and whatever else its line holds; what else it holds passes through to the output, so that
rows can be told apart there. Output is written in the order of the input, and only ever appended to. So what a process
that was killed has left is a beginning of the whole, but perhaps for its last row, and another one goes on behind it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from backprompt.errors import CommandError

Format: TypeAlias = Literal["jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("jsonl", "csv")
PIPE = "-"
PROMPT_FIELDS = ("prompt", "prompts", "parts")
"""Where a prompt is looked for if no field is named: a string, or a list of strings that `+` joins."""

_MAX_CSV_FIELD = 2**31 - 1  # csv's own limit is 131,072 characters


@dataclass(frozen=True)
class Row:
    """A row of input.

    Attributes:
        where: it stands, for messages.
        parts: of the prompt, to be joined with `+`.
        fields: all that the row holds, the prompt included.

    """

    where: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any]


def check_is_there(path: str) -> None:
    """Raise CommandError for a path that is none; reads nothing, for a pipe can be read but once."""
    if path != PIPE and not os.path.exists(path):
        raise CommandError(f"{path} is not there.")
    if os.path.isdir(path):
        raise CommandError(f"{path} is a folder, not a file of prompts.")


def format_of(path: str, given: Format | None) -> Format:
    """Return the format of a file: as given, else by its extension; JSONL for pipes.

    Raises:
        CommandError: neither says which it is.

    """
    if given is not None:
        return given
    if path == PIPE:
        return "jsonl"
    extension = Path(path).suffix.lower()
    if extension == ".csv":
        return "csv"
    if extension in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    raise CommandError(f"{path}: say whether this is JSONL or CSV, by the extension (.jsonl, .csv) or as an option.")


@dataclass(frozen=True)
class Input:
    """Where prompts come from.

    Args:
        path: a file, or "-" for standard input.
        format: of its rows.
        field: or column, that holds the prompt; by default the one of `PROMPT_FIELDS` that is there.

    """

    path: str
    format: Format
    field: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it can be read more than once."""
        return self.path != PIPE and os.path.isfile(self.path)

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard input" if self.path == PIPE else self.path

    def rows(self) -> Iterator[Row]:
        """Yield the rows as they are read.

        Raises:
            CommandError: it cannot be opened, or a row is not what it should be; names the line.

        """
        with self._opened() as file:
            yield from self._json_rows(file) if self.format == "jsonl" else self._csv_rows(file)

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

    def _json_rows(self, file: BinaryIO) -> Iterator[Row]:
        for number, line in enumerate(file, 1):
            where = f"line {number} of {self.name}"
            try:
                string = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CommandError(f"{where} is not UTF-8.") from error
            if not string.strip():
                continue
            try:
                value = json.loads(string, parse_constant=_finite, parse_float=_finite)
                if "\\u" in string:
                    json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise CommandError(f"{where} holds half of a surrogate pair, which is no character.") from error
            except json.JSONDecodeError as error:
                raise CommandError(f"{where} is not JSON: {error.msg} (column {error.colno}).") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise CommandError(f"{where} is no JSON that can be read: {error}.") from error
            fields = {self.field or PROMPT_FIELDS[0]: value} if isinstance(value, str) else value
            if not isinstance(fields, dict):
                raise CommandError(f"{where} is neither a JSON object nor a JSON string, but {shown(value)}.")
            yield Row(where, self._parts(fields, where), fields)

    def _csv_rows(self, file: BinaryIO) -> Iterator[Row]:
        csv.field_size_limit(_MAX_CSV_FIELD)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, strict=True)
        try:
            names = next(reader, [])
            repeated = [name for idx, name in enumerate(names) if name in names[:idx]]
            if repeated:
                raise CommandError(f"{self.name} has two columns called {repeated[0]!r}. Rename one.")
            for values in reader:
                where = f"line {reader.line_num} of {self.name}"
                if not values:
                    continue
                if len(values) != len(names):
                    num_values = counted(len(values), "value", "values")
                    num_columns = counted(len(names), "column", "columns")
                    raise CommandError(f"{where} has {num_values} for the {num_columns} of the header.")
                fields = dict(zip(names, values, strict=True))
                yield Row(where, self._parts(fields, where), fields)
        except csv.Error as error:
            raise CommandError(f"line {reader.line_num} of {self.name} is not CSV: {error}.") from error
        except UnicodeDecodeError as error:
            raise CommandError(f"{self.name} is not UTF-8, somewhere behind line {reader.line_num}.") from error
        finally:
            text.detach()  # else it would close the file

    def _parts(self, fields: Mapping[str, Any], where: str) -> tuple[str, ...]:
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


def checked(rows: Iterable[Row], new_fields: Sequence[str], output_format: Format) -> Iterator[Row]:
    """Yield the rows, if each can be written with new fields beside its own.

    Raises:
        CommandError: it has such a field already, or one that the first row has not and CSV therefore no column for.

    """
    columns: Mapping[str, Any] | None = None
    for row in rows:
        taken = [name for name in new_fields if name in row.fields]
        if taken:
            raise CommandError(f"{row.where} has a field {taken[0]!r}, which is the name of a result. Rename it.")
        columns = row.fields if columns is None else columns
        if output_format == "csv" and (added := [name for name in row.fields if name not in columns]):
            raise CommandError(f"{row.where} has a field {added[0]!r} that the first row has not. Write JSONL instead.")
        yield row


class Output:
    """Where results go, row by row.

    Args:
        path: a file, or "-" for standard output.
        format: of its rows.
        new_fields: what results add to a row's own fields.
        rows_per_prompt: how many rows each row of input becomes.

    """

    def __init__(self, path: str, format: Format, new_fields: Sequence[str], rows_per_prompt: int = 1) -> None:
        self.path = path
        self.format = format
        self._new_fields = tuple(new_fields)
        self._rows_per_prompt = rows_per_prompt
        self._columns: list[str] | None = None
        self._file: BinaryIO | None = None
        self._num_kept_bytes = 0
        self._tail = b""

    @property
    def name(self) -> str:
        """What messages call it."""
        return "standard output" if self.path == PIPE else self.path

    def resume(
        self, rows: Iterator[Row], check: Callable[[Mapping[str, Any]], str | None]
    ) -> tuple[int, Iterator[Row]]:
        """Go on behind what is there: take as many rows from the input; `cut_off` drops what was written half.

        Args:
            rows: of the input.
            check: returns what is wrong with the new fields of a row, or None.

        Returns:
            How many rows of input were taken, and the others.

        Raises:
            CommandError: what is there, or what would be dropped of it, was not made from this input.

        """
        num_prompts, num_bytes = 0, 0
        cut_off: list[_Written] = []
        for stop, group in itertools.groupby(self._written(), key=lambda found: found.idx // self._rows_per_prompt):
            written = list(group)
            if len(written) < self._rows_per_prompt:
                cut_off = written
                break
            row = next(rows, None)
            if row is None:
                raise CommandError(f"{self.path} has more rows than the input. Give it another name, or --overwrite.")
            for one in written:
                self._check_alike(one, row, check)
            num_prompts, num_bytes = stop + 1, written[-1].stop_byte
        self._num_kept_bytes = num_bytes
        if num_bytes < os.path.getsize(self.path):
            to_come = list(itertools.islice(rows, 2))
            self._check_cut_off(cut_off, to_come, check)
            rows = itertools.chain(to_come, rows)
        if not num_bytes:
            self._columns = None  # a header alone is written again
        return num_prompts, rows

    def _check_cut_off(
        self, written: Sequence[_Written], to_come: Sequence[Row], check: Callable[[Mapping[str, Any]], str | None]
    ) -> None:
        """Raise CommandError unless what is to be dropped is a beginning of what is written next.

        Args:
            written: whole rows, but not all that a row of input becomes.
            to_come: the next rows of input, two or as many as there are.
            check: as in `resume`.

        """
        refused = CommandError(
            f"{self.path} ends in what is no beginning of a row from "
            f"{to_come[0].where if to_come else 'the input, which has no more'}, so it cannot be gone on with. "
            "Give another name, or replace it: --overwrite."
        )
        if not to_come:
            raise refused
        is_header_alone = self._columns is not None and not written and not self._num_kept_bytes
        if is_header_alone and self._columns != [*to_come[0].fields, *self._new_fields]:
            raise refused
        for one in written:
            self._check_alike(one, to_come[0], check)
        beginning = self._beginning(to_come[0])
        if not (beginning.startswith(self._tail) or self._tail.startswith(beginning)):
            raise refused
        if self.format == "csv" and any(_has_whole_row(self._tail, self._beginning(row)) for row in to_come):
            raise refused

    def _beginning(self, row: Row) -> bytes:
        """Return what is written next, up to the first result: the header of CSV, if there is none yet, or the row."""
        if self.format == "jsonl":
            line = json.dumps({**row.fields, self._new_fields[0]: 0}, ensure_ascii=False)
            return line.removesuffix("0}").encode()
        if self._columns is None:
            return _csv_line([*row.fields, *self._new_fields]).encode()
        own = [_cell(row.fields.get(name, "")) for name in self._columns if name not in self._new_fields]
        return _csv_line([*own, "0"]).removesuffix("0\n").encode()

    def _check_alike(self, written: _Written, row: Row, check: Callable[[Mapping[str, Any]], str | None]) -> None:
        has_names = self.format == "csv" and written.idx > 0  # those of the first row
        own = {name: value for name, value in written.fields.items() if name not in self._new_fields}
        fields: Mapping[str, Any] = row.fields
        if self.format == "csv":
            fields = {name: _cell(row.fields.get(name, "")) for name in own}
        new = {name: value for name, value in written.fields.items() if name in self._new_fields}
        has_names = has_names or list(written.fields) == [*row.fields, *self._new_fields]
        if not has_names or json.dumps(own) != json.dumps(fields):
            wrong = f"is not from {row.where}"
        elif (found := check(new)) is not None:
            wrong = found
        else:
            return
        raise CommandError(
            f"row {written.idx + 1} of {self.path} {wrong}, so it cannot be gone on with. Give the same input and "
            "options as before, another name, or --overwrite."
        )

    def _written(self) -> Iterator[_Written]:
        """Yield the whole rows that are there, and note the columns of CSV and what stands behind the last row."""
        idx = 0
        with open(self.path, "rb") as file:
            for record, stop_byte in _records(file, self.format):
                if stop_byte is None:
                    self._tail = record
                    return
                try:
                    text = record.decode()
                    if self.format == "jsonl":
                        fields = json.loads(text)
                    else:
                        (values,) = csv.reader([text], strict=True)
                        if self._columns is None:
                            self._columns = values
                            continue
                        fields = dict(zip(self._columns, values, strict=True))
                    if not isinstance(fields, dict):
                        raise ValueError("no object")
                except (ValueError, csv.Error) as error:
                    raise CommandError(
                        f"row {idx + 1} of {self.path} cannot be read, so it cannot be gone on with: give the output "
                        "another name, or --overwrite."
                    ) from error
                yield _Written(idx, fields, stop_byte)
                idx += 1

    def open(self) -> None:
        """Open the file; what it holds stays until `cut_off`.

        Raises:
            CommandError: it cannot be written to.

        """
        if self.path == PIPE:
            self._file = sys.stdout.buffer
            return
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise CommandError(f"{self.path} cannot be written to: {error.strerror}.") from error

    def write(self, row: Row, results: Iterable[Mapping[str, Any]]) -> None:
        """Append a row for each result of a row of input."""
        assert self._file is not None
        try:
            text = "".join(self._lines(row, results))
        except ValueError as error:
            raise CommandError(f"{row.where}: a result is no finite number, which JSON has no word for.") from error
        self._file.write(text.encode())

    def cut_off(self) -> None:
        """Drop what the file holds, but for the rows that are gone on behind; a pipe or a device holds nothing."""
        assert self._file is not None
        if self.path != PIPE and os.fstat(self._file.fileno()).st_size > self._num_kept_bytes:
            self._file.truncate(self._num_kept_bytes)

    def flush(self) -> None:
        """Let readers see what was written."""
        assert self._file is not None
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None and self.path != PIPE:
            self._file.close()

    def _lines(self, row: Row, results: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        if self.format == "csv" and self._columns is None:
            self._columns = self._columns_for(row)
            yield _csv_line(self._columns)
        for result in results:
            fields = {**row.fields, **result}
            if self.format == "jsonl":
                yield json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
            else:
                assert self._columns is not None
                yield _csv_line([_cell(fields.get(name, "")) for name in self._columns])

    def _columns_for(self, row: Row) -> list[str]:
        return [*row.fields, *self._new_fields] if self._columns is None else self._columns


@dataclass(frozen=True)
class _Written:
    """A row that is in the output: its number, what it holds, and where in the file it ends."""

    idx: int
    fields: dict[str, Any]
    stop_byte: int


def _records(file: Iterable[bytes], format: Format) -> Iterator[tuple[bytes, int | None]]:
    """Yield each row with its end, and where in the file that is: None for a last one without an end.

    A line break within quotes does not end a row of CSV. A quote within quotes is written twice, so the number of
    quotes so far says whether one is open.
    """
    lines: list[bytes] = []
    num_quotes, stop_byte = 0, 0
    for line in file:
        lines.append(line)
        num_quotes += line.count(b'"')
        stop_byte += len(line)
        if line.endswith(b"\n") and (format == "jsonl" or num_quotes % 2 == 0):
            yield b"".join(lines), stop_byte
            lines = []
    if lines:
        yield b"".join(lines), None


def _has_whole_row(tail: bytes, beginning: bytes) -> bool:
    """Return whether a whole row of CSV with this beginning stands behind a line break in a row that has no end."""
    start = tail.find(b"\n" + beginning)
    if start < 0:
        return False
    _, stop_byte = next(_records(io.BytesIO(tail[start + 1 :]), "csv"), (b"", None))
    return stop_byte is not None


def _csv_line(values: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(values)  # it quotes the characters that end its lines
    return line.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> str:
    """Return a value as CSV has it: a string as it is, nothing for None, all else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False)


def _finite(number: str) -> float:
    """Return a float: what `json.loads` calls, which takes NaN and numbers that are too large for a float."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def shown(value: Any) -> str:
    """Return a value as JSON, the beginning of it if it is long."""
    string = json.dumps(value, ensure_ascii=False)
    return string if len(string) <= 40 else f"{string[:37]}..."


def counted(number: int, one: str, many: str) -> str:
    """Return a number with the word for so many."""
    return f"{number:,} {one if number == 1 else many}"
