"""Spans of tokens: the nodes of a radix tree with junctions, pure Python, no tensors.

Each `Span` is a run of token ids shared by every text through it; its children differ in their first token. Because
attention is causal, the representation of a token depends only on the tokens before it, so two texts with a common
beginning share spans. A span may hold its *states* (the source of logits and log-probabilities), and with them its
*keys and values* (needed by its children). If a span holds states, all its ancestors hold states; the same is true of
keys and values. Both kinds of data lie either on the model's device or in a second pool of memory. The rule about
ancestors also applies to the device alone.

    (root) -- "the cat" --+-- " sat"
                          +-- " ran" --+-- " off"
                                       +-- " home"

The *end* of a text is the span that holds its last token and no later token, or a junction if the text ends in a group.
Inserting a text splits a span if the text would otherwise have no end. Splitting a span keeps the object as the *lower*
part (a new span becomes the upper part), so references to the end of a text stay valid.

A *junction* marks the end of a group of branches. It is a span without tokens that has several parents: the span
before the group and the ends of its branches. Branches are spans like all others: a shared branch is a child of the
span before the group, a frozen branch is a child of the root, and a sequential branch is a child at a later position.

    context + (a | b) + question        context --+-- a ----+
                                                  +-- b ----+
                                                  +-- (junction) -- question

Behind a junction, attention counts a span once for each branch that leads through the span.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol, TypeAlias

from backprompt.tokens.graph import TokenIds

BranchEnd: TypeAlias = "tuple[Span, bool]"
"""The end of a branch, and whether the branch is frozen."""


@dataclass(frozen=True, slots=True)
class LaterKey:
    """The key of a span with a gap of positions before it: its position and its first token."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True)
class JunctionKey:
    """The key of a junction: the number of times that each branch ends there. Spans are compared by identity.

    Splitting a span does not change which span is the end.
    """

    num_branches: frozenset[tuple[BranchEnd, int]]

    @classmethod
    def of(cls, ends: Iterable[BranchEnd]) -> JunctionKey:
        """Return the key of the junction at which these branches end; their order does not matter."""
        return cls(frozenset(Counter(ends).items()))


class FanKey:
    """The key of a fan (fan.py), which is the only child of its parent."""


FAN = FanKey()

ChildKey: TypeAlias = "int | LaterKey | JunctionKey | FanKey"
"""The key of a span among its parent's children; for most spans the first token."""


class RowsBlock(Protocol):
    """A block of tensors, which this module never reads. A block knows the spans that hold rows of it."""

    def take(self, span: Span, num_rows: int) -> None:
        """Note that a span holds rows of the block. `num_rows`: the increase in the number of held rows."""

    def release(self, span: Span, num_rows: int) -> None:
        """Note that a span no longer holds its rows of the block."""


class Rows(Protocol):
    """The place of a span's data: consecutive rows of a block."""

    @property
    def block(self) -> RowsBlock | None:
        """The block, by identity; None if there are no rows."""

    @property
    def start(self) -> int:
        """The first row."""

    @property
    def stop(self) -> int:
        """The row after the last."""

    @property
    def num_bytes(self) -> int:
        """The rows' share of the block's bytes."""

    def split(self, num_tokens: int) -> tuple[Rows, Rows]:
        """Return the first `num_tokens` rows and the others; both share the block."""


Kind: TypeAlias = Literal["states", "keys_values"]
"""The two kinds of data of a span; `KINDS`: both. A span holds its keys and values only with its states."""

KINDS: tuple[Kind, ...] = ("states", "keys_values")

Pool: TypeAlias = Literal["device", "host"]
"""The two pools of memory for the data of spans; `POOLS`: both."""

POOLS: tuple[Pool, ...] = ("device", "host")

_SLOTS: Mapping[tuple[Kind, Pool], str] = {
    ("states", "device"): "states",
    ("keys_values", "device"): "keys_values",
    ("states", "host"): "host_states",
    ("keys_values", "host"): "host_keys_values",
}
"""The attributes of a `Span` that give the place of each kind of data. Only the methods of `Span` set them."""

_BELOW: Mapping[str, str] = {slot: f"{slot}_below" for slot in _SLOTS.values()}
"""For each of these attributes, the one that counts the spans right behind that hold the same data in the same pool."""

NO_CHILDREN: Mapping[ChildKey, Span] = MappingProxyType({})
"""The children of a span without children. Most spans have none, and a dict each would slow the garbage collector."""


class Span:
    """A run of token ids, the position of its first token, its parent and its children.

    Attributes:
        token_ids: the ids of its tokens, a tuple; a list while the span grows in place (`take_in`), so that no ids are
            copied for one more token. No other code changes the list, or keeps it.
        keys_values: the place of its keys and values on the model's device, or None.
        states: the place of its final hidden states and log-probabilities on the device, or None.
        host_keys_values, host_states: their places in the second pool (memory/host.py); never in both pools.
        keys_values_below, ...: for each of these four places, the number of spans (children, and junctions behind
            groups) that hold the same kind of data in the same pool and need this span for it.
        was_computed: whether the span was ever computed, even if it has no rows now.
        computed_in, loaded_in: the number of the evaluation that last forwarded it, or read it from a store; or 0.
        is_end: whether a text in use ends here; if so, this object must keep its end.
        credit, last_used: the order of eviction: see memory/eviction.py.
        is_stored: whether a store has all tokens up to its end.
        error: the error from storage at reduced precision, if read back from such a store; see store/.
        key: the name of all tokens up to its end (keys.py); None before the first use.

    """

    __slots__ = (
        "children",
        "computed_in",
        "credit",
        "error",
        "host_keys_values",
        "host_keys_values_below",
        "host_states",
        "host_states_below",
        "is_end",
        "is_stored",
        "key",
        "keys_values",
        "keys_values_below",
        "last_used",
        "loaded_in",
        "parent",
        "position",
        "states",
        "states_below",
        "token_ids",
        "was_computed",
    )

    def __init__(self, token_ids: Sequence[int], position: int, parent: Span | None) -> None:
        self.token_ids = token_ids
        self.position = position
        self.parent = parent
        self.children: Mapping[ChildKey, Span] = NO_CHILDREN
        self.keys_values: Rows | None = None
        self.states: Rows | None = None
        self.host_keys_values: Rows | None = None
        self.host_states: Rows | None = None
        self.keys_values_below = self.states_below = self.host_keys_values_below = self.host_states_below = 0
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

    def add_child(self, key: ChildKey, child: Span) -> None:
        """Add a span to the children, in place of another one with this key."""
        if not isinstance(self.children, dict):
            self.children = {}
        self.children[key] = child

    def remove_child(self, key: ChildKey) -> None:
        """Remove the child with this key."""
        assert isinstance(self.children, dict), self
        del self.children[key]

    @property
    def stop(self) -> int:
        """The position behind its last token."""
        return self.position + len(self.token_ids)

    @property
    def positions(self) -> Sequence[int]:
        """The position of each of its tokens."""
        return range(self.position, self.position + len(self.token_ids))

    @property
    def parents(self) -> Sequence[Span]:
        """The spans that must be held for this span to be held; the root has none."""
        return () if self.parent is None else (self.parent,)

    @property
    def begins_chain(self) -> bool:
        """Whether the span starts behind the root, a junction or a gap, not right behind another token."""
        return self.parent is not None and (not self.parent.token_ids or self.position != self.parent.stop)

    def closure(self, known: Container[Span] = ()) -> list[Span]:
        """Return the span and all its ancestors except the root, with junctions, each once and after its parents.

        Spans in `known` are left out, and so are spans that only the known ones need.
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

    def junction(self, ends: Iterable[BranchEnd]) -> Span | None:
        """Return the junction of the group behind this span with these branch ends, each frozen or not."""
        return self.children.get(JunctionKey.of(ends))

    def is_held(self, *, with_keys_values: bool = False, in_host: bool = False) -> bool:
        """Whether the states lie on the device, and optionally the keys and values; `in_host`: in either pool."""
        if self.states is None and not (in_host and self.host_states is not None):
            return False
        return not with_keys_values or self.keys_values is not None or (in_host and self.host_keys_values is not None)

    def holds(self, kind: Kind) -> bool:
        """Whether the states lie on the device and, for "keys_values", the keys and values, too."""
        return self.is_held(with_keys_values=kind == "keys_values")

    @property
    def is_empty(self) -> bool:
        """Whether the span has no rows, neither on the device nor in the second pool."""
        return not self.is_held(in_host=True)

    def rows_in(self, kind: Kind, pool: Pool) -> Rows | None:
        """Return the place of one kind of data in a pool, or None."""
        rows: Rows | None = getattr(self, _SLOTS[kind, pool])
        return rows

    def place(self, *, keys_values: Rows | None = None, states: Rows | None = None) -> None:
        """Record new places on the device for the given data, and remove those in the second pool."""
        if states is not None:
            self._put("states", states)
            if self.host_states is not None:
                self.let_go("states", "host")
        if keys_values is not None:
            self._put("keys_values", keys_values)
            if self.host_keys_values is not None:
                self.let_go("keys_values", "host")

    def take_in(self, token_id: int, keys_values: Rows, states: Rows) -> None:
        """Add a token, and record the places with its rows in the same blocks; the caller tells the blocks."""
        if isinstance(self.token_ids, list):
            self.token_ids.append(token_id)
        else:
            self.token_ids = [*self.token_ids, token_id]
        self.key = None
        self.keys_values, self.states = keys_values, states

    def move(self, kind: Kind, rows: Rows, pool: Pool) -> None:
        """Record a new place in a pool for one kind of data, and remove that in the other pool."""
        self._put(_SLOTS[kind, pool], rows)
        self.let_go(kind, "host" if pool == "device" else "device")

    def let_go(self, kind: Kind, pool: Pool) -> Rows | None:
        """Remove one kind of data from a pool, and return its place there, if it had one."""
        slot = _SLOTS[kind, pool]
        rows: Rows | None = getattr(self, slot)
        if rows is None:
            return None
        setattr(self, slot, None)
        if rows.block is not None:
            rows.block.release(self, rows.stop - rows.start)
        self._count_below(slot, -1)
        return rows

    def drop(self) -> None:
        """Remove all data, so that references to the span do not keep blocks alive."""
        for (kind, pool), slot in _SLOTS.items():
            if getattr(self, slot) is not None:
                self.let_go(kind, pool)

    def _put(self, slot: str, rows: Rows) -> None:
        """Set one of the places, and tell the block and the parents."""
        before: Rows | None = getattr(self, slot)
        setattr(self, slot, rows)
        num_before = 0
        if before is None:
            self._count_below(slot, 1)
        elif before.block is rows.block:
            num_before = before.stop - before.start
        elif before.block is not None:
            before.block.release(self, before.stop - before.start)
        if rows.block is not None:
            rows.block.take(self, rows.stop - rows.start - num_before)

    def _count_below(self, slot: str, change: int) -> None:
        """Add `change` to the number of spans, counted by each parent, that hold this data and need the parent."""
        below = _BELOW[slot]
        for parent in self.parents:
            setattr(parent, below, getattr(parent, below) + change)

    def give(self, upper: Span, num_tokens: int) -> None:
        """Give the rows of the first tokens to a new parent, in either pool, without copying."""
        for slot, below in _BELOW.items():
            rows: Rows | None = getattr(self, slot)
            if rows is not None:
                first, second = rows.split(num_tokens)
                setattr(upper, slot, first)  # the spans that `upper` continues count `upper` in place of this span
                setattr(self, slot, second)
                setattr(upper, below, 1)
                if first.block is not None:
                    first.block.take(upper, 0)

    def follow(self, parent: Span) -> None:
        """Continue another span from now on, in place of the present parent."""
        self.parent = parent
        for slot, below in _BELOW.items():
            if getattr(self, slot) is not None:
                setattr(parent, below, getattr(parent, below) + 1)

    def path(self) -> list[Span]:
        """Return the spans from the first below the root down to this one; no junction may lie between."""
        spans: list[Span] = []
        span: Span = self
        while span.parent is not None:
            spans.append(span)
            span = span.parent
        spans.reverse()
        return spans


IS_FREE: Mapping[Pool, Mapping[Kind, Callable[[Span], bool]]] = {
    "device": {
        "states": lambda span: span.states is not None and not span.states_below and span.keys_values is None,
        "keys_values": lambda span: span.keys_values is not None and not span.keys_values_below,
    },
    "host": {
        "states": lambda span: (
            span.host_states is not None and not span.host_states_below and span.host_keys_values is None
        ),
        "keys_values": lambda span: span.host_keys_values is not None and not span.host_keys_values_below,
    },
}
"""Whether one kind of a span's data lies in a pool and can be evicted, because no other data there needs the data. The
spans right behind a span need its data, and keys and values need their states."""


@dataclass(frozen=True, eq=False)
class Inserted:
    """A text that was inserted into the forest: its end and its tokens."""

    end: Span
    token_ids: TokenIds


def pass_on_history(span: Span, new: Span) -> None:
    """Copy to a part of a span whether and when the whole span was computed, stored and used."""
    new.was_computed, new.is_stored, new.error = span.was_computed, span.is_stored, span.error
    new.computed_in, new.loaded_in = span.computed_in, span.loaded_in
    new.credit, new.last_used = span.credit, span.last_used


class Nothing:
    """The place of a junction's data while its parents hold theirs: no rows, and no block."""

    block = None
    start = stop = num_bytes = 0

    def split(self, num_tokens: int) -> tuple[Rows, Rows]:
        """Raise: a junction has no rows to split."""
        raise AssertionError(num_tokens)


NOTHING = Nothing()


class Junction(Span):
    """The place where the branches of a group end: see the top of this file.

    Attributes:
        branches: the number of equal branches, by their end and by whether they are frozen. A frozen branch continues
            the root, not the junction's parent.

    """

    __slots__ = ("branches",)

    def __init__(self, position: int, parent: Span, branches: Mapping[BranchEnd, int]) -> None:
        super().__init__((), position, parent)
        self.branches = branches

    @property
    def parents(self) -> Sequence[Span]:
        """The span before the group, and the ends of its branches."""
        assert self.parent is not None
        return tuple(dict.fromkeys((self.parent, *(end for end, _ in self.branches))))


def child_key(parent: Span, position: int, token_id: int) -> ChildKey:
    """Return the key of a span among its parent's children: its first token and, after a gap, its position."""
    return token_id if position == parent.stop else LaterKey(position, token_id)
