"""Constraints of answers: `response_format` as OpenAI's, and vLLM's `guided_regex` and `guided_json`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from backprompt.serving.refusals import Refusal
from backprompt.tokens.constraints import Constraint, JsonSchema, Regex


class TextFormat(BaseModel):
    """Any text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """A JSON schema. The schema always applies, whatever `strict` says; name and description are not used."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    """JSON that is valid under a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["json_schema"]
    json_schema: NamedSchema


class Constrained(BaseModel):
    """The fields of a request that constrain the string of an answer."""

    response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = Field(None, discriminator="type")
    guided_regex: str | None = None
    guided_json: dict[str, Any] | None = None

    @property
    def constraint(self) -> Constraint | None:
        """The constraint of the answer; None for any text.

        Raises:
            Refusal: the request has several constraints.

        """
        found: dict[str, Constraint] = {}
        if isinstance(self.response_format, JsonObjectFormat):
            found["response_format"] = JsonSchema({"type": "object"})
        if isinstance(self.response_format, JsonSchemaFormat):
            found["response_format"] = JsonSchema(self.response_format.json_schema.schema_)
        if self.guided_regex is not None:
            found["guided_regex"] = Regex(self.guided_regex)
        if self.guided_json is not None:
            found["guided_json"] = JsonSchema(self.guided_json)
        if len(found) > 1:
            raise Refusal(f"An answer has one constraint, not {' and '.join(found)}. Leave one out.", param=[*found][1])
        return next(iter(found.values()), None)
