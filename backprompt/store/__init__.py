"""The prompt representation database: what was computed today, found by another process tomorrow."""

from backprompt.store.base import Entry, Header, Match, Store
from backprompt.store.disk import DiskStore
from backprompt.store.memory import MemoryStore

__all__ = ["DiskStore", "Entry", "Header", "Match", "MemoryStore", "Store"]
