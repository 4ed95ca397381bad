"""Importing the package is quick, and whichever of its modules is imported first finds the others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import backprompt

FOLDER = Path(backprompt.__file__).parent

LAZY = """
import sys
import backprompt
from backprompt.errors import BackpromptError
from backprompt import text, __version__
assert "torch" not in sys.modules
assert set(dir(backprompt)) >= {"LM", "errors", "text"} | set(backprompt.__all__)
assert backprompt.LM is sys.modules["backprompt.lm"].LM
assert backprompt.BackpromptError is BackpromptError
assert vars(backprompt)["LM"] is backprompt.LM
"""


def test_what_is_public_is_imported_when_it_is_asked_for():
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=FOLDER.parent, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""


def test_names_that_there_are_not():
    assert not hasattr(backprompt, "nothing_of_this_name")
    assert not hasattr(backprompt, "__nothing__")
    namespace: dict = {}
    exec("from backprompt import *", namespace)
    assert set(backprompt.__all__) <= set(namespace)


def test_no_module_needs_another_to_be_imported_first():
    """No two need each other while they are imported, so the order in which they are does not matter."""
    files = {name_of(path): path for path in FOLDER.rglob("*.py") if "examples" not in path.parts}
    graph = {name: (set(imported(path)) - {name}) & files.keys() for name, path in files.items()}
    assert len(graph) > 40
    assert {"backprompt.lm", "backprompt.skeleton"} <= graph["backprompt._public"] | graph["backprompt.executor"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def name_of(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules that one imports when it is imported, not later and not for types alone."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom):
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
