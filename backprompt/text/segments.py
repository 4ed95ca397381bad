"""The parts of a text: strings, token ids, and groups of segments that do not see each other.

    "context " + ("shot a" | "shot b") + " question"

has three segments: a string, a `Group` of two branches, and a string. A branch is a sequence of segments itself, so
groups nest. A frozen segment, which sees nothing before it, is a group of one frozen branch. A string or token ids
under an adapter of the model are an `Adapted`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal, TypeAlias

from backprompt.errors import GroupError

Leaf: TypeAlias = "str | tuple[int, ...]"
"""A string, or token ids that are used unchanged."""

Segment: TypeAlias = "Leaf | Adapted | Group"
"""A leaf, a leaf under an adapter, or a group."""

Positions: TypeAlias = Literal["shared", "sequential"]
POSITIONS: tuple[Positions, ...] = ("shared", "sequential")


@dataclass(frozen=True)
class Adapted:
    """A leaf that is computed under one adapter of the model, whatever adapters are active.

    Attributes:
        leaf: a string or token ids; not empty.
        adapter: the adapter's name; None: no adapter at all.

    """

    leaf: Leaf
    adapter: str | None


@dataclass(frozen=True)
class Branch:
    """One of the alternatives of a group; a frozen branch sees nothing but itself and starts at position 0.

    Attributes:
        segments: the segments of the branch.
        is_frozen: whether the branch is encoded and computed as a text of its own.
        add_special_tokens: whether a frozen branch gets the special tokens of the tokenizer. For other branches the
            text around them decides.

    """

    segments: tuple[Segment, ...]
    is_frozen: bool = False
    add_special_tokens: bool = True


MAX_DEPTH = 50
"""The largest depth of nested groups."""


@dataclass(frozen=True)
class Group:
    """Branches that see the text before the group and themselves; the text behind the group sees all of them.

    Attributes:
        branches: in written order. With shared positions, the order does not change results; repeated branches do.
        positions: "shared": each branch starts where the group starts; "sequential": where the previous branch ends.

    """

    branches: tuple[Branch, ...]
    positions: Positions = "shared"
    depth: int = field(default=1, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse groups too deep for recursive walks, which take one level of the call stack for each group.

        Raises:
            GroupError: more than `MAX_DEPTH` groups are nested.

        """
        inner = [part.depth for branch in self.branches for part in branch.segments if isinstance(part, Group)]
        object.__setattr__(self, "depth", 1 + max(inner, default=0))
        if self.depth > MAX_DEPTH:
            raise GroupError(
                f"Groups may be nested {MAX_DEPTH} deep, but this group is nested deeper. Write its branches "
                "side by side (a | b | c is one group), or put segments behind the group with +."
            )


def leaves(segments: Iterable[Segment]) -> Iterator[Leaf]:
    """Yield the strings and tuples of token ids, including those in groups, in written order."""
    yield from map(bare, marked_leaves(segments))


def marked_leaves(segments: Iterable[Segment]) -> Iterator[Leaf | Adapted]:
    """Yield the strings and tuples of token ids, each with its adapter."""
    stack = [iter(segments)]
    while stack:
        segment = next(stack[-1], None)
        if segment is None:
            stack.pop()
        elif isinstance(segment, Group):
            stack += (iter(branch.segments) for branch in reversed(segment.branches))
        else:
            yield segment


def bare(segment: Leaf | Adapted) -> Leaf:
    """Return a leaf without its adapter."""
    return segment.leaf if isinstance(segment, Adapted) else segment


def are_adapted(segments: Iterable[Segment]) -> bool:
    """Return whether a leaf has an adapter of its own."""
    return any(isinstance(leaf, Adapted) for leaf in marked_leaves(segments))


def under_adapter(segments: Iterable[Segment], adapter: str | None) -> tuple[Segment, ...]:
    """Return segments with all leaves under this adapter, which replaces the adapters that leaves have."""
    return tuple(
        Group(
            tuple(replace(branch, segments=under_adapter(branch.segments, adapter)) for branch in segment.branches),
            segment.positions,
        )
        if isinstance(segment, Group)
        else Adapted(bare(segment), adapter)
        for segment in segments
    )


def last_leaf(segments: Sequence[Segment]) -> Leaf | Adapted | None:
    """Return the last leaf in written order; None if there is none."""
    while segments and isinstance(segments[-1], Group):
        segments = segments[-1].branches[-1].segments
    return segments[-1] if segments else None  # type: ignore[return-value]  # no group


def shown(segments: Iterable[Segment]) -> str:
    """Return segments as an expression that shows their grouping; adjacent strings of one adapter are merged."""
    parts: list[str] = []
    adapter_of = attrgetter("adapter")
    for is_adapted, side_by_side in itertools.groupby(segments, key=lambda segment: isinstance(segment, Adapted)):
        if not is_adapted:
            parts += _shown_parts(side_by_side)
            continue
        for adapter, alike in itertools.groupby(side_by_side, key=adapter_of):
            parts += (f"({part}).with_adapter({adapter!r})" for part in _shown_parts(leaves(alike)))
    return " + ".join(parts) if parts else repr("")


def _shown_parts(segments: Iterable[Segment]) -> list[str]:
    parts: list[str] = []
    string = ""
    for segment in segments:
        if isinstance(segment, Group):
            parts += [*([repr(string)] if string else []), _shown_group(segment)]
            string = ""
        else:
            leaf = bare(segment)
            string += leaf if isinstance(leaf, str) else f"<{len(leaf)} token ids>"
    return [*parts, repr(string)] if string else parts


def _shown_group(group: Group) -> str:
    branches = [
        f"{_shown_text(branch)}.frozen()" if branch.is_frozen else shown(branch.segments) for branch in group.branches
    ]
    if group.positions == "sequential":
        return f"parallel([{', '.join(branches)}], positions='sequential')"
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"


def _shown_text(branch: Branch) -> str:
    inner = shown(branch.segments)
    return f"({inner})" if branch.add_special_tokens else f"Text({inner}, add_special_tokens=False)"
