"""The application: its routes, and the cancellation of requests whose clients have disconnected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from backprompt.asynchronous import in_thread
from backprompt.lm import LM
from backprompt.serving import answers
from backprompt.serving.bodies import Body, ChatBody, CompletionBody, ScoreBody
from backprompt.serving.keys import KeyCheck
from backprompt.serving.limits import BodyLimit, Limits, Queue
from backprompt.serving.refusals import Refusal, refusal_of
from backprompt.serving.streams import CHAT, COMPLETION, Kind, Piece, events, pieces
from backprompt.version import __version__

Result = TypeVar("Result")


def make_app(lm: LM, name: str, *, api_key: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Return an application that answers requests with one `LM`; requests at the same time share passes.

    Args:
        lm: the model.
        name: the name of the model for clients.
        api_key: the key that clients must send; None for no key.
        limits: the limits for requests; see `Limits` for the defaults.

    """
    server = _Server(lm, name, Limits() if limits is None else limits)
    app = FastAPI(title="backprompt", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, limits=server.limits)
    if api_key is not None:
        app.add_middleware(KeyCheck, api_key=api_key)  # the last one added is called first
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": server.queue.num_requests}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "backprompt"}]}

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionBody) -> Response:
        if body.stream:
            return await server.stream(request, body, COMPLETION)
        return await server.answer(request, body, answers.completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        if body.stream:
            return await server.stream(request, body, CHAT)
        return await server.answer(request, body, answers.chat_completion)

    @app.post("/v1/score")
    async def score(request: Request, body: ScoreBody) -> Response:
        return await server.answer(request, body, answers.scores)

    return app


class _Server:
    """One `LM` with its name and its limits, and the requests in work."""

    def __init__(self, lm: LM, name: str, limits: Limits) -> None:
        self.lm, self.name, self.limits = lm, name, limits
        self.queue = Queue(limits.max_requests)

    async def answer(self, request: Request, body: Body, answer: Callable[..., dict[str, Any]]) -> Response:
        """Return a whole answer, computed in a thread."""
        try:
            self._check_name(body)
            with self.queue.place():
                work = partial(answer, self.lm, body, self.limits, self.name)
                found = await _unless_gone(request, in_thread(work))
        except Exception as error:
            return _refused(refusal_of(error))
        return JSONResponse(found)

    async def stream(self, request: Request, body: CompletionBody | ChatBody, kind: Kind) -> Response:
        """Return an answer in pieces. The status tells errors that occur before the first piece."""
        async with AsyncExitStack() as held:
            try:
                self._check_name(body)
                held.enter_context(self.queue.place())
                asked = await _unless_gone(request, in_thread(partial(kind.ask, self.lm, body, self.limits)))
                found = await held.enter_async_context(aclosing(pieces(self.lm, asked, body)))
                first = await _unless_gone(request, _next(found))
            except Exception as error:
                return _refused(refusal_of(error))
            sent = events(self.lm, found, first, asked, kind, body, self.name)
            return _Events(sent, held.pop_all())

    def _check_name(self, body: Body) -> None:
        if body.model is not None and body.model != self.name:
            message = f"There is no model {body.model!r}; this server has {self.name!r}."
            raise Refusal(message, 404, "model", "model_not_found")


class _Events(StreamingResponse):
    """Server-sent events; when they end, for any reason, the resources in `held` are released."""

    def __init__(self, sent: AsyncGenerator[bytes, None], held: AsyncExitStack) -> None:
        super().__init__(sent, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`; if the client disconnects meanwhile, the work is cancelled."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal("The client has gone.", 499)
        return await working
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait({working})  # until streams that the work has begun are closed


async def _next(found: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(found, None)


async def _gone(request: Request) -> None:
    """Return when the client of a request has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(refusal: Refusal) -> Response:
    headers = {"Retry-After": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body, refusal.status, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    """Answer a request whose body is invalid, with the first error in it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, (str, int)))
    if first["type"] == "json_invalid":
        message, param = f"The body is no JSON: {first['ctx']['error']} at character {first['loc'][1]}.", ""
    elif first["type"] == "extra_forbidden":
        message = f"{param} is no field that this server knows. Leave it out."
    else:
        message = f"{param}: {first['msg']}." if param else "Send an object of JSON, as Content-Type: application/json."
    return _refused(Refusal(message, param=param or None))


async def _unknown(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, with an unsupported method, or with a body that is no text in UTF-8."""
    assert isinstance(error, HTTPException)
    if error.status_code == 400:
        return _refused(Refusal("The body cannot be read. Send JSON in UTF-8."))
    message = f"{request.method} {request.url.path}: {error.detail}. See /v1/models, /v1/completions, "
    return _refused(Refusal(f"{message}/v1/chat/completions and /v1/score.", error.status_code))
