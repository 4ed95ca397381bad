"""Stats: the work that an `LM` has done, and the bytes that it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from backprompt.evaluation.counters import Counters
from backprompt.evaluation.evaluator import Evaluator

_NAMES = ("kernel", "linears")  # fields of `Stats` that are not numbers


@dataclass(frozen=True)
class Stats:
    """The work of an `LM` so far and the bytes that it holds; `after - before` is the change in between.

    Attributes:
        tokens_requested: sum of the texts' tokens over all evaluations; reading a result of a text in memory adds none.
        tokens_computed: tokens forwarded through the model.
        tokens_recomputed: the computed tokens that had been forwarded before: they were evicted, or are rows of
            attention maps.
        tokens_dropped: tokens that CUDA graphs have forwarded ahead of a step of a generation, behind texts that then
            ended or went on otherwise; they are in no other count.
        tokens_fetched: tokens whose states, or keys and values, moved back from the second pool to the device.
        tokens_loaded: tokens whose states came from the store.
        tokens_reused: requested minus forwarded tokens: cached, shared, or scored without being forwarded.
        forward_passes: forward passes.
        model_calls: calls of the model's body: one for each packed pass, several for each pass by levels.
        logit_rows: rows of logits computed by the output head.
        steps_replayed: steps of generations computed by a CUDA graph that an earlier step recorded.
        steps_recorded: steps of generations in which a CUDA graph was recorded.
        steps_plain: steps of generations without a CUDA graph, of texts that grow in place: all of them on the CPU.
        seconds: time in forward passes and in the output head.
        bytes_held: bytes of keys, values, hidden states and log-probabilities that are on the device now.
        host_bytes_held: bytes of such results that are in the second pool, in host memory, now.
        result_bytes_held: bytes of rows of logits, of attention maps, of log-probabilities of texts that were read one
            by one, and of tokens that were scored and not forwarded, in bounded pools of their own now.
        graph_bytes: the memory of CUDA graphs, in addition to `memory_bytes`: at most a 16th of the memory that was
            free when the `LM` was made. `lm.clear()` frees it, and so does a pass that is short of memory.
        weight_bytes: bytes of the model's weights; for quantized weights, of their integers and scales.
        packed_weight_bytes: bytes of copies of weights in the order that kernels need: the copies that `pack_weights`
            makes, copies of int8 layers on the CPU, of the output head on CUDA, and of 4-bit weights of bitsandbytes
            that the model's first plain call would reorder.
        kernel: the attention kernel in use.
        linears: the code that multiplies linear layers: "torch", "onednn" (see `model/linear.py`) or "onednn, packed";
            with ", int8" if torch's kernels for int8 are used (see `model/int8.py`), and with ", padded head" if the
            head has a padded copy of its weight (see `model/padded.py`).

    """

    tokens_requested: int
    tokens_computed: int
    tokens_recomputed: int
    tokens_dropped: int
    tokens_fetched: int
    tokens_loaded: int
    tokens_reused: int
    forward_passes: int
    model_calls: int
    logit_rows: int
    steps_replayed: int
    steps_recorded: int
    steps_plain: int
    seconds: float
    bytes_held: int
    host_bytes_held: int
    result_bytes_held: int
    graph_bytes: int
    weight_bytes: int
    packed_weight_bytes: int
    kernel: str
    linears: str

    def __sub__(self, before: Stats) -> Stats:
        differences = {
            f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self) if f.name not in _NAMES
        }
        return replace(self, **differences)


def stats_of(counters: Counters, evaluator: Evaluator) -> Stats:
    """Return the work that was counted, and the bytes that an evaluator holds."""
    graphs = evaluator.executor.steps
    return Stats(
        tokens_requested=counters.tokens_requested,
        tokens_computed=counters.tokens_computed,
        tokens_recomputed=counters.tokens_recomputed,
        tokens_dropped=counters.tokens_dropped,
        tokens_fetched=counters.tokens_fetched,
        tokens_loaded=counters.tokens_loaded,
        tokens_reused=counters.tokens_requested - counters.tokens_computed,
        forward_passes=counters.forward_passes,
        model_calls=counters.model_calls,
        logit_rows=counters.logit_rows,
        steps_replayed=counters.steps["replayed"],
        steps_recorded=counters.steps["recorded"],
        steps_plain=counters.steps["plain"],
        seconds=counters.seconds,
        bytes_held=evaluator.memory.num_bytes,
        host_bytes_held=evaluator.host.num_bytes,
        result_bytes_held=evaluator.pools.num_bytes,
        graph_bytes=0 if graphs is None else graphs.num_bytes,
        weight_bytes=evaluator.executor.weight_bytes,
        packed_weight_bytes=evaluator.executor.linears.packed_bytes,
        kernel=evaluator.executor.kernel_name,
        linears=evaluator.executor.linears.name,
    )
