"""Spans of a forest, told by the token ids that lead to them, and blocks for their rows."""

from typing import Any


def spelled(span: Any) -> tuple[int, ...]:
    """The token ids from the root to the end of a span, found by following parents."""
    ids: tuple[int, ...] = ()
    while span.parent is not None:
        ids = span.token_ids + ids
        span = span.parent
    return ids


class AnyBlock:
    """A block of which nothing matters but its identity."""

    def take(self, span: Any, num_rows: int) -> None:
        pass

    def release(self, span: Any, num_rows: int) -> None:
        pass
