"""Rows of `results.json`: dataclasses in Python, objects in JSON.

A field's key in JSON is its name, or the `Key` of its annotation where the key is no name in Python. Keys keep the
order of the fields, so a row that is read and written again stays the same to the byte.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Key:
    """The name of a field in JSON: `num_bytes: Annotated[int, Key("bytes")]`."""

    name: str


def as_json(value: Any) -> Any:
    """Rows, and lists and dictionaries of rows, as `json.dumps` takes them."""
    if is_dataclass(value):
        return {field.key: as_json(getattr(value, field.name)) for field in _fields(type(value))}
    if isinstance(value, dict):
        return {name: as_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_json(inner) for inner in value]
    return value


def from_json(kind: Any, value: Any) -> Any:
    """The opposite: `kind` is a row's class, or a type with rows in it, such as `list[Row]` and `dict[str, Row]`.

    Raises:
        ValueError: an object has other keys than its row.

    """
    if is_dataclass(kind):
        return _row(kind, value)
    origin, inner_kinds = get_origin(kind), get_args(kind)
    if origin is list:
        return [from_json(inner_kinds[0], inner) for inner in value]
    if origin is dict:
        return {name: from_json(inner_kinds[1], inner) for name, inner in value.items()}
    if origin in (Union, types.UnionType):  # with None
        return None if value is None else from_json(inner_kinds[0], value)
    return value


def _row(kind: Any, value: dict[str, Any]) -> Any:
    own = _fields(kind)
    keys = sorted(field.key for field in own)
    if keys != sorted(value):
        raise ValueError(
            f"A row of {kind.__module__}.{kind.__qualname__} has the keys {keys}, but the results have "
            f"{sorted(value)}. Measure the suite again, or change the class to what was measured."
        )
    return kind(**{field.name: from_json(field.kind, value[field.key]) for field in own})


@dataclass(frozen=True)
class _Field:
    name: str
    key: str
    kind: Any


def _fields(kind: Any) -> list[_Field]:
    hints = get_type_hints(kind, include_extras=True)
    return [_field(field.name, hints[field.name]) for field in fields(kind)]


def _field(name: str, hint: Any) -> _Field:
    if get_origin(hint) is not Annotated:
        return _Field(name, name, hint)
    kind, key = get_args(hint)
    return _Field(name, key.name, kind)
