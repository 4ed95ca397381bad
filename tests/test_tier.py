"""A tier of memory by itself: its counts, the order of eviction, and how blocks become smaller and fewer."""

import gc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt.forest.span import KINDS
from backprompt.memory import tier
from backprompt.memory.blocks import BlockRows
from backprompt.memory.leaves import NOTHING_SPARED, Spared
from backprompt.memory.tier import Tier
from backprompt.tokens.graph import TokenBranch, TokenGraph, TokenGroup
from tiny_blocks import KEYS_VALUES_BYTES, STATES_BYTES, TOKEN_BYTES, assert_right, compute, inserted

STEM, LEFT, RIGHT = (1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 7, 8, 9)


def first_to_last(*nums_tokens):
    """An order of spans by their numbers of tokens, the same for both kinds."""
    return lambda kind, span: (float(nums_tokens.index(len(span.token_ids))), 0)


@pytest.fixture
def held():
    """1 2 3 4 --+-- 5 6
    +-- 7 8 9, all of one pass; the spans in this order. The stem goes first where it is a leaf, then the right one."""
    forest, _ = inserted(STEM, LEFT, RIGHT)
    spans = list(forest.spans())
    assert [len(span.token_ids) for span in spans] == [4, 2, 3]
    device = Tier(10_000, "device", first_to_last(4, 3, 2))
    device.add(compute(spans))
    return device, forest, spans


def what_is_held(spans):
    return [(span.is_held(), span.is_held(with_keys_values=True)) for span in spans]


def test_bytes_are_those_of_blocks_that_are_alive(held):
    device, _, spans = held
    assert device.num_bytes == 9 * TOKEN_BYTES
    for span in spans[:2]:
        span.drop()
    assert device.num_bytes == 9 * TOKEN_BYTES  # a block is as large as it is while anything refers to it
    spans[2].let_go("keys_values", "device")
    assert device.num_bytes == 9 * STATES_BYTES
    spans[2].drop()
    gc.collect()
    assert device.num_bytes == 0


def test_recounting_counts_what_spans_refer_to(held):
    device, _, spans = held
    others = compute(spans)  # never added
    device.recount(spans)
    assert device.num_bytes == sum(block.num_bytes for block in others) == 9 * TOKEN_BYTES
    device.recount([])
    assert device.num_bytes == 0


def test_nothing_goes_within_the_budget(held):
    device, forest, spans = held
    assert device.shrink(forest, 0, NOTHING_SPARED) == {"states": {}, "keys_values": {}}
    assert what_is_held(spans) == [(True, True)] * 3


def test_leaves_go_before_what_they_continue_and_keys_before_states(held):
    device, forest, (stem, left, right) = held
    order = []
    for _ in range(6):
        dropped = device.shrink(forest, 1, NOTHING_SPARED)
        order += [(kind, span) for kind in KINDS for span in dropped[kind]]
    assert order == [
        ("keys_values", right),
        ("states", right),
        ("keys_values", left),
        ("keys_values", stem),
        ("states", left),
        ("states", stem),
    ]
    assert device.shrink(forest, 1, NOTHING_SPARED) == {"states": {}, "keys_values": {}}


def test_no_more_goes_than_is_asked_for(held):
    device, forest, spans = held
    excess = 3 * TOKEN_BYTES + 2 * KEYS_VALUES_BYTES
    dropped = device.shrink(forest, excess, Spared(({spans[0]},)))
    assert {kind: list(rows) for kind, rows in dropped.items()} == {"keys_values": spans[:0:-1], "states": [spans[2]]}
    assert sum(tier.num_bytes_of(rows) for rows in dropped.values()) == excess
    assert what_is_held(spans) == [(True, True), (True, False), (False, False)]
    assert_right(spans[:2])


def test_a_span_that_is_spared_stays_and_all_that_it_continues(held):
    device, forest, spans = held
    dropped = device.shrink(forest, 10**9, Spared((set(), {spans[2]})))
    assert {kind: list(rows) for kind, rows in dropped.items()} == {"keys_values": [spans[1]], "states": [spans[1]]}
    assert what_is_held(spans) == [(True, True), (False, False), (True, True)]
    device.shrink(forest, 10**9, NOTHING_SPARED)
    assert what_is_held(spans) == [(False, False)] * 3


def test_spans_of_later_passes_go_last_and_those_of_the_latest_pass_first(held):
    device, forest, (stem, left, right) = held
    last_uses = {stem: 2, right: 1, left: 2}

    def shrink(excess, next_pass):
        dropped = device.shrink(forest, excess, Spared((), last_uses, next_pass))
        return [(kind, span) for kind in KINDS for span in dropped[kind]]

    assert shrink(1, 0) == [("keys_values", left)]  # the one of lower rank is used last in an earlier pass
    assert shrink(1, 2) == [("keys_values", right)]  # which is through
    assert shrink(1, 2) == [("states", right)]
    device.end_plan()
    assert shrink(1, 3) == [("keys_values", stem)]
    assert shrink(10**9, 3) == [("states", left), ("states", stem)]


def test_what_a_span_continues_is_worth_as_much_as_it(held):
    device, forest, spans = held
    stem, left, right = spans
    left.credit, left.last_used = 2.0, 5
    right.credit, right.last_used = 3.0, 4
    device.shrink(forest, 10**9, Spared(({stem},)))
    assert (stem.credit, stem.last_used) == (3.0, 5)


def test_a_group_goes_after_what_stands_behind_it_and_before_its_branches():
    """1 2 --+-- 3 --+
    +-- 4 --+-- (junction) -- 5"""
    group = TokenGroup((TokenBranch(((3,),)), TokenBranch(((4,),))))
    forest, (end,) = inserted(TokenGraph(((1, 2), group, (5,))))
    spans = list(forest.spans())
    (junction,) = (span for span in spans if not span.token_ids)
    device = Tier(10_000, "device", lambda kind, span: (0.0, 0))
    device.add(compute(spans))
    assert device.num_bytes == 5 * TOKEN_BYTES
    for rows in device.shrink(forest, 10**9, NOTHING_SPARED).values():
        order = list(rows)
        assert order[:2] == [end, junction]
        assert [span.token_ids for span in order[2:]] == [(3,), (4,), (1, 2)]


def test_compacting_keeps_the_rows_that_are_held(held):
    device, forest, spans = held
    device.shrink(forest, 2 * TOKEN_BYTES, Spared(({spans[2]},)))
    assert device.num_bytes == 9 * TOKEN_BYTES
    device.compact()
    assert device.num_bytes == 7 * TOKEN_BYTES
    assert_right([spans[0], spans[2]])


def test_compacting_takes_the_room_behind_the_only_span_of_a_block_that_grows():
    forest, (end,) = inserted((1, 2, 3))
    device = Tier(10_000, "device", first_to_last(3))
    blocks = compute([end])
    first, second = forest.split(end, 1), end
    forest.split(end, 1)
    for block, kind in zip(blocks, KINDS, strict=True):
        first.place(**{kind: BlockRows(block, 0, 1)})
        second.let_go(kind, "device")
        second.parent.let_go(kind, "device")
    device.add(blocks)
    for block, kind in zip(blocks, KINDS, strict=True):
        first.place(**{kind: BlockRows(block, 0, 2)})  # as if the span had taken in a token
    device.compact()
    assert device.num_bytes == 2 * TOKEN_BYTES
    assert [block.num_held for block in blocks] == [2, 2]


def test_small_blocks_become_one_where_they_are_many(monkeypatch):
    monkeypatch.setattr(tier, "MAX_SMALL_BLOCKS", 6)
    forest, ends = inserted(*([idx, 50 + idx] for idx in range(1, 5)))
    device = Tier(10_000, "device", first_to_last(2))
    for num_texts, end in enumerate(ends, 1):
        device.add(compute([end]))
        assert device.is_scattered == (num_texts == 4)
        device.compact()
    assert not device.is_scattered
    assert len({id(end.states.block) for end in ends}) == len({id(end.keys_values.block) for end in ends}) == 1
    assert device.num_bytes == 8 * TOKEN_BYTES
    assert_right(forest.spans())


@given(data=st.data())
def test_the_held_part_of_a_forest_is_whole(data):
    """Whatever goes: parents are held, keys and values come with states, and as much goes as was asked for."""
    texts = data.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=6))
    forest, _ = inserted(*texts)
    spans = list(forest.spans())
    ranks = {(kind, span): float(data.draw(st.integers(0, 9))) for kind in KINDS for span in spans}
    device = Tier(0, "device", lambda kind, span: (ranks[kind, span], 0))
    num_before = sum(block.num_bytes for block in compute(spans))
    staying = data.draw(st.sets(st.sampled_from(spans)))
    excess = data.draw(st.integers(0, num_before + 1))
    dropped = device.shrink(forest, excess, Spared((staying,)))
    sizes = [rows.num_bytes for of_kind in dropped.values() for rows in of_kind.values()]
    must_stay = {span for end in staying for span in end.path()}
    for span in spans:
        for kind in KINDS:
            assert span.holds(kind) == (span not in dropped[kind])
            above = [parent for parent in span.parents if parent.parent is not None]
            assert not span.holds(kind) or all(parent.holds(kind) for parent in above)
        assert span not in must_stay or span.is_held(with_keys_values=True)
    may_go = sum(len(span.token_ids) for span in spans if span not in must_stay) * TOKEN_BYTES
    assert sum(sizes) >= min(excess, may_go)
    assert sum(sizes) == 0 or sum(sizes) - max(sizes) < excess
