"""Room: the part of the byte budget that generations may hold at once.

Keeps the generations that have room, and those that wait for room, in the order in which they came. A waiting
generation holds no texts in memory, so no two generations wait for each other. A generation with room may be idle: no
caller requests its next step. If another generation waits, the idle one loses its room. Its texts may then be evicted,
and its next step waits for room and computes them again.

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
"""A generation that has taken no step for this time is idle, and loses its room if another generation waits."""

MAX_SECONDS_TO_WAIT = 1.0
"""The longest time until a waiting generation notices that its task was cancelled."""


class Generation(Protocol):
    """Texts that are continued together."""

    @property
    def prompts_to_hold(self) -> Sequence[TokenIds]:
        """The prompts of the texts that are in memory, or will be after the next step."""

    @property
    def num_new(self) -> int:
        """The largest number of tokens that are kept in memory for one text behind its prompt."""

    def let_go(self) -> None:
        """Hold no texts in memory until the next step."""


@dataclass(frozen=True)
class _LastStep:
    """The caller of the last step of a generation, and the time of its end; None during the step."""

    caller: ref[Any]
    ended: float | None = None


class Room:
    """The generations that share the budget of a session.

    Args:
        lock: the lock of the session; held by the callers of all methods but `stepping` and `wait`.

    Attributes:
        num_freed: the number of times that a generation needed less room than before.

    """

    def __init__(self, lock: threading.RLock) -> None:
        self.num_freed = 0
        self._changed = threading.Condition(lock)
        self._holding: WeakSet[Generation] = WeakSet()
        self._waiting: dict[Generation, None] = {}
        self._steps: WeakKeyDictionary[Generation, _LastStep] = WeakKeyDictionary()

    @property
    def is_awaited(self) -> bool:
        """Whether a generation waits for room."""
        return bool(self._waiting)

    def num_bytes(self, evaluator: Evaluator, *more: Generation) -> int:
        """Return the bytes that the generations with room, the `more` ones and the pinned texts hold in the end."""
        held = [(generation.prompts_to_hold, generation.num_new) for generation in (*self._holding, *more)]
        prompts = [prompt for own, _ in held for prompt in own]
        return evaluator.num_bytes_to_grow(prompts, sum(len(own) * num_new for own, num_new in held))

    def admit(self, generation: Generation, evaluator: Evaluator, *, may_wait: bool) -> bool:
        """Return whether a generation may take its next step. If so, it has room until it leaves; otherwise it waits.

        A generation that does not fit the budget by itself gets room when no other generation has room. Any thread may
        call this, also for a step that was interrupted meanwhile; the generation of such a step does not wait.
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
        """Note that a generation no longer holds texts in memory, and does not wait."""
        self._holding.discard(generation)
        self._waiting.pop(generation, None)
        self.note_freed()

    def note_freed(self) -> None:
        """Note that a generation holds less than before."""
        self.num_freed += 1
        self._changed.notify_all()

    @contextmanager
    def stepping(self, generation: Generation) -> Iterator[None]:
        """Note that a step of a generation is requested or in progress while the context lasts."""
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
        """Wait until a generation that was not admitted can be admitted, or its task was cancelled."""
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
        """Return whether no other generation has waited longer."""
        return next(iter(self._waiting), generation) is generation

    def _stop_waiting(self, generation: Generation) -> None:
        self._waiting.pop(generation, None)
        self.note_freed()

    def _makes_room(self, generation: Generation, evaluator: Evaluator) -> bool:
        """Take room from idle generations until this generation fits; return False if it does not fit."""
        asker = self._steps[generation].caller
        while self._holding and self.num_bytes(evaluator, generation) > evaluator.memory.max_bytes:
            if not self._let_one_go(asker):
                return False
        return True

    def _let_one_go(self, asker: ref[Any]) -> bool:
        """Take the room from the generation that has been idle longest; return False if none is idle.

        The caller that waits, `asker`, requests no step of another generation meanwhile. So the generations whose last
        step it requested are idle at once.
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
