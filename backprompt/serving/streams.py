"""Streams: answers in pieces, as server-sent events. The continuations of a request are generated at the same time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from backprompt.asynchronous import AsyncStream, in_thread
from backprompt.lm import LM
from backprompt.serving.answers import (
    FINISH,
    Asked,
    asked_of_chat,
    asked_of_completion,
    by_token,
    head,
    token_logprobs,
    usage,
)
from backprompt.serving.bodies import ChatBody, CompletionBody, Sampled
from backprompt.serving.refusals import refusal_of
from backprompt.serving.told import ToldTokens
from backprompt.text.node import Text

MAX_PIECES_AHEAD = 64
"""The number of pieces that wait for a client before the continuations of its request wait, too."""


@dataclass(frozen=True)
class Piece:
    """A piece of the continuation with index `idx`; the last piece of a continuation has a finish reason.

    Its log-probabilities are those of the tokens whose strings this piece completes.
    """

    idx: int
    text: str
    finish_reason: str | None = None
    num_tokens: int = 0
    logprobs: dict[str, Any] | None = None


async def pieces(lm: LM, asked: Asked, body: CompletionBody | ChatBody) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of the continuations that a request asks for, each as soon as it is decided.

    The streams are closed when the iteration ends, for any reason.

    Raises:
        The errors of `generate`.

    """
    if asked.max_new_tokens == 0:
        for idx in range(len(asked.prompts) * body.n):
            yield Piece(idx, "", "length")
        return
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(MAX_PIECES_AHEAD)
    is_echoed = isinstance(body, CompletionBody) and body.echo
    streams = [
        (
            lm.astream(prompt, max_new_tokens=asked.max_new_tokens, sample_idx=sample_idx, **asked.options),
            None if body.num_top is None else ToldTokens(lm, prompt, body.num_top, is_echoed=is_echoed),
        )
        for prompt, first_sample in zip(asked.prompts, asked.first_samples, strict=True)
        for sample_idx in range(first_sample, first_sample + body.n)
    ]
    tasks = [asyncio.create_task(_read(*stream, idx, queue)) for idx, stream in enumerate(streams)]
    try:
        num_left = len(tasks)
        while num_left:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            num_left -= piece.finish_reason is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(
    stream: AsyncStream, told: ToldTokens | None, idx: int, queue: asyncio.Queue[Piece | Exception]
) -> None:
    try:
        async with stream:
            async for piece in stream:
                logprobs = None if told is None else await in_thread(partial(told.given, stream.text, piece))
                await queue.put(Piece(idx, piece, logprobs=logprobs))
            text = stream.text
            logprobs = None if told is None else await in_thread(partial(told.rest, text))
            await queue.put(Piece(idx, "", FINISH[text.finish_reason], len(text.completion_tokens), logprobs))
    except Exception as error:
        await queue.put(error)


@dataclass(frozen=True)
class Kind:
    """A kind of answer in pieces.

    Attributes:
        ask: returns the generation that a body asks for, as `Asked`.
        head: the prefix of ids, and the "object" of each event.
        choice: returns a piece in the form of a choice of the API.
        first: returns the choice to send before the pieces of a continuation, given the `LM`, the index of the
            continuation, its prompt and the body; None for no such choice. Called in a thread.

    """

    ask: Callable[..., Asked]
    head: tuple[str, str]
    choice: Callable[[Piece], dict[str, Any]]
    first: Callable[[LM, int, Text, Any], dict[str, Any] | None]


def _text_choice(piece: Piece) -> dict[str, Any]:
    return {"index": piece.idx, "text": piece.text, "logprobs": piece.logprobs, "finish_reason": piece.finish_reason}


def _echo(lm: LM, idx: int, prompt: Text, body: Any) -> dict[str, Any] | None:
    if not body.echo:
        return None
    logprobs = None if body.num_top is None else token_logprobs(lm, prompt, 0, body.num_top)
    return _text_choice(Piece(idx, prompt.string, logprobs=logprobs))


def _chat_choice(piece: Piece) -> dict[str, Any]:
    delta = {} if piece.finish_reason is not None else {"content": piece.text}
    logprobs = by_token(piece.logprobs)
    return {"index": piece.idx, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _role(lm: LM, idx: int, prompt: Text, body: Any) -> dict[str, Any] | None:
    return {**_chat_choice(Piece(idx, "")), "delta": {"role": "assistant", "content": ""}}


COMPLETION = Kind(asked_of_completion, ("cmpl", "text_completion"), _text_choice, _echo)
CHAT = Kind(asked_of_chat, ("chatcmpl", "chat.completion.chunk"), _chat_choice, _role)


async def events(
    lm: LM, found: AsyncGenerator[Piece, None], first: Piece | None, asked: Asked, kind: Kind, body: Sampled, name: str
) -> AsyncGenerator[bytes, None]:
    """Yield an answer as server-sent events.

    Args:
        lm: the model.
        found: the pieces behind the `first` one.
        first: the first piece.
        asked: the generation that the request asks for.
        kind: the kind of the answer.
        body: the body of the request.
        name: the name of the model.

    """
    chunk, num_new = head(*kind.head, name), 0
    try:
        prompts = [prompt for prompt in asked.prompts for _ in range(body.n)]
        for idx, prompt in enumerate(prompts):
            choice = await in_thread(partial(kind.first, lm, idx, prompt, body))
            if choice is not None:
                yield _event({**chunk, "choices": [choice]})
        piece = first
        while piece is not None:
            num_new += piece.num_tokens
            yield _event({**chunk, "choices": [kind.choice(piece)]})
            piece = await anext(found, None)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _event({**chunk, "choices": [], "usage": usage(asked, num_new)})
    except Exception as error:  # the status was sent long ago
        yield _event(refusal_of(error).body)
    yield b"data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> bytes:
    """Return an event of one line in ASCII, because many clients also split lines at Unicode's line breaks (U+2028)."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"
