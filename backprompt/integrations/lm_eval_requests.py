"""Requests of lm-evaluation-harness as token ids, in an order in which those with common beginnings are neighbours."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backprompt.classify.scoring import TOKENS_AT_A_TIME
from backprompt.evaluation.behind import Behind
from backprompt.forest.fan import Shape


@dataclass(frozen=True)
class Continuation:
    """Ids of a request; the ids from `start` on are scored.

    There are at most `max_length` ids to forward, and one more, which is scored and not forwarded.
    """

    token_ids: tuple[int, ...]
    start: int


def behind_contexts(continuations: Sequence[Continuation]) -> list[Behind]:
    """Return the continuations in order; those of neighbours with the same context form one `Behind`."""
    shapes: dict[tuple[tuple[int, ...], ...], Shape] = {}
    behind: list[Behind] = []
    for context, own in itertools.groupby(continuations, key=lambda of: of.token_ids[: of.start]):
        completions = tuple(continuation.token_ids[continuation.start :] for continuation in own)
        behind.append(Behind(context, shapes.setdefault(completions, Shape(completions))))
    return behind


def slices_of(continuations: Sequence[Continuation], num_workers: int) -> Iterator[list[int]]:
    """Yield slices of continuations to score together, as indices; common beginnings are in one slice if possible."""
    # Ids compare fast as bytes. The order means nothing, but it puts common beginnings side by side.
    order = sorted(range(len(continuations)), key=lambda idx: array("i", continuations[idx].token_ids).tobytes())
    chosen: list[int] = []
    num_tokens = 0
    for idx in order:
        chosen.append(idx)
        num_tokens += len(continuations[idx].token_ids)
        if num_tokens >= TOKENS_AT_A_TIME * num_workers:
            yield chosen
            chosen, num_tokens = [], 0
    if chosen:
        yield chosen
