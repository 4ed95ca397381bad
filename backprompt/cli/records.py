"""Records: a row as the bytes of JSONL or CSV, and the ends of rows in such bytes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from backprompt.cli.rows import Format, Row, as_json
from backprompt.visible import visible_json

# Characters that spreadsheets take for the beginning of a formula; the last four are of full width.
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def records(file: Iterable[bytes], format: Format) -> Iterator[tuple[bytes, int | None]]:
    """Yield each row with its line break, and the byte offset behind it; None for a last row without a line break.

    A line break within quotes does not end a row of CSV. A quote within quotes is written twice, so the number of
    quotes so far says whether a quote is open.
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


def has_whole_row(tail: bytes, beginning: bytes) -> bool:
    """Return whether an unfinished last row contains, behind a line break, a whole row of CSV with this beginning."""
    start = tail.find(b"\n" + beginning)
    if start < 0:
        return False
    _, stop_byte = next(records(io.BytesIO(tail[start + 1 :]), "csv"), (b"", None))
    return stop_byte is not None


def csv_line(values: Sequence[str]) -> str:
    """Return a row of CSV with its line break."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(values)  # the writer quotes the characters that end its lines
    return line.getvalue().removesuffix("\r\n") + "\n"


def cell(value: Any) -> str:
    """Return a value as a cell of CSV: a string unchanged, an empty string for None, any other value as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else as_json(value)


def escaped_cell(value: Any) -> str:
    """Return the same as `cell`, with ' before a value that spreadsheets take for a formula; numbers stay unchanged."""
    plain = cell(value)
    return f"'{plain}" if _FORMULA.match(plain) and not _NUMBER.fullmatch(plain) else plain


def json_row(row: Row, new: Mapping[str, Any]) -> str:
    """Return a row with new fields as one JSON object; fields of the input keep the input's spelling."""
    own = as_json(row.fields) if row.source is None else visible_json(row.source)
    members = [object[1:-1].strip() for object in (own, as_json(new))]
    return f"{{{', '.join(filter(None, members))}}}"
