"""The prompt representation database: one process stores results, and another process finds them later.

The folder may import keys and the names of tensors. It imports no forest and no model: the archive
(`evaluation/archive.py`) connects them with stores.
A new store implements `Store` of `base.py` in a module here; `memory.py` is the simplest example. Users pass the store
to an `LM`. A new tensor of an entry goes into `schema.py`.
"""

from backprompt.store.base import Entry, Header, Match, Store
from backprompt.store.cached import CachedStore
from backprompt.store.disk import DiskStore
from backprompt.store.memory import MemoryStore
from backprompt.store.object import ObjectStore
from backprompt.store.opening import open_store

__all__ = ["CachedStore", "DiskStore", "Entry", "Header", "Match", "MemoryStore", "ObjectStore", "Store", "open_store"]
