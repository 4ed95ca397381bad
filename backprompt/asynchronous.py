"""Calls for asyncio: an `LM`'s calls, made in threads; calls of several tasks are answered together.

Each process has one pool of threads, created on first use. If a task is cancelled, its thread is told: a waiting call
is never computed, and a generation ends before its next step. A pass that already runs is finished.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol, TypeVar
from weakref import ref

from torch import Tensor

from backprompt.session.representation import ModelRepr
from backprompt.session.sharing import Cancellation, cancellation
from backprompt.text.engine import outside
from backprompt.text.node import Text

Result = TypeVar("Result")

MAX_THREADS = 128
"""The number of calls of a process that may wait for models at once; further calls wait for a thread."""

_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="backprompt")
    return _pool


def _forget_threads() -> None:
    global _pool
    _pool = None  # its threads are not in the child


if hasattr(os, "register_at_fork"):  # missing on Windows, which has no fork
    os.register_at_fork(after_in_child=_forget_threads)


async def in_thread(work: Callable[[], Result], *, on_cancel: Callable[[], object] | None = None) -> Result:
    """Return the result of `work`, run in a thread; if the task is cancelled, `on_cancel` is run in a thread."""
    task = asyncio.current_task()
    asked = Cancellation(None if task is None else ref(task))
    context = copy_context()
    context.run(cancellation.set, asked)
    try:
        return await asyncio.get_running_loop().run_in_executor(_threads(), partial(context.run, work))
    except asyncio.CancelledError:
        asked.is_set = True
        if on_cancel is not None:
            _threads().submit(on_cancel)
        raise


class Evaluates(Protocol):
    """The calls of an `LM` that tasks make in threads."""

    def evaluate(self, texts: Iterable[Text], /) -> list[ModelRepr]:
        """See `LM.evaluate`."""

    def token_logprobs(self, texts: Iterable[Text], starts: Iterable[Text | int] | None, /) -> list[Tensor]:
        """See `LM.token_logprobs`."""


class Streaming(Protocol):
    """A stream of strings; see `Stream`."""

    @property
    def text(self) -> Any:
        """The prompt and its continuation so far."""

    def __next__(self) -> str:
        """Return the next piece."""

    def close(self) -> None:
        """Stop."""


class AsyncStream:
    """The continuation of one text, piece by piece, for `async for`; see `LM.astream`.

    `stream.text` is the text so far at any time, a `GeneratedText`. A task that is cancelled closes the stream.
    """

    def __init__(self, begin: Callable[[], Streaming]) -> None:
        self._begin = begin
        self._stream: Streaming | None = None

    @property
    def text(self) -> Any:
        """The prompt and its continuation so far.

        Raises:
            RuntimeError: the iteration has not begun.

        """
        if self._stream is None:
            raise RuntimeError("This stream has not begun, so it has no text. Iterate over it: async for piece in ...")
        return self._stream.text

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        piece = await in_thread(self._next, on_cancel=self._close)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop; the generated text is kept."""
        await in_thread(self._close)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def _next(self) -> str | None:
        if self._stream is None:
            self._stream = self._begin()
        return next(self._stream, None)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class Asynchronous:
    """The calls of an `LM` for asyncio. Calls that wait at the same time, of any task, share passes."""

    async def aevaluate(self: Evaluates, texts: Iterable[Text]) -> list[ModelRepr]:
        """Evaluate texts in a thread; see `evaluate`. The texts of a cancelled task are no longer computed."""
        return await in_thread(partial(self.evaluate, texts))

    async def atoken_logprobs(
        self: Evaluates, texts: Iterable[Text], starts: Iterable[Text | int] | None = None
    ) -> list[Tensor]:
        """Return the log-probabilities of texts' tokens, computed in a thread; see `token_logprobs`."""
        return await in_thread(partial(self.token_logprobs, texts, starts))

    async def agenerate(self, texts: Text | Iterable[Text], *, max_new_tokens: int, **options: Any) -> Any:
        """Return texts of this `LM` continued by the model, in a thread; see `backprompt.generate`.

        If the task is cancelled, the generation ends before its next step, and none of its results is kept in memory.
        """
        return await in_thread(partial(outside("generate"), texts, max_new_tokens=max_new_tokens, **options))

    def astream(self, text: Text, *, max_new_tokens: int, **options: Any) -> AsyncStream:
        """Return an asynchronous iterator over the strings that the model adds to a text; see `Text.stream`.

            async for piece in lm.astream(text, max_new_tokens=20):
                print(piece, end="")

        Errors of the options and of the text are raised by the first step.
        """
        return AsyncStream(partial(outside("stream"), text, max_new_tokens=max_new_tokens, **options))
