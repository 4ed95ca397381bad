"""A near store in front of a far one: an entry that was read from the far store is read from the near one next time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from backprompt.errors import EntryTooLargeError
from backprompt.store.base import Entry, Header, Match, Store

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


class CachedStore(Store):
    """The entries of a far store, and a near store that keeps copies of the entries that were read or put.

    `persist` and `dtype` are those of the far store. If a lookup in the far store fails, one warning is logged, and
    only the near store is read after that.

    Args:
        far: the store that many machines reach, such as an `ObjectStore`.
        near: the store of this machine, with a budget of its own: `DiskStore("cache.bp", max_bytes="20 GB")`.

    Raises:
        ValueError: the two stores have different dtypes.

    """

    def __init__(self, far: Store, near: Store) -> None:
        if far.dtype != near.dtype:
            raise ValueError(
                f"A near store of dtype={near.dtype!r} cannot keep copies of a far store of dtype={far.dtype!r}: "
                "open both with the same dtype."
            )
        self.far, self.near = far, near
        self.persist, self.dtype = far.persist, far.dtype
        self._reads_far = True

    def __repr__(self) -> str:
        return f"CachedStore({self.far!r}, {self.near!r})"

    def get(self, name: str, tensors: Collection[str] | None = None) -> Entry | None:
        """Return the entry from the near store, or else from the far store, and put a whole copy into the near one."""
        entry = self.near.get(name, tensors)
        if entry is None and self._reads_far:
            entry = self.far.get(name)
            if entry is not None:
                self._keep(entry)
                if tensors is not None:
                    entry = Entry(entry.header, {n: tensor for n, tensor in entry.tensors.items() if n in tensors})
        return entry

    def put(self, entry: Entry) -> None:
        """Put the entry into the far store, then into the near one; errors of the near one are logged."""
        self.far.put(entry)
        self._keep(entry)

    def contains(self, name: str) -> bool:
        """Return whether one of the stores has the entry."""
        return self.near.contains(name) or (self._reads_far and self.far.contains(name))

    def delete(self, name: str) -> None:
        """Remove the entry from both stores. Other machines may keep copies."""
        self.far.delete(name)
        self.near.delete(name)

    def set_aside(self, name: str, reason: str) -> None:
        """Remove an entry that is damaged from both stores."""
        self.far.set_aside(name, reason)
        self.near.set_aside(name, reason)

    def longest(self, start: str, token_ids: Sequence[int]) -> Match | None:
        """Return the longer match of the two stores. If the near one matches all ids, the far one is not searched."""
        near = self.near.longest(start, token_ids)
        if near is not None and near.num_tokens == len(token_ids):
            return near
        far = self._asked(lambda: self.far.longest(start, token_ids))
        if near is None or far is None:
            return near or far
        return far if far.num_tokens > near.num_tokens else near

    def goes_on(self, start: str, token_ids: Sequence[int]) -> bool:
        """Return whether one of the stores may have an entry at this key with these ids and more."""
        return self.near.goes_on(start, token_ids) or bool(self._asked(lambda: self.far.goes_on(start, token_ids)))

    def list(self, text_prefix: str = "") -> Iterator[Header]:
        """Yield the headers of the far store, or of the near store if the far one cannot be read."""
        return (self.far if self._reads_far else self.near).list(text_prefix)

    def close(self) -> None:
        """Close both stores."""
        self.far.close()
        self.near.close()

    def _asked(self, look_up: Callable[[], Found]) -> Found | None:
        """Return the result of a lookup in the far store; None if the far store cannot be read."""
        if not self._reads_far:
            return None
        try:
            return look_up()
        except OSError as error:
            self._reads_far = False
            logger.warning("%r cannot be read (%s). From now on only %r is read.", self.far, error, self.near)
            return None

    def _keep(self, entry: Entry) -> None:
        try:
            self.near.put(entry)
        except EntryTooLargeError as error:
            logger.debug("%s has no copy in %r: %s", entry.header.name, self.near, error)
        except OSError as error:
            logger.warning("%r keeps no copy of %s (%s).", self.near, entry.header.name, error)
