"""Each kernel compiles for an H100, which need not be there: see `compiled_kernels.py`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import backprompt

MOST_STACK = 64
"""Bytes of registers that a thread may lay aside."""


def compiled(folder: Path, dtype: str, sizes: Sequence[int], capability: int = 90) -> list[dict[str, Any]]:
    """The compiled kernels, and errors; each process compiles anew."""
    script = Path(__file__).parent / "compiled_kernels.py"
    command = [sys.executable, script, str(capability), "--dtypes", dtype, "--sizes", *map(str, sizes)]
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no wheel of triton for this platform")
@pytest.mark.parametrize(("dtype", "sizes"), [("bfloat16", (64, 80)), ("float32", (80,))])
def test_every_kernel_compiles_for_an_h100(dtype: str, sizes: Sequence[int], tmp_path: Path) -> None:
    """For both tiles, with all kinds of scoring and none, and arguments that are aligned or not."""
    found = compiled(tmp_path, dtype, sizes)
    assert [kernel for kernel in found if "error" in kernel] == []
    assert {kernel["kernel"] for kernel in found} == set(kernels())
    assert [kernel for kernel in found if kernel["stack"] > MOST_STACK] == []


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no wheel of triton for this platform")
def test_without_tensor_cores_all_numbers_of_a_tile_lie_in_registers(tmp_path: Path) -> None:
    """As on a T4, which is of compute capability 7.5."""
    found = compiled(tmp_path, "float16", (64, 128), 75)
    assert [kernel for kernel in found if "error" in kernel or kernel["stack"] > MOST_STACK] == []
    assert "attend_kernel" in {kernel["kernel"] for kernel in found}


def kernels() -> list[str]:
    """The names of all kernels that are launched; others begin with an underscore."""
    sources = [path.read_text() for path in Path(backprompt.__file__).parent.rglob("*.py")]
    return [name for source in sources for name in re.findall(r"@triton\.jit[^@]*?\ndef ([a-z]\w*)\(", source)]
