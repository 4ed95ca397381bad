"""The store that a path or a URL names."""

from __future__ import annotations

import os

from backprompt.store.base import Store
from backprompt.store.disk import DiskStore
from backprompt.store.object import ObjectStore


def open_store(where: str | os.PathLike[str]) -> Store:
    """Return the store at a URL ("s3://bucket/prompts") or in a folder ("prompts.bp").

    Raises:
        OSError: the folder cannot be used for a store.
        MissingDependencyError: the URL needs a package that is not installed.
        ValueError: obstore does not know the kind of URL.

    """
    return ObjectStore(where) if isinstance(where, str) and is_url(where) else DiskStore(where)


def is_url(where: str) -> bool:
    """Return whether the string is a URL, not the path of a folder."""
    return "://" in where
