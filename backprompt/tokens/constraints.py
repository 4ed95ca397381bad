"""Constraints: languages, each a set of strings. The type of a constraint says how its description is read.

A constraint is plain data: constraints are compared by content and can be sent to other processes. matching.py and
finite.py apply them with llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from backprompt.arguments import as_bool, as_string
from backprompt.errors import MissingDependencyError, TextTypeError
from backprompt.visible import abbreviated


@dataclass(frozen=True)
class Regex:
    r"""All strings that a regular expression matches from their first to their last character.

        Regex(r"(yes|no), [1-9][0-9]{0,2} (cats|dogs)")

    The syntax is that of Rust's `regex`, as llguidance takes it, without look-around and backreferences. `.` is any
    character except a line break. `\d`, `\w`, `\s` and `(?i)` follow Unicode.

    Args:
        pattern: the regular expression.

    Raises:
        TextTypeError: the pattern is not a string.

    """

    pattern: str

    def __post_init__(self) -> None:
        as_string(self.pattern, "The pattern of a Regex")


@dataclass(frozen=True)
class Grammar:
    r"""All strings of a context-free grammar, written in llguidance's dialect of Lark.

        Grammar('start: sum\nsum: /[0-9]+/ | sum "+" sum')

    Args:
        lark: the rules; `start` is the first of them (https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).

    Raises:
        TextTypeError: the grammar is not a string.

    """

    lark: str

    def __post_init__(self) -> None:
        as_string(self.lark, "A Grammar")


@dataclass(frozen=True, init=False)
class JsonSchema:
    """All JSON texts that are valid under a schema.

        JsonSchema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
        JsonSchema(Person)  # a model of pydantic

    Properties come in the order of the schema. Keywords of JSON Schema that llguidance lacks, such as `not`, are
    refused. Names that are no keywords, such as a misspelt keyword, are ignored, as JSON Schema prescribes.

    Args:
        schema: a JSON schema as a dict; a model or `TypeAdapter` of pydantic; or a type of Python that pydantic can
            describe, such as a dataclass, a `TypedDict` or `list[int]`.
        compact: whether white space between the parts of the JSON text is forbidden. By default the model may write
            white space there.

    Raises:
        TextTypeError: `schema` is none of these, or a dict with a value that JSON does not have.
        MissingDependencyError: pydantic is not installed, and is needed for this type.
        ValueError: `compact` is neither True nor False.

    """

    json: str
    """The schema as JSON."""
    compact: bool

    def __init__(self, schema: Any, *, compact: bool = False) -> None:
        object.__setattr__(self, "json", _as_json(schema))
        object.__setattr__(self, "compact", as_bool(compact, "compact"))


Constraint: TypeAlias = "Regex | JsonSchema | Grammar"


def as_constraint(given: Any, name: str) -> Constraint:
    """Return a constraint; `name` names the argument in errors.

    Raises:
        TextTypeError: the value is not a constraint.

    """
    if isinstance(given, (Regex, JsonSchema, Grammar)):
        return given
    advice = "JsonSchema(...)" if isinstance(given, (Mapping, type)) else "Regex(...), JsonSchema(...) or Grammar(...)"
    raise TextTypeError(
        f"{name} must be a Regex, a JsonSchema or a Grammar, not {type(given).__name__}: {abbreviated(given)}. "
        f"Wrap it: {advice}."
    )


def _as_json(schema: Any) -> str:
    described = schema if isinstance(schema, Mapping) else _described(schema)
    try:
        return json.dumps(dict(described), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TextTypeError(f"The schema of a JsonSchema cannot be written as JSON: {error}.") from error


def _described(schema: Any) -> Any:
    """Return the JSON schema of a model of pydantic, or of a type."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        return schema.model_json_schema()
    if isinstance(schema, (str, bytes, int, float, list, tuple, type(None))):
        raise TextTypeError(
            "A JsonSchema takes a dict, a model of pydantic or a type, not "
            f"{type(schema).__name__}: {abbreviated(schema)}. json.loads(string) makes a dict of a string."
        )
    try:
        from pydantic import PydanticUserError, TypeAdapter
        from pydantic.errors import PydanticSchemaGenerationError
    except ImportError as error:
        raise MissingDependencyError(
            f"A JsonSchema of {abbreviated(schema)} needs pydantic: pip install pydantic. Or give the schema as a dict."
        ) from error
    try:
        adapter = schema if isinstance(schema, TypeAdapter) else TypeAdapter(schema)
        return adapter.json_schema()
    except (PydanticUserError, PydanticSchemaGenerationError) as error:
        raise TextTypeError(f"pydantic has no JSON schema of {abbreviated(schema)}: {error}") from error
