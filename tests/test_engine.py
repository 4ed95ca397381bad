"""A bound text asks its engine, whatever that is, and nothing else of the package."""

import subprocess
import sys
from pathlib import Path

import pytest

import backprompt as bp
from backprompt import LM, Text
from backprompt.errors import TextTypeError
from backprompt.text.engine import Engine
from tiny_models import build
from tiny_tokenizers import byte_level_bpe


class Recorder:
    """An engine that is no `LM`: notes the calls, and returns the name of the method in place of a result."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for, which is not in the protocol")

    def string(self, text):
        return self._called("string", text)

    def tokens(self, text):
        return self._called("tokens", text)

    def joins(self, text):
        return self._called("joins", text)

    def representation(self, text):
        return self._called("representation", text)

    def result(self, text, name):
        return self._called(name, text)

    def evaluate(self, texts):
        return [self._called("evaluate", text) for text in texts]

    def pin(self, text):
        return self._called("pin", text)

    def save(self, text):
        self._called("save", text)

    def _called(self, name, text):
        self.calls.append((name, text))
        return name


def test_a_text_asks_any_engine():
    engine = Recorder()
    assert isinstance(engine, Engine)
    text = Text("a", engine) + Text.from_tokens([1], engine)
    assert (text.string, text.tokens, text.joins()) == ("string", "tokens", "joins")
    assert (text.model_repr, text(), text.pin()) == ("representation", "representation", "pin")
    assert (text.logits, text.token_logprobs) == ("logits", "token_logprobs")
    text.save()
    assert [name for name, asked in engine.calls if asked is text] == [name for name, _ in engine.calls]
    assert [name for name, _ in engine.calls] == [
        *("string", "tokens", "joins", "representation", "representation", "pin"),
        *("logits", "token_logprobs", "save"),
    ]
    with bp.eager():
        built = text + "b"
    assert engine.calls[-2:] == [("tokens", built), ("evaluate", built)]


def test_what_needs_an_lm_says_so():
    text = Text("a", Recorder())
    for ask in (
        lambda: text.generate(max_new_tokens=1),
        lambda: text.stream(max_new_tokens=1),
        lambda: text.select(["a", "b"]),
        lambda: bp.evaluate([text]),
        lambda: text.draw(),
    ):
        with pytest.raises(TextTypeError, match="An LM is needed here, not Recorder"):
            ask()


def test_an_lm_is_an_engine():
    assert issubclass(LM, Engine)
    assert isinstance(LM(build("gpt2"), byte_level_bpe()), Engine)


TYPED = """
from typing_extensions import assert_type
import backprompt as bp
from backprompt.text.engine import Engine

def use(text: bp.Text) -> None:
    assert_type(text.draw(), bp.Drawing)
    assert_type(text.lm, Engine[bp.Text] | None)
    assert isinstance(text.lm, bp.LM)
    assert_type(text.lm, bp.LM)
    assert_type(text.lm.stats, bp.Stats)
"""

SETTINGS = """
[mypy]
strict = true
python_version = 3.10
[mypy-torch.*,transformers.*,numpy.*,tokenizers.*,graphviz.*,networkx.*,sklearn.*,tqdm.*,lm_eval.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_type_checkers_know_what_texts_return(tmp_path):
    snippet, settings = tmp_path / "snippet.py", tmp_path / "mypy.ini"
    snippet.write_text(TYPED)
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache", snippet]
    folder = Path(bp.__file__).parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if line.startswith(str(snippet))] == []
    assert done.stderr == ""
