"""`backprompt serve`: a model behind HTTP, for clients of OpenAI's API."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import Any

from backprompt.cli.arguments import add_command, add_model_arguments, check_model_arguments, load_model, say
from backprompt.cli.stream import positive
from backprompt.errors import CommandError, MissingDependencyError

KEY_VARIABLE = "BACKPROMPT_API_KEY"


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve",
        "answer requests over HTTP, as OpenAI's API does",
        f"""Answer /v1/completions, /v1/chat/completions, /v1/models and /v1/score over HTTP. Requests that arrive
        during a pass share the next pass. The server can be reached from this machine only, unless --host says
        otherwise.

        An interrupt or SIGTERM ends the server when all requests in progress are answered; a second one ends it at
        once. The key may also stand in the environment, as {KEY_VARIABLE}.""",
        run=run,
        examples=(
            "backprompt serve --model gpt2 --store prompts.bp",
            f"{KEY_VARIABLE}=secret backprompt serve --model gpt2 --host 0.0.0.0 --port 8080",
        ),
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    group.add_argument("--port", type=int, default=8000, help="the port to listen at (default: %(default)s)")
    group.add_argument("--name", help="the name of the model for clients (default: that of --model)")
    group.add_argument("--api-key", metavar="KEY", help="the key that clients must send (default: none)")
    group.add_argument(
        "--max-requests",
        type=positive,
        default=128,
        metavar="N",
        help="the largest number of requests in progress; more are refused (128)",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        default=65_536,
        metavar="N",
        help="the largest number of tokens of a request, including those to generate (65536)",
    )
    group.add_argument(
        "--max-body-bytes",
        type=positive,
        default=4 << 20,
        metavar="N",
        help="the largest body of a request, in bytes (4194304)",
    )
    group.add_argument(
        "--client-seconds",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="the longest time for a client to send a request, and to take what was sent to it (60)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    check_model_arguments(arguments)
    if not 0 <= arguments.port < 1 << 16:
        raise CommandError(f"--port must be between 0 and 65535, not {arguments.port}.")
    api_key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE)
    if api_key == "":
        raise CommandError(f"The key is empty. Give --api-key or {KEY_VARIABLE} a value, or leave both out.")
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"Serving needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    from backprompt.serving import app, limits, server

    limit = limits.Limits(
        arguments.max_body_bytes, arguments.max_tokens, arguments.max_requests, arguments.client_seconds
    )
    name = arguments.name or arguments.model
    served = app.make_app(load_model(arguments), name, api_key=api_key, limits=limit)
    if api_key is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        say(f"warning: anybody who can reach {arguments.host} may send requests, because no --api-key is given.")
    server.serve(
        served,
        arguments.host,
        arguments.port,
        lambda address: say(f"{name} is served at {address}/v1"),
        client_seconds=limit.client_seconds,
    )
    return 0
