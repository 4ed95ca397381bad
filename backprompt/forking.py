"""Forking: a child process finds every `LM` and store as it is between two calls, and computes on one thread.

`os.fork` copies memory as it is, and of all threads only the one that forks. So

- it waits for locks: one that another thread holds would never be released in the child, and what it guards would stay
  half changed there. First those of `LM`s, then those of stores, which they use.
- SQLite forbids carrying a connection over. A store closes its own, and each process opens one when it asks again.
- GNU OpenMP, with which torch computes on the CPU, waits for ever in a child for threads that are not there. So torch
  computes on one thread there, as in the workers of a DataLoader.

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
    """Must not be copied in the middle of a change."""

    def before_fork(self) -> None:
        """Wait until no other thread is in the middle of one, and let none begin."""
        ...

    def after_fork(self) -> None:
        """Let other threads go on; called in the parent and in the child."""
        ...


class ForkableLock:
    """A lock that no other thread holds when a process is forked."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # whoever forks may hold it

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def before_fork(self) -> None:
        """Wait until no other thread holds it."""
        self._lock.acquire()

    def after_fork(self) -> None:
        """Let go of it."""
        self._lock.release()


_lms: WeakSet[Forkable] = WeakSet()
stores: WeakSet[Forkable] = WeakSet()
_watch_lock = threading.RLock()  # around each change of the two sets, and each walk through them
_fork_lock = threading.RLock()
_held: list[Forkable] = []  # by the thread that holds `_fork_lock`


def watch_lm(lm: Forkable) -> None:
    """Let forking wait for it, for as long as it lives, before it waits for a store."""
    with _watch_lock:
        _lms.add(lm)


def watch_store(store: Forkable) -> None:
    """Let forking wait for it, for as long as it lives."""
    with _watch_lock:
        stores.add(store)


def before_fork() -> None:
    """Wait until no `LM` and no store is in the middle of a change; `os.fork` calls it."""
    _fork_lock.acquire()
    with _watch_lock:  # not while it waits for others, which may be about to add one
        owners = (*_lms, *stores)
    for owner in owners:
        owner.before_fork()
        _held.append(owner)


def after_fork() -> None:
    """Let all go on that `before_fork` has held up."""
    while _held:
        _held.pop().after_fork()
    _fork_lock.release()


def _after_in_child() -> None:
    global _watch_lock
    _watch_lock = threading.RLock()  # another thread may have held it
    after_fork()
    if not _lms:
        return
    import torch  # which whoever has an LM has; others need not wait for it

    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.info("This process was forked: torch computes on one thread, as the others of its parent are not there.")


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(before=before_fork, after_in_parent=after_fork, after_in_child=_after_in_child)
