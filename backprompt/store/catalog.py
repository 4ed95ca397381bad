"""The index of a folder, kept open and in agreement with the folder's files.

The catalog keeps the open index, the lock that guards the index, and the times of use that are not yet written to the
index. An index that is missing, unfinished or damaged is rebuilt from the files. An index of a newer version is left
unchanged, and another index is built in memory.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from backprompt.progress import showing
from backprompt.store.folder import Folder
from backprompt.store.index import SUFFIXES, DamagedIndexError, Index, NewerIndexError
from backprompt.store.paths import INDEX, explained, explaining

logger = logging.getLogger(__name__)

_USES_A_BATCH = 64

Answer = TypeVar("Answer")


class Catalog:
    """Answers queries to the index of a folder. Forking waits for the catalog, as for `forking.Forkable`."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.RLock()
        self._uses: dict[str, float] = {}  # name -> time of the last use, not written to the index yet
        self._is_closed = False
        self._index: Index | None = None  # None: not open; the next query opens it
        with self._lock:
            self._opened()

    def ask(self, question: Callable[[Index], Answer]) -> Answer:
        """Return an answer of the index; an index with invalid answers is rebuilt from the files, and queried again."""
        with self._lock:
            return self._answered(question)

    def forget(self, name: str) -> None:
        """Remove a name from the index if possible; an extra name in the index does no harm."""
        if self._folder.is_writable:
            self._hint(lambda index: index.forget(name))

    def note_use(self, name: str) -> None:
        """Record that an entry is used now. `write_uses` writes recorded uses to the index, as does a full batch."""
        with self._lock:
            self._uses[name] = time.time()
            if len(self._uses) >= _USES_A_BATCH:
                self.write_uses()

    def write_uses(self) -> None:
        """Write the recorded uses to the index."""
        with self._lock:
            uses = dict(self._uses)
            self._uses.clear()
            if uses and self._folder.is_writable:
                self._hint(lambda index: index.note_uses(uses.items()))

    def rebuild(self, *, show_progress_bar: bool | None = None) -> None:
        """Rebuild the index from the files alone."""
        with self._lock, showing(show_progress_bar):
            if self._folder.is_writable:
                self.ask(lambda index: index.rebuild(self._folder.described()))
            else:
                self._close_index()
                self._index = self._index_in_memory()

    def close(self) -> None:
        """Write the last uses and close the index."""
        with self._lock:
            if not self._is_closed:
                self.write_uses()
                self._close_index()
                self._is_closed = True

    def before_fork(self) -> None:
        """Close the index until the next query: SQLite forbids carrying a connection to another process."""
        self._lock.acquire()
        if self._folder.is_writable and not self._is_closed:  # a read-only index lies in memory, or has no locks
            with suppress(sqlite3.Error):  # the fork must continue, and release its locks
                self._close_index()

    def after_fork(self) -> None:
        """Let other threads continue."""
        self._lock.release()

    def _opened(self) -> Index:
        """Return the index, opening it if needed; the lock must be held."""
        if self._is_closed:
            raise explained(OSError(errno.EBADF, "it is closed"), "The store cannot be used", self._folder.path)
        if self._index is None:
            self._index = self._open_index()
        return self._index

    def _close_index(self) -> None:
        """Close the index; the next query opens it again, also after an interrupt. The lock must be held."""
        index, self._index = self._index, None
        if index is not None:
            index.close()

    def _open_index(self) -> Index:
        """Open the index; an index that is missing, unfinished or damaged is rebuilt."""
        file = self._folder.path / INDEX
        if not self._folder.is_writable:
            return Index.open_to_read(file) or self._index_in_memory()
        try:
            return self._finished(Index.open(file))
        except DamagedIndexError as error:
            self._move_index_aside(error)
        except NewerIndexError as error:
            logger.warning(
                "%s. The index is left unchanged, and %s is indexed in memory each time it is opened. Upgrade "
                "backprompt, or delete the index if no newer version uses the store.",
                error,
                self._folder.path,
            )
            return self._index_in_memory()
        try:
            return self._finished(Index.open(file))
        except (DamagedIndexError, NewerIndexError) as error:
            raise self._unusable(error) from error

    def _finished(self, index: Index) -> Index:
        """Return the index, built from all files if it was unfinished."""
        if not index.is_finished:
            try:
                index.rebuild(self._folder.described())
            except BaseException:
                index.close()
                raise
        return index

    def _index_in_memory(self) -> Index:
        index = Index.in_memory()
        index.rebuild(self._folder.described())
        return index

    def _move_index_aside(self, error: Exception) -> None:
        """Move all files of the index to unused names: they may belong to another application."""
        numbered = (self._folder.path / "damaged" / f"{INDEX}.{number}" for number in itertools.count(1))
        aside = next(name for name in numbered if not any(os.path.lexists(f"{name}{suffix}") for suffix in SUFFIXES))
        logger.warning(
            "The index of %s is damaged, or another file (%s). The file is moved to %s, and the index is rebuilt.",
            self._folder.path,
            error,
            aside,
        )
        with explaining("The index of a store cannot be moved aside", self._folder.path / INDEX):
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            for suffix in SUFFIXES:
                with suppress(FileNotFoundError):
                    os.rename(f"{self._folder.path / INDEX}{suffix}", f"{aside}{suffix}")

    def _answered(self, question: Callable[[Index], Answer]) -> Answer:
        try:
            return question(self._opened())
        except DamagedIndexError as error:
            self._close_index()
            if self._folder.is_writable:
                self._move_index_aside(error)
            else:
                self._index = self._index_in_memory()
        try:
            return question(self._opened())
        except DamagedIndexError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> OSError:
        return explained(
            OSError(errno.EIO, str(error)), "The index of a store cannot be used", self._folder.path / INDEX
        )

    def _hint(self, note: Callable[[Index], None]) -> None:
        """Update the index if possible; nothing depends on the update."""
        try:
            self.ask(note)
        except OSError as error:
            logger.info("The index of %s was not updated: %s", self._folder.path, error)
