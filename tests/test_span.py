"""The forest of spans spells what was inserted, shares every common beginning, and loses no row when it splits."""

import ast
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import backprompt
from backprompt.forest.forest import Forest
from backprompt.forest.span import KINDS, Junction, JunctionKey, Kind, Pool, Span
from backprompt.memory.blocks import BlockRows
from comparing import beginnings
from spans import AnyBlock, spelled

Ids = tuple[int, ...]

# Three token ids, so that texts share their beginnings, end inside one another and repeat.
texts = st.lists(st.integers(0, 2), max_size=8).map(tuple)
batches = st.lists(texts, max_size=12)


def all_spans(forest: Forest) -> Iterator[Span]:
    """Every span below the root, found by following children."""
    unseen = list(forest.root.children.values())
    while unseen:
        span = unseen.pop()
        yield span
        unseen += span.children.values()


def check_is_radix_tree(forest: Forest) -> None:
    assert (forest.root.token_ids, forest.root.position, forest.root.parent) == ((), 0, None)
    for span in [forest.root, *all_spans(forest)]:
        for first_id, child in span.children.items():
            assert child.parent is span
            assert child.token_ids, "an empty span"
            assert child.token_ids[0] == first_id
            assert child.position == span.position + len(span.token_ids)


def held(forest: Forest) -> list[Ids]:
    """The path to each token that the forest holds; a token that is held twice is listed twice."""
    return [
        spelled(span)[: span.position + num_tokens]
        for span in all_spans(forest)
        for num_tokens in range(1, len(span.token_ids) + 1)
    ]


class Computed:
    """Marks texts as computed, one block a text, and remembers which token each row of each block stands for."""

    def __init__(self, forest: Forest) -> None:
        self._forest = forest
        self._token_at: dict[tuple[object, int], Ids] = {}

    def add(self, ids: Ids) -> None:
        end = self._forest.insert(ids)
        block, num_rows = AnyBlock(), 7  # the rows before these are another text's
        for span in path_to(end):
            if span.keys_values is None:
                stop = num_rows + len(span.token_ids)
                span.keys_values = span.states = BlockRows(block, num_rows, stop)
                for row in range(num_rows, stop):
                    self._token_at[block, row] = spelled(span)[: span.position + row - num_rows + 1]
                num_rows = stop

    def tokens_of(self, span: Span) -> list[Ids]:
        """The paths to the tokens of the rows of `span`."""
        rows = span.keys_values
        assert rows is not None
        return [self._token_at[rows.block, row] for row in range(rows.start, rows.stop)]

    def tokens(self) -> set[Ids]:
        return {
            token for span in all_spans(self._forest) if span.keys_values is not None for token in self.tokens_of(span)
        }


def path_to(end: Span) -> list[Span]:
    """The spans from the first below the root to `end`, found by following parents."""
    path: list[Span] = []
    while end.parent is not None:
        path.insert(0, end)
        end = end.parent
    return path


def filled(batch: Sequence[Ids]) -> Forest:
    forest = Forest()
    for ids in batch:
        forest.insert(ids)
    return forest


def test_the_example_of_the_module() -> None:
    """Three texts share 1 2, two of them 4 as well.

    (root) -- 1 2 --+-- 3
                    +-- 4 --+-- 5
                            +-- 6
    """
    forest = Forest()
    sat, off, home = forest.insert((1, 2, 3)), forest.insert((1, 2, 4, 5)), forest.insert([1, 2, 4, 6])
    (the_cat,) = forest.root.children.values()
    ran = the_cat.children[4]
    assert (the_cat.token_ids, the_cat.position) == ((1, 2), 0)
    assert (the_cat.children, ran.children) == ({3: sat, 4: ran}, {5: off, 6: home})
    assert (ran.token_ids, ran.position, home.token_ids, home.position) == ((4,), 2, (6,), 3)
    assert home.path() == [the_cat, ran, home]
    assert list(forest.spans()) == [the_cat, sat, ran, off, home]
    assert repr(ran) == "Span(1 tokens at 2, 2 children, not held)"


@given(batches)
def test_every_text_is_spelled_by_the_path_to_its_end_also_after_later_inserts(batch: list[Ids]) -> None:
    forest = Forest()
    ends = [forest.insert(ids) for ids in batch]
    for ids, end in zip(batch, ends, strict=True):
        assert spelled(end) == ids
        assert end.path() == path_to(end)
        assert tuple(token_id for span in end.path() for token_id in span.token_ids) == ids
        assert forest.insert(ids) is end


@given(batches)
def test_each_distinct_token_is_held_once(batch: list[Ids]) -> None:
    forest = filled(batch)
    check_is_radix_tree(forest)
    assert sorted(held(forest)) == sorted(beginnings(batch))


@given(batches, st.randoms())
def test_the_order_of_inserts_does_not_matter(batch: list[Ids], random: Random) -> None:
    def cuts(forest: Forest) -> set[tuple[Ids, int]]:
        return {(spelled(span), span.position) for span in all_spans(forest)}

    shuffled = random.sample(batch, len(batch))
    assert cuts(filled(batch)) == cuts(filled(shuffled))


@given(batches)
def test_spans_yields_every_span_once_depth_first(batch: list[Ids]) -> None:
    forest = filled(batch)
    order = list(forest.spans())
    assert len(order) == len(set(order))
    assert set(order) == set(all_spans(forest))
    for before, span in pairwise([forest.root, *order]):
        # Depth first: a child stands right behind its parent, or behind a descendant of its parent.
        assert span.parent is before or span.parent in path_to(before) or span.parent is forest.root
        assert not before.children or before.children.get(span.token_ids[0]) is span


@given(batches, batches)
def test_a_split_keeps_every_row_with_its_token(computed_batch: list[Ids], batch: list[Ids]) -> None:
    forest = Forest()
    computed = Computed(forest)
    for ids in computed_batch:
        computed.add(ids)
    for ids in batch:
        forest.insert(ids)
    for span in all_spans(forest):
        if span.keys_values is not None:
            ids = spelled(span)
            assert computed.tokens_of(span) == [ids[: stop + 1] for stop in range(span.position, len(ids))]
    assert computed.tokens() == beginnings(computed_batch)


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_a_split_keeps_the_object_as_the_lower_part(num_tokens: int) -> None:
    """A holder of the span at which 5 6 7 8 9 ends keeps it.

    5 --+-- 6 7 8 9 -- 10     ->     5 --+-- 6 (new) -- 7 8 9 (the same object) -- 10
        +-- 1                            +-- 1
    """
    forest = Forest()
    below, sibling, span = forest.insert((5, 6, 7, 8, 9, 10)), forest.insert((5, 1)), forest.insert((5, 6, 7, 8, 9))
    parent, block = span.parent, AnyBlock()
    span.keys_values, span.states = BlockRows(block, 20, 24), BlockRows(block, 30, 34)
    span.host_keys_values, span.host_states = BlockRows(block, 40, 44), BlockRows(block, 50, 54)
    span.was_computed = True
    upper = forest.split(span, num_tokens)
    assert parent is not None
    assert parent.children == {6: upper, 1: sibling}
    assert (upper.parent, span.parent, below.parent) == (parent, upper, span)
    assert (upper.children, span.children) == ({span.token_ids[0]: span}, {10: below})
    assert (upper.token_ids, span.token_ids) == ((6, 7, 8, 9)[:num_tokens], (6, 7, 8, 9)[num_tokens:])
    assert (upper.position, span.position) == (1, 1 + num_tokens)
    assert upper.keys_values == BlockRows(block, 20, 20 + num_tokens)
    assert span.keys_values == BlockRows(block, 20 + num_tokens, 24)
    assert upper.states == BlockRows(block, 30, 30 + num_tokens)
    assert span.states == BlockRows(block, 30 + num_tokens, 34)
    assert upper.host_keys_values == BlockRows(block, 40, 40 + num_tokens)
    assert span.host_keys_values == BlockRows(block, 40 + num_tokens, 44)
    assert upper.host_states == BlockRows(block, 50, 50 + num_tokens)
    assert span.host_states == BlockRows(block, 50 + num_tokens, 54)
    assert upper.was_computed
    check_is_radix_tree(forest)


@pytest.mark.parametrize("num_tokens", [0, 3, 4])
def test_a_split_that_leaves_a_part_empty_is_refused(num_tokens: int) -> None:
    forest = Forest()
    span = forest.insert((1, 2, 3))
    with pytest.raises(AssertionError):
        forest.split(span, num_tokens)
    assert held(forest) == [(1,), (1, 2), (1, 2, 3)]


@given(batches, batches, texts)
@example([(0, 1), (0, 1, 2)], [], (0, 2))  # leaves a span in its middle, with the token that continues its end
def test_num_computed_is_the_longest_computed_beginning(computed_batch: list[Ids], batch: list[Ids], ids: Ids) -> None:
    forest = Forest()
    computed = Computed(forest)
    for computed_ids in computed_batch:
        computed.add(computed_ids)
    for other in batch:
        forest.insert(other)
    spans = list(all_spans(forest))
    known = beginnings(computed_batch)
    assert forest.num_computed(ids) == sum(ids[:stop] in known for stop in range(1, len(ids) + 1))
    assert list(all_spans(forest)) == spans


@given(batches, batches)
def test_prune_leaves_what_is_computed(computed_batch: list[Ids], batch: list[Ids]) -> None:
    forest = Forest()
    computed = Computed(forest)
    for ids in computed_batch:
        computed.add(ids)
    for ids in batch:
        forest.insert(ids)
    forest.prune()
    check_is_radix_tree(forest)
    assert sorted(held(forest)) == sorted(beginnings(computed_batch))
    assert computed.tokens() == beginnings(computed_batch)


@given(batches, st.data(), st.integers(0, 20), st.integers(0, 60))
def test_prune_leaves_the_latest_of_what_holds_nothing(
    batch: list[Ids], data: st.DataObject, max_spans: int, max_tokens: int
) -> None:
    """By the latest use of a span or its descendants; there is no room for another."""
    forest = Forest()
    for ids in batch:
        forest.insert(ids).last_used = data.draw(st.integers(0, 5))
    before = list(forest.spans())
    for span in before:
        span.was_computed = True
    latest = {span: max(below.last_used for below in before if span in below.path()) for span in before}
    forest.prune(max_spans, max_tokens)
    left = set(forest.spans())
    check_is_radix_tree(forest)
    assert left <= set(before)
    assert len(left) <= max_spans
    assert sum(len(span.token_ids) for span in left) <= max_tokens
    assert all(span.parent is forest.root or span.parent in left for span in left)
    gone = [span for span in before if span not in left]
    assert all(latest[span] <= min(map(latest.__getitem__, left), default=5) for span in gone)
    if gone:
        first = min(gone, key=lambda span: (-latest[span], before.index(span)))
        num_tokens = sum(len(span.token_ids) for span in left) + len(first.token_ids)
        assert len(left) == max_spans or num_tokens > max_tokens
    assert not any(span.children for span in gone)


def test_prune_takes_what_was_never_computed_and_remembers_the_rest() -> None:
    """1 (dropped) -- 2 (dropped); 1 -- 3 (inserted only); 4 (inserted only) -- 5 (dropped)"""
    forest = Forest()
    first, second, third, fourth, fifth = (forest.insert(ids) for ids in ((1,), (1, 2), (1, 3), (4,), (4, 5)))
    for span in (first, second, fifth):
        span.was_computed = True
    forest.prune(10, 10)
    assert set(forest.spans()) == {first, second, fourth, fifth}
    assert third not in first.children.values()


def test_prune_takes_what_stands_below_a_span_that_is_not_computed() -> None:
    """1 (computed) -- 2 (not) -- 3 (computed)"""
    forest = Forest()
    spans = [forest.insert(ids) for ids in ((1,), (1, 2), (1, 2, 3))]
    spans[0].states, spans[2].states = BlockRows(AnyBlock(), 0, 1), BlockRows(AnyBlock(), 0, 1)
    forest.prune()
    assert list(all_spans(forest)) == [spans[0]]


def test_prune_leaves_what_is_held_in_the_second_pool() -> None:
    """1 (on the device) -- 2 (in the second pool) -- 3 (nowhere)"""
    forest = Forest()
    spans = [forest.insert(ids) for ids in ((1,), (1, 2), (1, 2, 3))]
    spans[0].states, spans[1].host_states = BlockRows(AnyBlock(), 0, 1), BlockRows(AnyBlock(), 0, 1)
    assert [span.is_empty for span in spans] == [False, False, True]
    forest.prune()
    assert list(all_spans(forest)) == spans[:2]
    assert repr(spans[1]) == "Span(1 tokens at 1, 0 children, held in the second pool)"
    spans[1].host_keys_values = BlockRows(AnyBlock(), 0, 1)
    forest.clear()
    assert (spans[1].host_keys_values, spans[1].host_states) == (None, None)


@given(batches)
def test_clear_forgets_every_span_also_for_those_who_hold_one(batch: list[Ids]) -> None:
    forest = Forest()
    computed = Computed(forest)
    for ids in batch:
        computed.add(ids)
    ends = [forest.insert(ids) for ids in batch]
    spans = list(all_spans(forest))
    forest.clear()
    assert list(all_spans(forest)) == []
    assert [(span.keys_values, span.states) for span in spans] == [(None, None)] * len(spans)
    assert [spelled(end) for end in ends] == batch
    assert [forest.num_computed(ids) for ids in batch] == [0] * len(batch)


def test_a_chain_of_ten_thousand_spans() -> None:
    """0 -- 1 -- 2 -- ... -- 9999, one token a span: no walk recurses."""
    ids = tuple(range(10_000))
    forest = Forest()
    end = forest.insert(ids)
    for _ in ids[1:]:
        forest.split(end, 1)
    assert [span.token_ids for span in end.path()] == [(token_id,) for token_id in ids]
    assert list(forest.spans()) == end.path()
    assert forest.insert(ids) is end
    for span in end.path():
        span.keys_values = span.states = BlockRows(AnyBlock(), 0, 1)
    branch = forest.insert((*ids, 1))
    assert branch.parent is end
    assert forest.num_computed((*ids, 1)) == len(ids)
    forest.prune()
    assert list(forest.spans()) == end.path()
    forest.clear()
    assert list(forest.spans()) == []


def test_an_evaluation_that_has_computed_nothing_goes_on() -> None:
    forest = Forest()
    for _ in range(3):
        forest.begin_evaluation()
    assert (forest.evaluation, forest.stamp(), forest.stamp()) == (1, 1, 1)
    forest.begin_evaluation()
    forest.begin_evaluation()
    assert forest.evaluation == 2


@pytest.mark.parametrize(
    ("slots", "held", "with_keys", "anywhere", "anywhere_with_keys"),
    [
        ((), False, False, False, False),
        (("states",), True, False, True, False),
        (("states", "keys_values"), True, True, True, True),
        (("host_states",), False, False, True, False),
        (("host_states", "host_keys_values"), False, False, True, True),
        (("states", "host_keys_values"), True, False, True, True),
    ],
)
def test_where_a_span_is_held_and_with_what(slots, held, with_keys, anywhere, anywhere_with_keys) -> None:
    span = Forest().insert((1, 2))
    for slot in slots:
        setattr(span, slot, BlockRows(AnyBlock(), 0, 2))
    assert (span.is_held(), span.is_held(with_keys_values=True)) == (held, with_keys)
    assert (span.is_held(in_host=True), span.is_held(in_host=True, with_keys_values=True)) == (
        anywhere,
        anywhere_with_keys,
    )
    assert span.is_empty == (not anywhere)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_lies_in_one_pool_at_most(kind: Kind) -> None:
    span = Forest().insert((1, 2))

    def lies_in(kind: Kind) -> list[Pool]:
        return [pool for pool in ("device", "host") if span.rows_in(kind, pool) is not None]

    (other,) = set(KINDS) - {kind}
    rows = BlockRows(AnyBlock(), 0, 2)
    span.move(kind, rows, "host")
    assert (lies_in(kind), lies_in(other)) == (["host"], [])
    span.place(**{kind: rows})
    assert (lies_in(kind), lies_in(other)) == (["device"], [])
    span.move(kind, rows, "host")
    span.move(other, rows, "device")
    assert (lies_in(kind), lies_in(other)) == (["host"], ["device"])
    span.let_go(kind, "device")  # these rows do not lie there
    assert lies_in(kind) == ["host"]
    span.let_go(kind, "host")
    assert (lies_in(kind), lies_in(other)) == ([], ["device"])
    span.move(kind, rows, "host")
    span.drop()
    assert (lies_in(kind), lies_in(other)) == ([], [])


def test_a_junction_is_found_by_its_branches_in_any_order_each_as_often_as_it_is_there() -> None:
    forest = Forest()
    context = forest.insert((1,))
    a, b = forest.insert((1, 2, 3)), forest.insert((1, 4))
    junction = Junction(3, context, {})
    context.add_child(JunctionKey.of([(a, False), (b, True), (a, False)]), junction)
    forest.split(a, 1)  # an end stays the end
    assert context.junction([(b, True), (a, False), (a, False)]) is junction
    for ends in ([(a, False), (b, True)], [(a, False), (b, False), (a, False)], [(a, True), (b, True), (a, True)]):
        assert context.junction(ends) is None


def test_only_spans_say_and_set_where_their_rows_lie():
    """No other module compares these attributes with None, or writes them."""
    slots = {"keys_values", "states", "host_keys_values", "host_states"}
    found = set()
    for path in Path(backprompt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node]
            is_use = isinstance(node, ast.Compare) or isinstance(getattr(node, "ctx", None), ast.Store)
            if is_use and any(isinstance(part, ast.Attribute) and part.attr in slots for part in given):
                found.add(path.name)
    assert found == {"span.py"}
