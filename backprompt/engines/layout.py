"""Layout: the choice of a worker for each text, by content; the module knows workers only by number.

A layout remembers runs of texts in forest order (the order of their token ids), and the worker that was given each run.
A text belongs to the worker of the run that it falls into, or of the neighbouring run with which it shares at least
half of its tokens. So a later call finds the keys and values of its beginnings, and a prompt with a completion goes to
the worker of the prompt.

    runs of texts    [the cat sat ... the dog ran]   [they say ... they say no]
    worker                        0                              1
    "the cow"        in the first run: worker 0
    "they say yes"   behind the second run, and begins as it ends: worker 1
    "once upon"      shares nothing with a run: the call's own cut decides

If a worker's texts would cost more than `MAX_BUSIER` times the slowest part of a new cut, the new cut is taken for all
texts of the call, and each of its parts goes to the worker that holds most of the part.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from backprompt.forest.partition import Floats, Ints, Rates, cut, flattened, forest_order
from backprompt.tokens.graph import TokenIds, flat

MAX_BUSIER = 1.5
"""The cost of a worker, relative to the slowest part of a new cut, above which texts leave their workers."""
FEW_TOKENS = 512
"""Fewer tokens than this stay with their worker: other workers would have to compute their beginnings, too."""
MAX_RUNS = 100_000
"""The largest number of remembered runs; beyond it, all runs are forgotten."""

_BEHIND = b"\xff\xff\xff\xff"  # no token id: a key that ends in it sorts behind all texts with that beginning
_NOBODY = -1


@dataclass(frozen=True)
class Part:
    """The texts of a call that one worker is given.

    Attributes:
        worker: the number of the worker.
        indices: the indices of the texts, ascending.

    """

    worker: int
    indices: Ints


class Layout:
    """Places texts on workers, and remembers where.

    Args:
        num_workers: the number of workers.
        rates: the cost of tokens; by default the same everywhere.

    """

    def __init__(self, num_workers: int, rates: Rates | None = None) -> None:
        self.num_workers = num_workers
        self._rates = rates or Rates()
        self._lock = threading.Lock()
        self._begins: list[bytes] = []  # of runs, ascending; a run ends where the next one begins
        self._owners: list[int] = []
        self._num_given = np.zeros(num_workers, dtype=np.int64)  # tokens, for texts that belong to nobody

    def place(
        self, texts: Sequence[TokenIds], more: Sequence[int] | None = None, *, remember: bool = True
    ) -> list[Part]:
        """Return the parts of a call, at most one a worker; equal texts are in one part.

        Args:
            texts: token ids.
            more: the number of tokens that are computed behind each text.
            remember: whether later calls follow this placement.

        """
        if not texts:
            return [Part(0, np.zeros(0, dtype=np.int64))]
        number_of: dict[TokenIds, int] = {}
        numbers = np.array([number_of.setdefault(ids, len(number_of)) for ids in texts], dtype=np.int64)
        behind: Ints | int = np.bincount(numbers, weights=more).astype(np.int64) if more is not None else 0
        with self._lock:
            workers = self._placed([flat(ids) for ids in number_of], behind, remember=remember)[numbers]
        return [Part(worker, np.flatnonzero(workers == worker)) for worker in np.unique(workers).tolist()]

    def _placed(self, texts: Sequence[tuple[int, ...]], behind: Ints | int, *, remember: bool) -> Ints:
        """Return the worker of each of these texts, which are distinct."""
        ids, offsets = flattened(texts)
        order, shared = forest_order(ids, offsets)
        lengths: Ints = np.diff(offsets)[order].astype(np.int64)
        behind = behind[order] if isinstance(behind, np.ndarray) else behind
        keys = [ids[offsets[idx] : offsets[idx + 1]].astype(">u4").tobytes() for idx in order.tolist()]
        inside = np.array([self._owner_inside(key) for key in keys], dtype=np.int64)
        owners = np.array([self._owner(key, own) for key, own in zip(keys, inside.tolist(), strict=True)])
        added = lengths - shared + behind
        fresh = cut(lengths, shared, self.num_workers, rates=self._rates, behind=behind)
        parts = np.repeat(np.arange(len(fresh.starts) - 1), np.diff(fresh.starts))
        moved = self._workers_of(parts, owners, added)[parts]
        chosen = np.where(owners == _NOBODY, moved, owners)
        busiest = self._costs(chosen, lengths, shared, behind).max()
        if busiest > FEW_TOKENS * self._rates.linear and busiest > MAX_BUSIER * fresh.costs.max():
            chosen = moved
        if remember:
            self._num_given += np.bincount(chosen, weights=added, minlength=self.num_workers).astype(np.int64)
            self._remember(keys, chosen, inside)
        placed = np.empty_like(chosen)
        placed[order] = chosen
        return placed

    def _costs(self, workers: Ints, lengths: Ints, shared: Ints, behind: Ints | int) -> Floats:
        """Return the cost of each worker's texts; texts in forest order."""
        goes_on = np.concatenate([[False], workers[1:] == workers[:-1]])
        costs = self._rates.added(lengths, np.where(goes_on, shared, 0), behind)
        return np.bincount(workers, weights=costs, minlength=self.num_workers).astype(np.float64)

    def _workers_of(self, parts: Ints, owners: Ints, added: Ints) -> Ints:
        """Return a worker for each part: the one that holds most of it, or else the one given fewest tokens so far."""
        num_parts = int(parts[-1]) + 1
        held = np.zeros((num_parts, self.num_workers), dtype=np.int64)
        is_held = owners != _NOBODY
        np.add.at(held, (parts[is_held], owners[is_held]), added[is_held])
        found = np.full(num_parts, _NOBODY, dtype=np.int64)
        free = set(range(self.num_workers))
        by_most = sorted(np.argwhere(held).tolist(), key=lambda pair: -held[pair[0], pair[1]])
        for part, worker in by_most:
            if found[part] == _NOBODY and worker in free:
                found[part] = worker
                free.remove(worker)
        for part in np.flatnonzero(found == _NOBODY).tolist():
            found[part] = min(free, key=lambda worker: (self._num_given[worker], worker))
            free.remove(int(found[part]))
        return found

    def _owner_inside(self, key: bytes) -> int:
        """Return the worker of the run that a text falls into, or `_NOBODY`."""
        idx = bisect_right(self._begins, key) - 1
        return self._owners[idx] if idx >= 0 else _NOBODY

    def _owner(self, key: bytes, inside: int) -> int:
        """Return the worker to which a text belongs, or `_NOBODY`; `inside`: that of the run it falls into."""
        if inside != _NOBODY:
            return inside
        idx = bisect_right(self._begins, key) - 1  # where the run before the text ends
        before = _num_common(key, self._begins[idx]) if idx > 0 else 0
        after = _num_common(key, self._begins[idx + 1]) if idx + 1 < len(self._begins) else 0
        if max(before, after) == 0 or 2 * max(before, after) < len(key) // 4:
            return _NOBODY
        return self._owners[idx - 1] if before >= after else self._owners[idx + 1]

    def _remember(self, keys: Sequence[bytes], chosen: Ints, inside: Ints) -> None:
        if len(self._begins) > MAX_RUNS:
            self._begins, self._owners = [], []
        begins = np.concatenate([[0], np.flatnonzero(np.diff(chosen)) + 1, [len(chosen)]]).tolist()
        for first, stop in pairwise(begins):
            if (chosen[first:stop] != inside[first:stop]).any():
                self._give(keys[first], keys[stop - 1] + _BEHIND, int(chosen[first]))

    def _give(self, begin: bytes, end: bytes, worker: int) -> None:
        """Let all texts from `begin` to before `end` belong to a worker."""
        last = bisect_right(self._begins, end) - 1
        owner_behind = self._owners[last] if last >= 0 else _NOBODY
        first, stop = bisect_left(self._begins, begin), bisect_right(self._begins, end)
        self._begins[first:stop] = [begin, end]
        self._owners[first:stop] = [worker, owner_behind]


def _num_common(key: bytes, other: bytes) -> int:
    """Return the number of tokens that two texts have in common at their beginning."""
    num_bytes = min(len(key), len(other))
    own, its = np.frombuffer(key[:num_bytes], dtype=">u4"), np.frombuffer(other[:num_bytes], dtype=">u4")
    differ = np.flatnonzero(own != its)
    return int(differ[0]) if len(differ) else len(own)
