"""The prompt representation database: a folder that one can copy.

    prompts.bp/
        entries/3f/3f...-a0....safetensors    an entry a file, named by its keys (file.py has the format): the truth
        index.sqlite                          what is in the files' headers, for lookups (index.py); made from them
        damaged/                              what was damaged, or is not ours and was in the way: set aside
        writing/                              files that are being written

An entry is written beside, synced, and renamed to its name, so it is there as a whole or not at all; the index follows.
An entry that the index does not know (the process died in between, or a file was copied in) is found when the index
is rebuilt. Prompts are private: folders and files are readable by their owner only.

Nothing that a store did not make is deleted. Another file in the place of an entry or the index is moved to
`damaged`; all else is left alone.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from backprompt import forking
from backprompt.arguments import as_string
from backprompt.errors import DamagedEntryError, EntryTooLargeError, StoreVersionError
from backprompt.memory import parse_bytes
from backprompt.progress import progress_bar, showing
from backprompt.store.base import Entry, Header, Match, Persist, Store, as_token_ids, check_name, check_persist
from backprompt.store.file import read_entry, read_header, to_pieces
from backprompt.store.index import SUFFIXES, DamagedIndexError, Index, NewerIndexError, StoreStats
from backprompt.store.paths import FOLDERS, INDEX, check_folder, explained, explaining
from backprompt.store.precision import StoredDtype, check_stored_dtype
from backprompt.store.schema import check_header, is_name

logger = logging.getLogger(__name__)

_WRITING = "tmp"  # what names of files in the folder of that name begin with
_USES_A_BATCH = 64
_ABANDONED_SECONDS = 24 * 3600

Answer = TypeVar("Answer")


class DiskStore(Store):
    """Entries in a folder, made if it is not there. A folder that cannot be written to is read.

    Args:
        path: the folder: one that is not there yet, an empty one, or a store's.
        persist: what an `LM` puts into it: see `Store`.
        max_bytes: how much the files may take, a number or text such as "10 GB"; what was not used for longest goes
            first, and nothing before what begins behind it.
        dtype: how keys, values and hidden states are stored: None as computed; "float16" or "int8" take less space and
            cost accuracy, which is measured and kept with each entry.

    Raises:
        OSError: the folder cannot be made or read, is a file, or has other content; `errno` says which.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        persist: Persist = "always",
        max_bytes: int | str | None = None,
        dtype: StoredDtype | None = None,
    ) -> None:
        self.path = check_folder(path)
        self.persist = check_persist(persist)
        self.dtype = check_stored_dtype(dtype)
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes, "max_bytes")
        self._lock = threading.RLock()
        self._uses: dict[str, float] = {}  # name -> when it was used, not written to the index yet
        self.is_writable = self._make_folders()
        self._index: Index | None = None  # not open: the next question opens it
        with self._lock:
            self._opened()
        forking.watch_store(self)

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry after checking its bytes; a damaged one is set aside."""
        check_name(name)
        entry = self._read(name, tensors) if is_name(name) else None
        if entry is not None:
            self._note_use(name)
        return entry

    def put(self, entry: Entry) -> None:
        """Write the entry beside, sync it, rename it, and note it in the index.

        Raises:
            DamagedEntryError: it is no entry that could be read again.
            EntryTooLargeError, OSError: see `Store.put`.

        """
        self._check_writable()
        check_header(entry.header)
        final = self._file(entry.header.name)
        try:
            num_bytes = final.stat().st_size
        except FileNotFoundError:
            pieces = to_pieces(entry)
            num_bytes = sum(map(len, pieces))
            if self.max_bytes is not None and num_bytes > self.max_bytes:
                raise EntryTooLargeError(
                    f"An entry of {num_bytes:,} bytes does not fit {self}, which may take {self.max_bytes:,}. "
                    "Give it more: DiskStore(path, max_bytes=...)."
                ) from None
            with explaining("An entry cannot be stored", self.path):
                self._write(final, pieces)
        # Also where a process died between file and index.
        self._ask(lambda index: index.insert(entry.header, num_bytes, time.time()))
        if self.max_bytes is not None:
            self.prune(show_progress_bar=False)

    def contains(self, name: str) -> bool:
        """Return whether the file is there."""
        check_name(name)
        return is_name(name) and self._file(name).exists()

    def delete(self, name: str) -> None:
        """Remove the file, then forget it."""
        check_name(name)
        if not is_name(name):
            return
        file = self._file(name)
        with suppress(FileNotFoundError):
            if file.is_dir():  # it is no entry, and in the way
                self._move_aside(file)
            else:
                os.unlink(file)
        self._forget(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Move the file into the folder `damaged`, then forget it."""
        if is_name(name):
            self._move_aside(self._file(name))
            self._forget(name)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Look at the two neighbours in the index."""
        key, ids = as_string(start, "start"), as_token_ids(token_ids)
        return self._ask(lambda index: index.longest(key, ids))

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Return the headers of all entries whose text begins so, in the order of their texts."""
        prefix = as_string(text_prefix, "text_prefix")
        return self._headers(self._ask(lambda index: index.names(prefix)))

    def _headers(self, names: Sequence[str]) -> Iterator[Header]:
        for name in names:
            header = self._header(self._file(name))
            if header is not None:
                yield header
            elif not self.contains(name):
                self._forget(name)

    def find(self, text_prefix: str) -> Sequence[Header]:
        """Return what `list` yields."""
        return tuple(self.list(text_prefix))

    def stats(self) -> StoreStats:
        """Return how much is stored."""
        return self._ask(Index.totals)

    def verify(self, *, show_progress_bar: bool | None = None) -> Sequence[str]:
        """Read every entry, set the damaged ones aside, and return the names of those that cannot be read.

        Args:
            show_progress_bar: by default on a terminal where it takes longer than two seconds.

        """
        unreadable = []
        num_entries = self.stats().num_entries
        with showing(show_progress_bar), progress_bar(num_entries, "verifying", "entries") as bar:
            for file in self._files():
                if not self._can_be_read(file.stem):
                    unreadable.append(file.stem)
                bar.update()
        return unreadable

    def prune(self, max_bytes: int | str | None = None, *, show_progress_bar: bool | None = None) -> Sequence[str]:
        """Delete what was not used for longest until at most `max_bytes` are left; return the names.

        Args:
            max_bytes: a number or text such as "10 GB"; by default what the store was opened with.
            show_progress_bar: by default on a terminal where it takes longer than two seconds.

        Raises:
            ValueError: there is neither.
            OSError: the folder cannot be written to.

        """
        if max_bytes is None and self.max_bytes is None:
            raise ValueError('Say how much may stay: store.prune("1 GB"), or open the store with max_bytes.')
        self._check_writable()
        limit = self.max_bytes if max_bytes is None else parse_bytes(max_bytes, "max_bytes")
        assert limit is not None
        excess = self.stats().num_bytes - limit
        deleted: list[str] = []
        if excess > 0:
            self._write_uses()
        with (
            showing(show_progress_bar),
            progress_bar(max(excess, 0), "deleting", "bytes", is_long=excess > 0) as bar,
        ):
            while excess > 0:
                leaves = self._ask(Index.least_valuable)
                if not leaves:
                    break
                for name, num_bytes in leaves:
                    if excess > 0:
                        self.delete(name)
                        deleted.append(name)
                        bar.update(min(num_bytes, excess))
                        excess -= num_bytes
        if deleted:
            logger.debug("Deleted %d entries of %s; %d bytes are left.", len(deleted), self.path, limit + excess)
        return deleted

    def rebuild(self, *, show_progress_bar: bool | None = None) -> None:
        """Make the index anew from the files alone.

        Args:
            show_progress_bar: by default on a terminal where it takes longer than two seconds.

        """
        with self._lock, showing(show_progress_bar):
            if self.is_writable:
                self._ask(lambda index: index.rebuild(self._described()))
            else:
                self._close_index()
                self._index = self._index_in_memory()

    def close(self) -> None:
        """Write the last uses and close the index."""
        with self._lock:
            if not self._is_closed:
                self._write_uses()
                self._close_index()
                self._is_closed = True

    _is_closed = False

    def before_fork(self) -> None:
        """Close the index: SQLite forbids carrying a connection to another process. It is opened when asked again."""
        self._lock.acquire()
        if self.is_writable and not self._is_closed:  # what is only read lies in memory, or has no locks
            with suppress(sqlite3.Error):  # forking must go on to where locks are released
                self._close_index()

    def after_fork(self) -> None:
        """Let other threads go on."""
        self._lock.release()

    def _opened(self) -> Index:
        """Return the index, opened where it is not; the lock must be held."""
        if self._is_closed:
            raise explained(OSError(errno.EBADF, "it is closed"), "The store cannot be used", self.path)
        if self._index is None:
            self._index = self._open_index()
        return self._index

    def _close_index(self) -> None:
        """Close the index; whatever interrupts this, the next question opens it again. The lock must be held."""
        index, self._index = self._index, None
        if index is not None:
            index.close()

    def _file(self, name: str) -> Path:
        return self.path / "entries" / name[:2] / f"{name}.safetensors"

    def _files(self) -> Iterator[Path]:
        """Yield what lies where an entry should; what else is in the folders is not ours, nor where links lead to."""
        with os.scandir(self.path / "entries") as found:
            folders = sorted(folder.path for folder in found if folder.is_dir(follow_symlinks=False))
        for folder in map(Path, folders):
            try:
                files = sorted(folder.glob("*.safetensors"))
            except OSError as error:  # this one folder: others may be sound
                logger.warning("%s cannot be read: %s", folder, error)
                continue
            yield from (file for file in files if is_name(file.stem) and self._file(file.stem) == file)

    def _described(self) -> Iterator[tuple[Header, int, float]]:
        """Yield what the index is made of: for each file its header, its bytes, and when it was written."""
        files = list(self._files())
        with progress_bar(len(files), "indexing", "entries", is_long=len(files) > 1) as bar:
            for file in files:
                header = self._header(file)
                if header is not None:
                    with suppress(FileNotFoundError):  # deleted by another process meanwhile
                        status = file.stat()
                        yield header, status.st_size, status.st_mtime
                bar.update()

    def _read(self, name: str, tensors: Collection[str] | None) -> Entry | None:
        try:
            entry = read_entry(self._file(name), tensors)
            if entry.header.name != name:
                raise DamagedEntryError(f"it is the entry {entry.header.name}")
        except FileNotFoundError:
            self._forget(name)  # deleted by another process, or from outside
            return None
        except DamagedEntryError as error:
            self._report(self._file(name), error)
            self.set_aside(name, str(error))
            return None
        except (OSError, MemoryError) as error:  # this one entry: others may be sound
            logger.warning("%s cannot be read (%s). It is computed again when needed.", self._file(name), error)
            return None
        return entry

    def _header(self, file: Path) -> Header | None:
        """Return an entry's header; None where it cannot be had, after saying why. A damaged file is moved aside."""
        try:
            header = read_header(file)
            if header.name != file.stem:
                raise DamagedEntryError(f"it is the entry {header.name}")
        except FileNotFoundError:
            return None  # deleted by another process meanwhile
        except DamagedEntryError as error:
            self._report(file, error)
            self._move_aside(file)
            return None
        except StoreVersionError as error:
            logger.warning("%s: %s", file, error)
            return None
        except (OSError, MemoryError) as error:  # this one file: others may be sound
            logger.warning("%s cannot be read: %s", file, error)
            return None
        return header

    def _can_be_read(self, name: str) -> bool:
        try:
            return self._read(name, None) is not None
        except StoreVersionError as error:
            logger.warning("%s: %s", name, error)
            return True

    def _write(self, final: Path, pieces: Sequence[memoryview]) -> None:
        with suppress(FileExistsError):
            final.parent.mkdir(mode=0o700)
            _sync_folder(final.parent.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=_WRITING, dir=self.path / "writing")  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(final.parent)

    def _check_writable(self) -> None:
        if not self.is_writable:
            raise explained(
                OSError(errno.EACCES, "the folder cannot be written to"), "The store is only read", self.path
            )

    def _make_folders(self) -> bool:
        """Make what is missing; return whether the folder can be written to."""
        folders = [self.path / name for name in FOLDERS]
        try:
            with explaining("The folder of a store cannot be made", self.path):
                for folder in (self.path, *folders):
                    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            if not folders[0].is_dir():
                raise
            return False
        if not all(os.access(folder, os.R_OK | os.W_OK | os.X_OK) for folder in (self.path, *folders)):
            return False
        for folder in folders:
            if folder.is_symlink():  # files would be deleted and moved where it leads to
                raise explained(OSError(errno.ELOOP, "it is a link"), "This cannot be a store's own folder", folder)
        self._clear_away()
        return True

    def _clear_away(self) -> None:
        """Delete the files that a process left that was killed while it wrote them."""
        with os.scandir(self.path / "writing") as found:
            left = [file for file in found if file.name.startswith(_WRITING) and file.is_file(follow_symlinks=False)]
        for file in left:
            try:
                if file.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    os.unlink(file.path)
            except OSError as error:  # another process was faster, or it is somebody else's
                logger.debug("%s cannot be deleted: %s", file.path, error)

    def _open_index(self) -> Index:
        """Open the index; one that is missing, unfinished or damaged is made anew."""
        file = self.path / INDEX
        if not self.is_writable:
            return Index.open_to_read(file) or self._index_in_memory()
        try:
            return self._finished(Index.open(file))
        except DamagedIndexError as error:
            self._move_index_aside(error)
        except NewerIndexError as error:
            logger.warning(
                "%s; it is left alone, and %s is indexed in memory each time it is opened. Upgrade backprompt, or "
                "delete the index where no newer version uses the store.",
                error,
                self.path,
            )
            return self._index_in_memory()
        try:
            return self._finished(Index.open(file))
        except (DamagedIndexError, NewerIndexError) as error:
            raise self._unusable(error) from error

    def _finished(self, index: Index) -> Index:
        """Return the index, made of all files if it was not."""
        if not index.is_finished:
            try:
                index.rebuild(self._described())
            except BaseException:
                index.close()
                raise
        return index

    def _index_in_memory(self) -> Index:
        index = Index.in_memory()
        index.rebuild(self._described())
        return index

    def _move_index_aside(self, error: Exception) -> None:
        """Move all files of the index to names that nothing has: they may be those of another application."""
        numbered = (self.path / "damaged" / f"{INDEX}.{number}" for number in itertools.count(1))
        aside = next(name for name in numbered if not any(os.path.lexists(f"{name}{suffix}") for suffix in SUFFIXES))
        logger.warning(
            "The index of %s is damaged, or not one (%s); it is set aside as %s, and made anew from the entries.",
            self.path,
            error,
            aside,
        )
        with explaining("The index of a store cannot be set aside", self.path / INDEX):
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            for suffix in SUFFIXES:
                with suppress(FileNotFoundError):
                    os.rename(f"{self.path / INDEX}{suffix}", f"{aside}{suffix}")

    def _ask(self, question: Callable[[Index], Answer]) -> Answer:
        """Ask the index; one that answers nonsense is made anew from the files, and asked again."""
        with self._lock:
            return self._answered(question)

    def _answered(self, question: Callable[[Index], Answer]) -> Answer:
        try:
            return question(self._opened())
        except DamagedIndexError as error:
            self._close_index()
            if self.is_writable:
                self._move_index_aside(error)
            else:
                self._index = self._index_in_memory()
        try:
            return question(self._opened())
        except DamagedIndexError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> OSError:
        return explained(OSError(errno.EIO, str(error)), "The index of a store cannot be used", self.path / INDEX)

    def _forget(self, name: str) -> None:
        """Take a name out of the index, if that can be done: an index that names too much does no harm."""
        if self.is_writable:
            self._hint(lambda index: index.forget(name))

    def _note_use(self, name: str) -> None:
        with self._lock:
            self._uses[name] = time.time()
            if len(self._uses) >= _USES_A_BATCH:
                self._write_uses()

    def _write_uses(self) -> None:
        with self._lock:
            uses = dict(self._uses)
            self._uses.clear()
            if uses and self.is_writable:
                self._hint(lambda index: index.note_uses(uses.items()))

    def _hint(self, note: Callable[[Index], None]) -> None:
        """Tell the index what helps it, but nothing depends on."""
        try:
            self._ask(note)
        except OSError as error:
            logger.info("The index of %s was not brought up to date: %s", self.path, error)

    def _report(self, file: Path, error: DamagedEntryError) -> None:
        logger.warning("%s is damaged: %s. It is set aside and computed again when needed.", file, error)

    def _move_aside(self, file: Path) -> None:
        """Move a damaged file out of the way, if that can be done."""
        if not self.is_writable:
            return
        folder = self.path / "damaged"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            os.replace(file, folder / file.name)
        except FileNotFoundError:  # another thread or process was faster
            logger.debug("%s was gone before it could be set aside.", file)
        except OSError as error:
            logger.warning("%s cannot be set aside: %s", file, error)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
