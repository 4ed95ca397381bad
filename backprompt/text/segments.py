"""What a text is made of: strings, token ids, and groups of segments that do not see each other.

    "context " + ("shot a" | "shot b") + " question"

is three segments: a string, a `Group` of two branches, and a string. A branch is a sequence of segments itself, so
groups nest. A frozen segment sees nothing that stands before it: a group of one frozen branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from backprompt.errors import GroupError

Segment: TypeAlias = "str | tuple[int, ...] | Group"
"""A string, token ids that are taken as they are, or a group."""

Positions: TypeAlias = Literal["shared", "sequential"]
POSITIONS: tuple[Positions, ...] = ("shared", "sequential")


@dataclass(frozen=True)
class Branch:
    """One of the alternatives of a group; a frozen one sees nothing but itself and starts at position 0.

    Attributes:
        segments: what it consists of.
        is_frozen: whether it is a text of its own.
        add_special_tokens: whether a frozen one gets the special tokens of the tokenizer. What is not frozen begins as
            the text does that it stands in.

    """

    segments: tuple[Segment, ...]
    is_frozen: bool = False
    add_special_tokens: bool = True


MAX_DEPTH = 50
"""How deep groups may be nested."""


@dataclass(frozen=True)
class Group:
    """Branches of which each sees what stands before the group and itself; what follows sees all of them.

    Attributes:
        branches: in written order. What they mean does not depend on it, but repeats count.
        positions: "shared": each branch starts where the group starts; "sequential": where the one before it ends.

    """

    branches: tuple[Branch, ...]
    positions: Positions = "shared"
    depth: int = field(default=1, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what walks into groups, a level each, could not come out of.

        Raises:
            GroupError: groups in groups in groups, more than `MAX_DEPTH` of them.

        """
        inner = [part.depth for branch in self.branches for part in branch.segments if isinstance(part, Group)]
        object.__setattr__(self, "depth", 1 + max(inner, default=0))
        if self.depth > MAX_DEPTH:
            raise GroupError(
                f"Groups may be nested {MAX_DEPTH} deep, and this one is nested deeper. Write its branches "
                "side by side (a | b | c is one group), or put segments behind it with +."
            )


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
        f"{_shown_text(branch)}.frozen()" if branch.is_frozen else shown(branch.segments) for branch in group.branches
    ]
    if group.positions == "sequential":
        return f"parallel([{', '.join(branches)}], positions='sequential')"
    return branches[0] if len(branches) == 1 else f"({' | '.join(branches)})"


def _shown_text(branch: Branch) -> str:
    inner = shown(branch.segments)
    return f"({inner})" if branch.add_special_tokens else f"Text({inner}, add_special_tokens=False)"
