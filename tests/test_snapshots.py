"""Snapshots of states go with the rows behind which they stand: through budgets, the second pool and stores.

5 6 7 8 --+-- 1 2 3
          +-- 4 4
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, Text, evaluate, explain
from backprompt.forest.span import Span
from backprompt.memory.blocks import BlockRows
from backprompt.memory.snapshots import KeysValuesAndSnapshots, keep_snapshot, snapshot_of
from backprompt.memory.span_rows import compact, joined
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_equals_plain
from quick import up_to
from tiny_cached_models import build
from tiny_tokenizers import byte_level_bpe

TRUNK, LEFT, RIGHT = (5, 6, 7, 8), (5, 6, 7, 8, 1, 2, 3), (5, 6, 7, 8, 4, 4)
BYTES = 100  # of a snapshot of the blocks below


def block_of(*rows: int, num_rows: int = 6) -> KeysValuesAndSnapshots:
    """A block whose numbers are their row, with snapshots of the row's number behind some rows."""
    numbers = torch.arange(num_rows, dtype=torch.float32)[None, :, None]
    block = KeysValuesAndSnapshots({"keys.0": numbers.clone(), "values.0": numbers.clone()})
    block.snapshots = {row: torch.full((BYTES,), row, dtype=torch.uint8) for row in rows}
    return block


def seen(block: KeysValuesAndSnapshots) -> dict[int, int]:
    """The number in the row and in its snapshot, for each snapshot."""
    found = {int(block.tensors["keys.0"][0, row, 0]): int(snapshot[0]) for row, snapshot in block.snapshots.items()}
    assert all(snapshot.numel() == BYTES for snapshot in block.snapshots.values())
    return found


def test_snapshots_go_with_their_rows():
    block = block_of(1, 3, 5)
    assert seen(block.copied([slice(4, 6), slice(0, 2)])) == {5: 5, 1: 1}
    block.keep([slice(2, 4), slice(5, 6)])
    assert seen(block) == {3: 3, 5: 5}
    block.append([block_of(0, num_rows=2), block_of(1, num_rows=2)])
    assert seen(block) == {3: 3, 5: 5, 0: 0, 1: 1}
    target = block.zeros(4)
    block_of(4).copy_rows_to(target, np.array([4]), np.array([2]))
    assert seen(target) == {4: 4}
    block_of(5).copy_rows_to(target, np.array([5]), np.array([3]))
    assert seen(target) == {5: 5}, "a text that grows leaves its last snapshot behind"


def test_bytes_count_snapshots():
    block = block_of(1, 3)
    rows = BlockRows(block, 0, 3)
    assert (block.num_bytes, rows.num_bytes) == (6 * 8 + 2 * BYTES, 3 * 8 + BYTES)
    span = Span((1, 2, 3), 0, None)
    span.place(keys_values=rows)
    assert snapshot_of(span) is None
    keep_snapshot(span, torch.ones(BYTES, dtype=torch.uint8))
    assert snapshot_of(span) is not None
    assert block.num_bytes == 6 * 8 + 3 * BYTES
    compacted = compact({span: rows})
    assert (block.num_rows, sorted(block.snapshots)) == (3, [1, 2])
    assert compacted[span].num_bytes == 3 * 8 + 2 * BYTES


def test_joined_blocks_keep_their_snapshots():
    spans = [Span((1,), 0, None) for _ in range(2)]
    blocks = [block_of(0, num_rows=1), block_of(0, num_rows=1)]
    found = joined({span: BlockRows(block, 0, 1) for span, block in zip(spans, blocks, strict=True)})
    assert [rows.block.snapshots[rows.stop - 1].numel() for rows in found.values()] == [BYTES, BYTES]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe()


@pytest.fixture(scope="module", params=["lfm2", "mamba2", "jamba"])
def recurrent(request):
    return build(request.param)


def texts_of(lm: LM, *ids: tuple[int, ...]) -> list[Text]:
    return [Text.from_tokens(text, lm) for text in ids]


def test_budgets_count_snapshots_and_evict_them_with_their_spans(recurrent, tokenizer):
    free = LM(recurrent, tokenizer)
    evaluate(texts_of(free, TRUNK, LEFT, RIGHT))
    held = sum(block.num_bytes for block in free.session.evaluator.memory.blocks)
    computation = free.session.evaluator.computation
    tokens_and_spans = 9 * computation.token_bytes + 3 * computation.executor.snapshot_bytes
    assert free.stats.bytes_held == held == pytest.approx(tokens_and_spans, rel=0.05)
    assert explain(texts_of(free, LEFT, RIGHT)).bytes_needed == tokens_and_spans
    lm = LM(recurrent, tokenizer, memory_bytes=held * 2 // 3)
    for _ in range(2):
        for text in texts_of(lm, LEFT, RIGHT, TRUNK):
            assert_equals_plain(recurrent, [text])
            assert lm.stats.bytes_held <= held * 2 // 3
    assert lm.stats.tokens_recomputed > 0
    lm.clear()
    assert lm.stats.bytes_held == 0


def test_snapshots_move_to_the_second_pool_and_back(recurrent, tokenizer):
    lm = LM(recurrent, tokenizer, memory_bytes=1, host_memory_bytes="1 MB")
    trunk, left = texts_of(lm, TRUNK, LEFT)
    evaluate(trunk)
    assert (lm.stats.bytes_held, lm.stats.host_bytes_held > 0) == (0, True)
    before = lm.stats
    evaluate(left)
    done = lm.stats - before
    assert (done.tokens_computed, done.tokens_recomputed) == (3, 0)
    assert_equals_plain(recurrent, [left])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_another_process_continues_stored_texts(kind, recurrent, tokenizer, tmp_path):
    with MemoryStore() if kind == "memory" else DiskStore(tmp_path / "prompts.bp") as store:
        first = LM(recurrent, tokenizer, store=store)
        (trunk,) = texts_of(first, TRUNK)
        trunk.save()
        second = LM(recurrent, tokenizer, store=store)
        left, within = texts_of(second, LEFT, (5, 6, 9))
        evaluate(left)
        assert (second.stats.tokens_loaded, second.stats.tokens_computed) == (4, 3)
        evaluate(within)  # ends within what was stored: its states are computed again
        assert (second.stats.tokens_computed, second.stats.tokens_recomputed) == (3 + 1 + 2, 2)
        assert_equals_plain(recurrent, [left, within])
        third = LM(recurrent, tokenizer, store=store)
        (within,) = texts_of(third, (5, 6, 9))
        evaluate(within)  # loads a beginning of the entry, without the states behind its end
        assert (third.stats.tokens_loaded, third.stats.tokens_recomputed) == (2, 2)
        assert_equals_plain(recurrent, [within])


@given(
    order=st.permutations([TRUNK, LEFT, RIGHT, (5, 6), (5, 6, 9, 9), (3,)]),
    share=st.integers(0, 5),
    host_share=st.sampled_from([0, 2, 10]),
    data=st.data(),
)
@settings(max_examples=up_to(12), deadline=None)
def test_any_order_under_any_budget(order, share, host_share, data):
    model = build("lfm2")
    lm = LM(
        model,
        byte_level_bpe(),
        memory_bytes=share * 3000,
        host_memory_bytes=host_share * 3000,
        max_tokens_per_forward=data.draw(st.sampled_from([1, 3, 100])),
    )
    texts = texts_of(lm, *order)
    evaluate(texts[: data.draw(st.integers(0, len(texts)))])
    for text in texts:
        assert_equals_plain(model, [text])
        assert lm.stats.bytes_held <= share * 3000
