"""`response_format`: the constraint under which an answer is generated. This server knows plain text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backprompt.serving.refusals import Refusal


def constraint_options(response_format: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of `generate` for a `response_format`.

    Raises:
        Refusal: the format is another one than plain text.

    """
    kind = "text" if response_format is None else response_format.get("type")
    if kind != "text":
        raise Refusal(
            f"response_format of type {kind!r} is not supported by this server: answers are plain text. Leave it out.",
            param="response_format",
        )
    return {}
