"""What the benchmarks compare is the same work, and the report shows what was measured."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from backprompt import LM
from benchmarks import __main__ as command
from benchmarks import cappr, report, workloads
from tiny_models import build

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results.json"


def spread(*values: float) -> dict[str, Any]:
    return {"median": sorted(values)[len(values) // 2], "lowest": min(values), "highest": max(values)}


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
    return {"lines": lines, "memory": memory, "versions": {}}


def test_tables_show_the_suite_against_cappr(measured: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    without = {name: value for name, value in results.items() if name != "cappr"}
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
    pages = "".join((report.ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "benchmarks/README.md"))
    for name in set(tables) - set(others):
        assert re.search(f"<!-- {name} -->\n.*?<!-- /{name} -->", pages, flags=re.DOTALL), name


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return workloads.make_tokenizer()


def test_parts_encoded_apart_are_the_composed_prompt(tokenizer: Any) -> None:
    """CAPPr encodes what it caches, each prompt and each completion apart; a text must have the same ids."""
    lm = LM(build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer)
    for case in cappr.cases():
        few = workloads.Workload(case.workload.name, case.workload.prompts[:3])
        encoded = cappr.encode(tokenizer, cappr.with_spaces(few))
        assert [cappr.compose(lm, prompt).tokens for prompt in few.prompts] == [prompt.ids for prompt in encoded]
        if case.table == "names":
            assert {len(ids) for prompt in encoded for ids in prompt.completions} == {1}


def test_scores_of_classify_are_compared_one_by_one(tokenizer: Any) -> None:
    lm = LM(build("gpt2", vocab_size=workloads.VOCABULARY), tokenizer)
    case = cappr.joined_by_spaces(cappr.Case("", workloads.Workload("", workloads.two_choices().prompts[:2]), (), 0))
    scores = cappr.with_classify(lm, case.workload)
    before = lm.stats
    assert cappr.largest_gap(scores, scores) == 0
    (encoded, _) = cappr.encode(tokenizer, cappr.with_spaces(case.workload))
    ids = [(prompt.ids, prompt.completions) for prompt in cappr.encode(tokenizer, cappr.with_spaces(case.workload))]
    assert [len(row) for row in scores[0]] == [len(completion) for completion in encoded.completions]
    assert cappr.distinct_tokens(ids) >= before.tokens_computed > 0
    other = copy.deepcopy(scores)
    other[1][1][0] += 0.01
    with pytest.raises(AssertionError, match=r"off by 0\.0"):
        cappr.largest_gap(scores, other)
    del other[1][1][0]
    with pytest.raises(ValueError, match="zip"):
        cappr.largest_gap(scores, other)


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
