"""The README's code runs as it stands, and the public names are those that it and the design speak of."""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import backprompt
from backprompt import LM, Text
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


@pytest.fixture
def lm(gpt2_in_this_folder: None) -> LM:
    return backprompt.load("gpt2")


def blocks_by_heading() -> dict[str, str]:
    """The README's blocks of Python, each by the heading under which it stands; there is one under each at most."""
    sections = re.split(r"^## (.*)\n", README.read_text(encoding="utf-8"), flags=re.M)
    found = [
        (heading, block)
        for heading, section in zip(sections[1::2], sections[2::2], strict=True)
        for block in re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.M)
    ]
    assert len(dict(found)) == len(found), "two blocks under one heading"
    return dict(found)


def run_block(heading: str, names: dict[str, Any]) -> Any:
    """Run the block under this heading with these names, add those that it makes, and return what its last line gives.

    Also `backprompt` and `Text`, which the first block of the README imports.
    """
    names.update(backprompt=backprompt, Text=backprompt.Text)
    tree = ast.parse(blocks_by_heading()[heading])
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(README), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(README), "eval"), names)


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks_by_heading()["In a few lines"], str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("Hello there. General Kenobi...\n")
    texts, lm = names["texts"], names["lm"]
    assert lm.stats.tokens_computed == num_distinct(texts)
    assert lm.model.dtype is torch.float32


@pytest.mark.usefixtures("gpt2_in_this_folder")
def test_readme_example_of_the_store() -> None:
    for is_stored in (False, True):
        names: dict[str, Any] = {}
        run_block("Prompts that last", names)
        stats = names["lm"].stats
        assert (stats.tokens_loaded > 0) == (stats.tokens_computed == 0) == is_stored


def test_readme_example_of_groups(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"lm": lm}
    run_block("Segments that do not see each other", names)
    assert capsys.readouterr().out.startswith("2 texts: mean divergence")
    lm.clear()
    names["text"]()
    before = lm.stats
    names["other"]()
    first, eighth = names["shots"][0], names["shots"][0] + names["shots"][7]
    num_question = len(Text(names["question"], lm).tokens)
    num_eighth = len(eighth.tokens) - len(first.tokens)  # its first words are those of the others
    assert num_question < (lm.stats - before).tokens_computed < num_eighth + num_question


def test_readme_example_of_classification(lm: LM) -> None:
    predicted = run_block("Classification", {"lm": lm})
    assert len(predicted) == 2
    assert set(predicted) <= {"negative", "positive"}


def test_readme_example_of_scikit_learn(lm: LM) -> None:
    names = {"lm": lm}
    predicted = run_block("A prompt as a scikit-learn classifier", names)
    assert predicted.tolist() in (["bad"], ["good"])
    assert len(names["search"].cv_results_["params"]) == 8
    stats = lm.stats
    assert stats.tokens_computed < stats.tokens_requested / 4


def test_readme_example_of_generation(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"lm": lm}
    run_block("Generation", names)
    assert capsys.readouterr().out
    assert [len(row) for row in names["samples"]] == [4, 4]
    assert len(names["draft"].completion_tokens) == 20
    assert set(names["answer"].probabilities) == {"yes", "no"}
    assert names["copied"].completion_tokens == names["draft"].generate(max_new_tokens=20).completion_tokens


def test_readme_example_of_pictures(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    draft = Text("Dear Ms Amidala,", lm).generate(max_new_tokens=20)
    num_tokens = run_block("See it", {"draft": draft})
    assert Path("tree.svg").read_text(encoding="utf-8").count("Dear") == 2  # in its box, and in what is told of it
    assert capsys.readouterr().out.startswith("¦")
    assert num_tokens == num_distinct([draft + " Yours,", draft + " Love,"])


def test_readme_example_of_explaining(lm: LM, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"lm": lm}
    run_block("What is computed, why, and whether it is the same", names)
    explained, verified = names["explained"], names["verified"]
    assert f"forwards {explained.tokens_to_compute} tokens instead of" in capsys.readouterr().out
    assert explained.tokens_to_compute == explained.actual.tokens_computed == lm.stats.tokens_computed
    assert explained.misses
    assert verified.passed
    assert verified.num_texts == 2


def test_every_block_of_the_readme_is_run() -> None:
    """By one of the tests above: they name its heading."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert [heading for heading in blocks_by_heading() if source.count(f'"{heading}"') != 1] == []
    assert README.read_text(encoding="utf-8").count("```python\n") == len(blocks_by_heading()) > 0


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
    assert len(blocks) == len(outputs) == 7
    for block in blocks:
        pieces = block.split("[...]\n")
        assert any(all(piece in output for piece in pieces) for output in outputs), block
