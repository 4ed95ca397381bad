"""An application behind a real socket, in a thread of this process."""

import contextlib
import threading

import uvicorn

from backprompt.serving.connections import limited_connection
from waiting import wait_until


@contextlib.contextmanager
def served(app, client_seconds=60):
    """Yield the address of a server; at the end it answers what is in work, and stops."""
    connection = limited_connection(client_seconds)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=connection, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "it does not stop"
