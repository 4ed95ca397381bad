"""What a text is made of: strings, token ids, and groups of segments that do not see each other.

    "context " + ("shot a" | "shot b") + " question"

is three segments: a string, a `Group` of two branches, and a string. A branch is a sequence of segments itself, so
groups nest. A frozen segment sees nothing that stands before it: a group of one frozen branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Segment: TypeAlias = "str | tuple[int, ...] | Group"
"""A string, token ids that are taken as they are, or a group."""

Positions: TypeAlias = Literal["shared", "sequential"]
POSITIONS: tuple[Positions, ...] = ("shared", "sequential")


@dataclass(frozen=True)
class Branch:
    """One of the alternatives of a group; a frozen one sees nothing but itself and starts at position 0."""

    segments: tuple[Segment, ...]
    is_frozen: bool = False


@dataclass(frozen=True)
class Group:
    """Branches of which each sees what stands before the group and itself; what follows sees all of them.

    Attributes:
        branches: in written order. What they mean does not depend on it, but repeats count.
        positions: "shared": each branch starts where the group starts; "sequential": where the one before it ends.

    """

    branches: tuple[Branch, ...]
    positions: Positions = "shared"


def leaves(segments: Iterable[Segment]) -> Iterator[str | tuple[int, ...]]:
    """Yield the strings and tuples of token ids, those in groups too, in written order."""
    stack = [iter(segments)]
    while stack:
        segment = next(stack[-1], None)
        if segment is None:
            stack.pop()
        elif isinstance(segment, Group):
            stack += (iter(branch.segments) for branch in reversed(segment.branches))
        else:
            yield segment


def shown(segments: Iterable[Segment]) -> str:
    """Return segments as an expression that shows how they are grouped; strings side by side are one."""
    parts: list[str] = []
    string = ""
    for segment in segments:
        if isinstance(segment, Group):
            parts += [*([repr(string)] if string else []), _shown_group(segment)]
            string = ""
        else:
            string += segment if isinstance(segment, str) else f"<{len(segment)} token ids>"
    if string or not parts:
        parts.append(repr(string))
    return " + ".join(parts)


def _shown_group(group: Group) -> str:
    branches = [
        f"({shown(branch.segments)}).frozen()" if branch.is_frozen else shown(branch.segments)
        for branch in group.branches
    ]
    if group.positions == "sequential":
        return f"parallel([{', '.join(branches)}], positions='sequential')"
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"
