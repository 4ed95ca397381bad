"""The prompt representation database: a folder that one can copy.

    prompts.bp/
        entries/3f/3f...-a0....safetensors    an entry a file, named by its keys (file.py has the format): the truth
        index.sqlite                          what is in the files' headers, for lookups; rebuilt from them if need be
        damaged/                              files that failed their checksum, set aside
        writing/                              files that are being written

An entry is written beside, synced, and renamed to its name, so it is there as a whole or not at all; the index follows.
An entry that the index does not know (the process died in between, or a file was copied in) is found when the index
is rebuilt. Prompts are private: folders and files are readable by their owner only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from backprompt import forking
from backprompt.errors import DamagedEntryError, EntryTooLargeError, StoreVersionError
from backprompt.memory import parse_bytes
from backprompt.progress import progress_bar, showing
from backprompt.store.base import Entry, Header, Match, Persist, Store, check_persist, num_common
from backprompt.store.file import read_entry, read_header, to_pieces
from backprompt.store.precision import StoredDtype, check_stored_dtype

logger = logging.getLogger(__name__)

_SCHEMA_VERSION = 3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    name TEXT PRIMARY KEY, start TEXT NOT NULL, end TEXT NOT NULL, token_ids BLOB NOT NULL,
    position INTEGER NOT NULL, num_tokens INTEGER NOT NULL, num_bytes INTEGER NOT NULL, text TEXT NOT NULL,
    error REAL NOT NULL, last_used REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS needs (name TEXT NOT NULL, behind TEXT NOT NULL, PRIMARY KEY (name, behind)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_behind ON needs (behind);
CREATE INDEX IF NOT EXISTS by_start ON entries (start, token_ids);
CREATE INDEX IF NOT EXISTS by_use ON entries (last_used, position);
"""
_NEIGHBOURS = (
    "SELECT name, token_ids FROM entries WHERE start = ? AND token_ids <= ? ORDER BY token_ids DESC LIMIT 1",
    "SELECT name, token_ids FROM entries WHERE start = ? AND token_ids > ? ORDER BY token_ids LIMIT 1",
)
"""In the order of token ids, what has the longest common beginning with a sequence stands right before or after it."""
_LEAST_VALUABLE = """
SELECT name, num_bytes FROM entries AS entry
WHERE NOT EXISTS (SELECT 1 FROM entries AS other WHERE other.start = entry.end)
AND NOT EXISTS (SELECT 1 FROM needs WHERE needs.behind = entry.name)
ORDER BY last_used, position DESC LIMIT 100
"""
"""What nothing else begins behind, or in its middle: an entry is of no use without what stands before it."""
_USES_A_BATCH = 64
_ABANDONED_SECONDS = 24 * 3600
_LOCK_SECONDS = 30.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class StoreStats:
    """What a store holds; `largest_error` is that of storing in fewer bits (`Header.error`), 0 where nothing is."""

    num_entries: int
    num_tokens: int
    num_bytes: int
    largest_error: float


class DiskStore(Store):
    """Entries in a folder, made if it is not there. A folder that cannot be written to is read.

    Args:
        path: the folder.
        persist: what an `LM` puts into it: see `Store`.
        max_bytes: how much the files may take, a number or text such as "10 GB"; what was not used for longest goes
            first, and nothing before what begins behind it.
        dtype: how keys, values and hidden states are stored: None as computed; "float16" or "int8" take less space and
            cost accuracy, which is measured and kept with each entry.

    Raises:
        OSError: the folder cannot be made or read.
        StoreVersionError: a newer version of backprompt wrote it.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        persist: Persist = "always",
        max_bytes: int | str | None = None,
        dtype: StoredDtype | None = None,
    ) -> None:
        self.path = Path(path)
        self.persist = check_persist(persist)
        self.dtype = check_stored_dtype(dtype)
        self.max_bytes = None if max_bytes is None else parse_bytes(max_bytes, "max_bytes")
        self._lock = threading.RLock()
        self._uses: dict[str, float] = {}  # name -> when it was used, not written to the index yet
        self.is_writable = self._make_folders()
        self._index = self._open_index()
        forking.watch_store(self)

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry after checking its bytes; a damaged one is set aside."""
        entry = self._read(name, tensors)
        if entry is not None:
            self._note_use(name)
        return entry

    def put(self, entry: Entry) -> None:
        """Write the entry beside, sync it, rename it, and note it in the index."""
        if not self.is_writable:
            raise PermissionError(f"{self.path} cannot be written to.")
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
            self._write(final, pieces)
        # Also where a process died between file and index.
        self._ask(lambda index: _insert(index, entry.header, num_bytes, time.time()))
        if self.max_bytes is not None:
            self.prune(show_progress_bar=False)

    def contains(self, name: str) -> bool:
        """Return whether the file is there."""
        return self._file(name).exists()

    def delete(self, name: str) -> None:
        """Remove the file, then forget it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(name))
        self._forget(name)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Look at the two neighbours in the index."""
        asked = _packed(token_ids)

        def neighbours(index: sqlite3.Connection) -> list[Match]:
            rows = [row for query in _NEIGHBOURS for row in index.execute(query, (start, asked)).fetchall()]
            return [Match(_checked_name(name), num_common(_unpacked(packed), token_ids)) for name, packed in rows]

        matches = self._ask(neighbours)
        best = max(matches, key=lambda match: match.num_tokens, default=None)
        return best if best is not None and best.num_tokens else None

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of all entries whose text begins so, in the order of their texts."""
        query = "SELECT name FROM entries WHERE substr(text, 1, ?) = ? ORDER BY text"

        def names(index: sqlite3.Connection) -> list[str]:
            return [_checked_name(name) for (name,) in index.execute(query, (len(text_prefix), text_prefix)).fetchall()]

        for name in self._ask(names):
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
        query = "SELECT count(*), total(num_tokens), total(num_bytes), ifnull(max(error), 0.0) FROM entries"
        num_entries, num_tokens, num_bytes, error = self._ask(lambda index: index.execute(query).fetchone())
        return StoreStats(num_entries, int(num_tokens), int(num_bytes), error)

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

        """
        if max_bytes is None and self.max_bytes is None:
            raise ValueError('Say how much may stay: store.prune("1 GB"), or open the store with max_bytes.')
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
                leaves: list[tuple[str, int]] = self._ask(lambda index: index.execute(_LEAST_VALUABLE).fetchall())
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
        with self._database() as index:
            index.execute("DELETE FROM entries")
            index.execute("DELETE FROM needs")
            files = list(self._files())
            with (
                showing(show_progress_bar),
                progress_bar(len(files), "indexing", "entries", is_long=len(files) > 1) as bar,
            ):
                for file in files:
                    header = self._header(file)
                    with contextlib.suppress(FileNotFoundError):  # deleted by another process meanwhile
                        status = file.stat()
                        if header is not None:
                            _insert(index, header, status.st_size, status.st_mtime)
                    bar.update()
            index.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")  # only now: one that was cut off is made again

    def close(self) -> None:
        """Write the last uses and close the index."""
        with self._lock:
            if not self._is_closed:
                self._write_uses()
                self._index.close()
                self._is_closed = True

    _is_closed = False
    _is_closed_to_fork = False

    def _before_fork(self) -> None:
        """Close the index: SQLite forbids carrying a connection to another process. It is opened when asked again."""
        self._lock.acquire()
        if self.is_writable and not self._is_closed:  # what is only read lies in memory, or has no locks
            self._is_closed_to_fork = True
            with contextlib.suppress(sqlite3.Error):  # forking must go on to where locks are released
                self._index.close()

    def _after_fork(self) -> None:
        self._lock.release()

    def _opened(self) -> sqlite3.Connection:
        """Return the index; the lock must be held."""
        if self._is_closed_to_fork and not self._is_closed:
            self._is_closed_to_fork = False
            self._index = self._open_index()
        return self._index

    def _file(self, name: str) -> Path:
        return self.path / "entries" / name[:2] / f"{name}.safetensors"

    def _files(self) -> Iterator[Path]:
        return (self.path / "entries").glob("*/*.safetensors")

    def _read(self, name: str, tensors: Collection[str] | None) -> Entry | None:
        try:
            entry = read_entry(self._file(name), tensors)
            if entry.header.name != name:
                raise DamagedEntryError(f"it is the entry {entry.header.name}")
        except FileNotFoundError:
            self._forget(name)  # deleted by another process, or from outside
            return None
        except DamagedEntryError as error:
            self._set_aside(name, error)
            return None
        except OSError as error:  # this one entry: others may be sound
            logger.warning("%s cannot be read (%s). It is computed again when needed.", self._file(name), error)
            return None
        return entry

    def _header(self, file: Path) -> Header | None:
        """Return an entry's header; None where it cannot be had, after saying why. A damaged file is moved aside."""
        try:
            with open(file, "rb") as opened:
                header = read_header(opened)
            if header.name != file.stem:
                raise DamagedEntryError(f"it is the entry {header.name}")
        except FileNotFoundError:
            return None  # deleted by another process meanwhile
        except DamagedEntryError as error:
            self._move_aside(file, error)
            return None
        except StoreVersionError as error:
            logger.warning("%s: %s", file, error)
            return None
        except OSError as error:  # this one file: others may be sound
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
        with contextlib.suppress(FileExistsError):
            final.parent.mkdir(mode=0o700)
            _sync_folder(final.parent.parent)
        descriptor, temporary = tempfile.mkstemp(dir=self.path / "writing")  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(final.parent)

    def _make_folders(self) -> bool:
        """Make what is missing; return whether the folder can be written to."""
        writing = self.path / "writing"
        try:
            for folder in (self.path, self.path / "entries", self.path / "damaged", writing):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            if not (self.path / "entries").is_dir():
                raise
            return False
        if not (os.access(self.path, os.W_OK) and os.access(self.path / "entries", os.W_OK)):
            return False
        for left in writing.iterdir():  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                    left.unlink()
        return True

    def _open_index(self) -> sqlite3.Connection:
        """Open the index; one that is missing, unfinished or damaged is made anew."""
        file = self.path / "index.sqlite"
        if not self.is_writable:
            return self._open_index_to_read(file)
        try:
            index = self._connect(file)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            if _is_unavailable(error):
                raise OSError(f"The index of {self.path} cannot be opened: {error}.") from error
            self._move_index_aside(error)
            index = self._connect(file)
        self._index = index
        (version,) = index.execute("PRAGMA user_version").fetchone()
        if version < _SCHEMA_VERSION:
            self.rebuild()
        return index

    def _move_index_aside(self, error: Exception) -> None:
        logger.warning("The index of %s is damaged (%s); it is made anew from the files.", self.path, error)
        file = self.path / "index.sqlite"
        os.replace(file, self.path / "damaged" / file.name)
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{file}{suffix}")

    def _ask(self, question: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """Ask the index; one that answers nonsense is made anew from the files, and asked again."""
        try:
            with self._lock, self._opened() as index:
                return question(index)
        except (sqlite3.DatabaseError, struct.error, TypeError, ValueError) as error:
            if _is_unavailable(error):
                raise OSError(f"The index of {self.path} cannot be used: {error}.") from error
            self._renew_index(error)
        with self._database() as index:
            return question(index)

    def _renew_index(self, error: Exception) -> None:
        with self._lock:
            self._index.close()
            if self.is_writable:
                self._move_index_aside(error)
                self._index = self._open_index()
            else:
                self._index = self._index_in_memory()

    def _open_index_to_read(self, file: Path) -> sqlite3.Connection:
        log = Path(f"{file}-wal")
        has_all = file.exists() and not (log.exists() and log.stat().st_size)  # immutable files are read without logs
        if has_all:
            index = sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False)
            with contextlib.suppress(sqlite3.Error):
                (version,) = index.execute("PRAGMA user_version").fetchone()
                if version == _SCHEMA_VERSION:
                    return index
            index.close()
        return self._index_in_memory()

    def _index_in_memory(self) -> sqlite3.Connection:
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.executescript(_SCHEMA)
        self.rebuild()
        return self._index

    def _connect(self, file: Path) -> sqlite3.Connection:
        # sqlite's own files take this one's permissions. Not opened where it exists: closing it would let go of locks.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        index = sqlite3.connect(file, timeout=_LOCK_SECONDS, check_same_thread=False)
        try:
            (version,) = index.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise StoreVersionError(
                    f"{self.path} was written by a newer version of backprompt. Upgrade to read it."
                )
            index.execute("PRAGMA synchronous = NORMAL")
            if version < _SCHEMA_VERSION:
                _patiently(lambda: index.execute("PRAGMA journal_mode = WAL"))
                index.executescript("DROP TABLE IF EXISTS entries; DROP TABLE IF EXISTS needs;" if version else "")
                index.executescript(_SCHEMA)
            index.execute("SELECT count(*) FROM entries").fetchone()
        except BaseException:
            index.close()
            raise
        return index

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction on the index; its errors are those of a file that cannot be used."""
        try:
            with self._lock, self._opened() as index:
                yield index
        except sqlite3.Error as error:
            raise OSError(f"The index of {self.path} cannot be used: {error}.") from error

    def _forget(self, name: str) -> None:
        """Take a name out of the index, if that can be done: an index that names too much does no harm."""
        if self.is_writable:
            with self._hinting() as index:
                index.execute("DELETE FROM entries WHERE name = ?", (name,))
                index.execute("DELETE FROM needs WHERE name = ?", (name,))

    def _note_use(self, name: str) -> None:
        with self._lock:
            self._uses[name] = time.time()
            if len(self._uses) >= _USES_A_BATCH:
                self._write_uses()

    def _write_uses(self) -> None:
        with self._lock:
            uses = [(used, name) for name, used in self._uses.items()]
            self._uses.clear()
            if uses and self.is_writable:
                with self._hinting() as index:
                    index.executemany("UPDATE entries SET last_used = ? WHERE name = ?", uses)

    @contextlib.contextmanager
    def _hinting(self) -> Iterator[sqlite3.Connection]:
        """A transaction that may fail: what it writes helps, but nothing depends on it."""
        try:
            with self._database() as index:
                yield index
        except OSError as error:
            logger.info("The index of %s was not brought up to date: %s", self.path, error)

    def _set_aside(self, name: str, error: DamagedEntryError) -> None:
        self._move_aside(self._file(name), error)
        self._forget(name)

    def _move_aside(self, file: Path, error: DamagedEntryError) -> None:
        logger.warning("%s is damaged: %s. It is set aside and computed again when needed.", file, error)
        if self.is_writable:
            with contextlib.suppress(FileNotFoundError):  # another thread or process was faster
                os.replace(file, self.path / "damaged" / file.name)


def _insert(index: sqlite3.Connection, header: Header, num_bytes: int, last_used: float) -> None:
    place = (header.name, header.start, header.end, _packed(header.token_ids), header.position)
    text = header.text.encode(errors="replace").decode()  # half of a UTF-16 pair is no text for SQLite
    values = (*place, len(header.token_ids), num_bytes, text, header.error, last_used)
    index.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    needs = [(header.name, name) for name in header.behind]
    index.executemany("INSERT OR IGNORE INTO needs VALUES (?, ?)", needs)


def _patiently(attempt: Callable[[], object]) -> None:
    """Try until another process lets go of the database: changing its mode does not wait for locks by itself."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            attempt()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _is_unavailable(error: Exception) -> bool:
    """Return whether the index may be sound, but cannot be used now; any other error of SQLite's means damage."""
    words = ("locked", "busy", "full", "disk I/O", "readonly", "unable to open")
    return isinstance(error, sqlite3.ProgrammingError) or (  # it is closed
        isinstance(error, sqlite3.OperationalError) and any(word in str(error) for word in words)
    )


def _checked_name(name: object) -> str:
    """Return a name from the index.

    Raises:
        ValueError: it is none, so the index is damaged.

    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{name!r} is no entry's name")
    return name


def _packed(token_ids: Sequence[int]) -> bytes:
    """Return bytes whose order is that of the ids: big-endian, 8 bytes each."""
    return struct.pack(f">{len(token_ids)}Q", *token_ids)


def _unpacked(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f">{len(packed) // 8}Q", packed)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
