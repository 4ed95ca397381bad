"""The benchmarks of a GPU, tried out small on the CPU: what they compare is the same work, and they tell it in time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.suites import gpu
from benchmarks.suites.gpu import contenders, steps, works
from benchmarks.suites.gpu.lines import BACKPROMPT, GENERATE, PADDED, RECIPE, Line, table_of
from benchmarks.suites.gpu.rigs import TINY_GPT2, Rig
from comparing import num_distinct_ids


@pytest.fixture(scope="module")
def rig():
    return Rig(TINY_GPT2, torch.device("cpu"), scale=0.03)


@pytest.mark.parametrize("work", works.WORKS, ids=lambda work: work.name)
def test_works_are_forests_that_differ_between_repetitions(work):
    drawn, again, other = (work.drawn(mark, 0.03, 400) for mark in ("a", "a", "b"))
    texts = [asked.prompt + completion for asked in drawn for completion in asked.completions]
    assert works.num_tokens(drawn) == sum(map(len, texts))
    assert works.num_distinct(drawn) == num_distinct_ids(texts)
    assert drawn == again
    assert all(asked.prompt[:5] != fresh.prompt[:5] for asked, fresh in zip(drawn, other, strict=True))


def test_sizes_are_those_of_the_names():
    num_texts = {work.name: sum(len(asked.completions) for asked in work.drawn("a", 1, 50_000)) for work in works.WORKS}
    assert list(num_texts.values()) == [64 * 77, 128 * 4, 512 * 2, 4 * 4 * 16 * 3, 48, 1]


def test_padded_batches_score_what_backprompt_scores(rig, monkeypatch):
    monkeypatch.setattr(contenders, "PADDED_TOKENS", 2000)
    monkeypatch.setattr(contenders, "MAX_PADDED_BATCHES", 3)
    drawn = rig.drawn(works.NESTED, "test")
    own = [float(scores.sum()) for scores in contenders.backprompt_scores(rig, drawn)]
    padded = contenders.Padded(rig, drawn)
    found = padded.run()
    assert 0 < padded.share < 1
    assert len(own) > len(found) > 6
    assert [own[idx] for idx in found] == pytest.approx(list(found.values()), abs=1e-4)


def test_all_steps_run_and_are_said_at_once():
    said: list[str] = []
    kept: list[int] = []
    sizes = replace(steps.try_out(), shapes=(TINY_GPT2,), more_shapes=())
    measured = gpu.measured(sizes, 600, said.append, lambda found: kept.append(len(found.rows)))
    lines = [json.loads(line) for line in said[:-1]]
    assert not [line for line in lines if "error" in line or "left out" in line]
    assert len(lines) == len(kept) == 3 * len(works.WORKS) + 2 * 2
    by_work = {line.work: line for line in measured.rows}
    for work in works.WORKS:
        line = by_work.pop(work.name)
        assert line.seconds.keys() == {BACKPROMPT, PADDED, RECIPE}
        assert line.distinct - line.computed in range(1 + len(work.drawn("a", 0.03, 400)) * 77)  # last tokens are not
        assert (line.passes, line.gap < 1e-4, line.held > 0) == (-(-line.computed // 1024), True, True)
        assert line.phases.keys() == {"forward", "head", "rest"}
    assert [line.seconds.keys() for line in by_work.values()] == [{BACKPROMPT, GENERATE}] * 2
    assert all(line.first > 0 for line in by_work.values())
    assert said[-1] == table_of(measured.rows)
    assert said[-1].count("\n") == 1 + len(measured.rows)


def test_what_does_not_fit_the_budget_is_left_out_and_said():
    said: list[str] = []
    measured = gpu.measured(steps.try_out(), 0, said.append, lambda found: None)
    assert measured.rows == []
    assert all(json.loads(line)["left out"] == "-0 s are left" for line in said[:-1])


def test_a_step_that_fails_stops_no_other(monkeypatch):
    def recipe(rig, work):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(contenders, "recipe", recipe)
    said: list[str] = []
    sizes = replace(steps.try_out(), shapes=(TINY_GPT2,), more_shapes=())
    measured = gpu.measured(sizes, 600, said.append, lambda found: None)
    assert sum("too large" in line for line in said) == len(works.WORKS)
    assert len(measured.rows) == len(works.WORKS) + 2


def test_shares_are_of_the_limit_and_of_the_best_rival():
    line = Line("m", "w", seconds={BACKPROMPT: 0.5, PADDED: 1.0, RECIPE: 0.4}, limit=0.1)
    assert (line.of_limit, line.of_rival) == (0.2, 0.8)
    assert (Line("m", "w").of_limit, Line("m", "w", seconds={BACKPROMPT: 1.0}).of_rival) == (None, None)
    assert Line("m", "w", held=200, pass_bytes=300, peak=550).of_needed == 1.1
    assert Line("m", "w", held=200, peak=550).of_needed is None


@pytest.mark.parametrize("num_tokens", [40, 1300])
def test_a_plain_pass_has_the_number_of_tokens(rig, num_tokens):
    shapes = []
    hook = rig.model.base_model.h[0].register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape[:2]))
    try:
        contenders.plain_pass(rig, num_tokens)
    finally:
        hook.remove()
    assert [tuple(shape) for shape in shapes] == [{40: (1, 40), 1300: (3, 512)}[num_tokens]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_without_a_gpu_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "--gpu", "--results", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit):
        command.main()
    assert "error: no GPU: torch.cuda.is_available() is False" in capsys.readouterr().err
    said: list[str] = []
    assert gpu.SUITE.measure(said.append, None) is None
    assert said[0].startswith("The suite gpu is left out: no GPU")


def test_a_try_out_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--gpu", "--try-out", "--seconds", "0", "--results", str(path)])
    command.main()
    assert not path.exists()
