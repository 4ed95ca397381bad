"""A prompt representation database that many machines can reach: objects in a bucket, or in a shared folder.

    s3://bucket/prompts/
        entries/3f/3f...-a0....safetensors    one object for each entry, in the format of a file (file.py)
        begins/3f.../17.1f4.20.....a0...      an empty object for each entry: lookups list the names (beginnings.py)
        damaged/                              damaged objects

There is no index, because a bucket cannot update an index atomically. An object is stored as a whole or not at all. The
entry is written first, and then the name that lookups list. If a writer dies in between, lookups find the entry only
after a later `put` of the same entry.

Objects are reached through obstore, a library in Rust for S3 and compatible services, Google Cloud Storage, Azure,
folders and memory. An object of up to `SMALL_BYTES` is read in one request. A larger object is read in parts: first its
header, then, in parallel, the chunks of the requested tensors that contain the requested rows.

The times of last use are not kept. The lifecycle rules of a bucket can delete old objects.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from backprompt.arguments import as_string
from backprompt.errors import DamagedEntryError, MissingDependencyError, StoreVersionError
from backprompt.forking import ForkableLock, watch_store
from backprompt.store.base import Entry, Header, Match, Persist, Store, as_token_ids, check_name, check_persist
from backprompt.store.beginnings import FOLDER, Beginning, Beginnings
from backprompt.store.file import MAX_HEADER_BYTES, Contents, ranges_of, read_contents, tensor_of, to_pieces
from backprompt.store.precision import StoredDtype, check_stored_dtype
from backprompt.store.schema import check_header, is_name

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Bucket

logger = logging.getLogger(__name__)

SMALL_BYTES = 1 << 20
HEADER_BYTES = 1 << 16  # read before the length of the header is known
LISTING_SECONDS = 30.0
"""The age up to which a listing is reused. Entries that others put meanwhile are not found, but are computed again."""
MAX_LISTINGS = 10_000  # the number of keys whose listings are remembered
READERS = 16  # the number of headers that are read at once when all entries are listed

# A bucket that cannot be reached must not hold up an evaluation: obstore's own limit is three minutes a request.
_CLIENT_OPTIONS = {"timeout": timedelta(seconds=30), "connect_timeout": timedelta(seconds=5)}
_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}


class ObjectStore(Store):
    """Entries as objects under a URL.

    Args:
        url: such as "s3://bucket/prompts", "gs://bucket/prompts", "az://account/container/prompts", "file:///folder" or
            "memory:///".
        persist: the results that an `LM` stores: see `Store`.
        dtype: the precision of stored keys, values and hidden states: see `DiskStore`.
        options: arguments of obstore's `from_url`, such as `config={"endpoint": ..., "region": ...}`, `client_options`,
            `retry_config` and `credential_provider`. If no access key is given, obstore looks for one in the
            environment and at the provider's own addresses.

    Raises:
        MissingDependencyError: obstore is not installed.
        ValueError: obstore does not know the kind of URL, or an option is unknown.

    """

    def __init__(
        self, url: str, *, persist: Persist = "always", dtype: StoredDtype | None = None, **options: Any
    ) -> None:
        self.url = as_string(url, "url")
        self.persist = check_persist(persist)
        self.dtype = check_stored_dtype(dtype)
        self._options = {"client_options": _CLIENT_OPTIONS, "retry_config": _RETRIES, **options}
        self._bucket = _open(self.url, self._options)
        self._process_id = os.getpid()
        self._lock = ForkableLock()
        watch_store(self._lock)
        self._listings: OrderedDict[str, tuple[float, Beginnings]] = OrderedDict()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry after checking its bytes; a damaged entry is set aside."""
        return self._checked(name, tensors, None)

    def get_beginning(self, name: str, num_rows: int, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry; of a large object, only the first rows are read if they are at most half of all rows."""
        return self._checked(name, tensors, num_rows)

    def _checked(self, name: str, tensors: Collection[str] | None, num_rows: int | None) -> Entry | None:
        check_name(name)
        try:
            return self._read(name, tensors, num_rows) if is_name(name) else None
        except FileNotFoundError:
            self._forget(name)
            return None
        except DamagedEntryError as error:
            logger.warning(
                "%s of %r is damaged: %s. Its tokens are computed again when they are needed.", name, self, error
            )
            self.set_aside(name, str(error))
            return None
        except MemoryError as error:
            logger.warning(
                "%s of %r cannot be read (%s). Its tokens are computed again when they are needed.", name, self, error
            )
            return None

    def put(self, entry: Entry) -> None:
        """Write the entry, then the name for lookups; see `Store.put`."""
        header = entry.header
        check_header(header)
        if "-" in header.end:
            raise DamagedEntryError("its end has a hyphen")
        if not self.contains(header.name):
            self._write(_object(header.name), b"".join(to_pieces(entry)))
        beginning = Beginning.of(header)
        if header.token_ids:
            self._write(f"{FOLDER}/{header.start}/{beginning.name}", b"")
        with self._lock:
            if header.start in self._listings:
                self._listings[header.start][1].add(beginning)

    def contains(self, name: str) -> bool:
        """Return whether the object exists."""
        check_name(name)
        with self._reaching(f"{name} cannot be looked for"), suppress(FileNotFoundError):
            return is_name(name) and bool(self._bucket.head(_object(name)))
        return False

    def delete(self, name: str) -> None:
        """Remove the name for lookups, then the object."""
        check_name(name)
        if not is_name(name):
            return
        start, _, end = name.rpartition("-")
        with self._reaching(f"{name} cannot be deleted"):
            folder = f"{FOLDER}/{start}"
            for path in (*self._paths(folder, f".{end}"), _object(name)):
                with suppress(FileNotFoundError):
                    self._bucket.delete(path)
        self._forget(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Copy the object into the folder `damaged`, then delete it."""
        if is_name(name):
            with self._reaching(f"{name} cannot be set aside"), suppress(FileNotFoundError):
                self._bucket.copy(_object(name), f"damaged/{name}.safetensors")
            self.delete(name)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the better one of two neighbours in a listing at most `LISTING_SECONDS` old; see `Store.longest`."""
        key, ids = as_string(start, "start"), as_token_ids(token_ids)
        if not is_name(key):
            return None
        return self._listing(key).longest(ids, self._ids_of)

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether a listing at most `LISTING_SECONDS` old has an entry with these ids and more."""
        key, ids = as_string(start, "start"), as_token_ids(token_ids)
        return is_name(key) and self._listing(key).goes_on(ids, self._ids_of)

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of all entries whose text begins with `text_prefix`."""
        prefix = as_string(text_prefix, "text_prefix")
        return self._headers(prefix)

    def close(self) -> None:
        """Do nothing: connections are closed automatically."""

    def _headers(self, prefix: str) -> Iterator[Header]:
        with self._reaching("the entries cannot be listed"):
            names = [
                path.rsplit("/", 1)[-1].removesuffix(".safetensors") for path in self._paths("entries", ".safetensors")
            ]
        with ThreadPoolExecutor(READERS) as pool:
            for header in pool.map(self._header_or_none, filter(is_name, names)):
                if header is not None and header.text.startswith(prefix):
                    yield header

    def _header_or_none(self, name: str) -> Header | None:
        try:
            entry = self.get(name, ())
        except StoreVersionError as error:
            logger.warning("%s: %s", name, error)
            return None
        return None if entry is None else entry.header

    def _ids_of(self, name: str) -> Sequence[int] | None:
        entry = self.get(name, ())
        return None if entry is None else entry.header.token_ids

    def _read(self, name: str, tensors: Collection[str] | None, num_rows: int | None) -> Entry:
        path = _object(name)
        with self._reaching(f"{name} cannot be read"):
            num_bytes = self._bucket.head(path)["size"]
            whole = bytes(self._bucket.get(path).bytes()) if num_bytes <= SMALL_BYTES else None
            contents = self._contents(path, num_bytes) if whole is None else read_contents(io.BytesIO(whole), num_bytes)
            if contents.header.name != name:
                raise DamagedEntryError(f"the object holds another entry, {contents.header.name}")
            if whole is not None or (num_rows is not None and 2 * num_rows > len(contents.header.token_ids)):
                num_rows = None
            chosen = {n: place for n, place in contents.places.items() if tensors is None or n in tensors}
            ranges = {n: ranges_of(n, place, num_rows) for n, place in chosen.items()}
            starts = [place.start + start for n, place in chosen.items() for start, _ in ranges[n]]
            ends = [place.start + stop for n, place in chosen.items() for _, stop in ranges[n]]
            if whole is not None:
                pieces = [whole[start:end] for start, end in zip(starts, ends, strict=True)]
            else:
                pieces = list(map(bytes, self._bucket.get_ranges(path, starts=starts, ends=ends))) if starts else []
        left = iter(pieces)
        return Entry(
            contents.header,
            {
                n: tensor_of(n, place, ranges[n], list(islice(left, len(ranges[n]))), num_rows)
                for n, place in chosen.items()
            },
        )

    def _contents(self, path: str, num_bytes: int) -> Contents:
        """Return the contents of a large object's header."""
        begin = bytes(self._bucket.get_range(path, start=0, end=HEADER_BYTES))
        length = 8 + int.from_bytes(begin[:8], "little")
        if HEADER_BYTES < length <= min(8 + MAX_HEADER_BYTES, num_bytes):
            begin += bytes(self._bucket.get_range(path, start=HEADER_BYTES, end=length))
        return read_contents(io.BytesIO(begin), num_bytes)

    def _write(self, path: str, content: bytes) -> None:
        with self._reaching("an entry cannot be stored"):
            self._bucket.put(path, content)

    def _listing(self, start: str) -> Beginnings:
        """Return the entries at a key from a listing that is at most `LISTING_SECONDS` old."""
        with self._lock:
            listed_at, listing = self._listings.get(start, (-LISTING_SECONDS, None))
        if listing is None or time.monotonic() - listed_at > LISTING_SECONDS:
            now = time.monotonic()
            with self._reaching("the entries of a key cannot be listed"):
                listing = Beginnings(start, (path.rsplit("/", 1)[-1] for path in self._paths(f"{FOLDER}/{start}")))
            with self._lock:
                self._listings[start] = (now, listing)
                self._listings.move_to_end(start)
                while len(self._listings) > MAX_LISTINGS:
                    self._listings.popitem(last=False)
        return listing

    def _paths(self, folder: str, ending: str = "") -> Iterator[str]:
        listed = chain.from_iterable(self._bucket.list(folder))
        return (path for path in (meta["path"] for meta in listed) if path.endswith(ending))

    def _forget(self, name: str) -> None:
        start, _, end = name.rpartition("-")
        with self._lock:
            if start in self._listings:
                self._listings[start][1].remove(end)

    @contextmanager
    def _reaching(self, failed: str) -> Iterator[None]:
        """Turn obstore's errors into OSErrors that name the failed action and the next step.

        A forked process lacks the threads on which obstore sends requests, and obstore would wait for them forever.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        if self._process_id != os.getpid():
            reason = "this process was forked from the one that opened the store"
            raise OSError(errno.EIO, f"{failed}: {reason}. Start processes with the method 'spawn'", self.url)
        try:
            yield
        except BaseError as error:
            is_refused = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
            advice = "Check the keys and their permissions" if is_refused else "Check the address and the network"
            reason = str(error).split("\n", 1)[0]
            number = errno.EACCES if is_refused else errno.EIO
            raise OSError(number, f"{failed}: {reason}. {advice}", self.url) from error


def _open(url: str, options: dict[str, Any]) -> Bucket:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise MissingDependencyError(f"A store at {url} needs obstore: pip install obstore") from error
    if url.startswith("file://"):
        return from_url(url, mkdir=True, automatic_cleanup=False)
    try:
        return from_url(url, **({} if url.startswith("memory:") else options))
    except (BaseError, TypeError) as error:
        raise ValueError(f"No store can be opened at {url!r}: {str(error).splitlines()[0]}") from error


def _object(name: str) -> str:
    return f"entries/{name[:2]}/{name}.safetensors"
