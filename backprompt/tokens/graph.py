"""An encoded text: token ids and, for groups, a graph of them.

Without groups a text is a tuple of ids. With groups it is a `TokenGraph`: a sequence of runs of ids and `TokenGroup`s,
where each branch of a group is such a sequence again.

    context + (a | b) + question     TokenGraph(((1, 2, 3), TokenGroup((a, b)), (8, 9)))

`fold` walks a graph in the way attention does: each run continues the state of the tokens that the run sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

Part: TypeAlias = "tuple[int, ...] | TokenGroup"
TokenIds: TypeAlias = "tuple[int, ...] | TokenGraph"
State = TypeVar("State")


@dataclass(frozen=True)
class TokenBranch:
    """The parts of one branch of a group; never empty."""

    parts: tuple[Part, ...]
    is_frozen: bool = False


@dataclass(frozen=True)
class TokenGroup:
    """Branches that do not see each other; see `segments.Group`."""

    branches: tuple[TokenBranch, ...]
    is_sequential: bool = False


@dataclass(frozen=True)
class TokenGraph:
    """A text with groups. Its length is the number of its tokens."""

    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.flat)

    @cached_property
    def flat(self) -> tuple[int, ...]:
        """All ids in written order."""
        return tuple(token_id for run in _runs(self.parts) for token_id in run)

    @cached_property
    def num_positions(self) -> int:
        """One more than the largest position."""
        return fold(self, None, lambda state, position, ids: None, lambda state, ends, position: None)[1]


def flat(token_ids: TokenIds) -> tuple[int, ...]:
    """Return all ids in written order."""
    return token_ids.flat if isinstance(token_ids, TokenGraph) else token_ids


def num_positions(token_ids: TokenIds) -> int:
    """Return one more than the largest position."""
    return token_ids.num_positions if isinstance(token_ids, TokenGraph) else len(token_ids)


def without_last(token_ids: TokenIds) -> tuple[TokenIds, int] | None:
    """Return the text before the last token, and that token; None if no single token stands before it."""
    if not isinstance(token_ids, TokenGraph):
        return (token_ids[:-1], token_ids[-1]) if len(token_ids) > 1 else None
    *parts, last = token_ids.parts
    if not isinstance(last, tuple) or len(last) == 1:
        return None
    return TokenGraph((*parts, last[:-1])), last[-1]


def is_beginning(token_ids: TokenIds, whole: TokenIds) -> bool:
    """Return whether the text `whole` begins with these tokens; a group must match as a whole."""
    parts, whole_parts = _parts(token_ids), _parts(whole)
    if not len(token_ids):
        return True
    if len(parts) > len(whole_parts) or parts[:-1] != whole_parts[: len(parts) - 1]:
        return False
    last, its_counterpart = parts[-1], whole_parts[len(parts) - 1]
    if isinstance(last, tuple) and isinstance(its_counterpart, tuple):
        return its_counterpart[: len(last)] == last
    return last == its_counterpart


def ends_in_group(token_ids: TokenIds) -> bool:
    """Return whether a text ends in a group, so that it has no last token."""
    return isinstance(token_ids, TokenGraph) and isinstance(token_ids.parts[-1], TokenGroup)


def with_more(token_ids: TokenIds, more: tuple[int, ...]) -> TokenIds:
    """Return a text with more ids behind its last token."""
    if not isinstance(token_ids, TokenGraph):
        return token_ids + more
    parts, last = _before_and_last_ids(token_ids)
    return TokenGraph((*parts, last + more))


def _before_and_last_ids(graph: TokenGraph) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Return the parts before the last run of ids, and that run."""
    *parts, last = graph.parts
    assert isinstance(last, tuple), "a text that ends in a group has no last token"
    return tuple(parts), last


def as_token_ids(parts: Iterable[Part]) -> TokenIds:
    """Return the text with these parts in canonical form.

    Adjacent runs are merged; branches without tokens are dropped; a group of one branch becomes that branch, except a
    frozen branch behind other text.
    """
    merged = _merged(parts, is_first=True)
    if len(merged) == 1 and isinstance(merged[0], tuple):
        return merged[0]
    if all(isinstance(part, tuple) for part in merged):
        return tuple(token_id for run in _runs(merged) for token_id in run)
    return TokenGraph(merged)


def fold(
    token_ids: TokenIds,
    root: State,
    extend: Callable[[State, int, tuple[int, ...]], State],
    join: Callable[[State, Sequence[tuple[State, bool]], int], State],
) -> tuple[State, int]:
    """Walk a text; return the state and the position behind its end.

    Args:
        token_ids: the text.
        root: the state at the beginning of a text.
        extend: returns the state behind a run of ids, given the state before the run, the position of its first id, and
            the ids.
        join: returns the state behind a group, given the state before the group, a pair for each branch in written
            order (the state behind the branch, and whether the branch is frozen), and the position behind the group.

    """

    def walk(parts: Iterable[Part], state: State, position: int) -> tuple[State, int]:
        for part in parts:
            if isinstance(part, tuple):
                state, position = extend(state, position, part), position + len(part)
                continue
            ends: list[tuple[State, bool]] = []
            start, last = position, position
            for branch in part.branches:
                end, stop = walk(branch.parts, *((root, 0) if branch.is_frozen else (state, start)))
                ends.append((end, branch.is_frozen))
                last = max(last, stop)
                if part.is_sequential and not branch.is_frozen:
                    start = stop
            state, position = join(state, ends, last), last
        return state, position

    return walk(_parts(token_ids), root, 0)


def _parts(token_ids: TokenIds) -> tuple[Part, ...]:
    return token_ids.parts if isinstance(token_ids, TokenGraph) else (token_ids,)


def _merged(parts: Iterable[Part], *, is_first: bool) -> tuple[Part, ...]:
    """Return the parts in canonical form; `is_first` if no text stands before them."""
    merged: list[Part] = []

    def add(part: Part) -> None:
        last = merged[-1] if merged else None
        if isinstance(part, tuple) and isinstance(last, tuple):
            merged[-1] = last + part
        elif not isinstance(part, tuple) or part:
            merged.append(part)

    for part in parts:
        if isinstance(part, tuple):
            add(part)
            continue
        kept = [branch for branch in part.branches if any(_runs(branch.parts))]
        is_sequential = part.is_sequential and len(kept) > 1
        # If no text stands before and each branch starts at position 0, a frozen branch differs in no way from others.
        at_start = is_first and not merged and not is_sequential
        branches = [
            TokenBranch(_merged(branch.parts, is_first=at_start or branch.is_frozen), branch.is_frozen and not at_start)
            for branch in kept
        ]
        if len(branches) == 1 and not branches[0].is_frozen:
            for inner_part in branches[0].parts:
                add(inner_part)
        elif branches:
            add(TokenGroup(tuple(branches), is_sequential))
    return tuple(merged)


def _runs(parts: Iterable[Part]) -> Iterator[tuple[int, ...]]:
    for part in parts:
        if isinstance(part, tuple):
            yield part
        else:
            for branch in part.branches:
                yield from _runs(branch.parts)


def common_length(own: Sequence[int], ids: Sequence[int], offset: int) -> int:
    """Return the length of the common beginning of `own` and of `ids` from `offset` on."""
    window = ids[offset : offset + len(own)]
    if window == own:
        return len(own)
    num_common = 0
    for a, b in zip(own, window, strict=False):
        if a != b:
            break
        num_common += 1
    return num_common
