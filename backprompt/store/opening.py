"""Which store a path or a URL names."""

from __future__ import annotations

import os

from backprompt.store.base import Store
from backprompt.store.disk import DiskStore
from backprompt.store.object import ObjectStore


def open_store(where: str | os.PathLike[str]) -> Store:
    """Return the store at a URL ("s3://bucket/prompts") or in a folder ("prompts.bp").

    Raises:
        OSError: the folder cannot be that of a store.
        MissingDependencyError: the URL needs a package that is not installed.
        ValueError: the URL is none that obstore knows.

    """
    return ObjectStore(where) if isinstance(where, str) and is_url(where) else DiskStore(where)


def is_url(where: str) -> bool:
    """Return whether this is a URL, and no path of a folder."""
    return "://" in where
