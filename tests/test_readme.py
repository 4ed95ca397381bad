"""The README's code runs as it stands, and the public names are those that it and the design speak of."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch

import backprompt
from benchmarks.report import tables_of, with_tables
from comparing import num_distinct
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def gpt2_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which `load("gpt2")` finds a model: the example's name, at a local path."""
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    byte_level_bpe().save_pretrained(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("Hello there. General Kenobi...\n")
    texts, lm = names["texts"], names["lm"]
    assert lm.stats.tokens_computed == num_distinct(texts)
    assert lm.model.dtype is torch.float32


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_generation(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lm = backprompt.load("gpt2")
    names: dict = {"backprompt": backprompt, "Text": backprompt.Text, "lm": lm}
    exec(compile(blocks[5], str(README), "exec"), names)
    assert capsys.readouterr().out
    assert [len(row) for row in names["samples"]] == [4, 4]
    assert len(names["draft"].completion_tokens) == 20
    assert set(names["answer"].probabilities) == {"yes", "no"}


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lm = backprompt.load("gpt2")
    draft = backprompt.Text("Dear Ms Amidala,", lm).generate(max_new_tokens=20)
    names: dict = {"backprompt": backprompt, "draft": draft}
    *statements, last = blocks[6].strip().splitlines()
    exec("\n".join([*statements, f"num_tokens = {last}"]), names)
    assert Path("tree.svg").read_text(encoding="utf-8").count("Dear") == 2  # in its box, and in what is told of it
    assert capsys.readouterr().out.startswith("¦")
    longer = [draft + " Yours,", draft + " Love,"]
    assert names["num_tokens"] == num_distinct(longer)


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_the_store() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    for is_stored in (False, True):
        names: dict = {"backprompt": backprompt, "Text": backprompt.Text}
        exec(compile(blocks[1], str(README), "exec"), names)
        stats = names["lm"].stats
        assert (stats.tokens_loaded > 0) == (stats.tokens_computed == 0) == is_stored


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lm = backprompt.load("gpt2")
    names: dict = {"backprompt": backprompt, "Text": backprompt.Text, "lm": lm}
    exec(compile(blocks[2], str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("2 texts: mean divergence")
    lm.clear()
    names["text"]()
    before = lm.stats
    names["other"]()
    eighth = names["shots"][0] + names["shots"][7]
    num_question = len(backprompt.Text(names["question"], lm).tokens)
    num_eighth = len(eighth.tokens) - len(names["shots"][0].tokens)  # its first words are those of the others
    assert num_question < (lm.stats - before).tokens_computed < num_eighth + num_question


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_classification() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {"lm": backprompt.load("gpt2")}
    *statements, last = blocks[3].strip().splitlines()
    exec("\n".join([*statements, f"predicted = {last}"]), names)
    assert len(names["predicted"]) == 2
    assert set(names["predicted"]) <= {"negative", "positive"}


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_scikit_learn() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 8
    names: dict = {"lm": backprompt.load("gpt2")}
    *statements, last = blocks[4].strip().splitlines()
    exec("\n".join([*statements, f"predicted = {last}"]), names)
    assert names["predicted"].tolist() in (["bad"], ["good"])
    assert len(names["search"].cv_results_["params"]) == 8
    stats = names["lm"].stats
    assert stats.tokens_computed < stats.tokens_requested / 4


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_explaining(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lm = backprompt.load("gpt2")
    names: dict = {"backprompt": backprompt, "Text": backprompt.Text, "lm": lm}
    exec(compile(blocks[7], str(README), "exec"), names)
    explained, verified = names["explained"], names["verified"]
    assert f"forwards {explained.tokens_to_compute} tokens instead of" in capsys.readouterr().out
    assert explained.tokens_to_compute == explained.actual.tokens_computed == lm.stats.tokens_computed
    assert explained.misses
    assert verified.passed
    assert verified.num_texts == 2


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
    for path in (README, ROOT / "benchmarks" / "README.md"):
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
    assert len(blocks) == len(outputs) == 5
    for block in blocks:
        pieces = block.split("[...]\n")
        assert any(all(piece in output for piece in pieces) for output in outputs), block
