"""Room: the part of the byte budget that generations may hold at once.

Keeps the generations that have room, and those that wait for room, in the order in which they came. A generation that
waits holds nothing, so no two wait for each other. A generation with room whose next step nobody asks for gives up its
room if another one waits: its texts may be evicted, and its next step waits for room and computes them again.

    has room    generation 1: 3 texts with 20 new tokens each, behind a common beginning of 30 tokens
    wait        generation 2, which needs more than is left; generation 3, which came later
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet, ref

from backprompt.evaluation.evaluator import Evaluator
from backprompt.session.sharing import caller, cancellation
from backprompt.tokens.graph import TokenIds

IDLE_SECONDS = 0.1
"""A generation that has taken no step for so long gives its room up to one that waits."""

MAX_SECONDS_TO_WAIT = 1.0
"""The longest time until a waiting generation notices that its task was cancelled."""


class Generation(Protocol):
    """Texts that are continued together."""

    @property
    def prompts_to_hold(self) -> Sequence[TokenIds]:
        """The prompts of the texts that are held, or will be after the next step."""

    @property
    def num_new(self) -> int:
        """The largest number of tokens that are held for one text behind its prompt."""

    def let_go(self) -> None:
        """Hold nothing until the next step."""


@dataclass(frozen=True)
class _LastStep:
    """The caller of the last step of a generation, and the time of its end; None during the step."""

    caller: ref[Any]
    ended: float | None = None


class Room:
    """The generations that share the budget of a session.

    Args:
        lock: that of the session; held by the callers of all methods but `stepping` and `wait`.

    Attributes:
        num_freed: how many times a generation has held or asked for less than before.

    """

    def __init__(self, lock: threading.RLock) -> None:
        self.num_freed = 0
        self._changed = threading.Condition(lock)
        self._holding: WeakSet[Generation] = WeakSet()
        self._waiting: dict[Generation, None] = {}
        self._steps: WeakKeyDictionary[Generation, _LastStep] = WeakKeyDictionary()

    @property
    def is_awaited(self) -> bool:
        """Whether a generation waits."""
        return bool(self._waiting)

    def num_bytes(self, evaluator: Evaluator, *more: Generation) -> int:
        """Return the bytes that generations with room, and `more` ones, hold in the end, beside the pinned texts."""
        held = [(generation.prompts_to_hold, generation.num_new) for generation in (*self._holding, *more)]
        prompts = [prompt for own, _ in held for prompt in own]
        return evaluator.num_bytes_to_grow(prompts, sum(len(own) * num_new for own, num_new in held))

    def admit(self, generation: Generation, evaluator: Evaluator, *, may_wait: bool) -> bool:
        """Return whether a generation may take its next step; if so, it has room until it leaves; else it waits.

        A generation that does not fit the budget by itself has room when no other one has. Any thread may ask, also for
        a step that was interrupted meanwhile; such a generation does not wait.
        """
        if generation in self._holding or not generation.prompts_to_hold:
            return True
        if may_wait and not (self._is_next(generation) and self._makes_room(generation, evaluator)):
            self._waiting[generation] = None
            if self._steps[generation].ended is not None:
                self._stop_waiting(generation)
            return False
        self._holding.add(generation)
        self._stop_waiting(generation)
        return True

    def leave(self, generation: Generation) -> None:
        """Note that a generation holds nothing any more, and does not wait."""
        self._holding.discard(generation)
        self._waiting.pop(generation, None)
        self.note_freed()

    def note_freed(self) -> None:
        """Note that a generation holds less than before."""
        self.num_freed += 1
        self._changed.notify_all()

    @contextmanager
    def stepping(self, generation: Generation) -> Iterator[None]:
        """Note that a step of a generation is asked for as long as the context lasts."""
        here = caller()
        self._steps[generation] = _LastStep(here)
        try:
            yield
        finally:
            self._steps[generation] = _LastStep(here, time.monotonic())
            if generation in self._waiting:
                with self._changed:
                    self._stop_waiting(generation)

    def wait(self, generation: Generation) -> None:
        """Wait until a generation that was not admitted may be, or its task was cancelled."""
        asked = cancellation.get()
        with self._changed:
            self._steps[generation] = _LastStep(caller())  # another thread may have ended a step of the same generation
            while generation in self._waiting and not (asked is not None and asked.is_set):
                is_next = self._is_next(generation)
                self._changed.wait(min(IDLE_SECONDS, MAX_SECONDS_TO_WAIT) if is_next else MAX_SECONDS_TO_WAIT)
                if is_next:
                    return

    def forget(self) -> None:
        """Forget all generations: they began with other weights, or in the process that was forked."""
        self._holding.clear()
        self._waiting.clear()
        self._changed.notify_all()

    def _is_next(self, generation: Generation) -> bool:
        """Whether no other generation has waited for longer."""
        return next(iter(self._waiting), generation) is generation

    def _stop_waiting(self, generation: Generation) -> None:
        self._waiting.pop(generation, None)
        self.note_freed()

    def _makes_room(self, generation: Generation, evaluator: Evaluator) -> bool:
        """Let others go until a generation fits; return False if it does not."""
        asker = self._steps[generation].caller
        while self._holding and self.num_bytes(evaluator, generation) > evaluator.memory.max_bytes:
            if not self._let_one_go(asker):
                return False
        return True

    def _let_one_go(self, asker: ref[Any]) -> bool:
        """Let the generation give its room up whose step is longest ago; return False if all take steps.

        The asker waits, so it asks for no step of the others that it reads.
        """
        now = time.monotonic()
        idle = [
            (step.ended, generation)
            for generation in self._holding
            if (step := self._steps[generation]).ended is not None
            and (step.caller == asker or now - step.ended >= IDLE_SECONDS)
        ]
        if not idle:
            return False
        _, generation = min(idle, key=itemgetter(0))
        self._holding.discard(generation)
        generation.let_go()
        return True
