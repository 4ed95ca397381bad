"""Continuing: the part of a worker that continues texts, to their ends or as streams, with any engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from backprompt.engines.travel import PackedFound, PackedIds
from backprompt.generation.decoding import Decoding, Recipe
from backprompt.generation.found import Found

MAX_STREAMS = 64
"""The largest number of streams that a worker keeps. Beyond it, the least recently continued stream is dropped; if that
stream is continued later, it begins anew."""


class Continued(Protocol):
    """Texts that are being continued."""

    @property
    def decoding(self) -> Decoding:
        """The options."""

    def found(self, num_each: int = 1) -> Sequence[Sequence[Found]]:
        """Return up to `num_each` continuations of each text so far."""

    def step(self) -> bool:
        """Add tokens to the texts; return whether any text is unfinished."""

    def close(self) -> None:
        """Stop the unfinished texts."""


@dataclass(frozen=True)
class Grown:
    """The tokens of a stream that the driver does not have yet, and whether more follow."""

    found: Found
    is_going_on: bool


class Continuing(ABC):
    """The part of a worker that continues texts."""

    def __init__(self) -> None:
        self._streams: OrderedDict[str, Continued] = OrderedDict()

    @abstractmethod
    def _run(self, prompts: PackedIds, recipe: Recipe) -> Continued:
        """Begin to continue texts."""

    def generate(self, prompts: PackedIds, recipe: Recipe) -> PackedFound:
        """Continue texts to their ends; return all continuations of each."""
        run = self._run(prompts, recipe)
        try:
            while run.step():
                pass
        finally:
            run.close()
        return PackedFound.of(run.found(run.decoding.num_beams))

    def grow(self, prompt: PackedIds, name: str, recipe: Recipe, num_known: int) -> Grown:
        """Continue a stream until it has more than `num_known` tokens; an unknown stream begins anew."""
        run = self._streams.pop(name, None) or self._run(prompt, recipe)
        self._streams[name] = run
        while len(self._streams) > MAX_STREAMS:
            self._streams.popitem(last=False)[1].close()
        is_going_on = True
        while is_going_on and len(run.found()[0][0].choices) <= num_known:
            is_going_on = run.step()
        if not is_going_on:
            self.end_stream(name)
        ((found,),) = run.found()
        return Grown(Found(found.choices[num_known:], found.finish_reason, found.cut), is_going_on)

    def end_stream(self, name: str) -> None:
        """Stop a stream."""
        if (run := self._streams.pop(name, None)) is not None:
            run.close()
