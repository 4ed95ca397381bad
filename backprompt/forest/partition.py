"""Cuts a forest of token ids into parts for several workers, so that the slowest part is as fast as possible.

Texts are put into *forest order*, in which texts with a common beginning are neighbours. In this order a text adds the
tokens behind the beginning that it shares with the text before it. A part is a run of texts in forest order. It costs
the tokens that its texts add, and the beginning that its first text shares with the text before. This beginning is
computed once more, or fetched if that is cheaper:

    texts in forest order    a b c     a b d e     a b d f     x y
    shared with the one before   0           2           3       0
    two parts               |a b c     a b d e |   a b d f     x y|   tokens: 5 + 6, three of them computed twice

The cost of a token is that of the linear layers and that of attention to the tokens before it (`Rates`). All arrays are
flat: the input of the cut (`cut`) is two numbers for each text. This module knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = "npt.NDArray[np.int64]"
Floats: TypeAlias = "npt.NDArray[np.float64]"

# The number of tokens that are compared at once for neighbours; a few arrays of this size are alive at a time.
COMPARED_AT_ONCE = 1 << 22
# The shares of a part's cost by which a cut may move forward to a place where texts share less. All are tried.
SLACKS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.25)
# Steps of the bisection for the cost of the slowest part: a cost is found to a millionth of its first bounds.
BISECTIONS = 20
# If the slowest parts of two cuts differ by less than this share, the cut with fewer tokens is taken, ...
ALIKE = 0.01
# ... if its parts differ by less than this share.
EVEN = 0.05


@dataclass(frozen=True)
class Rates:
    """The costs of tokens, all in one unit, such as seconds.

    Attributes:
        linear: a token's linear layers.
        attention: a token's attention to one token before it.
        fetch: fetching the keys and values of a token that is computed elsewhere; None: fetching is impossible.

    """

    linear: float = 1.0
    attention: float = 0.0
    fetch: float | None = None

    def __post_init__(self) -> None:
        for name, rate in (("linear", self.linear), ("attention", self.attention), ("fetch", self.fetch or 0.0)):
            if not 0 <= rate < float("inf"):
                msg = f"A rate must be a finite number of at least 0, not {name}={rate!r}."
                raise ValueError(msg)

    def computing(self, num_tokens: Ints) -> Floats:
        """Return the cost of computing the first `num_tokens` tokens of a text."""
        return num_tokens * (self.linear + self.attention * (num_tokens - 1) / 2)

    def added(self, lengths: Ints, shared: Ints, behind: Ints | int) -> Floats:
        """Return the cost of each text beyond the beginning that it shares, tokens behind it included; see `cut`."""
        return self.computing(lengths) - self.computing(shared) + behind * (self.linear + self.attention * lengths)

    def fetching(self, num_tokens: Ints) -> Floats:
        """Return the cost of fetching the first `num_tokens` tokens of a text; infinite if fetching is impossible."""
        rate = np.inf if self.fetch is None else self.fetch
        return np.multiply(num_tokens, rate, out=np.zeros(num_tokens.shape), where=num_tokens > 0)


@dataclass(frozen=True)
class Partition:
    """Texts in parts.

    Attributes:
        order: the index of each text, in forest order, `(texts,)`.
        starts: the index in `order` at which each part begins, and at the end the number of texts, `(parts + 1,)`.
        costs: the cost of each part, in the unit of the rates, `(parts,)`.
        imbalance: how much less the fastest part costs than the slowest, as a share of the slowest.
        num_tokens: the tokens that each part computes, `(parts,)`.
        num_fetched: the tokens that each part fetches, all of them at the beginning of its first text, `(parts,)`.
        num_distinct: the distinct tokens of all texts.
        least_cost: a lower bound for the cost of the slowest part: an equal share of all distinct tokens, or the text
            with the largest cost.
        least_tokens: a lower bound for the tokens that any cut into this many parts computes and fetches in all.

    """

    order: Ints
    starts: Ints
    costs: Floats
    imbalance: float
    num_tokens: Ints
    num_fetched: Ints
    num_distinct: int
    least_cost: float
    least_tokens: int

    @cached_property
    def parts(self) -> list[Ints]:
        """The indices of each part's texts, in forest order."""
        return np.split(self.order, self.starts[1:-1])


def partition(
    texts: Sequence[Sequence[int] | Ints],
    num_parts: int | None = None,
    *,
    max_tokens: int | None = None,
    rates: Rates = Rates(),
) -> Partition:
    """Cut texts, as token ids, into at most `num_parts` parts, or into parts of at most `max_tokens` tokens each.

    There are fewer than `num_parts` parts if more of them would not make the slowest part faster.

    Raises:
        ValueError: none or both of `num_parts` and `max_tokens` are given, one of them is less than 1, or a single text
            has more than `max_tokens` tokens.

    """
    ids, offsets = flattened(texts)
    order, shared = forest_order(ids, offsets)
    return cut(np.diff(offsets)[order], shared, num_parts, max_tokens=max_tokens, rates=rates, order=order)


def flattened(texts: Sequence[Sequence[int] | Ints]) -> tuple[npt.NDArray[np.int32], Ints]:
    """Return the ids of all texts side by side, and the offset of each text and of the end, `(texts + 1,)`."""
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)), out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.int32)
    for text, first, stop in zip(texts, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        ids[first:stop] = text
    return ids, offsets


def forest_order(ids: npt.NDArray[np.integer], offsets: Ints) -> tuple[Ints, Ints]:
    """Return the indices of texts in forest order, and how many tokens each shares with the text before it.

    The order is that of the sorted ids; a text that is a beginning of others comes before them. Sorting takes eight
    bytes for each token besides the ids, and some 150 bytes for each text.
    """
    # Unsigned numbers with the highest byte first are ordered as their bytes are.
    digits = ids.astype(">u4").view(np.uint8).data
    keys = [
        bytes(digits[4 * first : 4 * stop])
        for first, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    del digits
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    del keys
    return order, _shared_with_the_one_before(ids, offsets, order)


def _shared_with_the_one_before(ids: npt.NDArray[np.integer], offsets: Ints, order: Ints) -> Ints:
    shared = np.zeros(len(order), dtype=np.int64)
    lengths = np.diff(offsets)[order]
    at_most = np.minimum(lengths[1:], lengths[:-1])
    firsts = offsets[:-1][order]
    start = 0
    ends = np.cumsum(at_most)
    while start < len(at_most):
        compared_before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, compared_before + COMPARED_AT_ONCE, side="right")))
        shared[start + 1 : stop + 1] = _equal_tokens(
            ids, firsts[start:stop], firsts[start + 1 : stop + 1], at_most[start:stop]
        )
        start = stop
    return shared


def _equal_tokens(ids: npt.NDArray[np.integer], firsts: Ints, others: Ints, at_most: Ints) -> Ints:
    """Return how many tokens from `firsts` on equal those from `others` on, up to the first difference or the limit."""
    ends = np.cumsum(at_most)
    begins = ends - at_most
    places = np.arange(ends[-1]) + np.repeat(firsts - begins, at_most)
    differ = ids[places] != ids[places + np.repeat(others - firsts, at_most)]
    differences = np.append(np.flatnonzero(differ), ends[-1])
    equal: Ints = np.minimum(differences[np.searchsorted(differences, begins)] - begins, at_most)
    return equal


def cut(
    lengths: Ints,
    shared: Ints,
    num_parts: int | None = None,
    *,
    max_tokens: int | None = None,
    rates: Rates = Rates(),
    order: Ints | None = None,
    behind: Ints | int = 0,
) -> Partition:
    """Cut texts in forest order; see `partition`.

    Args:
        lengths: tokens of each text, in forest order, `(texts,)`.
        shared: tokens that each text shares with the text before it, `(texts,)`; 0 for the first.
        num_parts: at most this many parts.
        max_tokens: at most this many tokens are computed in each part.
        rates: the costs of tokens.
        order: the index of each text; None: the texts are numbered in forest order.
        behind: the number of tokens that are computed behind each text, and attend to it, `(texts,)`.

    """
    if (num_parts is None) == (max_tokens is None):
        msg = "Give either num_parts or max_tokens, and not both."
        raise ValueError(msg)
    for name, number in (("num_parts", num_parts), ("max_tokens", max_tokens)):
        if number is not None and number < 1:
            msg = f"{name} must be at least 1, not {number}."
            raise ValueError(msg)
    forest = _Forest(lengths, shared, behind, rates if max_tokens is None else Rates())
    if max_tokens is None:
        starts = _into(forest, num_parts or 1)
    elif len(lengths) and (most := (lengths + behind).max()) > max_tokens:
        msg = f"A text of {most} tokens does not fit into a part of max_tokens={max_tokens}. Raise max_tokens."
        raise ValueError(msg)
    else:
        starts = min(
            (forest.cut(max_tokens, slack, len(lengths)) for slack in SLACKS),
            key=lambda starts: (len(starts), forest.repeated(starts)),
        )
    order = np.arange(len(lengths)) if order is None else order
    return _partition(_Forest(lengths, shared, behind, rates), starts, order, num_parts)


class _Forest:
    """The costs of runs of texts in forest order, from running sums of the costs that texts add.

    The run `start..stop` costs `added[stop] - saved[start]`. `saved` never falls: the beginning that a text shares is
    at most the whole text before it. So it costs at most that text's own beginning and the tokens which that text adds.
    """

    def __init__(self, lengths: Ints, shared: Ints, behind: Ints | int, rates: Rates) -> None:
        self.shared, self.new = shared, lengths - shared + behind
        self.fetched = rates.fetching(shared) < rates.computing(shared)
        self.beginning = np.minimum(rates.computing(shared), rates.fetching(shared))
        added = rates.added(lengths, shared, behind)
        self.added = np.concatenate([[0.0], np.cumsum(added)])
        self.saved = self.added[:-1] - self.beginning

    def cut(self, cost: float, slack: float, num_parts: int) -> Ints:
        """Return the starts of parts within a cost limit; the first is 0 if `num_parts` parts hold all texts.

        From the last text to the first, each part begins as early as the limit allows. No cut has fewer parts, because
        more texts never need fewer parts. With a `slack` a part begins up to that share of the cost later, at the place
        where texts share least. A text above the limit is a part of its own.
        """
        starts = [len(self.shared)]
        while starts[-1] and len(starts) <= num_parts:
            stop = starts[-1]
            enough = self.added[stop] - cost * (1 + 1e-12)
            first = min(stop - 1, int(np.searchsorted(self.saved, enough)))
            if first and slack:
                last = int(np.searchsorted(self.added, self.added[first] + slack * cost, side="right"))
                first += int(np.argmin(self.beginning[first : min(stop, last)]))
            starts.append(first)
        return np.array(starts[::-1], dtype=np.int64)

    def least_cost(self, num_parts: int) -> float:
        """Return a lower bound for the cost of the slowest of at most this many parts.

        A text costs its own tokens and its beginning. All parts together cost the distinct tokens, and one beginning
        for each part except the first; an equal share of this sum is the bound.
        """
        alone = float((self.added[1:] - self.saved).max(initial=0.0))
        num_more = min(num_parts, len(self.shared)) - 1
        fewest = np.sort(np.partition(self.beginning[1:], num_more - 1)[:num_more]) if num_more > 0 else np.zeros(0)
        together = self.added[-1] + np.concatenate([[0.0], np.cumsum(fewest)])
        return max(alone, float((together / np.arange(1, len(together) + 1)).min()))

    def enough(self, num_parts: int) -> float:
        """Return a cost limit for which `cut` needs at most `num_parts` parts: each adds at least an equal share."""
        return float(self.added[-1] / num_parts + self.beginning.max() + np.diff(self.added).max())

    def costs(self, starts: Ints) -> Floats:
        """Return the cost of each part."""
        return np.diff(self.added[starts]) + self.beginning[starts[:-1]]

    def imbalance(self, starts: Ints) -> float:
        """Return how much less the fastest part costs than the slowest, as a share of the slowest."""
        costs = self.costs(starts)
        return float(1 - costs.min() / costs.max()) if costs.max() else 0.0

    def repeated(self, starts: Ints) -> int:
        """Return the number of tokens that are computed or fetched once more."""
        return int(self.shared[starts[:-1]].sum())


def _into(forest: _Forest, num_parts: int) -> Ints:
    """Return the starts of at most this many parts: the slowest is as fast as possible, and tokens are few."""
    if not len(forest.shared):
        return np.zeros(1, dtype=np.int64)
    candidates = [starts for slack in SLACKS for starts in _bisected(forest, num_parts, slack)]
    slowest = [forest.costs(starts).max() for starts in candidates]
    enough = min(slowest) * (1 + ALIKE)
    alike = [starts for starts, cost in zip(candidates, slowest, strict=True) if cost <= enough]
    return min(
        alike, key=lambda starts: (forest.imbalance(starts) > EVEN, forest.repeated(starts), forest.imbalance(starts))
    )


def _bisected(forest: _Forest, num_parts: int, slack: float) -> list[Ints]:
    """Return the cuts into at most this many parts that a bisection over the cost of the slowest part finds."""
    low, high = forest.least_cost(num_parts), forest.enough(num_parts)
    if not (starts := forest.cut(low, slack, num_parts))[0]:
        return [starts]
    found = [np.array([0, len(forest.shared)])]
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not (starts := forest.cut(middle, slack, num_parts))[0]:
            found.append(starts)
            high = middle
        else:
            low = middle
    return found


def _partition(forest: _Forest, starts: Ints, order: Ints, at_most: int | None) -> Partition:
    num_parts = len(starts) - 1
    new = forest.new
    beginnings = forest.shared[starts[:-1]]
    fetched = forest.fetched[starts[:-1]]
    num_distinct = int(new.sum())
    fewest = np.partition(forest.shared[1:], num_parts - 2)[: num_parts - 1] if num_parts > 1 else new[:0]
    return Partition(
        order=order,
        starts=starts,
        costs=forest.costs(starts),
        imbalance=forest.imbalance(starts) if num_parts else 0.0,
        num_tokens=np.add.reduceat(new, starts[:-1]) + np.where(fetched, 0, beginnings) if num_parts else new,
        num_fetched=np.where(fetched, beginnings, 0),
        num_distinct=num_distinct,
        least_cost=forest.least_cost(at_most or num_parts),
        least_tokens=num_distinct + int(fewest.sum()),
    )
