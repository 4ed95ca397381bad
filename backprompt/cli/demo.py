"""`backprompt demo`: the example of the README, 40 customer questions sorted into 12 intents by a small model.

The demo is examples/intents.py itself. An installed package has a copy of its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backprompt.cli.arguments import add_command
from backprompt.errors import CommandError

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "examples", _PACKAGE.parent / "examples")
_MODULES = ("intents", "demo_model", "plain")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        "sort 40 customer questions into 12 intents with a small model",
        """Sort 40 customer questions into 12 intents: 480 texts as one tree of prompts, each distinct token computed
        once, beside plain padded batches. The demo takes about a minute on two cores, most of it for the plain batches.

        The demo model, SmolLM2-135M-Instruct, comes from PyPI (98 MB); if it is missing, an error says how to get
        it.""",
        run=run,
        examples=("backprompt demo", "backprompt demo --model gpt2"),
    )
    parser.add_argument("--model", metavar="NAME", help="a hub id or a folder, in place of the demo model")
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="questions, one a line: the customer's words, a tab, the intent (default: the 40)",
    )
    parser.add_argument(
        "--plain-batches", type=int, metavar="N", help="the number of plain batches to time (default: 4)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the example."""
    options = [
        part
        for name in ("model", "questions", "plain_batches")
        if (value := getattr(arguments, name)) is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    with _example() as intents:
        try:
            intents.main(options)
        except SystemExit as stop:
            if isinstance(stop.code, str):  # the demo model is missing, or a question has no known intent
                raise CommandError(" ".join(stop.code.split())) from stop
            raise
    return 0


@contextlib.contextmanager
def _example() -> Iterator[Any]:
    """Yield the example as a module; it imports the modules beside it by their plain names."""
    folder = next((folder for folder in _FOLDERS if (folder / "intents.py").is_file()), None)
    if folder is None:
        raise CommandError("The demo is not part of this installation. Install backprompt from its wheel or checkout.")
    before = {name: sys.modules.pop(name, None) for name in _MODULES}
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("intents")
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
