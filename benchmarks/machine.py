"""The machine and the versions that numbers were taken on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from backprompt import LM

Machine = dict[str, Any]


def describe_machine(lm: LM) -> Machine:
    """The machine and the versions behind the numbers."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": lm.stats.kernel,
        "linears": lm.stats.linears,
    }


def as_sentence(machine: Machine) -> str:
    """All facts of a machine, in a line."""
    return ", ".join(_fact(name, value) for name, value in machine.items())


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _fact(name: str, value: Any) -> str:
    return f"{name} ({as_sentence(value)})" if isinstance(value, dict) else f"{name} {value}"
