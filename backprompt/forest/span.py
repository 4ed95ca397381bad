"""Spans of tokens: the nodes of a radix tree with junctions, pure Python, no tensors.

Each `Span` is a run of token ids that every text through it shares; its children differ in their first token. Because
attention is causal, the representation of a token depends on the tokens before it only, so two texts with a common
beginning share spans. A span may hold its *states* (what logits and log-probabilities are read off) or not, and with
them its *keys and values* (what lets it be continued) or not. The ancestors of a span that holds either hold it, too.
Each of the two lies either on the model's device or in a second pool of memory; of what lies on the device the same is
true.

    (root) -- "the cat" --+-- " sat"
                          +-- " ran" --+-- " off"
                                       +-- " home"

The *end* of a text is the span that holds its last token and none behind it, or a junction where it ends in a group.
Inserting a text splits a span where that is needed for it to have one.

Splitting a span leaves the object in place as the *lower* part (a new span becomes the upper one), so whoever holds
the end of a text still holds it.

A *junction* stands where a group of branches ends: a span without tokens that has several parents, what the group
stands behind and the ends of its branches. Branches are spans like all others: a shared one continues what the group
stands behind, a frozen one stands at the root, and a sequential one continues it at a later position.

    context + (a | b) + question        context --+-- a ----+
                                                  +-- b ----+
                                                  +-- (junction) -- question

Attention of what stands behind a junction counts a span once for each branch that it is reached through.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from backprompt.tokens.graph import TokenIds

BranchEnd: TypeAlias = "tuple[Span, bool]"
"""The end of a branch, and whether the branch is frozen."""


@dataclass(frozen=True, slots=True)
class LaterKey:
    """The key of a span that leaves a gap of positions behind what it continues: its position and its first token."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class JunctionKey:
    """The key of a junction: how often each branch ends there. Spans are told apart by identity.

    An end stays the end when spans are split.
    """

    num_branches: frozenset[tuple[BranchEnd, int]]

    @classmethod
    def of(cls, ends: Iterable[BranchEnd]) -> JunctionKey:
        """Return the key of the junction at which these branches end; their order does not matter."""
        return cls(frozenset(Counter(ends).items()))


ChildKey: TypeAlias = "int | LaterKey | JunctionKey"
"""By which a span is found among the children of another; for most the first token."""


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

    @property
    def num_bytes(self) -> int:
        """Their share of the block's bytes."""
        ...

    def split(self, num_tokens: int) -> tuple[Rows, Rows]:
        """Return the first `num_tokens` rows and the others; both share the block."""
        ...


Kind: TypeAlias = Literal["states", "keys_values"]
"""Which of the two that a span may hold; `KINDS`: both. A span holds its keys and values only with its states."""

KINDS: tuple[Kind, ...] = ("states", "keys_values")

Pool: TypeAlias = Literal["device", "host"]
"""Which of the two pools of memory something of a span lies in."""

_SLOTS: Mapping[tuple[Kind, Pool], str] = {
    ("states", "device"): "states",
    ("keys_values", "device"): "keys_values",
    ("states", "host"): "host_states",
    ("keys_values", "host"): "host_keys_values",
}
"""The attributes of a `Span` that say where something of it lies. They are set by its methods only."""


class Span:
    """A run of token ids, the position of its first one, what it continues and what continues it.

    Attributes:
        keys_values: where its keys and values lie on the model's device; None where they do not.
        states: where its final hidden states and log-probabilities lie there; None where they do not.
        host_keys_values, host_states: where they lie in the second pool (memory/host.py); never in both.
        was_computed: whether it was computed before, though nothing of it may be held now.
        computed_in, loaded_in: the number of the evaluation that forwarded it last, or read it from a store; or 0.
        is_end: whether it is the end of a text that somebody knows of, so that this object must stay where it is.
        credit, last_used: when it may be evicted: see memory/budget.py.
        is_stored: whether a store has all up to its end.
        error: what storing it in fewer bits cost, where it was read back from a store that does so; see store/.
        key: what names all up to its end (keys.py); None where nobody has asked yet.

    """

    __slots__ = (
        "children",
        "computed_in",
        "credit",
        "error",
        "host_keys_values",
        "host_states",
        "is_end",
        "is_stored",
        "key",
        "keys_values",
        "last_used",
        "loaded_in",
        "parent",
        "position",
        "states",
        "token_ids",
        "was_computed",
    )

    def __init__(self, token_ids: tuple[int, ...], position: int, parent: Span | None) -> None:
        self.token_ids = token_ids
        self.position = position
        self.parent = parent
        self.children: dict[ChildKey, Span] = {}
        self.keys_values: Rows | None = None
        self.states: Rows | None = None
        self.host_keys_values: Rows | None = None
        self.host_states: Rows | None = None
        self.was_computed = False
        self.computed_in = self.loaded_in = 0
        self.is_end = False
        self.credit = 0.0
        self.last_used = 0
        self.is_stored = False
        self.error = 0.0
        self.key: bytes | None = None

    def __repr__(self) -> str:
        if self.is_held():
            state = "held" if self.is_held(with_keys_values=True) else "held, without keys"
        else:
            state = "not held" if self.is_empty else "held in the second pool"
        return f"Span({len(self.token_ids)} tokens at {self.position}, {len(self.children)} children, {state})"

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.position + len(self.token_ids)

    @property
    def parents(self) -> Sequence[Span]:
        """What must be held for this to be: the root's have none."""
        return () if self.parent is None else (self.parent,)

    @property
    def begins_chain(self) -> bool:
        """Whether it does not directly follow another span's last token: behind the root, a junction, or a gap."""
        return self.parent is not None and (not self.parent.token_ids or self.position != self.parent.stop)

    def closure(self, known: Container[Span] = ()) -> list[Span]:
        """Return all that this stands on and itself, junctions too, each once and after its parents; not the root.

        Without what is `known` already, and what only that stands on.
        """
        spans: dict[Span, None] = {}
        stack: list[tuple[Span, bool]] = [(self, False)]
        while stack:
            span, has_parents = stack.pop()
            if has_parents:
                spans[span] = None
            elif span not in spans and span not in known and span.parent is not None:
                stack.append((span, True))
                stack += ((parent, False) for parent in span.parents)
        return list(spans)

    def seen(self) -> dict[Span, int]:
        """Return the spans that its rows attend to besides its own, the first first, and how often each counts."""
        counts: dict[Span, int] = {}
        if self.parent is not None:
            _count_chain(counts, self.parent, None, 1)
        return dict(reversed(counts.items()))

    def junction(self, ends: Iterable[BranchEnd]) -> Span | None:
        """Return the junction behind a group that stands here, given by where its branches end, each frozen or not."""
        return self.children.get(JunctionKey.of(ends))

    def is_held(self, *, with_keys_values: bool = False, in_host: bool = False) -> bool:
        """Whether its states lie on the device, and its keys and values if asked for; `in_host`: in either pool."""
        has_states = self.states is not None or (in_host and self.host_states is not None)
        has_keys_values = self.keys_values is not None or (in_host and self.host_keys_values is not None)
        return has_states and (has_keys_values or not with_keys_values)

    def holds(self, kind: Kind) -> bool:
        """Whether its states lie on the device, and its keys and values if these are meant."""
        return self.is_held(with_keys_values=kind == "keys_values")

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is held, neither on the device nor in the second pool."""
        return not self.is_held(in_host=True)

    def rows_in(self, kind: Kind, pool: Pool) -> Rows | None:
        """Return where something of it lies in a pool; None where it does not."""
        rows: Rows | None = getattr(self, _SLOTS[kind, pool])
        return rows

    def place(self, *, keys_values: Rows | None = None, states: Rows | None = None) -> None:
        """Let what is given lie on the device, and in the second pool no more."""
        if states is not None:
            self.states, self.host_states = states, None
        if keys_values is not None:
            self.keys_values, self.host_keys_values = keys_values, None

    def move(self, kind: Kind, rows: Rows, pool: Pool) -> None:
        """Let something of it lie here in a pool, and in the other one no more."""
        setattr(self, _SLOTS[kind, pool], rows)
        setattr(self, _SLOTS[kind, "host" if pool == "device" else "device"], None)

    def let_go(self, kind: Kind, pool: Pool) -> None:
        """Let something of it lie in a pool no more."""
        setattr(self, _SLOTS[kind, pool], None)

    def drop(self) -> None:
        """Let nothing of it lie anywhere: whoever still refers to the span must not keep blocks alive."""
        for slot in _SLOTS.values():
            setattr(self, slot, None)

    def give(self, upper: Span, num_tokens: int) -> None:
        """Give the rows of its first tokens to another span, in either pool; nothing is copied."""
        for slot in _SLOTS.values():
            rows: Rows | None = getattr(self, slot)
            if rows is not None:
                first, second = rows.split(num_tokens)
                setattr(upper, slot, first)
                setattr(self, slot, second)

    def num_bytes(self, pool: Pool) -> int:
        """Return the bytes of all of it that lies in a pool."""
        found = (self.rows_in(kind, pool) for kind in KINDS)
        return sum(rows.num_bytes for rows in found if rows is not None)

    def path(self) -> list[Span]:
        """Return the spans from the first below the root down to this one, where no junction lies between."""
        spans: list[Span] = []
        span: Span = self
        while span.parent is not None:
            spans.append(span)
            span = span.parent
        spans.reverse()
        return spans


@dataclass(frozen=True, eq=False)
class Inserted:
    """A text that was inserted into the forest: its end, and what it consists of."""

    end: Span
    token_ids: TokenIds


def rows_of(spans: Iterable[Span], kind: Kind, pool: Pool) -> dict[Span, Rows]:
    """Return where something of spans lies in a pool, of those of which it lies there."""
    slot = _SLOTS[kind, pool]
    return {span: rows for span in spans if (rows := getattr(span, slot)) is not None}


class Nothing:
    """What a junction holds when its parents do: no rows of no block."""

    block = None
    start = stop = num_bytes = 0

    def split(self, num_tokens: int) -> tuple[Rows, Rows]:
        """A junction has nothing to split."""
        raise AssertionError(num_tokens)


NOTHING = Nothing()


class Junction(Span):
    """Where the branches of a group end: see the top of this file.

    Attributes:
        branches: the end of each branch, and whether it is frozen, so that it continues the root and not the junction's
            parent; and how many branches are this one.

    """

    __slots__ = ("branches",)

    def __init__(self, position: int, parent: Span, branches: Mapping[BranchEnd, int]) -> None:
        super().__init__((), position, parent)
        self.branches = branches

    @property
    def parents(self) -> Sequence[Span]:
        """What the group stands behind, and the ends of its branches."""
        assert self.parent is not None
        return tuple(dict.fromkeys((self.parent, *(end for end, _ in self.branches))))


def _count_chain(counts: dict[Span, int], end: Span, base: Span | None, times: int) -> None:
    """Add what lies between `base` and `end`, the last first."""
    span: Span | None = end
    while span is not None and span is not base:
        if isinstance(span, Junction):
            for (branch_end, is_frozen), repeats in span.branches.items():
                _count_chain(counts, branch_end, None if is_frozen else span.parent, times * repeats)
        elif span.token_ids:
            counts[span] = counts.get(span, 0) + times
        span = span.parent


def child_key(parent: Span, position: int, token_id: int) -> ChildKey:
    """Return what a span is found by among the children of another: its first token, and where that leaves a gap."""
    return token_id if position == parent.stop else LaterKey(position, token_id)
