"""Importing the package is quick, and whichever of its modules is imported first finds the others."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import torch

import backprompt
from said import own_lines

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
    assert own_lines(done.stderr) == []


def test_names_that_there_are_not():
    assert not hasattr(backprompt, "nothing_of_this_name")
    assert not hasattr(backprompt, "__nothing__")
    namespace: dict = {}
    exec("from backprompt import *", namespace)
    assert set(backprompt.__all__) <= set(namespace)


def test_no_module_needs_another_to_be_imported_first():
    """Nor do two know each other, later or for types alone: knowledge points one way, but for the package's root."""
    files = {name_of(path): path for path in FOLDER.rglob("*.py") if "examples" not in path.parts}
    del files["backprompt"]
    graph = {name: (set(imported(path)) - {name}) & files.keys() for name, path in files.items()}
    assert len(graph) > 40
    assert {"backprompt.lm", "backprompt.model.skeleton"} <= graph["backprompt._public"] | graph[
        "backprompt.model.executor"
    ]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_files_and_classes_fit_in_the_head():
    """Methods of the node and of the façade are many: users see these classes as one."""
    for path, tree in parsed(FOLDER).items():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= 450, f"{path} has {num_lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name not in ("Text", "LM"):
                num_methods = sum(isinstance(inner, ast.FunctionDef) for inner in node.body)
                assert num_methods <= 25, f"{node.name} has {num_methods} methods"


def name_of(path: Path) -> str:
    parts = path.relative_to(FOLDER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """The modules that one imports, be it when it is imported, later, or for types alone."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom):
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)


THEIRS = {"_repr_html_", "_loglikelihood_tokens", "_max_length", "_get_per_token_logps_and_entropies"}
"""Names that IPython, lm-evaluation-harness and TRL give to attributes, in the package and out of it."""


def test_no_module_uses_what_another_keeps_to_itself():
    """A name with an underscore is used only where it is defined, or by what inherits it."""
    trees = parsed(FOLDER)
    kept = kept_by(trees)
    assert {"_session", "_evaluated", "_concatenate"} <= kept
    assert private_uses(trees, kept) == set()


def test_no_test_uses_what_a_module_keeps_to_itself():
    """Nor patches it: a test that needs a seam finds one with a public name, or the seam gets one."""
    trees = parsed(Path(__file__).parent)
    assert len(trees) > 40
    assert private_uses(trees, kept_by(parsed(FOLDER))) == set()


def test_uses_of_what_is_kept_are_found():
    source = """
from backprompt.text.node import _EAGER, Text
text._left
self._left
text._right
patch.setattr(text, "_left", 1)
patch.setattr("backprompt.text.node._EAGER", 1)
patch.setattr(text, "left", 1)
def _right(): ...
"""
    found = private_uses({Path("a.py"): ast.parse(source)}, {"_left", "_right", "_EAGER"})
    places = ("_EAGER", "text._left", "'_left'", "'backprompt.text.node._EAGER'")
    assert found == {f"a.py: {place}" for place in places}


@cache
def parsed(folder: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")}


def kept_by(trees: dict[Path, ast.Module]) -> set[str]:
    """The private names of modules, without names that other libraries define, too."""
    kept = set().union(*(defined_in(tree) for tree in trees.values()))
    return kept - {*dir(torch.Tensor), *vars(torch.nn.Module())} - THEIRS


def private_uses(trees: dict[Path, ast.Module], kept: set[str]) -> set[str]:
    """Where a file reads, imports or patches one of these names that it does not define."""
    found = set()
    for path, tree in trees.items():
        others = kept - set(defined_in(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in others and is_not_of_itself(node):
                found.add(f"{path.name}: {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("backprompt."):
                found |= {f"{path.name}: {alias.name}" for alias in node.names if is_private(alias.name)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
                found |= {
                    f"{path.name}: {ast.unparse(argument)}"
                    for argument in node.args[:2]
                    if isinstance(argument, ast.Constant) and str(argument.value).rpartition(".")[2] in others
                }
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_not_of_itself(node: ast.Attribute) -> bool:
    return not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})


def defined_in(tree: ast.Module) -> Iterator[str]:
    """The private names that a module defines: functions, classes, variables, and attributes that a class sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not is_not_of_itself(node):
            names = [node.attr]
        else:
            names = []
        yield from filter(is_private, names)
