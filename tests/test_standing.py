"""The one-launch attention of a generation's steps: tables of the next step, and tables that stay where they are."""

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from test_steps import PROMPTS, Texts, prompts

from backprompt.attention.base import CannotStandError, Scoring
from backprompt.attention.calls import CallsAttention
from backprompt.attention.device_tables import DeviceTables
from backprompt.attention.shapes import Launch
from backprompt.attention.tables import Segments
from backprompt.attention.tiles import Tile
from backprompt.attention.triton import OneLaunch, TritonAttention
from backprompt.forest.passes import missing_spans
from backprompt.forest.plan import KeySegment, Pass, plan_pass
from backprompt.forest.span import Span
from backprompt.forest.steps import StepPlan
from backprompt.memory.blocks import KeysValues
from packed import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tile(rows=16, keys=16, warps=4, stages=2)


@given(prompts=prompts, num_steps=st.integers(1, 6), tile_tokens=st.sampled_from([1, 3, 128]), is_late=st.booleans())
def test_the_segments_of_a_step_are_those_of_a_plan_from_nothing(
    prompts: list[tuple[int, ...]], num_steps: int, tile_tokens: int, is_late: bool
) -> None:
    texts = Texts(prompts)
    steps = StepPlan(texts.to_come(), tile_tokens)
    prepared = TritonAttention().prepare(steps.pass_, 16)
    for step in range(num_steps):
        if step:
            prepared.advance()
        token_ids = [30 + step + idx for idx in range(len(steps.ends))]
        steps.begin(token_ids)
        to_come = [Span((token_id,), end.stop, end) for end, token_id in zip(steps.ends, token_ids, strict=True)]
        anew = plan_pass(missing_spans(to_come), tile_tokens)
        if not is_late or step == num_steps - 1:  # late: nobody asks for the segments of earlier steps
            expected = Segments.of(anew.segments, anew.positions)
            assert np.array_equal(prepared.segments.columns, expected.columns)
            assert np.array_equal(prepared.segments.positions, expected.positions)
            assert np.array_equal(prepared.segments.until, expected.until)
            assert prepared.segments.blocks == expected.blocks
            assert prepared.segments.grows.sum() == len(texts.ends)
        texts.take_in(steps.ends, token_ids)
        steps.advance()


class Rows:
    """Rows that see each other's keys never, some shared keys, and keys of their own in a buffer with room for more."""

    def __init__(self, lengths: list[int], num_shared: int, kv_heads: int = 2, head_dim: int = 16) -> None:
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.lengths, self.num_rows = lengths, len(lengths)
        room = max(lengths) + 40
        shared, own = self._block(num_shared + 1, 1), self._block(room * self.num_rows, 2)
        self.segments = [
            KeySegment.own(0, self.num_rows, num_shared + max(lengths), tuple(range(1, self.num_rows + 1))),
            KeySegment(0, self.num_rows, shared, 0, num_shared, 0),
            *(
                KeySegment(idx, idx + 1, own, idx * room, idx * room + length, num_shared, grows=True)
                for idx, length in enumerate(lengths)
            ),
        ]
        self.positions = [num_shared + length for length in lengths]

    def _block(self, num_keys: int, seed: int) -> KeysValues:
        keys, values = (
            [draw(self.kv_heads, num_keys, self.head_dim, 9 * seed + i + 2 * layer).contiguous().to(DEVICE)]
            for i in range(2)
            for layer in range(1)
        )
        return KeysValues.of(keys, values)

    def of_pass(self, seed: int) -> list[torch.Tensor]:
        """The queries of two heads a key head, the keys and the values of the rows."""
        sizes = (2 * self.kv_heads, self.kv_heads, self.kv_heads)
        return [
            draw(heads, self.num_rows, self.head_dim, seed + idx).contiguous().to(DEVICE)
            for idx, heads in enumerate(sizes)
        ]


def padded(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """More rows, whose numbers must not matter."""
    more = torch.full((tensor.shape[0], num_rows - tensor.shape[1], tensor.shape[2]), 3.0, device=tensor.device)
    return torch.cat([tensor, more], dim=1)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=10),
    num_shared=st.integers(0, 40),
    more_rows=st.integers(0, 10),
    window=st.sampled_from([None, None, 1, 9]),
    launch=st.sampled_from([Launch(SMALL, 20, 1), Launch(SMALL, 9, 2), Launch(SMALL, 2, 2), Launch(SMALL, 1, 1000)]),
)
@settings(max_examples=8)
def test_tables_that_stay_give_what_tables_of_their_own_give(
    lengths: list[int], num_shared: int, more_rows: int, window: int | None, launch: Launch
) -> None:
    rows = Rows(lengths, num_shared)
    segments = Segments.of(rows.segments, rows.positions)
    num_rows = len(lengths) + more_rows
    standing = OneLaunch(segments.padded(num_rows), has_room=True)
    places: set[int] = set()
    for step in range(3):
        if step:
            segments = segments.next_step()
            assert standing.load(segments.padded(num_rows))
        of_pass = rows.of_pass(step)
        expected = OneLaunch(segments).attend(0, *of_pass, Scoring(0.4, window), launch)
        wide = [padded(tensor, num_rows) for tensor in of_pass]
        found = standing.attend(0, *wide, Scoring(0.4, window), launch)
        torch.testing.assert_close(found[: len(lengths)], expected, rtol=1e-5, atol=1e-5)
        assert found[len(lengths) :].eq(0).all()
        places |= {table.numbers.data_ptr() for table in standing.tables.values()}
    assert len(places) == 1


def pass_of(rows: Rows) -> Pass:
    spans = tuple(Span((1,), position, None) for position in rows.positions)
    return Pass(spans, tuple(rows.segments))


def standing_of(rows: Rows, num_rows: int, **options: Any) -> tuple[TritonAttention, Any]:
    attention = TritonAttention(Launch(SMALL), device_types={DEVICE}, **options)
    standing = attention.standing(num_rows)
    assert standing.load(attention.prepare(pass_of(rows)))
    standing.attend(0, *(padded(tensor, num_rows) for tensor in rows.of_pass(0)), Scoring(0.4))
    return attention, standing


def test_a_step_that_needs_more_room_is_refused() -> None:
    attention, standing = standing_of(Rows([5] * 4, 10), 4)
    assert standing.load(attention.prepare(pass_of(Rows([9] * 4, 1000))))
    assert not standing.load(attention.prepare(pass_of(Rows([9] * 4, 16 * 1200))))  # pieces of 16 keys


def test_blocks_beyond_the_room_are_refused() -> None:
    rows = Rows([5], 10)
    attention, standing = standing_of(rows, 1)
    block = rows.segments[1].block
    for num_blocks, is_held in ((6, True), (7, False)):
        more = [KeySegment(0, 1, KeysValues(block.tensors), 0, 3, 0) for _ in range(num_blocks)]
        crowded = Pass(pass_of(rows).spans, (*rows.segments, *more))
        assert standing.load(attention.prepare(crowded)) == is_held


def test_tables_that_stay_keep_no_blocks() -> None:
    """Else rows of texts that have ended would lie in memory until the next step."""
    rows = Rows([5] * 2, 10)
    attention, standing = standing_of(rows, 2)
    assert standing.load(attention.prepare(pass_of(rows)))
    blocks = [weakref.ref(segment.block) for segment in rows.segments if segment.block is not None]
    del rows
    gc.collect()
    assert blocks
    assert not any(block() for block in blocks)


def test_layers_that_the_kernel_does_not_serve_are_refused() -> None:
    rows = Rows([5], 10)
    _, standing = standing_of(rows, 1)
    with pytest.raises(CannotStandError, match=r"torch\.float64"):
        standing.attend(0, *(tensor.double() for tensor in rows.of_pass(0)), Scoring(0.4))
    assert CallsAttention().standing(1) is None


def test_calls_that_begin_at_a_later_step() -> None:
    """The kernel serves the first step, and not the second."""
    texts = Texts(PROMPTS)
    steps = StepPlan(texts.to_come())
    prepared = TritonAttention(device_types=set()).prepare(steps.pass_, 16)
    plain = CallsAttention().prepare(steps.pass_, 16)
    for step in range(3):
        steps.begin([30 + step] * len(steps.ends))
        query = draw(4, len(steps.ends), 3, step)
        key, value = draw(2, len(steps.ends), 3, 7).contiguous(), draw(2, len(steps.ends), 1, 8).contiguous()
        expected = plain.attend(0, query, key, value, Scoring(0.4))
        if step:
            torch.testing.assert_close(prepared.attend(0, query, key, value, Scoring(0.4)), expected)
        texts.take_in(steps.ends, [30 + step] * len(steps.ends))
        steps.advance()
        prepared.advance()
        plain.advance()


def test_tables_that_had_no_room_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not advanced from a step that was never set: its last piece was full, so the next step has another piece."""
    rows, launch = Rows([16, 5], 0), Launch(SMALL)
    segments = Segments.of(rows.segments, rows.positions)
    standing = OneLaunch(segments, has_room=True)
    standing.attend(0, *rows.of_pass(0), Scoring(0.4), launch)
    segments = segments.next_step()
    with monkeypatch.context() as patch:
        patch.setattr(DeviceTables, "load", lambda self, segments, work: False)
        assert not standing.load(segments)
    assert standing.load(segments)
    of_pass = rows.of_pass(1)
    expected = OneLaunch(segments).attend(0, *of_pass, Scoring(0.4), launch)
    torch.testing.assert_close(standing.attend(0, *of_pass, Scoring(0.4), launch), expected, rtol=1e-5, atol=1e-5)
