"""The check of API keys, for a server that has a key."""

from __future__ import annotations

import hmac
from typing import Any

from starlette.responses import JSONResponse

from backprompt.serving.refusals import Refusal

OPEN_PATH = "/health"
"""The path that is answered without a key."""


class KeyCheck:
    """ASGI middleware that refuses requests without the server's key, before their bodies are read."""

    def __init__(self, app: Any, api_key: str) -> None:
        self._app, self._expected = app, api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["path"] != OPEN_PATH:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            if not hmac.compare_digest(key, self._expected) or scheme.lower() != b"bearer":
                refused = Refusal("This server needs its key: Authorization: Bearer KEY.", 401, code="invalid_api_key")
                await JSONResponse(refused.body, refused.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)
