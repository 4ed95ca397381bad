"""The simplest store: a dict. It shows what the contract means, and serves tests."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from threading import Lock

from backprompt.store.base import Entry, Header, Persist, Run, Store, check_persist


class MemoryStore(Store):
    """Entries in this process's memory."""

    def __init__(self, *, persist: Persist = "always") -> None:
        self.persist = check_persist(persist)
        self._entries: dict[str, Entry] = {}
        self._lock = Lock()

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return copies, so that the caller cannot change what is stored."""
        entry = self._entries.get(name)
        return None if entry is None else _copy(entry, tensors)

    def put(self, entry: Entry) -> None:
        """Store a copy."""
        copied = _copy(entry, None)
        with self._lock:
            self._entries.setdefault(entry.header.name, copied)

    def contains(self, name: str) -> bool:
        """Return whether there is such an entry."""
        return name in self._entries

    def delete(self, name: str) -> None:
        """Remove the entry, if there is one."""
        with self._lock:
            self._entries.pop(name, None)

    def starting_at(self, start: str, token_id: int) -> Sequence[Run]:
        """Return what starts here."""
        here = (header for header in self.list() if header.start == start and header.token_ids[0] == token_id)
        return [Run(header.name, header.token_ids) for header in here]

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of what is there now."""
        with self._lock:
            headers = [entry.header for entry in self._entries.values()]
        yield from (header for header in headers if header.text.startswith(text_prefix))

    def close(self) -> None:
        """Do nothing."""


def _copy(entry: Entry, tensors: Collection[str] | None) -> Entry:
    chosen = entry.tensors.items() if tensors is None else [(n, t) for n, t in entry.tensors.items() if n in tensors]
    return Entry(entry.header, {name: tensor.detach().cpu().clone() for name, tensor in chosen})
