"""Streams: answers in pieces, as server-sent events. The continuations of a request grow side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backprompt.asynchronous import AsyncStream
from backprompt.lm import LM
from backprompt.serving.answers import FINISH, Asked, asked_of_chat, asked_of_completion, head, usage
from backprompt.serving.bodies import Sampled
from backprompt.serving.refusals import refusal_of
from backprompt.text.node import Text

MAX_PIECES_AHEAD = 64
"""Continuations wait for a client that is so many pieces behind."""


@dataclass(frozen=True)
class Piece:
    """A piece of the continuation with this index; the last one has a finish reason."""

    idx: int
    text: str
    finish_reason: str | None = None
    num_tokens: int = 0


async def pieces(lm: LM, asked: Asked, n: int) -> AsyncGenerator[Piece, None]:
    """Yield the pieces of `n` continuations of each prompt, as they are decided.

    The streams are closed when the iteration ends, however it ends.

    Raises:
        The errors of `generate`.

    """
    if asked.max_new_tokens == 0:
        for idx in range(len(asked.prompts) * n):
            yield Piece(idx, "", "length")
        return
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(MAX_PIECES_AHEAD)
    streams = [
        lm.astream(prompt, max_new_tokens=asked.max_new_tokens, **_options_of(asked, sample_idx))
        for prompt in asked.prompts
        for sample_idx in range(n)
    ]
    tasks = [asyncio.create_task(_read(stream, idx, queue)) for idx, stream in enumerate(streams)]
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


async def _read(stream: AsyncStream, idx: int, queue: asyncio.Queue[Piece | Exception]) -> None:
    try:
        async with stream:
            async for piece in stream:
                await queue.put(Piece(idx, piece))
            text = stream.text
            await queue.put(Piece(idx, "", FINISH[text.finish_reason], len(text.completion_tokens)))
    except Exception as error:
        await queue.put(error)


def _options_of(asked: Asked, sample_idx: int) -> dict[str, Any]:
    """Return the options of one sample: each has a seed of its own."""
    options = dict(asked.options)
    if sample_idx and options.get("seed") is not None:
        options["seed"] += sample_idx
    return options


@dataclass(frozen=True)
class Kind:
    """A kind of answer in pieces.

    Attributes:
        ask: returns what a body asks for, as `Asked`.
        head: the prefix of ids, and the name of a piece's object.
        choice: returns a piece as a choice.
        first: returns the choice that stands before the pieces of each continuation, given its prompt and the body;
            None for no such choice.

    """

    ask: Callable[..., Asked]
    head: tuple[str, str]
    choice: Callable[[Piece], dict[str, Any]]
    first: Callable[[int, Text, Any], dict[str, Any] | None]


def _text_choice(piece: Piece) -> dict[str, Any]:
    return {"index": piece.idx, "text": piece.text, "logprobs": None, "finish_reason": piece.finish_reason}


def _echo(idx: int, prompt: Text, body: Any) -> dict[str, Any] | None:
    return _text_choice(Piece(idx, prompt.string)) if body.echo else None


def _chat_choice(piece: Piece) -> dict[str, Any]:
    delta = {} if piece.finish_reason is not None else {"content": piece.text}
    return {"index": piece.idx, "delta": delta, "logprobs": None, "finish_reason": piece.finish_reason}


def _role(idx: int, prompt: Text, body: Any) -> dict[str, Any] | None:
    return {**_chat_choice(Piece(idx, "")), "delta": {"role": "assistant", "content": ""}}


COMPLETION = Kind(asked_of_completion, ("cmpl", "text_completion"), _text_choice, _echo)
CHAT = Kind(asked_of_chat, ("chatcmpl", "chat.completion.chunk"), _chat_choice, _role)


async def events(
    found: AsyncGenerator[Piece, None], first: Piece | None, asked: Asked, kind: Kind, body: Sampled, name: str
) -> AsyncGenerator[bytes, None]:
    """Yield an answer as server-sent events.

    Args:
        found: the pieces behind the `first` one.
        first: the first piece.
        asked: what the request asks for.
        kind: that of the answer.
        body: of the request.
        name: of the model.

    """
    chunk, num_new = head(*kind.head, name), 0
    try:
        prompts = [prompt for prompt in asked.prompts for _ in range(body.n)]
        befores = (kind.first(idx, prompt, body) for idx, prompt in enumerate(prompts))
        for choice in befores:
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
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"
