"""A peer in a process and an environment of its own; requests and answers are a line of JSON each."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class PeerProgram:
    """The program that a peer runs: the name that people know, and how the command line learns of its interpreter."""

    name: str
    how_to_install: str = ""

    @property
    def option(self) -> str:
        return f"--{self.name.lower()}-python"

    @property
    def destination(self) -> str:
        """The option's attribute in what argparse returns."""
        return self.option.strip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        """The variable of the environment that stands in for the option."""
        return f"{self.name.upper()}_PYTHON"

    @property
    def default(self) -> str | None:
        return os.environ.get(self.variable)


VLLM = PeerProgram("vLLM")


class Peer:
    """`python -m benchmarks.{module} arguments` with another interpreter. A context manager.

    While we run, it waits for its input.
    """

    def __init__(self, python: Path, module: str, *arguments: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            [str(python), "-m", f"benchmarks.{module}", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.started = self._answer()
        """Versions and threads."""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # which ends it, once it has answered
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer.

        Raises:
            RuntimeError: the process ended instead.

        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The process of {self._module} ended with exit code {self._process.wait()}; what it said stands above."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
