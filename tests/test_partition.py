"""Forests cut into parts for several workers: the texts of each part, its cost, and bounds that no cut can beat."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt.forest.partition import ALIKE, Partition, Rates, cut, forest_order, partition

# Few tokens and short texts: they share beginnings, begin each other, and are equal.
TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=14)
RATES = st.builds(
    Rates, st.sampled_from([1.0, 2.5]), st.sampled_from([0.0, 0.1, 3.0]), st.sampled_from([None, 0.0, 0.5, 2.0])
)


def beginnings(texts: list[list[int]]) -> set[tuple[int, ...]]:
    """Return the distinct tokens of texts, each as the beginning that ends with it."""
    return {tuple(text[:stop]) for text in texts for stop in range(1, len(text) + 1)}


def texts_of(parts: Partition, texts: list[list[int]]) -> list[list[list[int]]]:
    return [[texts[index] for index in part] for part in parts.parts] if texts else []


@given(TEXTS, st.integers(1, 6), RATES)
def test_each_text_is_in_one_part_that_computes_or_fetches_all_of_its_tokens(
    texts: list[list[int]], num_parts: int, rates: Rates
) -> None:
    parts = partition(texts, num_parts, rates=rates)
    assert sorted(parts.order.tolist()) == list(range(len(texts)))
    assert len(parts.costs) <= num_parts
    assert all(len(part) for part in texts_of(parts, texts))
    assert parts.num_distinct == len(beginnings(texts))
    for part, cost, num_tokens, num_fetched in zip(
        texts_of(parts, texts), parts.costs, parts.num_tokens, parts.num_fetched, strict=True
    ):
        distinct = beginnings(part)
        assert len(distinct) == num_tokens + num_fetched
        fetched = {tuple(part[0][:stop]) for stop in range(1, num_fetched + 1)}
        computed = sum(rates.linear + rates.attention * (len(beginning) - 1) for beginning in distinct - fetched)
        assert cost == pytest.approx(computed + num_fetched * (rates.fetch or 0.0))
        if rates.fetch is None:
            assert not num_fetched


@given(TEXTS)
def test_texts_with_a_common_beginning_stand_together(texts: list[list[int]]) -> None:
    ids = np.array([token for text in texts for token in text], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, texts)])
    order, shared = forest_order(ids, offsets)
    in_order = [texts[index] for index in order]
    assert in_order == sorted(texts)
    for num, text, before in zip(shared[1:], in_order[1:], in_order, strict=False):
        assert text[:num] == before[:num]
        assert num == min(len(text), len(before)) or text[num] != before[num]
    assert not len(shared) or shared[0] == 0


@pytest.mark.parametrize("compared", [1, 5, 1 << 22])
def test_neighbours_are_compared_a_few_at_a_time(compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backprompt.forest.partition.COMPARED_AT_ONCE", compared)
    texts = [[1, 2, 300], [1, 2], [1, 2, 300], [70_000, 1], [256], [1]]
    offsets = np.cumsum([0, *map(len, texts)])
    order, shared = forest_order(np.array([token for text in texts for token in text]), offsets)
    assert order.tolist() == [5, 1, 0, 2, 4, 3]
    assert shared.tolist() == [0, 1, 2, 3, 0, 0]


@given(TEXTS.filter(bool), st.integers(1, 6), RATES.filter(lambda rates: rates.fetch is None))
def test_no_cut_is_better_than_the_bounds(texts: list[list[int]], num_parts: int, rates: Rates) -> None:
    parts = partition(texts, num_parts, rates=rates)
    assert parts.costs.max() >= parts.least_cost * (1 - 1e-9)
    assert parts.num_tokens.sum() >= parts.least_tokens
    # The bound on tokens holds for sets of texts in any order: it is the best of all ways to begin the other parts.
    in_order = sorted(texts)
    some = min(
        sum(
            len(beginnings(in_order[start:stop]))
            for start, stop in zip((0, *starts), (*starts, len(texts)), strict=True)
        )
        for starts in combinations(range(1, len(texts)), len(parts.costs) - 1)
    )
    assert some == parts.least_tokens


def cost_of(run: list[list[int]], num_shared: int, rates: Rates) -> float:
    """Return the cost of a run of texts whose first text shares so many tokens with the text before."""
    costs = {beginning: rates.linear + rates.attention * (len(beginning) - 1) for beginning in beginnings(run)}
    computed = sum(costs.pop(tuple(run[0][:stop])) for stop in range(1, num_shared + 1))
    fetched = np.inf if rates.fetch is None and num_shared else num_shared * (rates.fetch or 0.0)
    return sum(costs.values()) + min(computed, fetched)


@given(TEXTS.filter(bool), st.integers(1, 4), RATES)
def test_no_cut_into_runs_has_a_faster_slowest_part(texts: list[list[int]], num_parts: int, rates: Rates) -> None:
    parts = partition(texts, num_parts, rates=rates)
    in_order = sorted(texts)
    _, shared = forest_order(
        np.array([token for text in in_order for token in text]), np.cumsum([0, *map(len, in_order)])
    )
    best = min(
        max(
            cost_of(in_order[start:stop], int(shared[start]), rates)
            for start, stop in zip((0, *starts), (*starts, len(texts)), strict=True)
        )
        for num_cuts in range(num_parts)
        for starts in combinations(range(1, len(texts)), num_cuts)
    )
    assert best * (1 - 1e-9) <= parts.costs.max() <= best * (1 + ALIKE) + 1e-3
    assert parts.least_cost <= best * (1 + 1e-9)


@given(TEXTS.filter(bool), st.integers(7, 20))
def test_no_cut_has_fewer_parts_of_at_most_so_many_tokens(texts: list[list[int]], max_tokens: int) -> None:
    in_order = sorted(texts)
    fewest = next(
        num_cuts + 1
        for num_cuts in range(len(texts))
        if any(
            all(
                len(beginnings(in_order[start:stop])) <= max_tokens
                for start, stop in zip((0, *starts), (*starts, len(texts)), strict=True)
            )
            for starts in combinations(range(1, len(texts)), num_cuts)
        )
    )
    assert len(partition(texts, max_tokens=max_tokens).costs) == fewest


@given(TEXTS.filter(bool), st.integers(1, 6), RATES)
def test_more_workers_do_not_make_the_slowest_part_slower_than_one(
    texts: list[list[int]], num_parts: int, rates: Rates
) -> None:
    one = partition(texts, 1, rates=rates)
    assert partition(texts, num_parts, rates=rates).costs.max() <= one.costs.max() * (1 + 1e-9)
    assert one.num_tokens.sum() == one.num_distinct


@given(TEXTS.filter(bool), st.integers(7, 20))
def test_parts_of_at_most_so_many_tokens(texts: list[list[int]], max_tokens: int) -> None:
    parts = partition(texts, max_tokens=max_tokens, rates=Rates(attention=1.0))
    assert parts.num_tokens.max() <= max_tokens
    assert len(parts.costs) >= -(-parts.num_distinct // max_tokens)


def test_a_tree_is_cut_where_its_texts_share_little() -> None:
    # Eight instructions of 50 tokens with 100 questions of 10 each: cutting between instructions repeats nothing.
    texts = [[instruction] * 50 + [100 + question] * 10 for instruction in range(8) for question in range(100)]
    parts = partition(texts, 4)
    assert parts.num_tokens.sum() == parts.num_distinct == parts.least_tokens
    assert parts.imbalance == 0
    assert [sorted({int(index) // 100 for index in part}) for part in parts.parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_chain_stays_whole_and_a_star_is_dealt_out() -> None:
    chain = partition([[7] * length for length in range(1, 60)], 8)
    assert len(chain.costs) == 1  # the longest text holds all tokens: more parts would not be faster
    star = partition([[0, leaf, *[leaf] * 20] for leaf in range(1, 161)], 8)
    assert [len(part) for part in star.parts] == [20] * 8
    assert star.num_tokens.sum() == star.num_distinct + 7 == star.least_tokens


def test_a_shared_beginning_is_fetched_where_that_is_cheaper() -> None:
    texts = [[1] * 100 + [leaf] * 50 for leaf in range(2, 10)]
    computed = partition(texts, 4, rates=Rates())
    fetched = partition(texts, 4, rates=Rates(fetch=0.1))
    assert computed.num_fetched.sum() == 0
    assert fetched.num_fetched.tolist() == [0, 100, 100, 100]
    assert fetched.num_tokens.sum() == fetched.num_distinct
    assert fetched.costs.max() < computed.costs.max() or fetched.costs[1:].max() < computed.costs[1:].max()


def test_the_cost_of_attention_counts() -> None:
    # A text of 100 tokens costs as much as 41 of 10, if attention to a token costs a tenth of the layers.
    texts = [[1] * 100, *([10 + leaf] * 10 for leaf in range(40))]
    linear, attention = partition(texts, 2), partition(texts, 2, rates=Rates(attention=0.1))
    assert linear.imbalance <= 0.05
    assert attention.costs[0] == pytest.approx(100 + 0.1 * 99 * 100 / 2)
    assert len(attention.parts[0]) == 1 < len(linear.parts[0])


def test_a_million_texts_are_cut_from_two_numbers_each() -> None:
    lengths = np.full(1_000_000, 30)
    shared = np.where(np.arange(1_000_000) % 1000, 20, 0)
    parts = cut(lengths, shared, 256)
    assert parts.imbalance <= 0.05
    assert parts.num_tokens.sum() <= 1.05 * parts.num_distinct
    assert parts.costs.max() <= 1.05 * parts.least_cost


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give either num_parts or max_tokens"),
        ({"num_parts": 2, "max_tokens": 3}, "Give either num_parts or max_tokens"),
        ({"num_parts": 0}, "num_parts must be at least 1, not 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_tokens": 2}, "A text of 3 tokens does not fit into a part of max_tokens=2"),
    ],
)
def test_what_cannot_be_cut_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition([[1, 2, 3]], **arguments)


def test_rates_are_finite_numbers() -> None:
    with pytest.raises(ValueError, match="not attention=-1"):
        Rates(attention=-1)


def test_no_texts_make_no_parts() -> None:
    parts = partition([], 3)
    assert parts.num_distinct == 0
    assert len(parts.costs) == 0
