"""Compiles all kernels of Triton for a GPU that is not there, in the way in which the library launches them.

    python tests/compiled_kernels.py 90        # an H100; prints a line of JSON for each compiled kernel

A driver without a device stands in for the driver of CUDA. Triton itself compiles down to the GPU's instructions, and
checks that the shared memory suffices. A launch checks that each argument fits the compiled kernel, and computes
nothing. The attention has tensors without numbers, because its kernel knows the interpreter by the type of the device.

Triton's interpreter accepts programs that the compiler refuses. It must be off: TRITON_INTERPRET=0.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from backprompt.attention import triton_copies
from backprompt.attention.base import Scoring
from backprompt.attention.shapes import Launch
from backprompt.attention.tables import Segments
from backprompt.attention.tiles import Tile, tiles_for
from backprompt.attention.triton import OneLaunch
from backprompt.evaluation.rating_triton import rate
from backprompt.forest.plan import KeySegment
from backprompt.memory.placing import place
from backprompt.model.fused import rms_norm, rotated, silu_product

SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""By compute capability, the largest shared memory of a block in KiB (CUDA's guide, "Compute Capabilities")."""

LIMITS = {"i1": 1, "i8": 7, "i16": 15, "i32": 31, "i64": 63}
"""By type of a kernel's argument, the number of bits without the sign."""


class NoDevice:
    """A driver of Triton that compiles for a compute capability and launches nothing; `compiled`: the kernels."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: list[dict[str, Any]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_KIB[self.capability] << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{of}:(\d+)", usage)[1]) for of in ("REG", "STACK"))
        self.compiled.append({"kernel": name, "shared": shared, "registers": registers, "stack": stack})
        return object(), object(), registers, stack, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        types = list(source.signature.values())

        def launch(*given: Any) -> None:
            args = given[9:]  # behind the grid, the stream, the function, its metadata and the hooks
            assert len(args) == len(types), (len(args), types)
            for arg, name in zip(args, types, strict=True):
                if name in LIMITS:
                    assert -(2 ** LIMITS[name]) <= arg < 2 ** LIMITS[name], f"{arg} does not fit {name}"
                elif name.startswith("*"):
                    assert isinstance(arg, (int, torch.Tensor)), arg

        return launch


class Block:
    """Keys and values that lie anywhere."""

    def addresses(self) -> list[tuple[int, int, int]]:
        return [(1 << 40, 1 << 41, 1 << 33)]


@dataclass(frozen=True)
class Heads:
    heads: int
    kv_heads: int
    size: int


def attend(dtype: torch.dtype, heads: Heads, tile: Tile, *, has_all: bool) -> None:
    """Launch attention twice: with shared programs, so that they are joined, and without.

    `has_all`: with a window, a soft cap and sinks.
    """
    query, key, value = (
        torch.empty((5, num, heads.size), dtype=dtype, device="meta").transpose(0, 1)
        for num in (heads.heads, heads.kv_heads, heads.kv_heads)
    )
    sinks = torch.empty(heads.heads, dtype=dtype, device="meta")
    scoring = Scoring(0.3, 6, 2.0, sinks) if has_all else Scoring(0.3)
    segments = [KeySegment.own(0, 5, 19, (5, 2, 3, 5, 5)), KeySegment(1, 4, Block(), 0, 19, 0, times=2)]
    for least_pieces in (1, 1000):
        forest = OneLaunch(Segments.of(segments, [19, 20, 20, 21, 22]))
        for _ in range(2):  # the second launch calls the compiled kernel
            forest.attend(0, query, key, value, scoring, Launch(tile, math.inf, least_pieces))


def others(dtype: torch.dtype, shift: int) -> None:
    """Launch all other kernels; `shift`: how many elements tensors lie behind an aligned address."""
    for heads in (Heads(12, 12, 64), Heads(7, 1, 80)):
        query, key = (
            _tensor((5, num, heads.size), dtype, shift).transpose(0, 1) for num in (heads.heads, heads.kv_heads)
        )
        with patch.object(triton_copies, "serves", return_value=True):  # there is nothing to compare
            triton_copies.TritonCopies({"cpu"}).of(query, key, key)
        rotated(query[None], key[None], *[_tensor((1, 5, heads.size), dtype, shift)] * 2)
    for size, *way in ((64, False, False), (4096, False, True), (5120, True, False)):
        rms_norm(_tensor((3, size), dtype, shift), _tensor((size,), dtype, shift), 1e-6, *way)
    silu_product(_tensor((3, 100), dtype, shift), _tensor((3, 100), dtype, shift))
    ids = torch.empty(9, dtype=torch.int64)
    for columns in (50304, 50257):
        rate(_tensor((2, 50304), dtype, shift)[:, :columns], ids, ids)
    numbers = torch.empty(40, dtype=torch.int64)
    for num_rows in (2, 1):
        rows = numbers[: 2 * num_rows].view(2, num_rows)
        place(_tensor((2, 8), dtype, shift), torch.empty((), dtype=torch.int32), numbers.view(-1, 4), numbers, rows)


def large(dtype: torch.dtype) -> None:
    """Launch a gate for few numbers, and for more than 2 ** 31."""
    for num_rows in (3, 1 << 20):
        gates = torch.empty((num_rows, 4096), dtype=dtype, device="meta")
        silu_product(gates, gates)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> torch.Tensor:
    """Return a tensor that begins `shift` elements behind an aligned address."""
    return torch.empty(math.prod(shape) + shift, dtype=dtype)[shift:].view(shape)


def launches(
    capability: int, dtype: torch.dtype, sizes: Sequence[int]
) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """Yield descriptions, and functions that launch kernels; plain attention for the first size of heads only."""
    for shift in (0, 1):
        yield {"shift": shift}, partial(others, dtype, shift)
    yield {"large": True}, partial(large, dtype)
    for size, has_all in ((sizes[0], False), *((size, True) for size in sizes)):
        for tile in tiles_for(size, dtype.itemsize, has_tensor_cores=capability >= 80):
            about = {"size": size, "rows": tile.rows, "has_all": has_all}
            yield about, partial(attend, dtype, Heads(14, 2, size), tile, has_all=has_all)


def main(capability: int, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> None:
    """Print each compiled kernel, and each error."""
    driver = NoDevice(capability)
    triton.runtime.driver.set_active(driver)
    for dtype in dtypes:
        for about, launch in launches(capability, dtype, sizes):
            about = {"dtype": str(dtype), **about}
            driver.compiled.clear()
            try:
                launch()
            except Exception as error:  # a compiler fails in ways of its own; the others are compiled all the same
                print(json.dumps({**about, "error": f"{type(error).__name__}: {error}"}), flush=True)
            for kernel in driver.compiled:
                print(json.dumps({**about, **kernel}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compiles all kernels for a GPU that is not there.")
    parser.add_argument("capability", type=int, choices=SHARED_KIB, help="its compute capability, 90 for an H100")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 80, 128, 192, 256], help="of heads")
    given = parser.parse_args()
    main(given.capability, [getattr(torch, name) for name in given.dtypes], given.sizes)
