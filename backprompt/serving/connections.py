"""Connections: the time that a client has for sending the head of a request, and for receiving an answer.

Keeps one timer for each of the two for each connection. limits.py measures the time for a body, because a late body can
still be answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


def limited_connection(client_seconds: float) -> type[H11Protocol]:
    """Return a class of connections for uvicorn, with `client_seconds` as the time limit for clients."""
    return type("LimitedConnection", (_Connection,), {"client_seconds": client_seconds})


class _Connection(H11Protocol):
    client_seconds: ClassVar[float]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head. The transport's buffer is as small as possible, to notice slow clients at once."""
        self._sending = _Timer(self.loop, self.client_seconds, transport.abort)
        self._taking = _Timer(self.loop, self.client_seconds, transport.abort)
        transport.set_write_buffer_limits(0)
        super().connection_made(transport)
        self._sending.start()

    def data_received(self, data: bytes) -> None:
        """Stop the timer for the head once a head is complete; start it again after an answer."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._sending.start()
        else:
            self._sending.stop()

    def pause_writing(self) -> None:
        """Start the timer for the client, which has not received all data yet."""
        super().pause_writing()
        self._taking.start()

    def resume_writing(self) -> None:
        """Stop the timer for the client, which has received all data."""
        super().resume_writing()
        self._taking.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        super().connection_lost(exc)
        self._sending.stop()
        self._taking.stop()


class _Timer:
    """Calls a function when the time is over; starting a timer that runs changes nothing."""

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
