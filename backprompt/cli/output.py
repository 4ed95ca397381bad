"""Output: a file or a pipe of results, in the order of the input, and only ever appended to.

So the output of a killed process is the beginning of the whole output, except perhaps for its last row, and another
process can continue it. An `Output` keeps the file, locked against other processes of this program; the columns of CSV;
and the size of the earlier content that is kept.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from backprompt.cli.records import cell, csv_line, escaped_cell, has_whole_row, json_row, records
from backprompt.cli.rows import PIPE, Format, Row
from backprompt.errors import CommandError

logger = logging.getLogger(__name__)


class Output:
    """A destination of results, row by row.

    Args:
        path: a file, or "-" for standard output.
        format: the format of its rows.
        new_fields: the fields that results add to a row's own fields.
        rows_per_prompt: the number of output rows for each row of input.
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
        self._cell = escaped_cell if escapes_formulas else cell
        self._columns: list[str] | None = None
        self._file: BinaryIO | None = None
        self._claimed: BinaryIO | None = None
        self._num_kept_bytes = 0
        self._tail = b""

    @property
    def name(self) -> str:
        """The name of the output in messages."""
        return "standard output" if self.path == PIPE else self.path

    def resume(
        self, rows: Iterator[Row], check: Callable[[Mapping[str, Any]], str | None]
    ) -> tuple[int, Iterator[Row]]:
        """Continue an existing file: skip the input rows whose results it has; `cut_off` drops a half-written rest.

        Args:
            rows: the rows of the input.
            check: returns the fault in the new fields of a row, in words, or None.

        Returns:
            The number of skipped rows of input, and the other rows.

        Raises:
            CommandError: the rows of the file, or the rest to be dropped, were not made from this input.

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
                raise CommandError(
                    f"{self.path} has more rows than the input. Give the output another name, or "
                    "replace it: --overwrite."
                )
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
        """Raise CommandError unless the rest to be dropped is a beginning of the next rows.

        Args:
            written: whole rows for one row of input, but not all of its rows.
            to_come: the next rows of input, two or as many as there are.
            check: as in `resume`.

        """
        refused = CommandError(
            f"{self.path} ends in a row that does not come from "
            f"{to_come[0].where if to_come else 'the input, which has no more rows'}, so it cannot be continued. "
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
        if self.format == "csv" and any(has_whole_row(self._tail, self._beginning(row)) for row in to_come):
            raise refused

    def _beginning(self, row: Row) -> bytes:
        """Return the bytes to write next, up to the first result: the header of CSV if it is missing, else the row."""
        if self.format == "jsonl":
            return json_row(row, {self._new_fields[0]: 0}).removesuffix("0}").encode()
        if self._columns is None:
            return csv_line([*row.fields, *self._new_fields]).encode()
        own = [self._cell(row.fields.get(name, "")) for name in self._columns if name not in self._new_fields]
        return csv_line([*own, "0"]).removesuffix("0\n").encode()

    def _check_alike(self, written: _Written, row: Row, check: Callable[[Mapping[str, Any]], str | None]) -> None:
        has_names = self.format == "csv" and written.idx > 0  # the names of the first row
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
            f"row {written.idx + 1} of {self.path} {wrong}, so it cannot be continued. Give the same input and "
            "options as before, another name, or --overwrite."
        )

    def _written(self) -> Iterator[_Written]:
        """Yield the whole rows of the file, and note the columns of CSV and the bytes behind the last row."""
        idx = 0
        with open(self.path, "rb") as file:
            for record, stop_byte in records(file, self.format):
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
                        f"row {idx + 1} of {self.path} cannot be read, so it cannot be continued: give the output "
                        "another name, or --overwrite."
                    ) from error
                yield _Written(idx, fields, stop_byte)
                idx += 1

    def claim(self) -> None:
        """Keep other processes from writing to an existing file, until `close`.

        Raises:
            CommandError: another process writes to the file, or it cannot be read.

        """
        try:
            self._claimed = open(self.path, "rb")  # noqa: SIM115  # `close` closes it
        except OSError as error:
            raise CommandError(f"{self.path} cannot be read: {error.strerror}.") from error
        _lock(self._claimed, self.path)

    def open(self) -> None:
        """Open the file; its content stays until `cut_off`. A new file is claimed.

        Raises:
            CommandError: the file cannot be written to, or another process has created it by now.

        """
        if self.path == PIPE:
            self._file = sys.stdout.buffer
            return
        is_new = self._claimed is None and (os.path.isfile(self.path) or not os.path.exists(self.path))
        try:
            self._file = open(os.path.realpath(self.path), "xb" if is_new else "ab")  # noqa: SIM115  # see `close`
        except FileExistsError as error:
            raise CommandError(
                f"{self.path} did not exist at the start and exists now: another process writes to it. Give the "
                "output another name."
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
            raise CommandError(f"{row.where}: a result is not a finite number, so JSON cannot express it.") from error
        self._file.write(text.encode())

    def cut_off(self) -> None:
        """Drop the file's content behind the rows that are kept; a pipe or a device has no content."""
        assert self._file is not None
        if self.path != PIPE and os.fstat(self._file.fileno()).st_size > self._num_kept_bytes:
            self._file.truncate(self._num_kept_bytes)

    def flush(self) -> None:
        """Let readers see the rows written so far."""
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
                yield json_row(row, result) + "\n"
            else:
                assert self._columns is not None
                yield csv_line([self._cell(fields.get(name, "")) for name in self._columns])

    def _header(self, row: Row) -> str:
        """Return the header of CSV, from the first row that is written; an empty string if there is one already."""
        if self.format == "jsonl" or self._columns is not None:
            return ""
        self._columns = [*row.fields, *self._new_fields]
        formula = next((name for name in self._columns if self._cell(name) != name), None)
        if formula is not None:
            raise CommandError(
                f"{row.where} has a column {formula!r}, which spreadsheets take for a formula. Rename it."
            )
        return csv_line(self._columns)


@dataclass(frozen=True)
class _Written:
    """A row of the output: its idx, its fields, and the byte offset behind it."""

    idx: int
    fields: dict[str, Any]
    stop_byte: int


def _lock(file: BinaryIO, name: str) -> None:
    """Keep other processes of this program from writing to a file until it is closed, if the system can.

    The system releases the lock when the process ends, however it ends.

    Raises:
        CommandError: another process writes to the file.

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
