"""Spans of a forest, told by the token ids that lead to them."""

from typing import Any


def spelled(span: Any) -> tuple[int, ...]:
    """The token ids from the root to the end of a span, found by following parents."""
    ids: tuple[int, ...] = ()
    while span.parent is not None:
        ids = span.token_ids + ids
        span = span.parent
    return ids
