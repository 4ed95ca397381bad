"""A plan forwards each missing token once and shows each row its ancestors and itself, once each; no tensors here.

Every token is named by the token ids that lead to it, itself included. That name follows a token into the rows of the
blocks and of the passes, whatever was split meanwhile, so the view of a row is known without the forest: a text's
token sees every beginning of that text up to itself.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt.forest.forest import Forest
from backprompt.forest.passes import MIN_CUT_TOKENS, MIN_REST_TOKENS, cut_into_passes, missing_spans
from backprompt.forest.plan import KeySegment, Pass, plan_pass
from backprompt.forest.span import Span
from backprompt.memory.blocks import BlockRows
from comparing import beginnings
from spans import AnyBlock, spelled

Ids = tuple[int, ...]
Scene = tuple[list[list[Ids]], list[Ids]]

TILE_TOKENS = (1, 2, 5, 128)


def scene(seed: int, num_texts: int) -> Scene:
    """Two batches of texts that are computed, one after the other, and the texts that are wanted now.

    A text is another one, of any batch, and some tokens more: half of them one of the first three, which so get many
    branches, the others any. (Drawn token by token, most examples would be small.)
    """
    random = Random(seed)
    texts: list[Ids] = [()]
    batches: tuple[list[Ids], ...] = ([], [], [])
    for _ in range(num_texts):
        num_more = random.choice((1, 1, 1, 2, 3, 6, 70))
        base = random.choice(texts[: random.choice((3, 40))])
        texts.append((*base, random.randrange(8), *[0] * (num_more - 1)))
        batches[random.choice((0, 1, 2, 2, 2, 2))].append(texts[-1])
    return [*batches[:2]], batches[2]


scenes = st.builds(scene, seed=st.integers(0, 2**32 - 1), num_texts=st.integers(1, 40))
max_tokens_of_a_pass = st.sampled_from([4096, 300, 60, 7])


def tokens_of(spans: Iterable[Span]) -> list[Ids]:
    """The name of each token of `spans`, in order."""
    return [ids[: stop + 1] for span in spans for ids in [spelled(span)] for stop in range(span.position, len(ids))]


class World:
    """A forest of which some batches of texts are computed, and which token lies in which row of which block."""

    def __init__(self, computed_batches: Iterable[Iterable[Ids]] = ()) -> None:
        self.forest = Forest()
        self.blocks: list[AnyBlock] = []
        self.token_at: dict[tuple[object, int], Ids] = {}
        for batch in computed_batches:
            self.compute(span for ids in batch for span in self.forest.insert(ids).path())

    def compute(self, spans: Iterable[Span]) -> None:
        """Put those of `spans` that are not computed into a new block, one behind the other."""
        block, start = AnyBlock(), 0
        self.blocks.append(block)
        for span in spans:
            if span.keys_values is None:
                tokens = tokens_of([span])
                self.token_at |= {(block, start + row): token for row, token in enumerate(tokens)}
                span.keys_values = span.states = BlockRows(block, start, start + len(tokens))
                start += len(tokens)

    @property
    def computed(self) -> set[Ids]:
        return set(self.token_at.values())


def planned(world: World, wanted: Sequence[Ids], tile_tokens: int, max_tokens: int) -> Iterator[Pass]:
    """Yield the plan of each pass; its spans are computed before the next one is planned."""
    spans = missing_spans([world.forest.insert(ids) for ids in wanted])
    for group in cut_into_passes(world.forest, spans, max_tokens):
        pass_ = plan_pass(group, tile_tokens)
        yield pass_
        world.compute(group)


def own(pass_: Pass) -> tuple[KeySegment, ...]:
    return tuple(segment for segment in pass_.segments if segment.is_own)


def cross(pass_: Pass) -> tuple[KeySegment, ...]:
    return tuple(segment for segment in pass_.segments if not segment.is_own)


def seen_by_each_row(pass_: Pass, token_at: dict[tuple[object, int], Ids]) -> list[Counter[Ids]]:
    """How often its segments show each token to each row of the pass, by the definition of `KeySegment`."""
    row_tokens = tokens_of(pass_.spans)
    seen: list[Counter[Ids]] = [Counter() for _ in row_tokens]
    for segment in own(pass_):
        assert segment.key_position == pass_.positions[segment.start]
        for row in range(segment.start, segment.stop):
            for key in range(segment.start, row + 1):
                if segment.visible_until is None or row < segment.visible_until[key - segment.start]:
                    seen[row][row_tokens[key]] += 1
    for segment in cross(pass_):
        keys = range(segment.key_start, segment.key_stop)
        tokens = [row_tokens[key] if segment.block is None else token_at[segment.block, key] for key in keys]
        assert [len(token) - 1 for token in tokens] == [segment.key_position + i for i in range(len(tokens))]
        for row in range(segment.start, segment.stop):
            seen[row].update(tokens)
    return seen


def check_segments(pass_: Pass, token_at: dict[tuple[object, int], Ids]) -> None:
    """THE LAW: a row sees each token on the way to it once, and nothing else."""
    for token, seen in zip(tokens_of(pass_.spans), seen_by_each_row(pass_, token_at), strict=True):
        assert seen == Counter(token[:stop] for stop in range(1, len(token) + 1))
    # Each row has exactly one segment of its own, whose result the others are joined to.
    assert [row for segment in own(pass_) for row in range(segment.start, segment.stop)] == list(
        range(pass_.num_tokens)
    )


# Which spans


@given(scenes)
def test_missing_spans_are_what_is_wanted_and_not_computed(scene: Scene) -> None:
    computed, wanted = scene
    world = World(computed)
    spans = missing_spans([world.forest.insert(ids) for ids in wanted])
    assert sorted(tokens_of(spans)) == sorted(beginnings(wanted) - world.computed)
    assert all(span.keys_values is None for span in spans)


@given(scenes)
def test_missing_spans_stand_depth_first(scene: Scene) -> None:
    """Parents before children, and each subtree contiguous, also one whose root is computed."""
    computed, wanted = scene
    world = World(computed)
    spans = missing_spans([world.forest.insert(ids) for ids in wanted])
    idx_of = {span: idx for idx, span in enumerate(spans)}
    assert all(idx_of[span.parent] < idx for idx, span in enumerate(spans) if span.parent in idx_of)
    for ancestor in world.forest.spans():
        below = [idx for idx, span in enumerate(spans) if ancestor in span.path()]
        assert below == list(range(below[0], below[0] + len(below)) if below else ())


def test_nothing_is_missing_of_nothing() -> None:
    assert missing_spans([]) == []
    assert missing_spans([Forest().insert(())]) == []
    assert cut_into_passes(Forest(), [], max_tokens=4) == []


# Into which passes


@given(scenes, max_tokens_of_a_pass)
def test_passes_hold_every_token_once_in_order_within_the_bound(scene: Scene, max_tokens: int) -> None:
    computed, wanted = scene
    world = World(computed)
    ends = [world.forest.insert(ids) for ids in wanted]
    spans = missing_spans(ends)
    tokens = tokens_of(spans)
    passes = cut_into_passes(world.forest, spans, max_tokens)
    assert [token for group in passes for token in tokens_of(group)] == tokens
    assert all(span.token_ids for group in passes for span in group)
    sizes = [len(tokens_of(group)) for group in passes]
    assert all(1 <= size <= max_tokens for size in sizes)
    if passes:  # as few and as equal as can be, but no span is cut into less than MIN_CUT_TOKENS and MIN_REST_TOKENS
        equal_size = math.ceil(len(tokens) / math.ceil(len(tokens) / max_tokens))
        assert all(size > equal_size - MIN_CUT_TOKENS - MIN_REST_TOKENS for size in sizes[:-1])
    assert [spelled(end) for end in ends] == wanted


@pytest.mark.parametrize(
    ("text_sizes", "max_tokens", "pass_sizes"),
    [
        ([1000], 1000, [1000]),
        ([1000], 999, [500, 500]),
        ([1000], 300, [250, 250, 250, 250]),
        ([60, 80, 60], 100, [100, 100]),
        ([68, 80, 52], 100, [100, 100]),  # MIN_CUT_TOKENS of the second text still fit
        ([69, 80, 51], 100, [69, 80, 51]),
        ([80, 80, 40], 100, [80, 80, 40]),
        ([60, 50, 90], 100, [94, 90, 16]),  # cuts leave MIN_REST_TOKENS
    ],
)
def test_passes_are_equal_where_enough_of_a_text_fits(
    text_sizes: list[int], max_tokens: int, pass_sizes: list[int]
) -> None:
    forest = Forest()
    ends = [forest.insert([text_idx] * size) for text_idx, size in enumerate(text_sizes)]
    passes = cut_into_passes(forest, missing_spans(ends), max_tokens)
    assert [len(tokens_of(group)) for group in passes] == pass_sizes
    assert [span for group in passes for span in group if not span.children] == ends


# Which keys each row sees


@pytest.mark.parametrize("tile_tokens", TILE_TOKENS)
@given(scenes, max_tokens_of_a_pass)
def test_every_row_sees_what_leads_to_it_once_and_nothing_else(tile_tokens: int, scene: Scene, max_tokens: int) -> None:
    computed, wanted = scene
    world = World(computed)
    missing = beginnings(wanted) - world.computed
    forwarded = []
    for pass_ in planned(world, wanted, tile_tokens, max_tokens):
        check_segments(pass_, world.token_at)
        forwarded += tokens_of(pass_.spans)
    assert sorted(forwarded) == sorted(missing)


@given(scenes, st.sampled_from(TILE_TOKENS))
def test_the_row_of_a_pass_is_its_tokens_at_their_positions(scene: Scene, tile_tokens: int) -> None:
    computed, wanted = scene
    world = World(computed)
    for pass_ in planned(world, wanted, tile_tokens, max_tokens=100):
        tokens = tokens_of(pass_.spans)
        assert pass_.token_ids == [token[-1] for token in tokens]
        assert pass_.positions == [len(token) - 1 for token in tokens]
        assert pass_.num_tokens == len(tokens)


@given(scenes, st.sampled_from(TILE_TOKENS))
def test_tiles_hold_several_branches_and_no_more_tokens_than_allowed(scene: Scene, tile_tokens: int) -> None:
    computed, wanted = scene
    world = World(computed)
    for pass_ in planned(world, wanted, tile_tokens, max_tokens=600):
        for segment in own(pass_):
            if segment.visible_until is not None:
                assert len(segment.visible_until) == segment.stop - segment.start <= tile_tokens
                assert set(segment.visible_until) != {segment.stop}, "a chain is plainly causal"


def test_the_example_of_the_module() -> None:
    """Two prompts of 200 tokens under an instruction of 300 that is cached, two completions of 3 under each.

    instruction --+-- prompt a --+-- 3
                  |              +-- 3
                  +-- prompt b --+-- 3
                                 +-- 3
    """
    instruction = tuple(range(300))
    prompts = [(*instruction, first, *range(199)) for first in (1000, 2000)]
    wanted = [(*prompt, first, 7, 8) for prompt in prompts for first in (3000, 4000)]
    world = World([[instruction]])
    (block,) = world.blocks
    (pass_,) = planned(world, wanted, tile_tokens=128, max_tokens=1024)
    assert own(pass_) == (
        KeySegment.own(0, 200, 300),
        KeySegment.own(200, 206, 500, (203, 203, 203, 206, 206, 206)),
        KeySegment.own(206, 406, 300),
        KeySegment.own(406, 412, 500, (409, 409, 409, 412, 412, 412)),
    )
    assert set(cross(pass_)) == {
        KeySegment(0, 412, block, 0, 300, key_position=0),
        KeySegment(200, 206, None, 0, 200, key_position=300),
        KeySegment(406, 412, None, 206, 406, key_position=300),
    }


@given(scenes, st.sampled_from(TILE_TOKENS), max_tokens_of_a_pass)
def test_a_span_has_one_segment_of_each_kind_at_most(scene: Scene, tile_tokens: int, max_tokens: int) -> None:
    computed, wanted = scene
    world = World(computed)
    for pass_ in planned(world, wanted, tile_tokens, max_tokens):
        ancestors = {ancestor for span in pass_.spans for ancestor in span.path() if ancestor is not span}
        assert len(own(pass_)) <= len(pass_.spans)
        assert len(cross(pass_)) <= len(ancestors)


def test_a_small_tree_is_one_tile() -> None:
    """Each row is seen until its last descendant.

    1 --+-- 2 --+-- 3
        |       +-- 4
        +-- 5
    """
    (pass_,) = planned(World(), [(1, 2, 3), (1, 2, 4), (1, 5)], tile_tokens=5, max_tokens=100)
    assert (own(pass_), cross(pass_)) == ((KeySegment.own(0, 5, 0, (5, 4, 3, 4, 5)),), ())


def test_the_largest_continuation_joins_the_run_and_the_small_ones_make_tiles() -> None:
    """7 tokens, and under them 1, 2, 6, 1 and 2 more: laid out as 7 + 6, 2 + 2 + 1, 1."""
    stem = (0,) * 7
    wanted = [(*stem, first, *range(num_tokens - 1)) for first, num_tokens in enumerate((1, 2, 6, 1, 2), 1)]
    (pass_,) = planned(World(), wanted, tile_tokens=5, max_tokens=100)
    assert [span.token_ids[0] for span in pass_.spans] == [0, 3, 2, 5, 1, 4]
    assert own(pass_) == (
        KeySegment.own(0, 13, 0),
        KeySegment.own(13, 18, 7, (15, 15, 17, 17, 18)),
        KeySegment.own(18, 19, 7),
    )
    assert cross(pass_) == (KeySegment(13, 19, None, 0, 7, key_position=0),)


def test_a_comb_is_one_causal_run_with_its_teeth_behind_it() -> None:
    """A chain of 20 times 10 tokens, with 2 tokens hanging from each: as many calls as parts, not as pairs of parts."""
    chain = tuple(range(200))
    wanted = [(*chain[:end], 1000 + end, 0) for end in range(10, 201, 10)]
    (pass_,) = planned(World(), wanted, tile_tokens=8, max_tokens=1024)
    assert own(pass_)[0] == KeySegment.own(0, 202, 0)
    assert len(own(pass_)) <= 20
    assert len(cross(pass_)) == 19
    assert all(segment.start == 202 for segment in cross(pass_))


@pytest.mark.parametrize("num_tokens", [1, 50, 500])
@pytest.mark.parametrize("tile_tokens", TILE_TOKENS)
def test_a_single_text_is_one_causal_call(num_tokens: int, tile_tokens: int) -> None:
    pass_ = plan_pass([Forest().insert(range(num_tokens))], tile_tokens)
    assert (own(pass_), cross(pass_)) == ((KeySegment.own(0, num_tokens, 0),), ())


@pytest.mark.parametrize("tile_tokens", TILE_TOKENS)
def test_a_chain_is_one_causal_call(tile_tokens: int) -> None:
    """200 -- 100 -- 50 -- 3: one text, cut where others end."""
    forest = Forest()
    end = forest.insert(range(353))
    spans = [forest.split(end, num_tokens) for num_tokens in (200, 100, 50)]
    pass_ = plan_pass([*spans, end], tile_tokens)
    assert (own(pass_), cross(pass_)) == ((KeySegment.own(0, 353, 0),), ())


@pytest.mark.parametrize("tile_tokens", TILE_TOKENS)
def test_a_chain_that_continues_a_cached_text_is_two_calls(tile_tokens: int) -> None:
    """200 (cached) -- 100 (cached, same block) -- 50 -- 3: neighbours in memory are attended to together."""
    world = World([[tuple(range(200)), tuple(range(300))]])
    (block,) = world.blocks
    (pass_,) = planned(world, [tuple(range(350)), tuple(range(353))], tile_tokens, max_tokens=1024)
    assert own(pass_) == (KeySegment.own(0, 53, 300),)
    assert cross(pass_) == (KeySegment(0, 53, block, 0, 300, key_position=0),)


def test_what_lies_apart_in_memory_is_attended_to_apart() -> None:
    """20 (rows 5..25) -- 10 (rows 25..35 of another block, or 0..10 of the same): never one segment."""
    for block_of_second, start in ((AnyBlock(), 25), (None, 0)):
        forest = Forest()
        first, second, end = (forest.insert(range(num_tokens)) for num_tokens in (20, 30, 33))
        first.keys_values = BlockRows(block := AnyBlock(), 5, 25)
        second.keys_values = BlockRows(block_of_second or block, start, start + 10)
        assert cross(plan_pass([end])) == (
            KeySegment(0, 3, block, 5, 25, key_position=0),
            KeySegment(0, 3, block_of_second or block, start, start + 10, key_position=20),
        )


@pytest.mark.parametrize("num_cached", [0, 1, 300])
def test_many_short_leaves_take_few_calls(num_cached: int) -> None:
    """A prompt of 300 tokens, of which `num_cached` are, and 77 labels of 3 tokens: two tiles under one segment."""
    prompt = tuple(range(300))
    world = World([[prompt[:num_cached]]])
    (pass_,) = planned(world, [(*prompt, 1000 + label, 1, 2) for label in range(77)], 128, max_tokens=1024)
    check_segments(pass_, world.token_at)
    assert pass_.num_tokens == 300 - num_cached + 231
    assert len(own(pass_)) + len(cross(pass_)) <= 5


def test_small_neighbours_share_a_tile_whatever_they_continue() -> None:
    """20 cached prompts that share nothing, a new token behind each, as in a step of generation: one tile of 20."""
    prompts = [(number, *range(10)) for number in range(20)]
    world = World([prompts])
    (pass_,) = planned(world, [(*prompt, 7) for prompt in prompts], 128, max_tokens=1024)
    check_segments(pass_, world.token_at)
    assert own(pass_) == (KeySegment.own(0, 20, 11, tuple(range(1, 21))),)
    assert len(cross(pass_)) == 20


def test_an_ancestor_that_nobody_computed_is_noticed() -> None:
    forest = Forest()
    forest.insert((1, 2))
    end = forest.insert((1, 2, 3))
    with pytest.raises(AssertionError, match="neither in the pass nor computed"):
        plan_pass([end])


def test_a_chain_of_two_thousand_spans_is_planned_without_recursion() -> None:
    forest = Forest()
    end = forest.insert(range(2000))
    for _ in range(1999):
        forest.split(end, 1)
    spans = missing_spans([end])
    assert spans == end.path()
    pass_ = plan_pass(spans)
    assert (pass_.num_tokens, own(pass_)[0].start, own(pass_)[-1].stop) == (2000, 0, 2000)
    assert [len(group) for group in cut_into_passes(forest, spans, max_tokens=500)] == [500] * 4
