"""Forking: a child process finds every `LM` and store in the state between two calls, and computes on one thread.

`os.fork` copies memory as it is, but only one thread: the one that forks. Therefore:

- Forking waits for locks. A lock held by another thread would never be released in the child, and the guarded data
  would stay half changed there. The locks of `LM`s come first, then those of stores, because `LM`s use stores.
- SQLite forbids carrying a connection over. A store closes its connection, and each process opens its own on next use.
- GNU OpenMP, which torch uses on the CPU, waits forever in a child for threads that do not exist there. So torch
  computes on one thread in the child, as in the workers of a DataLoader.

On CUDA a child cannot compute at all: torch raises an error that says so.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Protocol
from weakref import WeakSet

logger = logging.getLogger(__name__)


class Forkable(Protocol):
    """An object that must not be copied in the middle of a change."""

    def before_fork(self) -> None:
        """Wait until no other thread is in the middle of a change, and let none begin."""
        ...

    def after_fork(self) -> None:
        """Let other threads continue; called in the parent and in the child."""
        ...


class ForkableLock:
    """A lock that no other thread holds when a process is forked."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the forking thread may hold it

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        """Wait until no other thread holds the lock, and take it."""
        self._lock.acquire()

    def after_fork(self) -> None:
        """Release the lock."""
        self._lock.release()


_lms: WeakSet[Forkable] = WeakSet()
stores: WeakSet[Forkable] = WeakSet()
_watch_lock = threading.RLock()  # guards each change of the two sets and each walk through them
_fork_lock = threading.RLock()
_held: list[Forkable] = []  # held by the thread that holds `_fork_lock`


def watch_lm(lm: Forkable) -> None:
    """Make each fork wait for `lm` before it waits for any store, for as long as `lm` lives."""
    with _watch_lock:
        _lms.add(lm)


def watch_store(store: Forkable) -> None:
    """Make each fork wait for `store`, for as long as `store` lives."""
    with _watch_lock:
        stores.add(store)


def before_fork() -> None:
    """Wait until no `LM` and no store is in the middle of a change; called by `os.fork`."""
    _fork_lock.acquire()
    with _watch_lock:  # released before waiting: another thread may be about to add an owner
        owners = (*_lms, *stores)
    for owner in owners:
        owner.before_fork()
        _held.append(owner)


def after_fork() -> None:
    """Release all that `before_fork` holds."""
    while _held:
        _held.pop().after_fork()
    _fork_lock.release()


def _after_in_child() -> None:
    global _watch_lock
    _watch_lock = threading.RLock()  # another thread may have held it
    after_fork()
    if not _lms:
        return
    import torch  # already imported if an LM exists; other processes need not wait for the import

    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.info(
            "Let torch compute on one thread in a forked process, in which the other threads of the "
            "parent do not exist."
        )


if hasattr(os, "register_at_fork"):  # missing on Windows, which has no fork
    os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=_after_in_child)
