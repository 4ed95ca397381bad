"""The prompt representation database: a folder that can be copied.

    prompts.bp/
        entries/3f/3f...-a0....safetensors    one file for each entry, named by its keys (format: file.py)
        index.sqlite                          the data of the files' headers, for lookups (index.py)
        damaged/                              damaged files, and foreign files that had the name of a store's file
        writing/                              files that are being written

folder.py keeps the files, catalog.py the open index.

An entry is written to a temporary file, synced, and renamed to its name, so it exists either as a whole or not at all.
The index is updated afterwards. If the process dies in between, or a file is copied in from elsewhere, the index lacks
the entry until it is rebuilt. Prompts are private: only their owner can read folders and files.

A store deletes only files that a store made. A foreign file with the name of an entry or of the index is moved to
`damaged`; all other files are left unchanged.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress

from backprompt import forking
from backprompt.arguments import as_string
from backprompt.errors import DamagedEntryError, EntryTooLargeError, StoreVersionError
from backprompt.memory.budget import parse_bytes
from backprompt.progress import progress_bar, showing
from backprompt.store.base import Entry, Header, Match, Persist, Store, as_token_ids, check_name, check_persist
from backprompt.store.catalog import Catalog
from backprompt.store.file import read_entry, to_pieces
from backprompt.store.folder import Folder
from backprompt.store.index import Index, StoreStats
from backprompt.store.paths import check_folder, explaining
from backprompt.store.precision import StoredDtype, check_stored_dtype
from backprompt.store.schema import check_header, is_name

logger = logging.getLogger(__name__)


class DiskStore(Store):
    """Entries in a folder, created if missing. A folder without write permission is only read.

    Args:
        path: the folder; it must be missing, empty, or the folder of a store.
        persist: the results that an `LM` stores: see `Store`.
        max_bytes: the limit for the bytes of the files, a number or text such as "10 GB". The least recently used
            entries are deleted first, but each entry only after the entries that continue it.
        dtype: the precision of stored keys, values and hidden states. None: as computed. "float16" and "int8" take less
            space and cost accuracy; the error is measured and kept with each entry.

    Raises:
        OSError: the folder cannot be created or read, is a file, or has other content; `errno` says which.

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
        self._folder = Folder(self.path)
        self.is_writable = self._folder.is_writable
        self._catalog = Catalog(self._folder)
        forking.watch_store(self._catalog)

    def __repr__(self) -> str:
        return f"DiskStore({str(self.path)!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry after checking its bytes; a damaged entry is set aside."""
        check_name(name)
        entry = self._read(name, tensors) if is_name(name) else None
        if entry is not None:
            self._catalog.note_use(name)
        return entry

    def put(self, entry: Entry) -> None:
        """Write the entry to a temporary file, sync and rename the file, and add the entry to the index.

        Raises:
            DamagedEntryError: the entry could not be read again.
            EntryTooLargeError, OSError: see `Store.put`.

        """
        self._folder.check_writable()
        check_header(entry.header)
        final = self._folder.file(entry.header.name)
        try:
            num_bytes = final.stat().st_size
        except FileNotFoundError:
            pieces = to_pieces(entry)
            num_bytes = sum(map(len, pieces))
            if self.max_bytes is not None and num_bytes > self.max_bytes:
                raise EntryTooLargeError(
                    f"An entry of {num_bytes:,} bytes does not fit {self}, whose limit is {self.max_bytes:,} bytes. "
                    "Raise the limit: DiskStore(path, max_bytes=...)."
                ) from None
            with explaining("An entry cannot be stored", self.path):
                self._folder.write(final, pieces)
        # Needed even if the file exists: a process may have died between writing file and index.
        self._catalog.ask(lambda index: index.insert(entry.header, num_bytes, time.time()))
        if self.max_bytes is not None:
            self.prune(show_progress_bar=False)

    def contains(self, name: str) -> bool:
        """Return whether the file exists."""
        check_name(name)
        return is_name(name) and self._folder.file(name).exists()

    def delete(self, name: str) -> None:
        """Remove the file, then its name from the index."""
        check_name(name)
        if not is_name(name):
            return
        file = self._folder.file(name)
        with suppress(FileNotFoundError):
            if file.is_dir():  # no entry, although the name is that of an entry
                self._folder.move_aside(file)
            else:
                os.unlink(file)
        self._catalog.forget(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Move the file into the folder `damaged`, then remove its name from the index."""
        if is_name(name):
            self._folder.move_aside(self._folder.file(name))
            self._catalog.forget(name)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the better one of two neighbours in the index; see `Store.longest`."""
        key, ids = as_string(start, "start"), as_token_ids(token_ids)
        return self._catalog.ask(lambda index: index.longest(key, ids))

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether the index has an entry at this key that begins with `token_ids` and has more tokens."""
        key, ids = as_string(start, "start"), as_token_ids(token_ids)
        return self._catalog.ask(lambda index: index.goes_on(key, ids))

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Return the headers of all entries whose text begins with `text_prefix`, in the order of their texts."""
        prefix = as_string(text_prefix, "text_prefix")
        return self._headers(self._catalog.ask(lambda index: index.names(prefix)))

    def _headers(self, names: Sequence[str]) -> Iterator[Header]:
        for name in names:
            header = self._folder.header(self._folder.file(name))
            if header is not None:
                yield header
            elif not self.contains(name):
                self._catalog.forget(name)

    def find(self, text_prefix: str) -> Sequence[Header]:
        """Return a tuple of the headers that `list` yields."""
        return tuple(self.list(text_prefix))

    def stats(self) -> StoreStats:
        """Return the numbers of stored entries, tokens and bytes, and the largest error."""
        return self._catalog.ask(Index.totals)

    def verify(self, *, show_progress_bar: bool | None = None) -> Sequence[str]:
        """Read every entry, set damaged entries aside, and return the names of entries that cannot be read.

        Args:
            show_progress_bar: by default a bar shows on a terminal if the call takes longer than two seconds.

        """
        unreadable = []
        num_entries = self.stats().num_entries
        with showing(show_progress_bar), progress_bar(num_entries, "verifying", "entries") as bar:
            for file in self._folder.files():
                if not self._can_be_read(file.stem):
                    unreadable.append(file.stem)
                bar.update()
        return unreadable

    def prune(self, max_bytes: int | str | None = None, *, show_progress_bar: bool | None = None) -> Sequence[str]:
        """Delete the least recently used entries until at most `max_bytes` are left; return the deleted names.

        Args:
            max_bytes: a number or text such as "10 GB"; by default the store's own limit.
            show_progress_bar: by default a bar shows on a terminal if the call takes longer than two seconds.

        Raises:
            ValueError: neither limit is given.
            OSError: the folder cannot be written to.

        """
        if max_bytes is None and self.max_bytes is None:
            raise ValueError('prune() needs a limit: store.prune("1 GB"), or a store that was opened with max_bytes.')
        self._folder.check_writable()
        limit = self.max_bytes if max_bytes is None else parse_bytes(max_bytes, "max_bytes")
        assert limit is not None
        excess = self.stats().num_bytes - limit
        deleted: list[str] = []
        if excess > 0:
            self._catalog.write_uses()
        with (
            showing(show_progress_bar),
            progress_bar(max(excess, 0), "deleting", "bytes", is_long=excess > 0) as bar,
        ):
            while excess > 0:
                leaves = self._catalog.ask(Index.least_valuable)
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
        """Rebuild the index from the files alone.

        Args:
            show_progress_bar: by default a bar shows on a terminal if the call takes longer than two seconds.

        """
        self._catalog.rebuild(show_progress_bar=show_progress_bar)

    def close(self) -> None:
        """Write the last uses and close the index."""
        self._catalog.close()

    def _read(self, name: str, tensors: Collection[str] | None) -> Entry | None:
        try:
            entry = read_entry(self._folder.file(name), tensors)
            if entry.header.name != name:
                raise DamagedEntryError(f"the file holds another entry, {entry.header.name}")
        except FileNotFoundError:
            self._catalog.forget(name)  # deleted by another process, or from outside
            return None
        except DamagedEntryError as error:
            self._folder.report(self._folder.file(name), error)
            self.set_aside(name, str(error))
            return None
        except (OSError, MemoryError) as error:  # other entries may be intact
            logger.warning(
                "%s cannot be read (%s). Its tokens are computed again when they are needed.",
                self._folder.file(name),
                error,
            )
            return None
        return entry

    def _can_be_read(self, name: str) -> bool:
        try:
            return self._read(name, None) is not None
        except StoreVersionError as error:
            logger.warning("%s: %s", name, error)
            return True
