"""The tokens of a text in written order: the position of each token, and the tokens that it sees."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.tokens.graph import TokenIds, fold

Seen: TypeAlias = "tuple[slice, ...]"
"""Tokens, as slices of a text's tokens in written order; the slices do not overlap."""


@dataclass(frozen=True)
class WrittenRun:
    """Consecutive tokens, each of which sees the tokens before it in the run.

    Attributes:
        start, stop: the bounds of the run, counted in written order.
        position: the position of the first token.
        before: the tokens before the run, seen by all tokens of the run.

    """

    start: int
    stop: int
    position: int
    before: Seen


def written_runs(token_ids: TokenIds) -> list[WrittenRun]:
    """Return the runs of a text; equal branches of a group are runs of their own."""
    runs: list[WrittenRun] = []

    def extend(before: Seen, position: int, ids: tuple[int, ...]) -> Seen:
        start = runs[-1].stop if runs else 0
        runs.append(WrittenRun(start, start + len(ids), position, before))
        return (*before, slice(start, start + len(ids)))

    def join(before: Seen, ends: Sequence[tuple[Seen, bool]], position: int) -> Seen:
        own = (seen if is_frozen else seen[len(before) :] for seen, is_frozen in ends)
        return before + tuple(part for parts in own for part in parts)

    nothing: Seen = ()
    fold(token_ids, nothing, extend, join)
    return runs


def positions_of(runs: Sequence[WrittenRun]) -> npt.NDArray[np.int64]:
    """Return the position of each token, `(tokens,)`."""
    return np.concatenate([np.arange(run.stop - run.start) + run.position for run in runs])


def visible_to(runs: Sequence[WrittenRun], rows: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return which tokens the tokens `rows` see, themselves included, `(rows, tokens)`."""
    visible = np.zeros((len(rows), runs[-1].stop), dtype=np.bool_)
    starts = [run.start for run in runs]
    for seen, row in zip(visible, rows, strict=True):
        run = runs[bisect_right(starts, row) - 1]
        for part in run.before:
            seen[part] = True
        seen[run.start : row + 1] = True
    return visible
