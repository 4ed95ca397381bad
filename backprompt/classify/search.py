"""Best-first search for the best of many completions, without scoring all of them. Pure Python.

The completions form a trie of token ids. An *expanded* (forwarded) node gives the log-probabilities of all its
children. Log-probabilities are at most 0, so further tokens can only lower the score of a path. A node's *bound* is
the best score that any completion below it would have if all further tokens had log-probability 0. Nodes are expanded
in the order of their bounds, until no node can still beat the best finished completion (A* with this bound as its
heuristic; Hart, Nilsson and Raphael 1968).

    (root) -- cancel --+-- order            expanded: (root), cancel. "cancel order" has -0.9, and the bound of
                       +-- card             "refund" is -2.1, so no completion below it is looked at.
           -- refund --+-- payment
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

SLACK = 1e-9
"""The rounding error of a bound (relative; absolute below 1): sums in another order round differently."""


@dataclass(frozen=True)
class Candidate:
    """A completion: its ids, and the terms of its score.

    Attributes:
        token_ids: its ids; not empty.
        offset: its score if all its tokens had log-probability 0; may be inf or -inf.
        divisor: the number by which the sum of its log-probabilities is divided: 1, or the number of its tokens.

    """

    token_ids: tuple[int, ...]
    offset: float
    divisor: int

    def bound(self, logprob: float) -> float:
        """Return the highest score within reach after tokens with a total log-probability of `logprob`.

        The bound is -inf after a token of probability 0, whatever the offset.
        """
        return logprob / self.divisor + self.offset if logprob > -math.inf else -math.inf


@dataclass(eq=False)
class Node:
    """A node of the trie: a common beginning of completions.

    Attributes:
        token_ids: the path from the root.
        children: the next nodes, by token id.
        candidate_idxs: the completions that end here.
        best: the completions below that have the highest bound for at least one log-probability of the path.

    """

    token_ids: tuple[int, ...]
    children: dict[int, Node] = field(default_factory=dict)
    candidate_idxs: list[int] = field(default_factory=list)
    best: list[Candidate] = field(default_factory=list)

    def bound(self, logprob: float) -> float:
        """Return the highest score that any completion below can reach, if the path has `logprob`."""
        return max(candidate.bound(logprob) for candidate in self.best)


def make_trie(candidates: Sequence[Candidate]) -> Node:
    """Return the root of the trie of these completions."""
    root = Node(())
    nodes = [root]
    for idx, candidate in enumerate(candidates):
        node = root
        for depth, token_id in enumerate(candidate.token_ids, 1):
            if token_id not in node.children:
                node.children[token_id] = Node(candidate.token_ids[:depth])
                nodes.append(node.children[token_id])
            node = node.children[token_id]
        node.candidate_idxs.append(idx)
    for node in reversed(nodes):  # children before parents
        ending = [candidates[idx] for child in node.children.values() for idx in child.candidate_idxs]
        node.best = _undominated([*ending, *(c for child in node.children.values() for c in child.best)])
    return root


class Search:
    """A search for the best completion behind one prompt.

    Until `expand` returns no nodes, the caller passes the log-probabilities of each node's children to `tell`.

    Args:
        root: the root of the candidates' trie; several searches may share it.
        score: maps a completion's idx and the log-probabilities of its tokens to its score, which must equal
            `candidate.bound(sum of log-probabilities)` up to rounding.

    """

    def __init__(self, root: Node, score: Callable[[int, list[float]], float]) -> None:
        self.best_idx = 0
        """The finished completion with the highest score; of equal scores, the first."""
        self.best_score = -math.inf
        self._score = score
        self._order = itertools.count()
        self._frontier: list[tuple[float, int, Node]] = [(-root.bound(0.0), next(self._order), root)]
        self._logprobs: dict[Node, list[float]] = {root: []}

    def expand(self, max_nodes: int) -> list[Node]:
        """Return the nodes with the highest bounds among the nodes that may still lead to the best completion."""
        nodes: list[Node] = []
        while self._frontier and len(nodes) < max_nodes and self._may_win(-self._frontier[0][0]):
            nodes.append(heapq.heappop(self._frontier)[2])
        return nodes

    def tell(self, node: Node, logprobs: Mapping[int, float]) -> None:
        """Take in the log-probabilities of the tokens that follow an expanded node."""
        before = self._logprobs.pop(node)
        for token_id, child in node.children.items():
            path = [*before, logprobs[token_id]]
            for idx in child.candidate_idxs:
                score = self._score(idx, path)
                if (score, -idx) > (self.best_score, -self.best_idx):
                    self.best_score, self.best_idx = score, idx
            if child.children:
                bound = child.bound(math.fsum(path))
                if self._may_win(bound):
                    self._logprobs[child] = path
                    heapq.heappush(self._frontier, (-bound, next(self._order), child))

    def _may_win(self, bound: float) -> bool:
        """Return whether a completion with this bound may still beat the best score, or equal it."""
        return bound > -math.inf and bound + SLACK * max(1.0, abs(bound)) >= self.best_score


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that may have the highest bound: no other candidate is as good or better in both terms."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.divisor, -c.offset)):
        if not kept or candidate.offset > kept[-1].offset:
            kept.append(candidate)
    return kept
