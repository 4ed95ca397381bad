"""Rows: a prompt and the other fields of its line of input, as JSONL or CSV, through files or pipes.

The other fields of a row are copied to the output, so that rows can be told apart there. From JSONL to JSONL they keep
their spelling, numbers to the last digit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from backprompt.errors import CommandError
from backprompt.visible import beginning, visible_json

Format: TypeAlias = Literal["jsonl", "csv"]
FORMATS: tuple[Format, ...] = ("jsonl", "csv")
PIPE = "-"


@dataclass(frozen=True)
class Row:
    """A row of input.

    Attributes:
        where: the place of the row, for messages.
        parts: the parts of the prompt, to be joined with `+`.
        fields: all fields of the row, the prompt included.
        source: the JSON object as the input spells it; None for other input.

    """

    where: str
    parts: tuple[str, ...]
    fields: Mapping[str, Any]
    source: str | None = None


def check_is_there(path: str) -> None:
    """Raise CommandError for a path that is missing or a folder; reads nothing, since a pipe can be read only once."""
    if path != PIPE and not os.path.exists(path):
        raise CommandError(f"{path} does not exist.")
    if os.path.isdir(path):
        raise CommandError(f"{path} is a folder, not a file of prompts.")


def format_of(path: str, given: Format | None, option: str) -> Format:
    """Return the format of a file: as given by an option, else by its extension; JSONL for pipes.

    Raises:
        CommandError: the format is neither given nor told by the extension.

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
    raise CommandError(f"{path} may be JSONL or CSV. Say which, by the extension (.jsonl, .csv) or with {option}.")


def checked(rows: Iterable[Row], new_fields: Sequence[str], output_format: Format) -> Iterator[Row]:
    """Yield the rows, checking that each can be written with new fields beside its own.

    Raises:
        CommandError: a row has such a field already, or, for CSV, a field that the first row lacks.

    """
    columns: Mapping[str, Any] | None = None
    for row in rows:
        taken = [name for name in new_fields if name in row.fields]
        if taken:
            raise CommandError(f"{row.where} has a field {taken[0]!r}, which is the name of a result. Rename it.")
        columns = row.fields if columns is None else columns
        if output_format == "csv" and (added := [name for name in row.fields if name not in columns]):
            raise CommandError(
                f"{row.where} has a field {added[0]!r} that the first row does not have. Write JSONL instead."
            )
        yield row


def as_json(value: Any, *, allow_nan: bool = False) -> str:
    """Return a value as JSON that terminals can show: other alphabets as they are, control characters escaped.

    Raises:
        ValueError: the value holds a number that is not finite, which JSON cannot express.

    """
    return visible_json(json.dumps(value, ensure_ascii=False, allow_nan=allow_nan))


def shown(value: Any) -> str:
    """Return a value as JSON, shortened if it is long."""
    return beginning(as_json(value), 40)
