"""Calls that share passes: the threads that wait for a session, and calls that are answered together.

Keeps the line of a session: the threads that wait for its lock, in the order in which they came. A thread that gets the
lock with a `Call` answers all calls in the line together; the other threads find their answers when they get the lock.
So a line changes nothing for a single thread, and no thread waits for later calls.

    running    thread 1: evaluates
    line       thread 2: token_logprobs, thread 3: text.tokens, thread 4: evaluate, thread 5: token_logprobs
    next       thread 3, because thread 4 cannot answer it and came later; then one pass for threads 2, 4 and 5
"""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from backprompt.evaluation.evaluator import Evaluator

Answer = TypeVar("Answer")

MAX_SECONDS_TO_GIVE_WAY = 1.0
"""The longest wait for earlier threads that do not take the lock, because an error may have stopped them."""


class Cancellation:
    """Tells the calls of a task that no caller waits for their answers any more.

    Args:
        task: the task.

    Attributes:
        is_set: whether the task was cancelled. Any thread may set it at any time.

    """

    def __init__(self, task: ref[Any] | None = None) -> None:
        self.task = task
        self.is_set = False


cancellation: ContextVar[Cancellation | None] = ContextVar("cancellation", default=None)
"""The cancellation of the task for which a thread works."""


def caller() -> ref[Any]:
    """Return the task for which this thread works, or this thread."""
    asked = cancellation.get()
    return ref(threading.current_thread()) if asked is None or asked.task is None else asked.task


class Call(ABC, Generic[Answer]):
    """A thread's question to a session, which may be answered along with those of other threads.

    Attributes:
        found: the result that was computed for this call along with others, or None.
        is_answered: whether `found` may be used.
        is_alone: whether the call's own thread must answer the call, and raise its errors.

    """

    def __init__(self) -> None:
        self.found: Any = None
        self.is_answered = self.is_alone = False
        self._cancellation = cancellation.get()

    @staticmethod
    @abstractmethod
    def together(evaluator: Evaluator, calls: Sequence[Any]) -> None:
        """Set `found` of each call of this kind to its result, or set its `is_alone`; the lock is held."""

    @abstractmethod
    def finish(self) -> Answer:
        """Return the answer, from `found` if the call `is_answered`. Its own thread calls this and holds the lock."""

    def ahead(self) -> Sequence[Call[Any]]:
        """Return calls of other kinds to compute first, so that this call finds their results; the lock is held."""
        return ()

    @property
    def may_join(self) -> bool:
        """Whether another thread may answer the call along with others."""
        return not (self.is_answered or self.is_alone or self.is_cancelled)

    @property
    def is_cancelled(self) -> bool:
        """Whether no caller waits for the answer."""
        return self._cancellation is not None and self._cancellation.is_set

    def check_cancelled(self) -> None:
        """Raise CancelledError if no caller waits for the answer."""
        if self.is_cancelled:
            raise CancelledError("The task that made this call was cancelled, so nothing is computed for it.")


class Line:
    """The threads that wait for a lock, in the order in which they came.

    A place in the line is any object; a place that others may answer is a `Call`. Places are added without the lock.

    Attributes:
        lock: the lock.
        places: the places of the waiting threads, in order.

    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.places: dict[object, None] = {}
        self._changed = threading.Condition(self.lock)
        self._giving_way: dict[object, set[object]] = {}  # by place, the places that go first

    def leave(self, place: object) -> None:
        """Remove a place from the line; its thread holds the lock now."""
        self.places.pop(place, None)
        if self._giving_way:
            for first in self._giving_way.values():
                first.discard(place)
            if not all(self._giving_way.values()):
                self._changed.notify_all()

    def give_way(self, call: Call[Any]) -> None:
        """Wait for earlier threads whose calls cannot be answered along with this one; the lock must be held once.

        Python's locks keep no order. Without this wait, the next call of the thread that answered would overtake a
        thread whose call was answered, and the calls of threads in loops would never be in the line together.
        """
        before = itertools.takewhile(lambda place: place is not call, list(self.places))
        first = {place for place in before if not (isinstance(place, Call) and place.may_join)}
        if not first:
            return
        self._giving_way[call] = first
        try:
            while first and call.may_join:
                if not self._changed.wait(MAX_SECONDS_TO_GIVE_WAY):
                    for place in first:  # so no other call waits for them; their threads, if any, need no place
                        self.places.pop(place, None)
                    break
        finally:
            self._giving_way.pop(call, None)

    def forget_others(self) -> None:
        """Empty the line: the waiting threads do not exist in a forked process."""
        self.places.clear()
        self._giving_way.clear()

    def joining(self, call: Call[Any]) -> list[Call[Any]]:
        """Return, in order, the calls that may be answered together with `call`, which is one of them."""
        if not call.may_join or len(self.places) == 1:
            return []
        return [place for place in list(self.places) if isinstance(place, Call) and place.may_join]
