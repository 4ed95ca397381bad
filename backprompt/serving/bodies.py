"""The bodies of requests: the fields that the server knows, with OpenAI's names and defaults.

A field that the server does not know is refused by name. A field that exists only for compatibility must have its
neutral value. `null` means the default of a field, as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from backprompt.serving.constraints import Constrained
from backprompt.serving.refusals import Refusal


class Fields(BaseModel):
    """Fields of a request; `null` stands for the default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class Body(Fields):
    """A request's body."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    user: str | None = None  # OpenAI's name for a client's own users; not used


class StreamOptions(Fields):
    """What a stream sends besides its text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Sampled(Body, Constrained):
    """The fields for generation."""

    neutral: ClassVar[dict[str, Any]] = {
        "best_of": (None, 1),
        "suffix": (None, ""),
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": (None, {}),
        "tools": (None, []),
        "tool_choice": (None, "none"),
    }

    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)  # a field of vLLM and others; 0 for all tokens
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    best_of: int | None = None
    suffix: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    def options(self) -> dict[str, Any]:
        """Return the options of `generate`.

        Raises:
            Refusal: a field that exists only for compatibility has another than its neutral value.

        """
        for name, values in self.neutral.items():
            given = getattr(self, name, None)
            if given not in values:
                raise Refusal(f"{name} is not supported, and was {given!r}. Leave it out.", param=name)
        options: dict[str, Any] = {"stop": self.stop or None, "constraint": self.constraint}
        if self.temperature == 0:
            return options
        return {
            **options,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
        }


class CompletionBody(Sampled):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def num_top(self) -> int | None:
        """The number of most probable tokens to tell in each place; None for no log-probabilities at all."""
        return self.logprobs


class ChatBody(Sampled):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages; `null` as the content of an assistant's message becomes "", since templates would write a word.

        Raises:
            Refusal: the content of another message is `null`.

        """
        for idx, message in enumerate(self.messages):
            role = message.get("role")
            if role != "assistant" and message.get("content", "") is None:
                raise Refusal(
                    f"messages[{idx}] has the role {role!r}, and null as content. Give a string; only what the "
                    "assistant said may be null.",
                    param="messages",
                )
        return [{**one, "content": ""} if one.get("content", "") is None else one for one in self.messages]

    @property
    def num_top(self) -> int | None:
        """The number of most probable tokens to tell in each place; None for no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ScoreBody(Body):
    """`/v1/score`: completions, all behind each of the prompts."""

    prompts: list[str] = Field(min_length=1)
    completions: list[str] = Field(min_length=1)
