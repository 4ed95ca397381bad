"""The suite of trainers' batches, on batches of a few tokens."""

import copy
from dataclasses import replace

import pytest

from benchmarks.suites.training import batches, suite
from benchmarks.suites.training.batches import Batch, Done, group, nothing_shared
from tiny_models import build


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 20)
    monkeypatch.setattr(batches, "COMPLETION_TOKENS", (3, 9))
    monkeypatch.setattr(suite, "BATCHES", {"group of 4": lambda vocab: group(4, vocab)})
    monkeypatch.setattr(suite, "MODELS", {"tiny": lambda: build("llama")})


def test_batches_are_padded_on_the_right_and_scored_behind_the_prompt():
    batch = group(4, 320)
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 29)
    assert (batch.num_kept, batch.num_padded) == (9, 4 * 29)
    assert (batch.input_ids[:, :20] == batch.input_ids[0, :20]).all()
    lengths = batch.attention_mask.sum(dim=1) - 20
    assert lengths[0] == 9
    assert all(3 <= length <= 9 for length in lengths.tolist())
    assert len(set(batch.input_ids[:, 20].tolist())) == 4
    other = nothing_shared(4, 320)
    assert other.attention_mask.all()
    assert len(set(other.input_ids[:, 0].tolist())) == 4


def test_a_step_is_measured_on_each_batch():
    said: list[str] = []
    measured = suite.SUITE.measure(said.append, None)
    assert len(measured.rows) == len(said) == len(suite.STEPS)
    line, batch = measured.rows[0], group(4, 320)
    lengths = batch.attention_mask.sum(dim=1) - 20
    assert line.tokens_padded == batch.num_padded
    assert line.tokens_forwarded == 20 + int((lengths - 1).sum())
    assert {row.step: row.tokens_forwarded for row in measured.rows} == dict.fromkeys(
        ["without gradients", "with gradients"], line.tokens_forwarded
    )
    assert line.ratio_of_tokens == line.tokens_padded / line.tokens_forwarded
    results: dict = {}
    suite.SUITE.keep(results, measured.rows)
    assert suite.SUITE.rows(copy.deepcopy(results)) == measured.rows
    (table,) = suite.SUITE.tables(results)
    assert f"| tiny | without gradients | group of 4 | 116 | {line.tokens_forwarded} | " in table.text
    assert suite.SUITE.rows({}) == []


def test_ways_that_find_other_numbers_are_an_error():
    step, model = suite.STEPS[0], build("llama")
    off = replace(step, ways={**step.ways, suite.BACKPROMPT: lambda model, batch: _off_by(0.01, model, batch)})
    with pytest.raises(AssertionError, match=r"backprompt on a batch: 0\.0"):
        suite.line_of("tiny", model, off, "a batch", group(4, 320))


def _off_by(gap: float, model, batch: Batch) -> Done:
    done = suite.STEPS[0].ways[suite.PLAIN](model, batch)
    return replace(done, numbers=done.numbers + gap)
