"""Rows: prompts in, results out, as JSONL or CSV, through files or pipes.

A row of input is a prompt and whatever else its line holds; what else it holds passes through to the output, so that
rows can be told apart there: from JSONL to JSONL as it is written, numbers to the last digit. Output is written in the
order of the input, and only ever appended to. So what a process that was killed has left is a beginning of the whole,
but perhaps for its last row, and another one goes on behind it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from backprompt._visible import beginning, visible_json
from backprompt.errors import CommandError

logger = logging.getLogger(__name__)

Format: TypeAlias = Literal["jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("jsonl", "csv")
PIPE = "-"
PROMPT_FIELDS = ("prompt", "prompts", "parts")
"""Where a prompt is looked for if no field is named: a string, or a list of strings that `+` joins."""

_MAX_CSV_FIELD = 2**31 - 1  # csv's own limit is 131,072 characters
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What spreadsheets take for the beginning of a formula; the last four are of full width.
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """A row of input.

    Attributes:
        where: it stands, for messages.
        parts: of the prompt, to be joined with `+`.
        fields: all that the row holds, the prompt included.
        source: the fields as the input has them, a JSON object; None for other input.

    """

    where: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any]
    source: str | None = None


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
                raise CommandError(f"{where} holds half of a surrogate pair, which is no character.") from error
            except json.JSONDecodeError as error:
                raise CommandError(f"{where} is not JSON: {error.msg} (column {error.colno}).") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise CommandError(f"{where} is no JSON that can be read: {error}.") from error
            source = string.strip() if isinstance(value, dict) else None
            fields = {self.field or PROMPT_FIELDS[0]: value} if isinstance(value, str) else value
            if not isinstance(fields, dict):
                raise CommandError(f"{where} is neither a JSON object nor a JSON string, but {shown(value)}.")
            yield Row(where, self._parts(fields, where), fields, source)

    def _csv_rows(self, file: BinaryIO) -> Iterator[Row]:
        csv.field_size_limit(_MAX_CSV_FIELD)
        reader = csv.reader(self._csv_lines(file), strict=True)
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

    def _csv_lines(self, file: BinaryIO) -> Iterator[str]:
        r"""Yield lines with their ends, which are \n, \r\n or \r."""
        for number, line in enumerate(file, 1):
            text = decoded(line, f"line {number} of {self.name}", may_have_mark=number == 1)
            yield from re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text)

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


def decoded(data: bytes, where: str, *, may_have_mark: bool = True) -> str:
    """Return text from UTF-8, without the byte-order mark that it may begin with.

    Raises:
        CommandError: it is something else, or holds NUL, which only other encodings of text have.

    """
    try:
        text = data.decode("utf-8-sig" if may_have_mark else "utf-8")
    except UnicodeDecodeError as error:
        is_utf_16 = data[:2] in _UTF_16 or b"\0" in data
        hint = " It looks like UTF-16: convert it, as with iconv -f UTF-16 -t UTF-8." if is_utf_16 else ""
        raise CommandError(f"{where} is not UTF-8.{hint}") from error
    if "\0" in text:
        raise CommandError(
            f"{where} holds NUL bytes. If it is UTF-16, convert it, as with iconv -f UTF-16LE -t UTF-8; JSON writes "
            "the character NUL as \\u0000."
        )
    return text


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
        escapes_formulas: CSV: put ' before cells that spreadsheets would run.

    """

    def __init__(
        self,
        path: str,
        format: Format,
        new_fields: Sequence[str],
        rows_per_prompt: int = 1,
        *,
        escapes_formulas: bool = False,
    ) -> None:
        self.path = path
        self.format = format
        self._new_fields = tuple(new_fields)
        self._rows_per_prompt = rows_per_prompt
        self._cell = _escaped_cell if escapes_formulas else _cell
        self._columns: list[str] | None = None
        self._file: BinaryIO | None = None
        self._claimed: BinaryIO | None = None
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
            return _json_row(row, {self._new_fields[0]: 0}).removesuffix("0}").encode()
        if self._columns is None:
            return _csv_line([*row.fields, *self._new_fields]).encode()
        own = [self._cell(row.fields.get(name, "")) for name in self._columns if name not in self._new_fields]
        return _csv_line([*own, "0"]).removesuffix("0\n").encode()

    def _check_alike(self, written: _Written, row: Row, check: Callable[[Mapping[str, Any]], str | None]) -> None:
        has_names = self.format == "csv" and written.idx > 0  # those of the first row
        own = {name: value for name, value in written.fields.items() if name not in self._new_fields}
        fields: Mapping[str, Any] = row.fields
        if self.format == "csv":
            fields = {name: self._cell(row.fields.get(name, "")) for name in own}
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

    def claim(self) -> None:
        """Keep other processes from writing to a file that is there, until `close`.

        Raises:
            CommandError: one writes to it; or it cannot be read.

        """
        try:
            self._claimed = open(self.path, "rb")  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise CommandError(f"{self.path} cannot be read: {error.strerror}.") from error
        _lock(self._claimed, self.path)

    def open(self) -> None:
        """Open the file; what it holds stays until `cut_off`. One that was not there before is claimed.

        Raises:
            CommandError: it cannot be written to, or is there by now.

        """
        if self.path == PIPE:
            self._file = sys.stdout.buffer
            return
        is_new = self._claimed is None and (os.path.isfile(self.path) or not os.path.exists(self.path))
        try:
            self._file = open(os.path.realpath(self.path), "xb" if is_new else "ab")  # noqa: SIM115  # see `close`
        except FileExistsError as error:
            raise CommandError(
                f"{self.path} was not there, and is by now: another process writes to it. Give the output another name."
            ) from error
        except OSError as error:
            raise CommandError(f"{self.path} cannot be written to: {error.strerror}.") from error
        if is_new:
            _lock(self._file, self.path)

    def write(self, row: Row, results: Iterable[Mapping[str, Any]]) -> None:
        """Append a row for each result of a row of input."""
        assert self._file is not None
        header = self._header(row)
        try:
            text = header + "".join(self._lines(row, results))
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
        """Close the file, and let others write to it."""
        try:
            if self._file is not None and self.path != PIPE:
                self._file.close()
        finally:
            if self._claimed is not None:
                self._claimed.close()

    def _lines(self, row: Row, results: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        for result in results:
            fields = {**row.fields, **result}
            if self.format == "jsonl":
                yield _json_row(row, result) + "\n"
            else:
                assert self._columns is not None
                yield _csv_line([self._cell(fields.get(name, "")) for name in self._columns])

    def _header(self, row: Row) -> str:
        """Return the header of CSV, from the first row that is written; nothing where there is one already."""
        if self.format == "jsonl" or self._columns is not None:
            return ""
        self._columns = [*row.fields, *self._new_fields]
        formula = next((name for name in self._columns if self._cell(name) != name), None)
        if formula is not None:
            raise CommandError(f"{row.where} has a column {formula!r}, which is taken for a formula. Rename it.")
        return _csv_line(self._columns)


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
    return "" if value is None else as_json(value)


def _escaped_cell(value: Any) -> str:
    """Return the same, with ' before what spreadsheets take for a formula; a number is none."""
    cell = _cell(value)
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def _json_row(row: Row, new: Mapping[str, Any]) -> str:
    """Return a row with new fields as one JSON object: what is the input's own as it is written there."""
    own = as_json(row.fields) if row.source is None else visible_json(row.source)
    members = [object[1:-1].strip() for object in (own, as_json(new))]
    return f"{{{', '.join(filter(None, members))}}}"


def as_json(value: Any, *, allow_nan: bool = False) -> str:
    """Return a value as JSON that terminals can show: other alphabets as they are, control characters escaped.

    Raises:
        ValueError: it holds a number that is not finite, which JSON has no word for.

    """
    return visible_json(json.dumps(value, ensure_ascii=False, allow_nan=allow_nan))


def _lock(file: BinaryIO, name: str) -> None:
    """Keep other processes of this program from writing to a file until it is closed, where the system can.

    The system lets go of the lock when the process ends, however it does.

    Raises:
        CommandError: another one writes to it.

    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CommandError(
            f"{name} is being written to by another process. Wait for it, or give the output another name."
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.debug("%s cannot be locked: %s", name, error)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object: what `json.loads` calls, which would keep the last of two values silently."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for idx, name in enumerate(names) if name in names[:idx])
        raise ValueError(f"an object has two fields called {repeated!r}")
    return fields


def _finite(number: str) -> float:
    """Return a float: what `json.loads` calls, which takes NaN and numbers that are too large for a float."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def shown(value: Any) -> str:
    """Return a value as JSON, the beginning of it if it is long."""
    return beginning(as_json(value), 40)


def counted(number: int, one: str, many: str) -> str:
    """Return a number with the word for so many."""
    return f"{number:,} {one if number == 1 else many}"
