"""Chains: adjacent segments of a text with no group between them, which are encoded together under any adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

from backprompt.text.segments import Adapted, Group, Leaf, Segment, bare

Marked: TypeAlias = "Leaf | Adapted"
"""A leaf, or a leaf under an adapter."""


class Chain(NamedTuple):
    """Adjacent strings and token ids, with no group between them."""

    leaves: tuple[Leaf, ...]
    is_continuation: bool  # whether any text stands before

    def up_to(self, leaf_idx: int) -> Chain:
        """Return the chain of the leaves before this one."""
        return Chain(self.leaves[:leaf_idx], self.is_continuation)


class MarkedChain(NamedTuple):
    """A chain, and its leaves with their adapters."""

    chain: Chain
    leaves: tuple[Marked, ...]


class GroupPiece(NamedTuple):
    """A group among chains, and whether any text stands before it."""

    group: Group
    is_continuation: bool


def pieces_of(segments: Iterable[Segment], is_continuation: bool) -> Iterator[MarkedChain | GroupPiece]:
    """Yield chains and groups, from left to right."""
    for is_group, side_by_side in itertools.groupby(segments, key=lambda segment: isinstance(segment, Group)):
        if is_group:
            for group in side_by_side:
                assert isinstance(group, Group)
                yield GroupPiece(group, is_continuation)
                is_continuation = True
        else:
            marked = tuple(leaf for leaf in side_by_side if not isinstance(leaf, Group))
            yield MarkedChain(Chain(tuple(map(bare, marked)), is_continuation), marked)
            is_continuation = True


def chains_of(segments: Iterable[Segment], is_continuation: bool = False) -> Iterator[Chain]:
    """Yield all chains of a text, including those in branches, in written order."""
    for piece in pieces_of(segments, is_continuation):
        if isinstance(piece, MarkedChain):
            yield piece.chain
        else:
            for branch in piece.group.branches:
                yield from chains_of(branch.segments, piece.is_continuation and not branch.is_frozen)
