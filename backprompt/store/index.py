"""The index of a folder of entries: the data of their headers, in SQLite, for lookups.

The index contains only data of the files, so a damaged index is rebuilt from them (catalog.py). An index counts as
damaged in three cases: its schema differs from that of this version, even by a trigger, a view or a column; an answer
has another type; or a query takes longer than it can take on a sound index. An index of a newer version is not damaged:
that version may be using the index, so it is left unchanged and not queried.

A folder may come from anywhere, so its index may be hostile. No code in its schema is trusted, the work of SQLite on it
is bounded, and its schema is compared before any other query. Only a regular file is opened.
"""

from __future__ import annotations

import errno
import math
import os
import sqlite3
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

from backprompt.store.base import Header, Match, num_common
from backprompt.store.paths import explaining
from backprompt.store.schema import MAX_NAME_LENGTH, is_name
from backprompt.visible import abbreviated

SUFFIXES = ("", "-wal", "-shm", "-journal")
"""The suffixes of the files that SQLite makes for one database."""

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
"""Schemas are compared exactly, so each change of `_SCHEMA` needs a new version."""

_NAME = f"CASE WHEN length(name) <= {MAX_NAME_LENGTH} THEN name END"
_TOKEN_IDS = "CASE WHEN length(token_ids) <= :max_bytes THEN substr(token_ids, 1, length(:asked)) END"
_NEXT = (
    f"SELECT {_NAME}, {_TOKEN_IDS} FROM entries WHERE start = :start AND token_ids > :asked ORDER BY token_ids LIMIT 1"
)
"""In the order of token ids, entries that begin with the given sequence and have more come right behind it."""

_NEIGHBOURS = (
    f"SELECT {_NAME}, {_TOKEN_IDS} FROM entries WHERE start = :start AND token_ids <= :asked "
    "ORDER BY token_ids DESC LIMIT 1",
    _NEXT,
)
"""In the order of token ids, the entry with the longest common prefix is next to the given sequence."""

_NAMES_BY_TEXT = f"SELECT {_NAME} FROM entries WHERE substr(text, 1, ?) = ? ORDER BY text"
TOTALS = """
SELECT count(name), ifnull(sum(num_tokens), 0), ifnull(sum(num_bytes), 0), ifnull(max(error), 0.0) FROM entries
"""
_LEAST_VALUABLE = f"""
SELECT {_NAME}, num_bytes FROM entries AS entry
WHERE NOT EXISTS (SELECT 1 FROM entries AS other WHERE other.start = entry.end)
AND NOT EXISTS (SELECT 1 FROM needs WHERE needs.behind = entry.name)
ORDER BY last_used, position DESC LIMIT 100
"""
"""Entries that no other entry continues, from their end or from within. (Without its beginning an entry is useless.)"""

MAX_VALUE_BYTES = 128 << 20
"""The size limit of a row: four times the largest header of an entry (file.py)."""

_LOCK_SECONDS = 30.0
_LOOKUP_SECONDS = 10.0
SCAN_SECONDS = 60.0
"""Limits of a query's processor time, without waiting: many times what a lookup, or a walk through all rows, takes."""

_STEPS_A_CHECK = 100_000
"""The number of SQLite instructions between two checks of the time: some milliseconds."""


class DamagedIndexError(Exception):
    """The index differs from an index of this version, or gives invalid answers. Callers of a store never see this."""


class NewerIndexError(Exception):
    """A newer version of backprompt made the index. Callers of a store never see this."""


@dataclass(frozen=True)
class StoreStats:
    """The contents of a store; `largest_error` is that of reduced precision (`Header.error`), or 0."""

    num_entries: int
    num_tokens: int
    num_bytes: int
    largest_error: float


class Index:
    """Queries to one index, one at a time: the owner of the index holds a lock around each.

    Every method raises DamagedIndexError if the index is damaged, and OSError if it cannot be used now.

    Attributes:
        is_finished: whether the index was built from all files.

    """

    def __init__(self, connection: sqlite3.Connection, file: Path | None) -> None:
        self._connection = connection
        self._file = file
        self._deadline = _Deadline()
        self.is_finished = True
        connection.set_progress_handler(self._deadline.is_over, _STEPS_A_CHECK)
        _harden(connection)
        finalize(self, connection.close)  # in case no caller closes the index

    @classmethod
    def open(cls, file: Path) -> Index:
        """Return an index opened for reading and writing, created if missing.

        Raises:
            NewerIndexError: a newer version of backprompt made the index.

        """
        _check_kind_of(file)
        with suppress(FileExistsError), explaining("The index of a store cannot be made", file):
            # SQLite's own files get these permissions. An existing file stays unopened: closing it would release locks.
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        return cls._connected(str(file), file, is_uri=False, prepare=cls._prepare)

    @classmethod
    def open_to_read(cls, file: Path) -> Index | None:
        """Return an index opened only for reading; None if it is missing or cannot be read completely."""
        log = Path(f"{file}-wal")
        try:
            _check_kind_of(file)
            if not file.exists() or (log.exists() and log.stat().st_size):  # immutable files are read without logs
                return None
            return cls._connected(f"{file.as_uri()}?immutable=1", file, is_uri=True, prepare=cls._check_finished)
        except (DamagedIndexError, NewerIndexError, OSError):
            return None

    @classmethod
    def in_memory(cls) -> Index:
        """Return an empty index in memory."""
        index = cls(sqlite3.connect(":memory:", check_same_thread=False), None)
        index._connection.executescript(_SCHEMA)
        return index

    @classmethod
    def _connected(cls, name: str, file: Path, *, is_uri: bool, prepare: Callable[[Index], None]) -> Index:
        with _translated(file):
            connection = sqlite3.connect(name, timeout=_LOCK_SECONDS, check_same_thread=False, uri=is_uri)
        try:
            with _translated(file):
                index = cls(connection, file)
            prepare(index)
        except BaseException:
            connection.close()
            raise
        return index

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the better one of two neighbours of these ids; see `Store.longest`."""
        given = _place(start, token_ids)
        with self._transaction():
            rows = [row for query in _NEIGHBOURS for row in self._ask(query, given)]
        matches = [Match(_checked_name(name), num_common(_unpacked(packed), token_ids)) for name, packed in rows]
        best = max(matches, key=lambda match: match.num_tokens, default=None)
        return best if best is not None and best.num_tokens else None

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether an entry at this key begins with these ids and has more."""
        with self._transaction():
            rows = self._ask(_NEXT, _place(start, token_ids))
        return any(_unpacked(packed) == tuple(token_ids) for _, packed in rows)

    def names(self, text_prefix: str) -> list[str]:
        """Return the names of all entries whose text begins with `text_prefix`, in the order of their texts."""
        with self._transaction():
            rows = self._ask(_NAMES_BY_TEXT, (len(text_prefix), text_prefix), SCAN_SECONDS)
        return [_checked_name(name) for (name,) in rows]

    def totals(self) -> StoreStats:
        """Return the numbers of stored entries, tokens and bytes, and the largest error."""
        with self._transaction():
            ((num_entries, num_tokens, num_bytes, error),) = self._ask(TOTALS, (), SCAN_SECONDS)
        return StoreStats(
            _checked_number(num_entries),
            _checked_number(num_tokens),
            _checked_number(num_bytes),
            _checked_error(error),
        )

    def least_valuable(self) -> list[tuple[str, int]]:
        """Return names and bytes of entries that may be deleted, the least recently used first."""
        with self._transaction():
            rows = self._ask(_LEAST_VALUABLE, (), SCAN_SECONDS)
        return [(_checked_name(name), _checked_number(num_bytes, least=1)) for name, num_bytes in rows]

    def rebuild(self, described: Iterable[tuple[Header, int, float]]) -> None:
        """Replace all rows by these headers, each with its size in bytes and the time of its last use."""
        with self._transaction():
            for table in ("entries", "needs"):  # with a condition, row by row, so that the time limit applies
                self._ask(f"DELETE FROM {table} WHERE true", (), SCAN_SECONDS)
            for header, num_bytes, last_used in described:
                self._insert(header, num_bytes, last_used)
            # Set last: an index whose building was interrupted is built again.
            self._ask(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        self.is_finished = True

    def insert(self, header: Header, num_bytes: int, last_used: float) -> None:
        """Add an entry."""
        with self._transaction():
            self._insert(header, num_bytes, last_used)

    def forget(self, name: str) -> None:
        """Remove a name, if it exists."""
        with self._transaction():
            self._ask("DELETE FROM entries WHERE name = ?", (name,))
            self._ask("DELETE FROM needs WHERE name = ?", (name,))

    def note_uses(self, uses: Iterable[tuple[str, float]]) -> None:
        """Record the times of uses of entries."""
        with self._transaction():
            for name, used in uses:
                self._ask("UPDATE entries SET last_used = ? WHERE name = ?", (used, name))

    def close(self) -> None:
        """Close the index; a second call does nothing."""
        self._connection.close()

    def _insert(self, header: Header, num_bytes: int, last_used: float) -> None:
        place = (header.name, header.start, header.end, _packed(header.token_ids), header.position)
        text = header.text.encode(errors="replace").decode()  # SQLite refuses half of a UTF-16 pair
        values = (*place, len(header.token_ids), num_bytes, text, header.error, last_used)
        self._ask("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        for behind in header.behind:
            self._ask("INSERT OR IGNORE INTO needs VALUES (?, ?)", (header.name, behind))

    def _prepare(self) -> None:
        """Compare the schema with our own, or create the schema if there is none."""
        with _translated(self._file):
            version, schema = self._version(), self._schema()
            if not schema and version == 0:
                _patiently(lambda: self._ask("PRAGMA journal_mode = WAL"))
                # All at once: other processes must not see a part of it.
                _patiently(lambda: self._connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;"))
            else:
                self._check(version, schema)
            self._ask("PRAGMA synchronous = NORMAL")
            self._ask("SELECT 1 FROM entries LIMIT 1")
        self.is_finished = version == _SCHEMA_VERSION

    def _check_finished(self) -> None:
        with _translated(self._file):
            version = self._version()
            self._check(version, self._schema())
        if version != _SCHEMA_VERSION:
            raise DamagedIndexError("the index was not finished")

    def _check(self, version: int, schema: list[tuple[Any, ...]]) -> None:
        if version > _SCHEMA_VERSION and any(row[:2] == ("table", "entries") for row in schema):
            raise NewerIndexError(f"{self._file} was made by a newer version of backprompt")
        if schema != _own_schema():
            raise DamagedIndexError("the file does not have the tables of an index")

    def _version(self) -> int:
        ((version,),) = self._ask("PRAGMA user_version")
        return _checked_number(version)

    def _schema(self) -> list[tuple[Any, ...]]:
        # The length of the SQL is bounded by the limit of SQLite for a statement (_harden).
        return self._ask("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name LIMIT 100")

    def _ask(
        self, statement: str, given: Sequence[Any] | dict[str, Any] = (), seconds: float = _LOOKUP_SECONDS
    ) -> list[Any]:
        """Return all rows of the answer."""
        self._deadline.set(seconds)
        try:
            return self._connection.execute(statement, given).fetchall()
        except UnicodeDecodeError as error:  # a message of SQLite that quotes bytes of the file
            raise DamagedIndexError(str(error)) from error
        finally:
            self._deadline.set(math.inf)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _translated(self._file), self._connection:
            yield


class _Deadline:
    """The time limit of a query, in processor time of the calling thread."""

    def __init__(self) -> None:
        self._until = math.inf

    def set(self, seconds: float) -> None:
        """Set the limit to this many seconds from now."""
        self._until = time.thread_time() + seconds

    def is_over(self) -> bool:
        """Return whether the time has ended."""
        return time.thread_time() > self._until


@cache
def _own_schema() -> list[tuple[Any, ...]]:
    index = Index.in_memory()
    try:
        return index._schema()
    finally:
        index.close()


def _harden(connection: sqlite3.Connection) -> None:
    """Bound the work that a hostile file can cause in SQLite, as far as this version of Python can."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    if sys.version_info >= (3, 11):
        for limit, most in (
            (sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
            (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000),
            (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 100),
            (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 10),
            (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1),
            (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        ):
            connection.setlimit(limit, most)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_VIEW, False)


def _check_kind_of(file: Path) -> None:
    """Raise if a file of the database is a folder, a link, a pipe or the like, without opening it."""
    for suffix in SUFFIXES:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(f"{file}{suffix}").st_mode):
                raise DamagedIndexError(f"{file.name}{suffix} is not a regular file")


@contextmanager
def _translated(file: Path | None) -> Iterator[None]:
    """Translate errors of SQLite: the index is damaged, or cannot be used now."""
    try:
        yield
    except sqlite3.ProgrammingError:  # the query is wrong, whatever the index is
        raise
    except sqlite3.Error as error:
        number, advice = _why_unavailable(error)
        if number is None:
            raise DamagedIndexError(str(error)) from error
        reason = str(error).rstrip(".")
        raise OSError(number, f"The index of a store cannot be used: {reason}. {advice}", str(file)) from error


def _why_unavailable(error: Exception) -> tuple[int | None, str]:
    """Return an error number and advice if the index may be sound but cannot be used now; else None and ""."""
    if isinstance(error, sqlite3.OperationalError):
        for word, number, advice in _UNAVAILABLE:
            if word in str(error):
                return number, advice
    return None, ""


_UNAVAILABLE = (
    ("locked", errno.EBUSY, "Another process has been writing to the index for long. Try again."),
    ("busy", errno.EBUSY, "Another process has been writing to the index for long. Try again."),
    ("full", errno.ENOSPC, "Free some space."),
    ("disk I/O", errno.EIO, "The disk failed to read or write the index. Check the disk."),
    (
        "readonly",
        errno.EACCES,
        "You have no permission to write to the index. Change its permissions, or copy the store.",
    ),
    ("unable to open", errno.EACCES, "Check the permissions of the folder and the free space."),
)


def _patiently(attempt: Callable[[], object]) -> None:
    """Retry until other processes release the database: changing its mode does not wait for locks by itself."""
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            attempt()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _checked_name(name: object) -> str:
    """Return a name from the index."""
    if not isinstance(name, str) or not is_name(name):
        raise DamagedIndexError(f"{abbreviated(str(name))} is not the name of an entry")
    return name


def _checked_number(number: object, least: int = 0) -> int:
    if not isinstance(number, int) or number < least:
        raise DamagedIndexError(f"{abbreviated(str(number))} is not a valid count")
    return number


def _checked_error(error: object) -> float:
    if not isinstance(error, float) or not 0 <= error < math.inf:
        raise DamagedIndexError(f"{abbreviated(str(error))} is not a valid error")
    return error


def _place(start: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the parameters of the queries for the neighbours of these ids."""
    return {"start": start, "asked": _packed(token_ids), "max_bytes": MAX_VALUE_BYTES}


def _packed(token_ids: Sequence[int]) -> bytes:
    """Return bytes in the order of the ids: big-endian, 8 bytes each."""
    return struct.pack(f">{len(token_ids)}Q", *token_ids)


def _unpacked(packed: object) -> tuple[int, ...]:
    if not isinstance(packed, bytes) or len(packed) % 8:
        raise DamagedIndexError("its token ids are not valid")
    return struct.unpack(f">{len(packed) // 8}Q", packed)
