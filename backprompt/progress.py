"""Progress bars over work that may take longer than two seconds, with one rule for when they show.

By default a bar shows only if standard error is a terminal: in the log of a job a bar would be noise.

Public functions take the caller's wish as `show_progress_bar` and set it with `showing`; `progress_bar` reads it.
`TQDM_DISABLE=1` in the environment hides every bar (tqdm 4.66 or newer), including those of properties such as
`text.logits`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

from tqdm import tqdm

from backprompt.arguments import as_bool

DELAY_SECONDS = 2.0
"""The time after which a bar that was not requested shows."""

_SHOW: ContextVar[bool | None] = ContextVar("backprompt_show_progress_bar", default=None)


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar that releases its lock when it is interrupted.

    tqdm takes its lock, draws, and releases the lock. An interrupt during drawing leaves the lock taken, and a bar in
    another thread waits forever. tqdm's lock also consists of two locks, taken one after the other; this lock is taken
    in one step.
    """

    _lock = threading.RLock()

    def refresh(self, nolock: bool = False, lock_args: tuple[Any, ...] | None = None) -> Any:
        """Draw the bar; `lock_args` are tqdm's, and unused here."""
        with nullcontext() if nolock else self._lock:
            return super().refresh(nolock=True)

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from the screen."""
        with nullcontext() if nolock else self._lock:
            super().clear(nolock=True)


def _renew_lock() -> None:
    """Give a forked child its own lock: a thread that exists only in the parent may have held the parent's lock."""
    Bar._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # missing on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def showing(show: bool | None) -> Iterator[None]:
    """Show bars at once (True) or never (False) while the context lasts; None leaves the setting unchanged.

    Raises:
        ValueError: `show` is neither True, False nor None.

    """
    check_show(show)
    token = _SHOW.set(_SHOW.get() if show is None else show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def check_show(show: bool | None) -> None:
    """Raise ValueError if `show_progress_bar` is neither True, False nor None."""
    if show is not None:
        as_bool(show, "show_progress_bar")


def is_wanted(show: bool | None, *, is_long: bool) -> bool:
    """Return whether a bar may show: as `show` says or, for None, during long work on a terminal.

    Raises:
        ValueError: see `check_show`.

    """
    check_show(show)
    return is_long and is_terminal() if show is None else show


def is_terminal() -> bool:
    """Return whether a person sees standard error: it is a terminal, or belongs to a notebook."""
    is_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return sys.stderr is not None and (sys.stderr.isatty() or is_notebook)


def progress_bar(total: int, desc: str, unit: str, *, is_long: bool = True) -> Any:
    """Return a bar over `total` units of work; the bar follows `showing`, or shows on a terminal after `DELAY_SECONDS`.

    Args:
        total: the number of units.
        desc: a description of the work.
        unit: the name of a unit.
        is_long: whether the work has several steps, so that the bar would move; else the bar shows only on request.

    """
    show = _SHOW.get()
    if not is_wanted(show, is_long=is_long):
        return _hidden_bar()
    delay = 0.0 if show else DELAY_SECONDS
    return Bar(total=total, desc=desc, unit=f" {unit}", unit_scale=total >= 10_000, delay=delay)


@cache
def _hidden_bar() -> Bar:
    """Return the one bar that never shows, for all work: it keeps no counts."""
    return Bar(disable=True)


class GrowingBar:
    """A bar over work that is planned in parts; created with the first part."""

    def __init__(self, desc: str, unit: str) -> None:
        self._desc = desc
        self._unit = unit
        self._bar: Any = None

    def expect(self, num_units: int, *, is_long: bool) -> None:
        """Set the number of units that remain; `is_long`: see `progress_bar`."""
        if self._bar is None:
            self._bar = progress_bar(num_units, self._desc, self._unit, is_long=is_long)
        self._bar.total = self._bar.n + num_units

    def update(self, num_units: int) -> None:
        """Add finished units."""
        self._bar.update(num_units)

    def __enter__(self) -> GrowingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
