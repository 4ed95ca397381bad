"""The ways of attention in training, on a batch of a few tokens on the CPU."""

import torch

from backprompt.training import attention
from benchmarks.suites import training_gpu
from benchmarks.suites.gpu.rigs import TINY_LLAMA, Rig
from benchmarks.suites.training import batches
from benchmarks.suites.training.batches import group


def test_each_way_is_measured_and_named(monkeypatch):
    monkeypatch.setattr(batches, "PROMPT_TOKENS", 20)
    monkeypatch.setattr(batches, "COMPLETION_TOKENS", (3, 9))
    before = dict(attention.ORDER)
    rig = Rig(TINY_LLAMA, torch.device("cpu"), 1.0)
    line = training_gpu.line_of(rig, "group of 4", group(4, 400))
    assert before == attention.ORDER
    assert line.kernels["fast calls"] == "flash_cpu"
    assert line.kernels["clear calls"] == "clear"
    assert line.kernels["flex"].startswith("clear (flex failed: ")  # torch has no backward of it on the CPU
    assert line.tokens_forwarded < line.tokens_padded
    assert max(line.gaps.values()) < 1e-4
    assert {len(spread.values) for spread in line.seconds.values()} == {training_gpu.ROUNDS}
    results: dict = {}
    training_gpu.SUITE.keep(results, [line])
    assert training_gpu.SUITE.rows(results) == [line]
    (table,) = training_gpu.SUITE.tables(results)
    assert "group of 4" in table.text
    assert len({row.count("|") for row in table.text.splitlines()}) == 1


def test_without_a_gpu_the_suite_says_so(monkeypatch):
    monkeypatch.setattr(training_gpu, "is_there", lambda: False)
    said: list[str] = []
    assert training_gpu.SUITE.measure(said.append, None) is None
    assert said == ["The suite training_gpu is left out: no GPU: torch.cuda.is_available() is False."]
