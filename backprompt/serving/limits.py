"""Limits: how much a request may ask for, and how many requests are in work at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from backprompt.serving.refusals import Refusal


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        max_body_bytes: the largest body of a request.
        max_tokens: the largest number of tokens of a request: those of its prompts, and those that it may generate.
        max_requests: the largest number of requests in work; others are refused until one is done.

    """

    max_body_bytes: int = 4 << 20
    max_tokens: int = 65_536
    max_requests: int = 128

    def check_tokens(self, num_tokens: int) -> None:
        """Raise Refusal for a request of more tokens than are allowed."""
        if num_tokens > self.max_tokens:
            raise Refusal(
                f"This request has {num_tokens:,} tokens, those to be generated included; this server takes "
                f"{self.max_tokens:,}. Ask for less, or in several requests.",
                413,
                code="too_many_tokens",
            )


class Queue:
    """The requests in work.

    Attributes:
        num_requests: how many there are.

    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self.num_requests = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count a request for as long as the context lasts.

        Raises:
            Refusal: there are too many.

        """
        if self.num_requests >= self._max_requests:
            raise Refusal(
                f"{self.num_requests} requests are in work, and this server takes no more. Ask again later.",
                429,
                code="queue_full",
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1


class BodyLimit:
    """ASGI middleware that refuses bodies beyond a size, whether they say their size or not."""

    def __init__(self, app: Any, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = Refusal(
            f"The body has more than the {self._max_bytes:,} bytes that this server takes. Send several requests.",
            413,
            code="body_too_large",
        )
        given = dict(scope["headers"]).get(b"content-length", b"0")
        chunks: list[bytes] = []
        num_bytes, is_whole = 0, False
        is_too_large = given.isdigit() and int(given) > self._max_bytes
        while not (is_whole or is_too_large):
            message = await receive()
            if message["type"] != "http.request":
                return
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            is_whole, is_too_large = not message.get("more_body", False), num_bytes > self._max_bytes
        if is_too_large:
            await JSONResponse(refused.body, refused.status)(scope, receive, send)
            return
        await self._app(scope, _replaying(b"".join(chunks), receive), send)


def _replaying(body: bytes, receive: Any) -> Any:
    """Return a `receive` that gives a body which was received, and then what comes."""
    is_given = False

    async def given() -> Any:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
