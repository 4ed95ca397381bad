"""The parts of a text: strings, token ids, and groups of segments that do not see each other.

    "context " + ("shot a" | "shot b") + " question"

has three segments: a string, a `Group` of two branches, and a string. A branch is a sequence of segments itself, so
groups nest. A frozen segment sees nothing before it: a group of one frozen branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from backprompt.errors import GroupError

Segment: TypeAlias = "str | tuple[int, ...] | Group"
"""A string, token ids that are used unchanged, or a group."""

Positions: TypeAlias = Literal["shared", "sequential"]
POSITIONS: tuple[Positions, ...] = ("shared", "sequential")


@dataclass(frozen=True)
class Branch:
    """One of the alternatives of a group; a frozen branch sees nothing but itself and starts at position 0.

    Attributes:
        segments: the segments of the branch.
        is_frozen: whether the branch is a text of its own.
        add_special_tokens: whether a frozen branch gets the special tokens of the tokenizer. Other branches begin like
            the text around them.

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
        branches: in written order. Their meaning does not depend on the order, but repeats count.
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
                f"Groups may be nested {MAX_DEPTH} deep, and this one is nested deeper. Write its branches "
                "side by side (a | b | c is one group), or put segments behind it with +."
            )


def leaves(segments: Iterable[Segment]) -> Iterator[str | tuple[int, ...]]:
    """Yield the strings and tuples of token ids, including those in groups, in written order."""
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
    """Return segments as an expression that shows their grouping; adjacent strings are merged."""
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
        f"{_shown_text(branch)}.frozen()" if branch.is_frozen else shown(branch.segments) for branch in group.branches
    ]
    if group.positions == "sequential":
        return f"parallel([{', '.join(branches)}], positions='sequential')"
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"


def _shown_text(branch: Branch) -> str:
    inner = shown(branch.segments)
    return f"({inner})" if branch.add_special_tokens else f"Text({inner}, add_special_tokens=False)"
