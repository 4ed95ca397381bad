"""The server: an application behind a socket, run by uvicorn until a signal comes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from backprompt.errors import CommandError
from backprompt.serving.connections import limited_connection


def serve(app: Any, host: str, port: int, on_start: Callable[[str], object], *, client_seconds: float) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish the requests in progress. A second signal ends all at once.

    Args:
        app: the application.
        host: the address to listen on.
        port: the port to listen on; 0 for any free port.
        on_start: called with the server's address as soon as the socket listens.
        client_seconds: see `Limits`.

    Raises:
        CommandError: the server cannot listen on the address.

    """
    connection = limited_connection(client_seconds)
    config = uvicorn.Config(app, host=host, port=port, http=connection, log_level="warning", access_log=False)
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.socket(infos[0][0], socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(infos[0][4])
        listening.listen(config.backlog)
    except OSError as error:
        raise CommandError(f"--host {host} --port {port} cannot be listened at: {error}.") from error
    with listening:
        shown = f"[{host}]" if ":" in host else host
        on_start(f"http://{shown}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run([listening])
