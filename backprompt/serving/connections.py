"""Connections: the time that a client has for the head of a request, and for taking what is sent to it.

Keeps one timer for each of the two, a connection. The time for a body is counted in limits.py, which can still answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


def limited_connection(client_seconds: float) -> type[H11Protocol]:
    """Return the class of connections, for uvicorn, whose clients have so many seconds."""
    return type("LimitedConnection", (_Connection,), {"client_seconds": client_seconds})


class _Connection(H11Protocol):
    client_seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head. The transport holds as little as it can, so it tells at once who is slow."""
        self._sending = _Timer(self.loop, self.client_seconds, transport.abort)
        self._taking = _Timer(self.loop, self.client_seconds, transport.abort)
        transport.set_write_buffer_limits(0)
        super().connection_made(transport)
        self._sending.start()

    def data_received(self, data: bytes) -> None:
        """Note whether a head is complete."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._sending.start()
        else:
            self._sending.stop()

    def pause_writing(self) -> None:
        """Begin to wait for the client."""
        super().pause_writing()
        self._taking.start()

    def resume_writing(self) -> None:
        """Note that the client has taken everything."""
        super().resume_writing()
        self._taking.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the waiting."""
        super().connection_lost(exc)
        self._sending.stop()
        self._taking.stop()


class _Timer:
    """Calls a function when the time is over; a timer that runs is not started again."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, act: Callable[[], object]) -> None:
        self._begin = partial(loop.call_later, seconds, act)
        self._running: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._running is None:
            self._running = self._begin()

    def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            self._running = None
