"""Seconds, peak memory and the yardsticks that seconds are held against."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

if TYPE_CHECKING:
    from backprompt import LM  # peers in environments of their own import this file

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    lowest: float
    highest: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), values)

    @classmethod
    def of_ratios(cls, numerators: list[float], denominators: list[float]) -> Spread:
        return cls.of([n / d for n, d in zip(numerators, denominators, strict=True)])


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cpu_seconds_of(work: Callable[[], object]) -> float:
    """Seconds of the processor, which other programs on the machine hardly change."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_bytes_of(work: Callable[[], object]) -> int | None:
    """By how much the process grows at most while `work` runs; None where the system does not tell.

    The peak can be reset on Linux only, and not in every container.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, so that using it again shows
        CLEAR_REFS.write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def resident_bytes() -> int:
    """Memory of this process that lies in RAM now."""
    return _status_bytes("VmRSS")


@contextmanager
def noted_passes(lm: LM) -> Iterator[list[int]]:
    """Yield a list that gets the number of tokens of each pass, as long as the context lasts; on the CPU."""
    executor = lm.session.evaluator.executor
    sizes: list[int] = []
    forward = executor.forward

    def noting(pass_: Any, *more: Any) -> Any:
        sizes.append(len(pass_.token_ids))
        return forward(pass_, *more)

    executor.forward = noting  # type: ignore[method-assign]
    try:
        yield sizes
    finally:
        del executor.forward


def matmul_seconds(lm: LM, pass_sizes: list[int], num_logit_rows: int, rows_in_a_slice: int) -> float:
    """The matrix products of linear layers and output head alone, as large as in the run: the limit.

    They run as `torch.addmm` into memory that is there and as the `LM` multiplies them; the faster one counts.
    Attention's own products are left out, so a fraction of this limit is a little pessimistic.
    """
    sizes = pass_sizes, num_logit_rows, rows_in_a_slice
    return min(_addmm_seconds(lm.model, *sizes), _own_seconds(lm, *sizes))  # type: ignore[arg-type]


def _own_seconds(lm: LM, pass_sizes: list[int], num_logit_rows: int, rows_in_a_slice: int) -> float:
    body, head = lm.session.evaluator.executor._body, lm.session.evaluator.executor._head.lm_head
    layers = [(layer, _num_inputs(layer)) for block in body.h for layer in _linear_layers(block)]
    buffers = {n: {size: torch.randn(n, size) for size in {size for _, size in layers}} for n in set(pass_sizes)}
    slices = _slices(num_logit_rows, rows_in_a_slice)
    hidden = torch.randn(max(slices), _num_inputs(head))

    def work() -> None:
        for num_tokens in pass_sizes:
            for layer, num_in in layers:
                layer(buffers[num_tokens][num_in])
        for rows in slices:
            head(hidden[:rows])

    with torch.no_grad():
        work()
        return seconds_of(work)


def _addmm_seconds(model: GPT2LMHeadModel, pass_sizes: list[int], num_logit_rows: int, rows_in_a_slice: int) -> float:
    layers = [(_matrix(m), m.bias) for block in model.transformer.h for m in _linear_layers(block)]
    sizes = {size for weight, _ in layers for size in weight.shape}
    buffers = {n: {size: torch.randn(n, size) for size in sizes} for n in set(pass_sizes)}
    outputs = {n: {size: torch.empty(n, size) for size in sizes} for n in set(pass_sizes)}
    head = model.lm_head.weight.T  # (inputs, vocab)
    slices = _slices(num_logit_rows, rows_in_a_slice)
    hidden, logits = torch.randn(max(slices), head.shape[0]), torch.empty(max(slices), head.shape[1])

    def work() -> None:
        for num_tokens in pass_sizes:
            for weight, bias in layers:
                num_in, num_out = weight.shape
                torch.addmm(bias, buffers[num_tokens][num_in], weight, out=outputs[num_tokens][num_out])
        for rows in slices:
            torch.mm(hidden[:rows], head, out=logits[:rows])

    with torch.no_grad():
        work()  # touches all memory once
        return seconds_of(work)


def dense_seconds(model: GPT2LMHeadModel, num_tokens: int, num_logit_rows: int, rows_in_a_slice: int) -> float:
    """The plain model's forward of as many tokens, in equal rows of at most 512, and its head for as many rows."""
    num_rows = -(-num_tokens // 512)
    ids = torch.zeros((1, -(-num_tokens // num_rows)), dtype=torch.long)
    hidden = torch.randn(rows_in_a_slice, model.config.n_embd)

    def work() -> None:
        for rows in _slices(num_tokens, ids.shape[1]):
            model.transformer(input_ids=ids[:, :rows], use_cache=False)
        for rows in _slices(num_logit_rows, rows_in_a_slice):
            model.lm_head(hidden[:rows])

    with torch.no_grad():
        return seconds_of(work)


def _linear_layers(block: nn.Module) -> list[nn.Module]:
    return [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]


def _num_inputs(layer: nn.Module) -> int:
    """Of a layer of GPT-2's body, or of its head, the only one whose weights are `(outputs, inputs)`."""
    num_out, num_in = layer.weight.shape
    return num_in if num_out > 50_000 else num_out


def _matrix(layer: nn.Module) -> torch.Tensor:
    return layer.weight  # Conv1D of GPT-2: (inputs, outputs)


def _slices(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _status_bytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
