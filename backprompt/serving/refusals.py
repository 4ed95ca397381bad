"""Refusals: the errors that clients get, in the form of OpenAI's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from backprompt.errors import (
    BackpromptError,
    MissingDependencyError,
    NonFiniteError,
    StaleRepresentationError,
    WorkerError,
)

logger = logging.getLogger(__name__)


@dataclass
class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        message: names the given value and the next step.
        status: the HTTP status code.
        param: the name of the field that is wrong, if any.
        code: the name of the reason, for programs.

    """

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal that a client gets for an error; an error of an unexpected kind is logged in full."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, (MissingDependencyError, NonFiniteError, StaleRepresentationError, WorkerError)):
        return Refusal(str(error), 500)
    if isinstance(error, (BackpromptError, ValueError, TypeError)):
        return Refusal(str(error))
    logger.error("A request failed.", exc_info=error)
    return Refusal(f"The server failed ({type(error).__name__}); its log says more.", 500)
