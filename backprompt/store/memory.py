"""The simplest store: a dict. It illustrates the contract, and serves tests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from backprompt.arguments import as_string
from backprompt.forking import ForkableLock, watch_store
from backprompt.store.base import (
    Entry,
    Header,
    Match,
    Persist,
    Store,
    as_token_ids,
    check_name,
    check_persist,
    num_common,
)
from backprompt.store.precision import StoredDtype, check_stored_dtype


class MemoryStore(Store):
    """Entries in this process's memory."""

    def __init__(self, *, persist: Persist = "always", dtype: StoredDtype | None = None) -> None:
        self.persist = check_persist(persist)
        self.dtype = check_stored_dtype(dtype)
        self._entries: dict[str, Entry] = {}
        self._lock = ForkableLock()
        watch_store(self._lock)

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return a copy of the entry, so that the caller cannot change stored data."""
        check_name(name)
        entry = self._entries.get(name)
        return None if entry is None else _copy(entry, tensors)

    def put(self, entry: Entry) -> None:
        """Store a copy."""
        copied = _copy(entry, None)
        with self._lock:
            self._entries.setdefault(entry.header.name, copied)

    def contains(self, name: str) -> bool:
        """Return whether the entry exists."""
        check_name(name)
        return name in self._entries

    def delete(self, name: str) -> None:
        """Remove the entry, if it exists."""
        check_name(name)
        with self._lock:
            self._entries.pop(name, None)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the best of all entries that start at this key; see `Store.longest`."""
        start, ids = as_string(start, "start"), as_token_ids(token_ids)
        here = (header for header in self.list() if header.start == start)
        matches = [Match(header.name, num_common(header.token_ids, ids)) for header in here]
        best = max(matches, key=lambda match: match.num_tokens, default=None)
        return best if best is not None and best.num_tokens else None

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether an entry at this key begins with `token_ids` and has more tokens."""
        start, ids = as_string(start, "start"), as_token_ids(token_ids)
        here = (header.token_ids for header in self.list() if header.start == start)
        return any(len(found) > len(ids) and found[: len(ids)] == ids for found in here)

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Return the headers of the entries that exist now."""
        prefix = as_string(text_prefix, "text_prefix")
        with self._lock:
            headers = [entry.header for entry in self._entries.values()]
        return (header for header in headers if header.text.startswith(prefix))

    def close(self) -> None:
        """Do nothing."""


def _copy(entry: Entry, tensors: Collection[str] | None) -> Entry:
    chosen = entry.tensors.items() if tensors is None else [(n, t) for n, t in entry.tensors.items() if n in tensors]
    return Entry(entry.header, {name: tensor.detach().cpu().clone() for name, tensor in chosen})
