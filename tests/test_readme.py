"""The README's code runs as it stands, and the public names are those that it and the design speak of."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import backprompt
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
    assert len(blocks) == 1
    names: dict = {}
    exec(compile(blocks[0], str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("Hello there. General Kenobi...\n")
    texts, lm = names["texts"], names["lm"]
    distinct = {text.tokens[:stop] for text in texts for stop in range(1, len(text.tokens) + 1)}
    assert lm.stats.tokens_computed == len(distinct)
    assert lm.model.dtype is torch.float32


def test_public_names() -> None:
    public = {
        name for name, value in vars(backprompt).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(backprompt.__all__)
    assert {"LM", "Text", "evaluate", "load", "eager", "ModelRepr", "BackpromptError"} <= public


def test_every_error_is_also_a_built_in_kind() -> None:
    errors = [value for value in vars(backprompt).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(errors) > 10
    for error in errors:
        if error is not backprompt.BackpromptError:
            assert issubclass(error, backprompt.BackpromptError)
            assert any(base.__module__ == "builtins" and base is not Exception for base in error.__bases__)
