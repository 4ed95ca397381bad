"""Importing the package is quick, and whichever of its modules is imported first finds the others."""

import subprocess
import sys
from pathlib import Path

import backprompt

EACH_FIRST = """
import importlib, pkgutil
found = [module.name for module in pkgutil.walk_packages(backprompt.__path__, "backprompt.")]
names = [name for name in found if "integrations." not in name and name != "backprompt.__main__"]
assert len(names) > 40, names
for name in names:
    for loaded in [other for other in sys.modules if other.partition(".")[0] == "backprompt"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""

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


def run(program: str) -> str:
    root = str(Path(backprompt.__file__).parent.parent)
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", program]
    return subprocess.run(command, cwd=root, stderr=subprocess.PIPE, text=True).stderr


def test_what_is_public_is_imported_when_it_is_asked_for_and_any_module_first():
    assert run(LAZY + EACH_FIRST) == ""  # in one process, as torch takes seconds


def test_names_that_there_are_not():
    assert not hasattr(backprompt, "nothing_of_this_name")
    assert not hasattr(backprompt, "__nothing__")
    namespace: dict = {}
    exec("from backprompt import *", namespace)
    assert set(backprompt.__all__) <= set(namespace)
