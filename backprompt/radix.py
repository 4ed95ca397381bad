"""The forest of token spans: a radix tree, pure Python, no tensors.

Each `Span` is a run of token ids that every text through it shares; its children differ in their first token. Because
attention is causal, the representation of a token depends on the tokens before it only, so two texts with a common
beginning share spans. A span may hold its *states* (what logits and log-probabilities are read off) or not, and with
them its *keys and values* (what lets it be continued) or not. The ancestors of a span that holds either hold it, too.
Each of the two lies either on the model's device or in a second pool of memory; of what lies on the device the same is
true.

    (root) -- "the cat" --+-- " sat"
                          +-- " ran" --+-- " off"
                                       +-- " home"

Splitting a span leaves the object in place as the *lower* part (a new span becomes the upper one), so whoever holds
the span at which a text ends still holds the end of that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Rows(Protocol):
    """Where something of a span lies: consecutive rows of a block of tensors that this module never looks into."""

    @property
    def block(self) -> object:
        """The block, by identity."""
        ...

    @property
    def start(self) -> int:
        """The first row."""
        ...

    @property
    def stop(self) -> int:
        """The row after the last."""
        ...

    def split(self, num_tokens: int) -> tuple[Rows, Rows]:
        """Return the first `num_tokens` rows and the others; both share the block."""
        ...


SLOTS = ("rows", "states", "host_rows", "host_states")
"""The attributes of a `Span` that say where something of it lies."""


class Span:
    """A run of token ids, the position of its first one, what it continues and what continues it.

    Attributes:
        rows: where its keys and values lie on the model's device; None where they do not.
        states: where its final hidden states and log-probabilities lie there; None where they do not.
        host_rows, host_states: where they lie in the second pool (host.py); never in both.
        was_computed: whether it was computed before, though nothing of it may be held now.
        num_pins: how many pins hold the texts that end here.
        credit, last_used: when it may be evicted: see memory.py.
        is_stored: whether a store has all up to its end.
        error: what storing it in fewer bits cost, where it was read back from a store that does so; see store/.
        key: what names all up to its end (identity.py); None where nobody has asked yet.

    """

    __slots__ = (
        "children",
        "credit",
        "error",
        "host_rows",
        "host_states",
        "is_stored",
        "key",
        "last_used",
        "num_pins",
        "parent",
        "position",
        "rows",
        "states",
        "token_ids",
        "was_computed",
    )

    def __init__(self, token_ids: tuple[int, ...], position: int, parent: Span | None) -> None:
        self.token_ids = token_ids
        self.position = position
        self.parent = parent
        self.children: dict[int, Span] = {}
        self.rows: Rows | None = None
        self.states: Rows | None = None
        self.host_rows: Rows | None = None
        self.host_states: Rows | None = None
        self.was_computed = False
        self.num_pins = 0
        self.credit = 0.0
        self.last_used = 0
        self.is_stored = False
        self.error = 0.0
        self.key: bytes | None = None

    def __repr__(self) -> str:
        if self.states is None:
            state = "not held" if self.host_states is None else "held in the second pool"
        else:
            state = "held, without keys" if self.rows is None else "held"
        return f"Span({len(self.token_ids)} tokens at {self.position}, {len(self.children)} children, {state})"

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is held, neither on the device nor in the second pool."""
        return self.states is None and self.host_states is None

    def path(self) -> list[Span]:
        """Return the spans from the first below the root down to this one."""
        spans: list[Span] = []
        span: Span = self
        while span.parent is not None:
            spans.append(span)
            span = span.parent
        spans.reverse()
        return spans


class Forest:
    """All spans, under one empty root."""

    def __init__(self) -> None:
        self.root = Span((), 0, None)

    def insert(self, token_ids: Sequence[int]) -> Span:
        """Return the span that ends exactly where `token_ids` end, splitting and adding spans as needed."""
        ids = tuple(token_ids)
        span, num_matched = self.root, 0
        while num_matched < len(ids):
            child = span.children.get(ids[num_matched])
            if child is None:
                child = Span(ids[num_matched:], num_matched, span)
                span.children[ids[num_matched]] = child
                return child
            num_common = _common_length(child.token_ids, ids, num_matched)
            if num_common < len(child.token_ids):
                child = self.split(child, num_common)
            span, num_matched = child, num_matched + num_common
        return span

    def num_computed(self, token_ids: Sequence[int]) -> int:
        """Return of how many of the first of `token_ids` the keys and values are held; changes nothing."""
        ids = tuple(token_ids)
        span, num_matched = self.root, 0
        while num_matched < len(ids):
            child = span.children.get(ids[num_matched])
            if child is None or child.rows is None:
                break
            num_common = _common_length(child.token_ids, ids, num_matched)
            num_matched += num_common
            if num_common < len(child.token_ids):
                break
            span = child
        return num_matched

    def split(self, span: Span, num_tokens: int) -> Span:
        """Cut `span` after `num_tokens` and return the new upper part; `span` itself becomes the lower part."""
        assert span.parent is not None and 0 < num_tokens < len(span.token_ids), (span, num_tokens)
        upper = Span(span.token_ids[:num_tokens], span.position, span.parent)
        span.parent.children[upper.token_ids[0]] = upper
        span.token_ids = span.token_ids[num_tokens:]
        span.position += num_tokens
        span.parent = upper
        upper.children[span.token_ids[0]] = span
        for slot in SLOTS:
            place: Rows | None = getattr(span, slot)
            if place is not None:
                first, second = place.split(num_tokens)
                setattr(upper, slot, first)
                setattr(span, slot, second)
        upper.was_computed, upper.is_stored, upper.error = span.was_computed, span.is_stored, span.error
        upper.credit, upper.last_used = span.credit, span.last_used
        return upper

    def prune(self) -> None:
        """Remove the spans of which nothing is held, and what continues them."""
        for span in list(self.spans()):
            if span.is_empty and span.parent is not None:
                span.parent.children.pop(span.token_ids[0], None)

    def clear(self) -> None:
        """Forget everything: nothing of any span is held any more, and none is found any more."""
        for span in self.spans():
            for slot in SLOTS:
                setattr(span, slot, None)
        self.root.children = {}

    def spans(self) -> Iterator[Span]:
        """Yield every span below the root, each before what continues it, depth first."""
        stack = list(reversed(self.root.children.values()))
        while stack:
            span = stack.pop()
            yield span
            stack += reversed(span.children.values())


def _common_length(span_ids: tuple[int, ...], ids: tuple[int, ...], offset: int) -> int:
    """Return how many of `span_ids` equal `ids` from `offset` on."""
    window = ids[offset : offset + len(span_ids)]
    if window == span_ids:
        return len(span_ids)
    num_common = 0
    for a, b in zip(span_ids, window, strict=False):
        if a != b:
            break
        num_common += 1
    return num_common
