"""Progress bars over work that may take longer than two seconds: one rule for when they show.

A bar that nobody asked for shows only where standard error is a terminal: in the log of a job it would be noise.

Public functions say by `show_progress_bar` what their caller wants; what works below them, several modules away, asks
here. `TQDM_DISABLE=1` in the environment hides every bar (tqdm 4.66 or newer), those of properties such as
`text.logits` included.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from backprompt.arguments import as_bool

DELAY_SECONDS = 2.0
"""A bar that nobody asked for shows when work has taken so long."""

_SHOW: ContextVar[bool | None] = ContextVar("backprompt_show_progress_bar", default=None)


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar whose lock an interrupt does not leave behind.

    tqdm takes its lock, draws, and lets go of it: an interrupt while it draws leaves the lock taken, and whoever shows
    a bar in another thread waits for ever. Its lock is also two, taken one after the other; this one is taken in one
    step.
    """

    _lock = threading.RLock()

    def refresh(self, nolock: bool = False, lock_args: tuple[Any, ...] | None = None) -> Any:
        """Draw the bar; `lock_args` are tqdm's, and nothing here gives any."""
        with nullcontext() if nolock else self._lock:
            return super().refresh(nolock=True)

    def clear(self, nolock: bool = False) -> None:
        """Take the bar off the screen."""
        with nullcontext() if nolock else self._lock:
            super().clear(nolock=True)


def _renew_lock() -> None:
    """Give a forked child a lock of its own: a thread that is not there may have held its parent's."""
    Bar._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def showing(show: bool | None) -> Iterator[None]:
    """Let bars show at once (True) or never (False) for as long as the context lasts; None leaves it as it is.

    Raises:
        ValueError: it is none of the three.

    """
    check_show(show)
    token = _SHOW.set(_SHOW.get() if show is None else show)
    try:
        yield
    finally:
        _SHOW.reset(token)


def check_show(show: bool | None) -> None:
    """Raise ValueError for what is neither True, False nor None, as `show_progress_bar`."""
    if show is not None:
        as_bool(show, "show_progress_bar")


def is_wanted(show: bool | None, *, is_long: bool) -> bool:
    """Return whether a bar may show: as is said, and where nothing is, over long work on a terminal.

    Raises:
        ValueError: see `check_show`.

    """
    check_show(show)
    return is_long and is_terminal() if show is None else show


def is_terminal() -> bool:
    """Return whether somebody sees what standard error says: on a terminal, or in a notebook, which has none."""
    is_notebook = type(sys.stderr).__module__.startswith("ipykernel.")
    return sys.stderr is not None and (sys.stderr.isatty() or is_notebook)


def progress_bar(total: int, desc: str, unit: str, *, is_long: bool = True) -> Any:
    """Return a bar over `total` units of work, which shows as `showing` says, or on a terminal after `DELAY_SECONDS`.

    Args:
        total: how much there is to do.
        desc: what is done.
        unit: what `total` counts.
        is_long: whether there are several steps, so that a bar would move: else it shows only if it is asked for.

    """
    show = _SHOW.get()
    if not is_wanted(show, is_long=is_long):
        return Bar(disable=True)
    delay = 0.0 if show else DELAY_SECONDS
    return Bar(total=total, desc=desc, unit=f" {unit}", unit_scale=total >= 10_000, delay=delay)


class GrowingBar:
    """A bar over work that is planned a part at a time; made when the first part is."""

    def __init__(self, desc: str, unit: str) -> None:
        self._desc = desc
        self._unit = unit
        self._bar: Any = None

    def expect(self, num_units: int, *, is_long: bool) -> None:
        """Say how much is still to be done; `is_long`: see `progress_bar`."""
        if self._bar is None:
            self._bar = progress_bar(num_units, self._desc, self._unit, is_long=is_long)
        self._bar.total = self._bar.n + num_units

    def update(self, num_units: int) -> None:
        """Say that so much was done."""
        self._bar.update(num_units)

    def __enter__(self) -> GrowingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
