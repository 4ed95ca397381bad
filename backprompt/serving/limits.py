"""Limits: the size of a request, the time in which it must arrive, and the number of requests at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from backprompt.serving.refusals import Refusal


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        max_body_bytes: the largest body of a request, in bytes.
        max_tokens: the largest number of tokens of a request: those of its prompts, and those that it may generate.
        max_requests: the largest number of requests at the same time; others are refused until one is answered.
        client_seconds: the time limit of a client, in seconds, for each of: sending the head of a request, sending the
            body, and receiving the data that was sent to it.

    """

    max_body_bytes: int = 4 << 20
    max_tokens: int = 65_536
    max_requests: int = 128
    client_seconds: float = 60

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
    """The requests that are being answered.

    Attributes:
        num_requests: the number of these requests.

    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self.num_requests = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Count a request for as long as the context lasts.

        Raises:
            Refusal: there are too many requests.

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
    """ASGI middleware that refuses bodies beyond a size, with or without a stated length, and slow bodies."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seconds = self._limits.client_seconds
        try:
            body = await asyncio.wait_for(self._body(scope, receive), seconds)
        except asyncio.TimeoutError:
            slow = Refusal(f"The body did not arrive within {seconds:g} seconds.", 408, code="body_too_slow")
            await _last_answer(slow)(scope, receive, send)
        except Refusal as refusal:
            await _last_answer(refusal)(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replaying(body, receive), send)

    async def _body(self, scope: Any, receive: Any) -> bytes | None:
        """Return the body; None if the client has disconnected.

        Raises:
            Refusal: the body is too large.

        """
        max_bytes = self._limits.max_body_bytes
        given = dict(scope["headers"]).get(b"content-length", b"0")
        announced, num_bytes = int(given) if given.isdigit() else 0, 0
        chunks: list[bytes] = []
        is_whole = False
        while not is_whole and max(announced, num_bytes) <= max_bytes:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            num_bytes += len(chunks[-1])
            is_whole = not message.get("more_body", False)
        if max(announced, num_bytes) > max_bytes:
            raise Refusal(
                f"The body has more than the {max_bytes:,} bytes that this server takes. Send several requests.",
                413,
                code="body_too_large",
            )
        return b"".join(chunks)


def _last_answer(refusal: Refusal) -> JSONResponse:
    """Return an answer that closes the connection: the body was not read to its end, so no other request can follow."""
    return JSONResponse(refusal.body, refusal.status, {"Connection": "close"})


def _replaying(body: bytes, receive: Any) -> Any:
    """Return a `receive` that returns a body that was received before, and then the later messages."""
    is_given = False

    async def given() -> Any:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
