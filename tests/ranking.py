"""A plain ranking of the rows that can be evicted next, to compare with: all spans are looked at, nothing is kept."""

import pytest

from backprompt.forest.span import KINDS
from backprompt.memory.leaves import Leaves


def plain_leaves(forest, pool):
    """The rows of a pool that no other rows there need, each with its kind and span."""
    rows = {(kind, span) for span in forest.spans() for kind in KINDS if span.rows_in(kind, pool) is not None}
    needed = {(kind, parent) for kind, span in rows for parent in span.parents}
    needed |= {("states", span) for kind, span in rows if kind == "keys_values"}
    return rows - needed


def plain_ranks(forest, pool, rank, spared):
    """The rank of each of these rows that may go: those that later passes attend to last, the latest pass first."""
    ranks = {}
    for kind, span in plain_leaves(forest, pool):
        if not any(span in spans for spans in spared.stay):
            last_use = spared.last_uses.get(span, -1)
            ranks[kind, span] = (0, *rank(kind, span)) if last_use < spared.next_pass else (1, -last_use, 0)
    return ranks


def compare_with_plain(patch: pytest.MonkeyPatch, forest_of):
    """Compare every leaf that is taken with the plain ranking of `forest_of(leaves)`; return the leaves taken."""
    taken = []
    take = Leaves.take

    def compared(self):
        ranks = plain_ranks(forest_of(self), self.pool, self.rank, self.spared)
        leaf = take(self)
        if leaf is None:
            assert not ranks
        else:
            assert ranks[leaf] == min(ranks.values())
            taken.append(leaf)
        return leaf

    patch.setattr(Leaves, "take", compared)
    return taken
