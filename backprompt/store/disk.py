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
import shutil
import sqlite3
import tempfile
import threading
import time
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backprompt.errors import DamagedEntryError, StoreVersionError
from backprompt.store.base import Entry, Header, Persist, Run, Store, check_persist
from backprompt.store.file import read_entry, read_header, to_bytes

logger = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    name TEXT PRIMARY KEY, start TEXT NOT NULL, first_token INTEGER NOT NULL, token_ids BLOB NOT NULL,
    position INTEGER NOT NULL, num_tokens INTEGER NOT NULL, num_bytes INTEGER NOT NULL, text TEXT NOT NULL,
    last_used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_start ON entries (start, first_token);
CREATE INDEX IF NOT EXISTS by_text ON entries (text);
CREATE INDEX IF NOT EXISTS by_use ON entries (last_used, position);
"""
_USES_A_BATCH = 64


@dataclass(frozen=True)
class StoreStats:
    """What a store holds."""

    num_entries: int
    num_tokens: int
    num_bytes: int


class DiskStore(Store):
    """Entries in a folder, made if it is not there.

    Args:
        path: the folder.
        persist: what an `LM` puts into it: see `Store`.
        max_bytes: how much the files may take; what was not used for longest goes first.

    Raises:
        OSError: the folder cannot be made or read.

    """

    def __init__(
        self, path: str | os.PathLike[str], *, persist: Persist = "always", max_bytes: int | None = None
    ) -> None:
        self.path = Path(path)
        self.persist = check_persist(persist)
        self.max_bytes = max_bytes
        self._lock = threading.RLock()
        self._uses: dict[str, float] = {}  # name -> when it was used, not written to the index yet
        self.is_writable = self._make_folders()
        self._index = self._open_index()

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry after checking its bytes; a damaged one is set aside."""
        try:
            with open(self._file(name), "rb") as file:
                entry = read_entry(file, tensors)
        except FileNotFoundError:
            self._forget(name)  # deleted by another process, or from outside
            return None
        except DamagedEntryError as error:
            self._set_aside(name, error)
            return None
        if entry.header.name != name:
            self._set_aside(name, DamagedEntryError(f"it is the entry {entry.header.name}"))
            return None
        self._note_use(name)
        return entry

    def put(self, entry: Entry) -> None:
        """Write the entry beside, sync it, rename it, and note it in the index."""
        final = self._file(entry.header.name)
        try:
            num_bytes = final.stat().st_size
        except FileNotFoundError:
            content = to_bytes(entry)
            self._write(final, content)
            num_bytes = len(content)
        with self._lock, self._index:  # also where a process died between file and index
            self._insert(entry.header, num_bytes, time.time())
        if self.max_bytes is not None:
            self.prune(self.max_bytes)

    def contains(self, name: str) -> bool:
        """Return whether the file is there."""
        return self._file(name).exists()

    def delete(self, name: str) -> None:
        """Remove the file, then forget it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(name))
        self._forget(name)

    def starting_at(self, start: str, token_id: int) -> Sequence[Run]:
        """Return what starts here, from the index alone."""
        query = "SELECT name, token_ids FROM entries WHERE start = ? AND first_token = ?"
        with self._lock:
            rows = self._index.execute(query, (start, token_id)).fetchall()
        return [Run(name, tuple(array("q", packed))) for name, packed in rows]

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of all entries whose text begins so."""
        with self._lock:
            rows = self._index.execute(
                "SELECT name FROM entries WHERE substr(text, 1, ?) = ? ORDER BY text", (len(text_prefix), text_prefix)
            ).fetchall()
        yield from self._headers([name for (name,) in rows])

    def find(self, text_prefix: str) -> Sequence[Header]:
        """Return the headers of all entries whose text begins so, in the order of their texts."""
        return tuple(self.list(text_prefix))

    def stats(self) -> StoreStats:
        """Return how much is stored."""
        with self._lock:
            row = self._index.execute("SELECT count(*), total(num_tokens), total(num_bytes) FROM entries").fetchone()
        return StoreStats(*map(int, row))

    def verify(self) -> Sequence[str]:
        """Read every entry, set the damaged ones aside, and return their names."""
        names = [file.stem for file in self._files()]
        return [name for name in names if self.get(name) is None and not self.contains(name)]

    def prune(self, max_bytes: int) -> Sequence[str]:
        """Delete what was not used for longest until at most `max_bytes` are left; return the names."""
        self._write_uses()
        with self._lock:
            excess = self.stats().num_bytes - max_bytes
            deleted: list[str] = []
            # Used equally long ago: what stands further behind goes first, as nothing is of use without its beginning.
            order = "SELECT name, num_bytes FROM entries ORDER BY last_used, position DESC"
            for name, num_bytes in self._index.execute(order).fetchall() if excess > 0 else ():
                if excess <= 0:
                    break
                self.delete(name)
                deleted.append(name)
                excess -= num_bytes
        return deleted

    def rebuild(self) -> None:
        """Make the index anew from the files alone."""
        with self._lock, self._index:
            self._index.execute("DELETE FROM entries")
            for file in self._files():
                with contextlib.suppress(FileNotFoundError):  # deleted by another process meanwhile
                    status = file.stat()
                    try:
                        self._insert(_header_of(file), status.st_size, status.st_mtime)
                    except DamagedEntryError as error:
                        self._move_aside(file, error)

    def close(self) -> None:
        """Write the last uses and close the index."""
        with self._lock:
            self._write_uses()
            self._index.close()

    def _write(self, final: Path, content: bytes) -> None:
        final.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.path / "writing")  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(final.parent)

    def _file(self, name: str) -> Path:
        return self.path / "entries" / name[:2] / f"{name}.safetensors"

    def _files(self) -> Iterator[Path]:
        return (self.path / "entries").glob("*/*.safetensors")

    def _headers(self, names: Sequence[str]) -> Iterator[Header]:
        for name in names:
            try:
                yield _header_of(self._file(name))
            except FileNotFoundError:
                continue  # deleted by another process meanwhile
            except DamagedEntryError as error:
                self._set_aside(name, error)

    def _make_folders(self) -> bool:
        """Make what is missing; return whether the folder can be written to."""
        try:
            for folder in (self.path, *(self.path / name for name in ("entries", "damaged", "writing"))):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except PermissionError:
            if not (self.path / "entries").is_dir():
                raise
        return os.access(self.path, os.W_OK) and os.access(self.path / "entries", os.W_OK)

    def _open_index(self) -> sqlite3.Connection:
        file = self.path / "index.sqlite"
        if not self.is_writable:
            return sqlite3.connect(f"{file.absolute().as_uri()}?immutable=1", uri=True, check_same_thread=False)
        is_new = not file.exists()
        try:
            index = self._connect(file)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            logger.warning("The index of %s is damaged (%s); it is made anew from the files.", self.path, error)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{file}{suffix}")
            index, is_new = self._connect(file), True
        self._index = index
        if is_new:
            self.rebuild()
        return index

    def _connect(self, file: Path) -> sqlite3.Connection:
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))  # sqlite's own files take this one's permissions
        index = sqlite3.connect(file, timeout=30, check_same_thread=False)
        try:
            index.execute("PRAGMA journal_mode = WAL")
            index.execute("PRAGMA synchronous = NORMAL")
            (version,) = index.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise StoreVersionError(
                    f"{self.path} was written by a newer version of backprompt. Upgrade to read it."
                )
            index.executescript(_SCHEMA)
            index.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            index.execute("SELECT count(*) FROM entries").fetchone()
        except BaseException:
            index.close()
            raise
        return index

    def _insert(self, header: Header, num_bytes: int, last_used: float) -> None:
        ids = header.token_ids
        place = (header.name, header.start, ids[0], array("q", ids).tobytes(), header.position, len(ids))
        values = (*place, num_bytes, header.text, last_used)
        self._index.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def _note_use(self, name: str) -> None:
        with self._lock:
            self._uses[name] = time.time()
            if len(self._uses) >= _USES_A_BATCH:
                self._write_uses()

    def _write_uses(self) -> None:
        with self._lock:
            if self._uses and self.is_writable:
                with self._index:
                    uses = [(used, name) for name, used in self._uses.items()]
                    self._index.executemany("UPDATE entries SET last_used = ? WHERE name = ?", uses)
            self._uses.clear()

    def _set_aside(self, name: str, error: DamagedEntryError) -> None:
        self._move_aside(self._file(name), error)
        self._forget(name)

    def _forget(self, name: str) -> None:
        if self.is_writable:
            with self._lock, self._index:
                self._index.execute("DELETE FROM entries WHERE name = ?", (name,))

    def _move_aside(self, file: Path, error: DamagedEntryError) -> None:
        logger.warning("%s is damaged: %s. It is set aside and computed again when needed.", file, error)
        if self.is_writable:
            with contextlib.suppress(FileNotFoundError):  # another thread or process was faster
                shutil.move(file, self.path / "damaged" / file.name)


def _header_of(file: Path) -> Header:
    with open(file, "rb") as opened:
        header = read_header(opened)
    if header.name != file.stem:
        raise DamagedEntryError(f"it is the entry {header.name}")
    return header


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
