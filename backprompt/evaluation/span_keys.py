"""Keys of spans by content: a key names all tokens up to a span's last one, under one root.

A key is computed once and kept with its span (`Span.key`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from backprompt.forest.keys import extend_key, gap_key, group_key
from backprompt.forest.span import Junction, Span


@dataclass(frozen=True)
class Root:
    """The base of all keys, and the names that are hashed into it."""

    key: bytes
    model: str
    tokenizer: str
    dtype: str
    exactness: str


class SpanKeys:
    """The keys of spans under one root.

    Args:
        root: returns the root; called at first use, because it hashes the model's weights.

    """

    def __init__(self, root: Callable[[], Root]) -> None:
        self._make_root = root
        self._root: Root | None = None

    @property
    def root(self) -> Root:
        """The base of all keys; the first use hashes the model's weights."""
        if self._root is None:
            self._root = self._make_root()
        return self._root

    def key_of(self, span: Span) -> bytes:
        """Return the key of all tokens up to the span's last one."""
        if span.parent is None:
            return self.root.key
        for part in span.closure(known=_Keyed()):
            assert part.parent is not None
            before = self.key_of(part.parent) if part.parent.key is None else part.parent.key
            if isinstance(part, Junction):
                branches = [
                    (self.key_of(end), is_frozen)
                    for (end, is_frozen), repeats in part.branches.items()
                    for _ in range(repeats)
                ]
                part.key = group_key(before, branches, part.position)
            else:
                part.key = extend_key(before, part.position, part.token_ids)
        assert span.key is not None
        return span.key

    def start_of(self, span: Span) -> bytes:
        """Return the start key of an entry whose first span is this one."""
        assert span.parent is not None
        before = self.key_of(span.parent)
        return before if span.position == span.parent.stop else gap_key(before, span.position)


class _Keyed:
    """All spans whose key is known."""

    def __contains__(self, span: object) -> bool:
        return isinstance(span, Span) and span.key is not None
