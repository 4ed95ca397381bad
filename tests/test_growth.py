"""Growth by itself: which spans are absorbed, where their rows go, and what is copied for it."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.memory.growth import ROWS_AT_A_TIME, Growth
from backprompt.memory.location import Location
from tiny_blocks import TOKEN_BYTES, assert_right, compute, inserted

PROMPTS = ((1, 2, 3), (1, 2, 4, 5))


class Texts:
    """Texts that grow a token at a time, as a generation lets them."""

    def __init__(self, *prompts):
        self.forest, self.ends = inserted(*prompts)
        self.ids = [list(prompt) for prompt in prompts]
        compute(list(self.forest.spans()))
        self.growth = Growth(self.forest)

    def step(self, token_ids):
        """Append a token to each text, all in one pass; return the blocks that were made to keep them few."""
        for ids, token_id in zip(self.ids, token_ids, strict=True):
            ids.append(token_id)
        self.ends = [self.forest.insert(ids, is_end=False) for ids in self.ids]
        new = [end for end in dict.fromkeys(self.ends) if not end.is_held()]
        compute(new)
        self.growth.note_pass(new)
        return self.growth.absorb(list(dict.fromkeys(self.ends)), held=set(self.ends))

    def spans_behind_prompts(self):
        return [span for end in self.ends for span in end.path() if not span.is_end]

    def blocks(self):
        return {id(end.keys_values.block) for end in self.ends}, {id(end.states.block) for end in self.ends}


def test_texts_that_grow_stay_few_spans_with_right_rows():
    texts = Texts(*PROMPTS)
    for step in range(40):
        texts.step([10 + step, 60 + step])
        assert_right(texts.forest.spans())
        assert [end.token_ids for end in texts.ends] == [tuple(range(10, 11 + step)), tuple(range(60, 61 + step))]
    assert [len(end.path()) for end in texts.ends] == [3, 3]  # shared beginning, rest of the prompt, new tokens


def test_rows_are_appended_where_there_is_room():
    """A buffer is made at the second step, when the first token is no prompt's end any more, and when it is full."""
    texts = Texts(*PROMPTS)
    made = [texts.step([10 + step, 60 + step]) for step in range(2 * ROWS_AT_A_TIME + 6)]
    assert [step for step, blocks in enumerate(made) if blocks] == [
        1,
        1 + ROWS_AT_A_TIME + 1,
        2 * (ROWS_AT_A_TIME + 1) + 1,
    ]
    assert all(len(blocks) in (0, 2) for blocks in made)  # keys and values; states
    assert [len(of_kind) for of_kind in texts.blocks()] == [1, 1]  # of all texts together


def test_room_beside_a_text_is_zero():
    """A masked key that is nan would spoil the rows that do not see it."""
    texts = Texts(*PROMPTS)
    texts.step([10, 60])
    keys_values, states = texts.step([11, 61])
    assert keys_values.num_rows == states.num_rows == 2 * (2 + ROWS_AT_A_TIME)
    room = [row for start in (2, 4 + ROWS_AT_A_TIME) for row in range(start, start + ROWS_AT_A_TIME)]
    for block in (keys_values, states):
        for name, tensor in block.tensors.items():
            assert not torch.any(tensor.index_select(block.token_axis, torch.tensor(room))), name


def test_rows_that_lie_side_by_side_are_not_copied():
    forest, (end,) = inserted((1, 2, 3, 4))
    (block, _) = compute([end])
    forest.split(end, 2)
    assert Growth(forest).absorb([end], held=()) == []
    assert [span.token_ids for span in forest.spans()] == [(1, 2, 3, 4)]
    assert end.states.block is block
    assert_right([end])


def test_a_chain_is_absorbed_at_once():
    """1 2 3 -- 10 -- 20 -- 21, behind which others were dropped."""
    texts = Texts((1, 2, 3))
    for tokens in ([10], [20, 30], [21, 22, 31]):
        texts.ids = [list(ids) for ids in texts.ids for _ in range(2)][: len(tokens)]
        texts.step(tokens)
    assert [span.token_ids for span in texts.ends[0].path()] == [(1, 2, 3), (10,), (20,), (21,)]
    for end in texts.ends[1:]:
        texts.forest.discard(end, held=())
    texts.growth.absorb(texts.ends[:1], held=set(texts.ends[:1]))
    assert [span.token_ids for span in texts.forest.spans()] == [(1, 2, 3), (10, 20, 21)]
    assert_right(texts.forest.spans())


@pytest.mark.parametrize("rows", [slice(1, 2), slice(0, 3)], ids=["some", "all"])
def test_copied_rows_are_copied_once_into_tensors_of_their_own(monkeypatch, rows):
    _, (end,) = inserted((1, 2, 3))
    compute([end])
    made, empty = [], Location.empty
    monkeypatch.setattr(Location, "empty", lambda *args: (made.append(args), empty(*args))[1])
    for block in (end.keys_values.block, end.states.block):
        made.clear()
        copied = block.copied([rows])
        assert len(made) <= len(block.tensors)
        for name, tensor in copied.tensors.items():
            own = block.tensors[name]
            assert torch.equal(tensor, own.narrow(block.token_axis, rows.start, rows.stop - rows.start))
            assert tensor.untyped_storage().data_ptr() != own.untyped_storage().data_ptr()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("why", ["an end", "held", "another continues it", "no keys and values", "stored"])
def test_a_span_is_not_absorbed(why):
    """1 2 -- 3, where another holder may have 1 2."""
    forest, (end,) = inserted((1, 2, 3))
    upper = forest.split(end, 2)
    compute([upper, end])
    held = set()
    if why == "an end":
        upper.is_end = True
    elif why == "held":
        held.add(upper)
    elif why == "another continues it":
        forest.insert((1, 2, 9))
    elif why == "no keys and values":
        end.let_go("keys_values", "device")
    else:
        upper.is_stored = True
    Growth(forest).absorb([end], held)
    assert end.parent is upper
    assert end.token_ids == (3,)
    assert_right([upper, end])


def test_what_several_continue_moves_out_of_the_buffer():
    """In the buffer, a shared parent would keep other texts' rows alive."""
    texts = Texts(*PROMPTS)
    texts.step([10, 60])
    texts.step([11, 61])
    first, second = texts.ids
    texts.ids = [first, second, list(first)]
    made = texts.step([12, 62, 13])
    shared = texts.ends[0].parent
    assert shared is texts.ends[2].parent
    assert shared.token_ids == (10, 11)
    assert {shared.keys_values.block, shared.states.block} <= set(made)
    assert shared.keys_values.block.num_rows == shared.states.block.num_rows == 2
    assert_right(texts.forest.spans())


def test_spans_that_part_in_one_step_move_together_to_one_block_without_room():
    texts = Texts(*PROMPTS, (8, 9))
    for step in range(3):
        texts.step([10 + step, 60 + step, 90 + step])
    texts.ids = [list(ids) for ids in texts.ids[:2] for _ in range(2)]
    made = texts.step([20, 21, 70, 71])
    shared = [texts.ends[0].parent, texts.ends[2].parent]
    assert [len(span.token_ids) for span in shared] == [3, 3]
    assert {span.keys_values.block for span in shared} | {span.states.block for span in shared} == set(made)
    assert [block.num_rows for block in made] == [6, 6]
    assert texts.growth.release(texts.ends) == []  # they stay until most of the block is unused
    for end in texts.ends[2:]:
        texts.forest.discard(end, held=())
    del texts.ends[2:]
    assert texts.growth.release(texts.ends) == []
    assert_right(span for span in texts.forest.spans() if span.is_held())
    texts.growth.finish(texts.ends[0])
    assert shared[0].keys_values.block.num_rows == shared[0].states.block.num_rows == 3


@given(data=st.data())
def test_texts_that_grow_part_and_are_dropped_keep_their_rows(data):
    texts = Texts(*PROMPTS, (8,))
    for step in range(data.draw(st.integers(1, 12))):
        nums = [data.draw(st.integers(0 if idx else 1, 2)) for idx in range(len(texts.ends))]  # continuations of each
        texts.ids = [list(ids) for ids, num in zip(texts.ids, nums, strict=True) for _ in range(num)]
        for end, num in zip(texts.ends, nums, strict=True):
            if not num:
                texts.forest.discard(end, held=())
        texts.step([10 + 2 * step + idx for num in nums for idx in range(num)])
        assert_right(span for span in texts.forest.spans() if span.is_held())
        for parent in {end.parent for end in texts.ends if not end.parent.is_end}:
            assert 2 * parent.states.block.num_held >= parent.states.block.num_rows


def test_what_has_grown_takes_as_many_bytes_as_it_has_tokens():
    texts = Texts(*PROMPTS)
    for step in range(5):
        texts.step([10 + step, 60 + step])
    made = [texts.growth.finish(end) for end in texts.ends]
    assert [sum(block.num_bytes for block in blocks) for blocks in made] == [5 * TOKEN_BYTES] * 2
    assert_right(texts.forest.spans())
    assert [texts.growth.finish(end) for end in texts.ends] == [[], []]
    gc.collect()
    assert not texts.growth._buffers  # the buffers have no references any more


def test_a_buffer_that_was_made_smaller_has_no_room():
    """Eviction cuts blocks: then the next token needs another buffer."""
    texts = Texts(*PROMPTS)
    texts.step([10, 60])
    texts.step([11, 61])
    for end in texts.ends:
        assert end.keys_values.block.num_rows > 4
    block, states = texts.ends[0].keys_values.block, texts.ends[0].states.block
    rows = [slice(end.keys_values.start, end.keys_values.stop) for end in texts.ends]
    for of_kind in (block, states):
        of_kind.keep(rows)
    for end, start in zip(texts.ends, (0, 2), strict=True):
        end.place(
            keys_values=type(end.keys_values)(block, start, start + 2),
            states=type(end.states)(states, start, start + 2),
        )
    texts.ids = texts.ids[:1]
    assert len(texts.step([12])) == 2  # not behind its rows, where the other text's lie
    assert_right(texts.forest.spans())
