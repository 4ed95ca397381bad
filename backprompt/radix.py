"""The forest of token spans: a radix tree with junctions, pure Python, no tensors.

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

A *junction* stands where a group of branches ends: a span without tokens that has several parents, what the group
stands behind and the ends of its branches. Branches are spans like all others: a shared one continues what the group
stands behind, a frozen one stands at the root, and a sequential one continues it at a later position.

    context + (a | b) + question        context --+-- a ----+
                                                  +-- b ----+
                                                  +-- (junction) -- question

Attention of what stands behind a junction counts a span once for each branch that it is reached through.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from backprompt.token_graph import TokenGraph, TokenIds, fold

ChildKey: TypeAlias = "int | tuple[int | None, ...]"


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
        computed_in, loaded_in: the number of the evaluation that forwarded it last, or read it from a store; or 0.
        is_end: whether a text may end here that somebody knows of, so that this object must stay where it is.
        credit, last_used: when it may be evicted: see memory.py.
        is_stored: whether a store has all up to its end.
        error: what storing it in fewer bits cost, where it was read back from a store that does so; see store/.
        key: what names all up to its end (identity.py); None where nobody has asked yet.

    """

    __slots__ = (
        "children",
        "computed_in",
        "credit",
        "error",
        "host_rows",
        "host_states",
        "is_end",
        "is_stored",
        "key",
        "last_used",
        "loaded_in",
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
        self.children: dict[ChildKey, Span] = {}
        self.rows: Rows | None = None
        self.states: Rows | None = None
        self.host_rows: Rows | None = None
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
        if self.states is None:
            state = "not held" if self.host_states is None else "held in the second pool"
        else:
            state = "held, without keys" if self.rows is None else "held"
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

    def junction(self, ends: Iterable[tuple[Span, bool]]) -> Span | None:
        """Return the junction behind a group that stands here, given by where its branches end, each frozen or not."""
        return self.children.get(_junction_key(ends))

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is held, neither on the device nor in the second pool."""
        return self.states is None and self.host_states is None

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
class Place:
    """Where a text stands in the forest: the span at which it ends, and what it consists of."""

    end: Span
    token_ids: TokenIds


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

    def __init__(self, position: int, parent: Span, branches: Mapping[tuple[Span, bool], int]) -> None:
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


class Forest:
    """All spans, under one empty root.

    Attributes:
        root: what texts begin behind.
        evaluation: the number of the latest evaluation, the first being 1.
        is_whole: False while things change that belong together, and for good after an error that cut this short: then
            nothing in the forest can be trusted, and all that is left to do is `clear`.

    """

    def __init__(self) -> None:
        self.root = Span((), 0, None)
        self.evaluation = 0
        self.is_whole = True

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Let things change that belong together: all of them, or the forest is not whole any more.

        An error may come at any line, as Ctrl-C does. Whatever changes where spans stand, their tokens or their rows in
        more than one step does it in here, and here as little else as it can. At each moment all spans that hold
        something are found from the root, so that `clear` reaches them.
        """
        self.is_whole = False
        yield
        self.is_whole = True

    def insert(self, token_ids: TokenIds | Sequence[int], *, is_end: bool = True) -> Span:
        """Return the span that ends exactly where `token_ids` end, splitting and adding spans as needed.

        Where they end in a group it is a junction. `is_end` False: the caller forgets it before `absorb` is called for
        what continues it.
        """
        ids = token_ids if isinstance(token_ids, TokenGraph) else tuple(token_ids)
        end, _ = fold(ids, self.root, self.extend, self._join)
        end.is_end |= is_end
        return end

    def in_order(self, place: Place) -> list[Span]:
        """Return the spans of a text in written order, those of repeated branches repeatedly; junctions left out."""
        if not isinstance(place.token_ids, TokenGraph):
            return place.end.path()
        spans: list[Span] = []

        def continue_(span: Span, position: int, ids: tuple[int, ...]) -> Span:
            end = self.extend(span, position, ids)  # finds it: the text was inserted
            chain, above = [], end
            while above is not span:
                assert above.parent is not None
                chain.append(above)
                above = above.parent
            spans.extend(reversed(chain))
            return end

        fold(place.token_ids, self.root, continue_, self._join)
        return spans

    def extend(self, span: Span, position: int, ids: tuple[int, ...]) -> Span:
        """Return the span that ends where `ids` end that stand behind `span`, the first at `position`."""
        num_matched = 0
        while num_matched < len(ids):
            key = child_key(span, position + num_matched, ids[num_matched])
            child = span.children.get(key)
            if child is None:
                child = Span(ids[num_matched:], position + num_matched, span)
                span.children[key] = child
                return child
            num_common = common_length(child.token_ids, ids, num_matched)
            if num_common < len(child.token_ids):
                child = self.split(child, num_common)
            span, num_matched = child, num_matched + num_common
        return span

    def _join(self, before: Span, ends: Sequence[tuple[Span, bool]], position: int) -> Span:
        """Return the junction behind branches that end at `ends`, each frozen or not."""
        branches = Counter(ends)
        for end, _ in ends:
            end.is_end = True
        junction = before.junction(ends)
        if junction is None:
            junction = before.children[_junction_key(ends)] = Junction(position, before, branches)
        return junction

    def num_computed(self, token_ids: Sequence[int]) -> int:
        """Return of how many of the first of `token_ids` the keys and values are held; changes nothing."""
        ids = tuple(token_ids)
        span, num_matched = self.root, 0
        while num_matched < len(ids):
            child = span.children.get(ids[num_matched])
            if child is None or child.rows is None:
                break
            num_common = common_length(child.token_ids, ids, num_matched)
            num_matched += num_common
            if num_common < len(child.token_ids):
                break
            span = child
        return num_matched

    def split(self, span: Span, num_tokens: int) -> Span:
        """Cut `span` after `num_tokens` and return the new upper part; `span` itself becomes the lower part."""
        assert span.parent is not None and 0 < num_tokens < len(span.token_ids), (span, num_tokens)
        upper = Span(span.token_ids[:num_tokens], span.position, span.parent)
        upper.was_computed, upper.is_stored, upper.error = span.was_computed, span.is_stored, span.error
        upper.computed_in, upper.loaded_in = span.computed_in, span.loaded_in
        upper.credit, upper.last_used = span.credit, span.last_used
        upper.children[span.token_ids[num_tokens]] = span
        with self.changing():
            span.parent.children[child_key(span.parent, span.position, span.token_ids[0])] = upper
            span.token_ids = span.token_ids[num_tokens:]
            span.position += num_tokens
            span.parent = upper
            for slot in SLOTS:
                place: Rows | None = getattr(span, slot)
                if place is not None:
                    first, second = place.split(num_tokens)
                    setattr(upper, slot, first)
                    setattr(span, slot, second)
        return upper

    def absorb(self, span: Span, rows: Rows, states: Rows) -> None:
        """Let `span` begin where what it continues begins, which is there no more; the opposite of `split`.

        Args:
            span: what absorbs.
            rows, states: where its keys and values, and its states, lie from now on.

        """
        upper = span.parent
        assert upper is not None and upper.parent is not None and len(upper.children) == 1, span
        with self.changing():
            upper.rows = upper.states = None  # whoever still refers to it must not keep blocks alive
            upper.parent.children[child_key(upper.parent, upper.position, upper.token_ids[0])] = span
            span.token_ids = upper.token_ids + span.token_ids
            span.position = upper.position
            span.parent = upper.parent
            span.rows, span.states = rows, states

    def discard(self, span: Span, held: Container[Span]) -> None:
        """Remove a span that nothing continues and nobody knows of, and what it continued, as far as that holds there.

        A span that is no leaf, is among those `held` or ends a text stays. One that was
        removed before may be given again.
        """
        while span.token_ids and span.parent is not None and not (span.children or span in held or span.is_end):
            parent = span.parent
            key = child_key(parent, span.position, span.token_ids[0])
            if parent.children.get(key) is not span:
                return
            with self.changing():
                span.rows = span.states = None  # whoever still refers to it must not keep blocks alive
                del parent.children[key]
            span = parent

    def prune(self, max_spans: int = 0, max_tokens: int = 0) -> None:
        """Remove spans of which nothing is held, until so many of them with so many tokens are left at most.

        The span used longest ago goes first, and spans that continue another go before it.
        """
        spans = list(self.spans())
        last_used = {span: span.last_used for span in spans if span.is_empty}
        for span in reversed(spans):  # each before its parents
            if span in last_used:
                for parent in span.parents:
                    if parent in last_used:
                        last_used[parent] = max(last_used[parent], last_used[span])
        latest_first = sorted(last_used, key=last_used.__getitem__, reverse=True)  # of equals, parents come first
        num_tokens = itertools.accumulate(len(span.token_ids) for span in latest_first)
        num_kept = sum(total <= max_tokens for total in itertools.islice(num_tokens, max_spans))
        gone = set(latest_first[num_kept:])
        for left in {span.parent for span in gone if span.parent is not None} - gone:
            left.children = {key: child for key, child in left.children.items() if child not in gone}
        for span in gone:
            span.children = {}  # parents and children refer to each other: the cycle collector comes late

    def clear(self) -> None:
        """Forget everything: nothing of any span is held any more, and none is found any more. Makes it whole again."""
        with self.changing():
            stack = [self.root]  # `spans` looks at more than children, which may not be whole
            while stack:
                span = stack.pop()
                stack += span.children.values()
                for slot in SLOTS:
                    setattr(span, slot, None)
            self.root.children = {}

    def spans(self) -> Iterator[Span]:
        """Yield every span below the root, each before what continues it, depth first."""
        spans = depth_first(self.root, lambda span: span.children.values())
        next(spans)
        return spans


def depth_first(root: Span, continuations: Callable[[Span], Iterable[Span]]) -> Iterator[Span]:
    """Yield spans from the root on, each after its parents; what a junction still needs is drawn forward.

    Args:
        root: the first.
        continuations: the children of a span to go on with, in order; all parents of each must be among what comes.

    """
    done: set[Span] = set()
    stack = [root]
    while stack:
        span = stack.pop()
        if span in done:
            continue  # it was drawn forward
        if isinstance(span, Junction) and not done.issuperset(span.parents):
            stack += reversed(span.closure(known=done))  # itself the last
            continue
        done.add(span)
        yield span
        stack += reversed(list(continuations(span)))


def child_key(parent: Span, position: int, token_id: int) -> ChildKey:
    """Return what a span is found by among the children of another: its first token, and where that leaves a gap."""
    return token_id if position == parent.stop else (position, token_id)


def _junction_key(ends: Iterable[tuple[Span, bool]]) -> ChildKey:
    # An end stays the end when spans are split. None tells the key from those of spans at later positions.
    return (None, *sorted(2 * id(end) + is_frozen for end, is_frozen in ends))


def common_length(span_ids: tuple[int, ...], ids: tuple[int, ...], offset: int) -> int:
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
