"""Joins: places where two segments of a text meet, and the joins that change tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, TypeAlias

from backprompt.text.extents import Join
from backprompt.text.node import Text
from backprompt.tokens.chains import Chain, chains_of
from backprompt.tokens.graph import common_length
from backprompt.tokens.tokenizer import EncodesStrings

Joins: TypeAlias = Literal["exact", "split", "error"]
JOINS: tuple[Joins, ...] = ("exact", "split", "error")


def changed_joins(tokenizer: EncodesStrings, text: Text) -> list[Join]:
    """Return every join of a text that changes tokens, from left to right."""
    joins: list[Join] = []
    num_before = 0
    for chain in chains_of(text.segments):
        joins += _changed_joins(tokenizer, chain, num_before)
        num_before += len(chain.leaves)
    return joins


def _changed_joins(tokenizer: EncodesStrings, chain: Chain, num_before: int) -> Iterator[Join]:
    numbered = enumerate(chain.leaves, num_before)
    for is_string, side_by_side in itertools.groupby(numbered, key=lambda place: isinstance(place[1], str)):
        if is_string:
            run = [(idx, str(leaf)) for idx, leaf in side_by_side]
            is_continuation = chain.is_continuation or run[0][0] > num_before
            yield from _changed_joins_of_run(tokenizer, run, is_continuation)


def _changed_joins_of_run(
    tokenizer: EncodesStrings, strings: list[tuple[int, str]], is_continuation: bool
) -> list[Join]:
    """Return the changed joins of one run, given as segment indices and strings; none if the run's ids do not change.

    Joins can cancel out: in "x " + " " + "y" the first join makes one token of two spaces, and the "y" splits it again.
    """
    (_, run), *rest = strings
    if not tokenizer.encodes_continuations:
        return _joins_that_change_the_left_side(tokenizer, run, rest, is_continuation)
    (ids,) = tokenizer.encode([run], is_continuation=is_continuation)
    ids_apart, joins = ids, []
    for idx, string in rest:
        (right,) = tokenizer.encode([string], is_continuation=True)
        (joined,) = tokenizer.encode([run + string], is_continuation=is_continuation)
        if joined != ids + right:
            joins.append(Join(idx, run, string, *_differing_middles(ids + right, joined)))
        run, ids, ids_apart = run + string, joined, ids_apart + right
    return joins if ids != ids_apart else []


def _joins_that_change_the_left_side(
    tokenizer: EncodesStrings, run: str, rest: list[tuple[int, str]], is_continuation: bool
) -> list[Join]:
    """Return the joins that change the ids of the text before them; no string is encoded as a continuation."""
    runs = list(itertools.accumulate((string for _, string in rest), initial=run))
    encoded = tokenizer.encode(runs, is_continuation=is_continuation)
    joins = []
    for (idx, string), left, ids, joined in zip(rest, runs[:-1], encoded[:-1], encoded[1:], strict=True):
        num_same = common_length(ids, joined, 0)
        if num_same < len(ids):
            joins.append(Join(idx, left, string, ids[num_same:], joined[num_same:]))
    return joins


def _differing_middles(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return both sequences without their common beginning and then without their common end."""
    shortest = min(len(a), len(b))
    start = next((i for i in range(shortest) if a[i] != b[i]), shortest)
    end = next((i for i in range(shortest - start) if a[-1 - i] != b[-1 - i]), shortest - start)
    return a[start : len(a) - end], b[start : len(b) - end]
