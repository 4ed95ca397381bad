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
        tokens_requested: sum of the texts' tokens over all evaluations; reading a result of a held text adds none.
        tokens_computed: tokens forwarded through the model.
        tokens_recomputed: the computed tokens that had been forwarded before: dropped over the budget, or rows of
            attention maps.
        tokens_fetched: tokens whose states, or keys and values, moved back from the second pool to the device.
        tokens_loaded: tokens whose states came from the store.
        tokens_reused: requested minus forwarded tokens: cached, shared, or scored without being forwarded.
        forward_passes: forward passes.
        model_calls: calls of the model's body: one a packed pass, several a pass by levels.
        logit_rows: rows of logits computed by the output head.
        steps_replayed: steps of generations that a CUDA graph computed, as it was recorded in an earlier step.
        steps_recorded: steps of generations in which a CUDA graph was recorded.
        steps_plain: steps of generations without a CUDA graph, of texts that grow in place: all of them on the CPU.
        seconds: time in forward passes and in the output head.
        bytes_held: keys, values, hidden states and log-probabilities held now on the device.
        host_bytes_held: the same results, held now in the second pool, in host memory.
        result_bytes_held: rows of logits, attention maps, and log-probabilities of tokens that were scored and not
            forwarded, held now in bounded pools of their own.
        graph_bytes: the memory of CUDA graphs, in addition to `memory_bytes`: at most a 16th of the memory that was
            free when the `LM` was made. `lm.clear()` frees it, and so does a pass that is short of memory.
        weight_bytes: the weights of the model as they are held; of quantized ones the integers and scales.
        packed_weight_bytes: copies of weights in the order that kernels need: the copies that `pack_weights` makes,
            copies of int8 layers on the CPU, of the output head on CUDA, and of 4-bit weights of bitsandbytes that the
            model's first plain call would reorder.
        kernel: the attention kernel in use.
        linears: the code that multiplies linear layers: "torch", "onednn" (see `model/linear.py`) or "onednn, packed";
            ", int8" is added where torch's kernels for int8 serve (see `model/int8.py`), and ", padded head" where the
            head has a padded copy of its weight (see `model/padded.py`).

    """

    tokens_requested: int
    tokens_computed: int
    tokens_recomputed: int
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
