"""The benchmarks compare the same work, and the report shows the measured numbers."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from backprompt import LM, Text, evaluate, generate
from benchmarks import __main__ as command
from benchmarks import contenders, report, suites, workloads
from benchmarks.measure import Spread, noted_passes
from benchmarks.plots import files_of
from benchmarks.rows import from_json
from benchmarks.suite import Suite
from benchmarks.suites import partition, workers
from benchmarks.suites.cappr import cases, duel
from crews import crew_lm
from tiny_models import build

WAITING = {"training_gpu": ["training_gpu"]}
"""Suites that may not have run yet, on a GPU or on a quiet machine, and the markers of their tables."""
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.json"


def spread(*values: float) -> dict[str, Any]:
    return vars(Spread.of(list(values)))


@pytest.fixture
def committed() -> dict[str, Any]:
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return results


@pytest.fixture
def measured() -> dict[str, Any]:
    """A suite against CAPPr as it would be written, with numbers that are easy to find again."""
    setting = {"cached": True, "batch_size": 3, "batch_size_completions": None}

    def line(table: str, num_classes: int) -> dict[str, Any]:
        rivals = {"CAPPr": 91.0, "generating 1 token": 92.0, "generating 4 tokens": 93.0}
        return {
            "table": table,
            "workload": f"{table} {num_classes}",
            "classes": num_classes,
            "texts": 96 * num_classes,
            "tokens in strings": 5000,
            "distinct tokens": 400,
            "computed": 399,
            "seconds": {"backprompt": spread(13.0), **{name: spread(value) for name, value in rivals.items()}},
            "times faster": {"CAPPr": spread(6.1, 7.2, 8.3)},
            "setting": setting,
            "tried": [{**setting, "seconds": 5.5}, {**setting, "batch_size_completions": 16, "seconds": 4.4}],
            "prompts tried": 2,
            "gap": 2e-6,
        }

    memory = {
        "prompt tokens": 900,
        "completion tokens": 150,
        "distinct tokens": 1000,
        "classes": 77,
        "held": 76_812_000,
        "bytes a token": 76_812,
        "backprompt": {"peak": 123_000_000, "seconds": 1.0},
        "CAPPr": [{**setting, "peak": 5_678_000_000, "seconds": 8.0}],
    }
    lines = [line("five", 77), *(line(table, num) for num in (2, 64) for table in ("curve", "names"))]
    return {"lines": lines, "memory": memory, "versions": {}, "threads": 2}


def test_tables_show_the_suite_against_cappr(measured: dict[str, Any], committed: dict[str, Any]) -> None:
    without = {name: value for name, value in committed.items() if name != "cappr"}
    others = report.tables_of(copy.deepcopy(without))
    tables = report.tables_of({**without, "cappr": measured})
    assert {name: tables[name] for name in others} == others
    assert "| five 77 | 13.0 | 91.0 | 7.2 (6.1 to 8.3) |" in tables["cappr"]
    assert (
        "4.40: cached, 3 prompts, 16 completions; 5.50: cached, 3 prompts, all completions" in tables["table settings"]
    )
    assert "| 64 | 13.0 | 91.0 | 92.0 | 93.0 | 13.0 | 91.0 |" in tables["table curve"]
    assert "1,000 tokens of 76,812 bytes, where the strings have 1,000 distinct ones" in tables["table memory"]
    assert "| 5,678 | 8.0 |" in tables["table memory"]
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    for name in set(tables) - set(others):
        assert re.search(f"<!-- {name} -->\n.*?<!-- /{name} -->", pages, flags=re.DOTALL), name


def test_every_marker_is_of_one_suite_and_every_plot_is_drawn(committed: dict[str, Any]) -> None:
    """No marker without a table, no table without a marker; the same of plots and their committed files."""
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    not_measured = {
        f"table {marker}" for name, markers in WAITING.items() if name not in committed for marker in markers
    }
    assert set(re.findall(r"<!-- /(.*?) -->", pages)) == set(report.tables_of(committed)) | not_measured
    files = [path for plot in report.plots_of(committed) for path in files_of(plot, RESULTS.parent / "plots").values()]
    assert sorted(files) == sorted((RESULTS.parent / "plots").iterdir())


@pytest.mark.parametrize("suite", suites.find_suites(), ids=lambda suite: suite.name)
def test_rows_are_written_as_they_were_read(suite: Suite, committed: dict[str, Any]) -> None:
    if suite.name in WAITING and not suite.is_measured(committed):
        pytest.skip("this suite has not run yet")
    rows, kept = suite.rows(committed), {"lines": [{"suite": "another"}]}
    suite.keep(kept, rows)
    expected = committed.get(suite.name, [line for line in committed["lines"] if line["suite"] == suite.name])
    assert json.dumps(kept.get(suite.name, kept["lines"][1:])) == json.dumps(expected)
    assert kept["lines"][0] == {"suite": "another"}
    assert suite.rows(kept) == rows
    suite.keep(kept, rows)
    assert suite.rows(kept) == rows
    assert suite.is_measured(kept)
    assert not suite.is_measured({"machines": {}, "lines": []})


def test_rows_with_other_keys_are_refused() -> None:
    assert from_json(dict[str, Spread | None], {"a": spread(1.0), "b": None}) == {"a": Spread.of([1.0]), "b": None}
    with pytest.raises(ValueError, match=r"Spread has the keys .*'values'.*, but the results have \['median'\]"):
        from_json(list[Spread], [{"median": 1.0}])


A_SUITE = """
from dataclasses import dataclass
from benchmarks.suite import Measured, Suite
from benchmarks.tables import Table, markdown

@dataclass(frozen=True)
class Row:
    seconds: float

class Toy(Suite):
    name, place, rows_type = "toy", 5, list[Row]

    def measure(self, say, peer_python):
        say("measuring")
        return Measured([Row(12.5)], {"processor": "an abacus"})

    def tables(self, results):
        return [Table("table toy", markdown(["s"], [[str(row.seconds)] for row in self.rows(results)]))]

SUITE = Toy()
"""


def test_adding_a_suite_is_adding_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.py").write_text(A_SUITE, encoding="utf-8")
    names = [suite.name for suite in suites.find_suites()]
    monkeypatch.setattr(suites, "__path__", [*suites.__path__, str(tmp_path)])
    assert [suite.name for suite in suites.find_suites()] == ["toy", *names]
    path = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "toy", "--results", str(path)])
    monkeypatch.setattr(command, "draw_plots", lambda results, folder: None)  # matplotlib is not there in tests
    command.main()
    assert capsys.readouterr().out == "measuring\ntoy: 0.0 minutes\n\n"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results == {"machines": {"toy": {"processor": "an abacus"}}, "lines": [], "toy": [{"seconds": 12.5}]}
    tables = report.tables_of(results)
    assert tables == {"table toy": "| s |\n| --- |\n| 12.5 |", "machine": "- *toy*: processor an abacus"}
    page = "<!-- table five -->\nold\n<!-- /table five -->\n<!-- table toy -->\nold\n<!-- /table toy -->"
    assert report.with_tables(page, tables) == page[: page.index("toy")] + (
        "toy -->\n| s |\n| --- |\n| 12.5 |\n<!-- /table toy -->"
    )


def test_two_tables_with_one_marker_are_refused(monkeypatch: pytest.MonkeyPatch, committed: dict[str, Any]) -> None:
    monkeypatch.setattr(report, "find_suites", lambda: suites.find_suites() * 2)
    with pytest.raises(ValueError, match=r"same marker: .*'again', 'again'"):
        report.tables_of(committed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return workloads.make_tokenizer()


def test_parts_encoded_apart_are_the_composed_prompt(tokenizer: Any) -> None:
    """CAPPr encodes what it caches, each prompt and each completion apart; a text must have the same ids."""
    lm = LM(build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer)
    for case in cases.cases():
        few = workloads.Workload(case.workload.name, case.workload.prompts[:3])
        encoded = contenders.encode(tokenizer, cases.with_spaces(few))
        assert [duel.compose(lm, prompt).tokens for prompt in few.prompts] == [prompt.ids for prompt in encoded]
        if case.table == "names":
            assert {len(ids) for prompt in encoded for ids in prompt.completions} == {1}


def test_scores_of_classify_are_compared_one_by_one(tokenizer: Any) -> None:
    lm = LM(build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer)
    case = cases.joined_by_spaces(cases.Case("", workloads.Workload("", workloads.two_choices().prompts[:2]), (), 0))
    scores = duel.with_classify(lm, case.workload)
    before = lm.stats
    assert duel.largest_gap(scores, scores) == 0
    (encoded, _) = contenders.encode(tokenizer, cases.with_spaces(case.workload))
    ids = [
        (prompt.ids, prompt.completions) for prompt in contenders.encode(tokenizer, cases.with_spaces(case.workload))
    ]
    assert [len(row) for row in scores[0]] == [len(completion) for completion in encoded.completions]
    assert duel.distinct_tokens(ids) >= before.tokens_computed > 0
    other = copy.deepcopy(scores)
    other[1][1][0] += 0.01
    with pytest.raises(AssertionError, match=r"off by 0\.0"):
        duel.largest_gap(scores, other)
    del other[1][1][0]
    with pytest.raises(ValueError, match="zip"):
        duel.largest_gap(scores, other)


def test_without_cappr_its_suite_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machines": {}, "lines": []}))
    monkeypatch.delenv("CAPPR_PYTHON", raising=False)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "cappr", "--results", str(path)])
    monkeypatch.setattr(command, "draw_plots", lambda results, folder: None)  # matplotlib is not there in tests
    command.main()
    assert "cappr==0.9.6" in capsys.readouterr().out
    assert "cappr" not in json.loads(path.read_text())
    monkeypatch.setattr("sys.argv", ["benchmarks", "--only", "cappr", "--cappr-python", str(tmp_path / "python")])
    with pytest.raises(SystemExit, match="2"):
        command.main()


def test_each_shape_of_a_forest_is_cut() -> None:
    lines = dict(zip(partition.SHAPES, partition.measured(4000, 8), strict=True))
    for shape, line in lines.items():
        made = shape.make(4000)
        lengths = made[0] if isinstance(made, tuple) else list(map(len, made))
        assert len(lengths) == 4000
        assert line.num_tokens == sum(lengths)
        assert line.of_least >= 1
        assert 1 <= line.least_of_distinct <= line.of_distinct
        assert line.num_parts == (1 if "chain" in shape.name[:10] else 8)
    tree = lines[partition.SHAPES[0]]
    assert tree.of_distinct < 1.05
    assert tree.of_slowest > 0.9
    assert f"| {tree.num_tokens:,} | {tree.num_distinct:,} |" in partition.table_of([tree])


def test_workers_and_one_process_do_the_same_work(tokenizer: Any) -> None:
    def loader() -> tuple[Any, Any]:
        return build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer

    works = (workers.duel.scored(4, 3, 5), workers.duel.generated(3, 2, 5))
    two, one = crew_lm(2, loader), crew_lm(1, loader)
    lines = list(workers.duel.measured(works, LM(*loader()), two, one, num_rounds=1))
    for line in lines:
        (in_one,) = line.tokens[workers.duel.ONE_PROCESS]
        assert line.tokens[workers.duel.ONE_WORKER] == [in_one]
        assert len(line.tokens[workers.duel.TWO_WORKERS]) == 2
        assert in_one <= sum(line.tokens[workers.duel.TWO_WORKERS]) < 2 * in_one
        assert line.gap < 1e-4
    other = crew_lm(2, lambda: (build("gpt2", vocab_size=workloads.VOCABULARY, seed=5), tokenizer))
    with pytest.raises(AssertionError, match="workers are off by"):
        list(workers.duel.measured(works[:1], LM(*loader()), other, one, num_rounds=1))


def test_a_simulation_follows_its_rates() -> None:
    quick, slow = (workers.Measures(100.0, driver, 0.0, 0.0) for driver in (0.0, 1e-3))
    lines = workers.simulated(quick, 4000)
    assert [line.num_workers for line in lines] == [1, 8, 64, 256]
    assert lines[0].faster == 1
    assert 7 < lines[1].faster <= 8
    # The driver's four seconds do not get fewer.
    one, *_, many = workers.simulated(slow, 4000)
    assert many.faster == pytest.approx((one.slowest + 4) / (many.slowest + 4))
    assert many.faster < lines[-1].faster


def test_the_passes_of_all_calls_are_noted(tokenizer: Any) -> None:
    lm = LM(build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer)
    evaluate(Text("The first call has passes of the probe.", lm))
    prompts = [Text(f"{word} and", lm) for word in ("one", "two")]
    before = lm.stats
    with noted_passes(lm) as sizes:
        lm.token_logprobs([prompt + " more" for prompt in prompts], prompts)
        num_scored = (lm.stats - before).tokens_computed
        assert sum(sizes) == num_scored > 0
        generate(prompts, max_new_tokens=5, min_new_tokens=5)  # some of the steps go in place
    done = lm.stats - before
    assert sum(sizes) == done.tokens_computed > num_scored
    assert len(sizes) == done.forward_passes
    lm.token_logprobs([Text("three", lm)])
    assert len(sizes) == done.forward_passes
