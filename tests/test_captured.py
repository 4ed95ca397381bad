"""Captured steps of generations give the tokens of plain ones; on the CPU a function does again what is recorded."""

import ctypes
import gc
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

import devices
from backprompt import LM, NonFiniteError, Text, generate
from backprompt.attention.base import CannotStandError
from backprompt.attention.calls import CallsAttention, PreparedCalls
from backprompt.attention.shapes import Launch
from backprompt.attention.tiles import Tile
from backprompt.attention.triton import TritonAttention
from backprompt.forest.plan import Pass
from backprompt.forest.span import Span
from backprompt.forest.steps import later
from backprompt.memory import growth
from backprompt.memory.blocks import KeysValues, States
from backprompt.memory.places import Places
from backprompt.memory.placing import place
from backprompt.model import executor, graphs, steps
from backprompt.model.recording import CudaRecorder, NoWaits, Output, Recording
from backprompt.model.steps import CapturedSteps
from backprompt.model.steps import tensors_of as tensors_of_model
from backprompt.model.weights import WeightsMonitor
from comparing import assert_close
from reference import plain_greedy, plain_token_logprobs
from tiny_models import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKWARDS = torch.tensor([3, 2, 1, 0])
LAUNCH = Launch(Tile(rows=16, keys=64, warps=4, stages=2), 1, 1000)


def record(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
    """What a CUDA graph does: the tensors of the first output are filled anew."""
    plain = compute()
    finish(plain)
    output = compute()

    def replay() -> None:
        new = compute()
        for old, tensor in zip(tensors_of(output), tensors_of(new), strict=True):
            old.copy_(tensor)
        finish(output)

    return Recording(plain, output, replay)


def tensors_of(output: Output) -> list[torch.Tensor]:
    logits = [] if output.logits is None else [output.logits]
    return [output.hidden, output.is_finite, output.report, *logits, *output.keys_values.in_order()]


class CallsThatStand(CallsAttention):
    """The calls of each step, for as many rows as the step has: the interpreter of kernels is slow."""

    has_room = True

    def prepare(self, pass_: Any, num_steps: int = 1) -> "PreparedForSome":
        return PreparedForSome(self, pass_, num_steps)

    def standing(self, num_rows: int) -> Any:
        return StandingCalls(num_rows)


class PreparedForSome(PreparedCalls):
    def of_next_step(self) -> "PreparedForSome":
        pass_ = later(self._pass, self._num_done + 1)
        spans = tuple(Span((0,), span.position + 1, None) for span in pass_.spans)
        return PreparedForSome(self._attention, Pass(spans, pass_.segments))

    def attend(self, layer_idx: int, query: Any, key: Any, value: Any, scoring: Any) -> torch.Tensor:
        num_live = self._pass.num_tokens
        rows = (tensor[:, :num_live] for tensor in (query, key, value))
        output = super().attend(layer_idx, *rows, scoring)
        return torch.cat([output, torch.full_like(output[:1], 7.0).repeat(query.shape[1] - num_live, 1, 1)])


class StandingCalls:
    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.num_bytes = 100 * num_rows
        self.prepared: Any = None

    def load(self, prepared: Any) -> bool:
        self.prepared = prepared
        return CallsThatStand.has_room

    def load_next(self, prepared: Any) -> bool:
        return self.load(prepared.of_next_step())

    def attend(self, layer_idx: int, query: torch.Tensor, *args: Any) -> torch.Tensor:
        assert query.shape[1] == self.num_rows
        return self.prepared.attend(layer_idx, query, *args)


def place_by_hand(like: Any, is_finite: Any, sources: Any, targets: Any, rows: Any) -> None:
    """What the kernel does with numbers that are finite."""
    targets = targets.view(-1, len(sources), 2)
    for row, (block, target_row) in enumerate(rows.T.tolist()):
        for (source, stride, num_heads, size), (target, target_stride) in zip(
            sources.tolist(), targets[block].tolist(), strict=True
        ):
            for head in range(num_heads if block >= 0 else 0):
                to, start = target + 4 * (head * target_stride + target_row * size), head * stride + row * size
                ctypes.memmove(to, source + 4 * start, 4 * size)


def capture(
    patch: pytest.MonkeyPatch,
    record: Any = record,
    attention: Callable[[], Any] = CallsThatStand,
    place: Any = place_by_hand,
    max_bytes: float = math.inf,
) -> None:
    """Let models capture the steps of generations on the CPU."""
    if devices.DEVICE.type != "cpu":
        pytest.skip("what is captured is done again by hand, on the CPU")

    def captured(body: torch.nn.Module, head: torch.nn.Module, attention: Any) -> CapturedSteps:
        return CapturedSteps(attention, tensors_of_model(body, head), record, place, max_bytes=max_bytes)

    patch.setattr(executor, "attention_for", lambda device: attention())
    patch.setattr(executor, "captured_steps", captured)
    patch.setattr(steps, "STEPS_BEFORE_RECORDING", 1)


def counts_of(lm: LM) -> dict[str, int]:
    return dict(lm.session.evaluator.executor.steps.counts)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch)


def texts_of(lm: LM) -> list[Text]:
    """Texts of several lengths, three for a bucket of four rows."""
    return [Text(prompt, lm) for prompt in ("The cat sat on", "A", "The cat sat and")]


def check_captured(model: Any, tokenizer: Any, num_tokens: int, left: int) -> None:
    """Tokens are those of the plain call, and what steps leave is what evaluating leaves."""
    lm = LM(model, tokenizer)
    found = generate(texts_of(lm), max_new_tokens=num_tokens)
    counts = counts_of(lm)
    assert counts["recorded"] == 1 + left
    assert counts.get("left", 0) == left
    assert counts["replayed"] >= num_tokens - 3 - 2 * left
    for text in found:
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, num_tokens)
        assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))


def test_captured_steps_with_the_kernels(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch, attention=lambda: TritonAttention(LAUNCH, device_types={"cpu"}), place=place)
    check_captured(model, tokenizer, 5, 0)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize(("name", "left"), [("gpt2", 0), ("llama", 0), ("gemma2", 0), ("mistral_sliding", 1)])
def test_captured_steps_give_the_tokens_of_plain_ones(name: str, left: int, tokenizer: Any) -> None:
    """A window that begins to hide keys leaves the graph."""
    check_captured(FAMILIES[name](), tokenizer, 40, left)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("max_blocks", [8, 1])
def test_texts_that_leave_and_move(
    max_blocks: int, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples end at different steps, so buckets change; texts outgrow their room, and move to other buffers."""
    monkeypatch.setattr(graphs, "MAX_BLOCKS", max_blocks)
    monkeypatch.setattr(growth, "ROWS_AT_A_TIME", 3)
    lms = [LM(model, tokenizer) for _ in range(2)]
    lms[1].session.evaluator.executor.steps = None
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": 3, "eos_token_id": list(range(0, 320, 17))}
    found, expected = ([text.tokens for text in generate(texts_of(lm) * 2, **options)] for lm in lms)
    assert found == expected
    assert len({len(tokens) for tokens in found}) > 3
    counts = counts_of(lms[0])
    assert counts["recorded"] > 1
    assert "left" not in counts  # an address that changes is a matter of tables


def stepping(lm: LM, num_tokens: int, between: Callable[[int, Any], None] = lambda num, run: None) -> tuple[int, ...]:
    """The tokens of one text; `between` is called before each step."""
    stream = Text("The cat", lm).stream(max_new_tokens=num_tokens)
    is_going_on, num = True, 0
    while is_going_on:
        between(num, stream.run)
        is_going_on = stream.run.step()
        num += 1
    return stream.run.results()[0][0].completion_tokens


@pytest.mark.usefixtures("captured")
def test_no_way_through_the_model_keeps_gradients(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes, captured steps and attention maps; the caller has gradients on."""
    ways: set[bool] = set()
    attend = executor.Executor.attend

    def watched(self: Any, *given: Any, **options: Any) -> Any:
        ways.add(torch.is_inference_mode_enabled())
        assert not torch.is_grad_enabled()
        return attend(self, *given, **options)

    monkeypatch.setattr(executor.Executor, "attend", watched)
    lm = LM(model, tokenizer)
    stepping(lm, 12)
    assert counts_of(lm)["replayed"]
    assert not Text("The cat sat", lm).model_repr.attention().requires_grad
    assert ways == {True, False}


@pytest.mark.usefixtures("captured")
def test_weights_that_lie_elsewhere_leave_the_graph(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else notices, as with a copy of the same numbers that is made between two looks."""
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    for look in ("has_changed", "has_moved"):
        monkeypatch.setattr(WeightsMonitor, look, lambda self: False)
    weight = model.transformer.h[0].mlp.c_fc.weight

    def between(num: int, run: Any) -> None:
        if num == 5:
            weight.data = weight.data.clone()

    tokens = stepping(lm, 12, between)
    assert counts_of(lm)["left"] == 1
    assert counts_of(lm)["recorded"] == 2
    assert tokens == plain_greedy(model, Text("The cat", lm).tokens, 12)


@pytest.mark.usefixtures("captured")
def test_changed_weights_are_seen(tokenizer: Any) -> None:
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    before = stepping(lm, 12)
    model.transformer.h[0].mlp.c_fc.weight.data *= 3.0
    assert stepping(lm, 12) == plain_greedy(model, Text("The cat", lm).tokens, 12) != before
    assert counts_of(lm)["replayed"] > 5


@pytest.mark.usefixtures("captured")
def test_a_step_without_room_leaves_the_graph(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(model, tokenizer)

    def between(num: int, run: Any) -> None:
        monkeypatch.setattr(CallsThatStand, "has_room", num not in (6, 7))  # ahead, and then

    assert stepping(lm, 12, between) == plain_greedy(model, Text("The cat", lm).tokens, 12)
    assert counts_of(lm)["left"] == 1
    assert counts_of(lm)["recorded"] == 2


@pytest.mark.usefixtures("captured")
def test_other_work_between_steps(model: Any, tokenizer: Any) -> None:
    """Another text is evaluated, everything is dropped, and a text splits the prompt."""
    lm = LM(model, tokenizer)

    def between(num: int, run: Any) -> None:
        if num == 3:
            lm.evaluate([Text("The cat sat", lm)])
        if num == 7:
            lm.clear()
        if num == 12:
            lm.evaluate([Text("The", lm) + " dog"])

    assert stepping(lm, 20, between) == plain_greedy(model, Text("The cat", lm).tokens, 20)
    assert counts_of(lm)["replayed"] >= 8


@pytest.mark.parametrize("why", ["cannot be recorded", "other numbers", "calls"])
def test_a_model_that_cannot_be_recorded_takes_plain_steps(
    why: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        if why == "cannot be recorded":
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        recording = record(compute, finish)

        def replay() -> None:
            recording.replay()
            recording.output.hidden.add_(1.0)

        return Recording(recording.plain, recording.output, replay)

    capture(monkeypatch, failing, CallsAttention if why == "calls" else CallsThatStand)
    lm = LM(model, tokenizer)
    with caplog.at_level("INFO", logger="backprompt.model.steps"):
        assert stepping(lm, 12) == plain_greedy(model, Text("The cat", lm).tokens, 12)
    captured = lm.session.evaluator.executor.steps
    reasons = {"cannot be recorded": "operation not permitted", "other numbers": "a replay was off", "calls": "calls"}
    assert reasons[why] in captured.refusal
    assert captured.counts["eager"] > 8
    assert not captured.counts["replayed"]
    assert [record.getMessage() for record in caplog.records] == [f"Steps are not captured: {captured.refusal}."]


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_no_step(value: float, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding of the token that comes next is spoiled, unseen."""
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    for look in ("has_changed", "has_moved"):
        monkeypatch.setattr(WeightsMonitor, look, lambda self: False)

    def between(num: int, run: Any) -> None:
        if num == 6:
            model.transformer.wte.weight.data[run.found()[0][0].choices[-1].token_id] = value

    with pytest.raises(NonFiniteError):
        stepping(lm, 12, between)
    counts = counts_of(lm)
    assert counts["replayed"] > 2
    num_steps = counts["replayed"] + counts["eager"] - 1  # without the last one
    assert lm.stats.tokens_computed == num_steps + len(Text("The cat", lm).tokens)


# The places


def test_rows_go_to_their_places_in_one_launch() -> None:
    """Rows of two blocks, one that goes nowhere, and one that is not finite."""
    blocks = [(keys_values(20, seed), States.of(numbers(20, 8, seed))) for seed in (1, 2)]
    expected = [(block.copied([slice(0, 20)]), states.copied([slice(0, 20)])) for block, states in blocks]
    new, hidden = keys_values(5, 3), numbers(5, 8, 3)
    for tensor in new.in_order():
        tensor[:, 4, 1:] = math.nan
    places = Places(blocks, np.array([0, 1, -1, 0, 1]), np.array([3, 19, 0, 4, 0]))
    output = Output(hidden, new, torch.ones((), dtype=torch.int32, device=DEVICE), None, None, torch.ones(2, 5))
    rows = np.stack([places.block_idx, places.target_rows])
    tables = [torch.from_numpy(table).to(DEVICE) for table in (output.sources(), places.addresses().ravel(), rows)]
    place(hidden, output.is_finite, *tables)
    assert output.is_finite.item() == 0
    for block, row, target in ((0, 0, 3), (1, 1, 19), (0, 3, 4), (1, 4, 0)):
        own, states = expected[block]
        for old, tensor in zip(own.in_order(), new.in_order(), strict=True):
            old[:, target] = tensor[:, row].nan_to_num(0.0)
        states.hidden[target] = hidden[row]
    for (own, states), (found, found_states) in zip(expected, blocks, strict=True):
        assert all(map(torch.equal, own.in_order(), found.in_order()))
        assert torch.equal(states.hidden, found_states.hidden)
    place(hidden, is_finite := torch.ones((), dtype=torch.int32, device=DEVICE), *tables[:2], tables[2][:, :4])
    assert is_finite.item() == 1


def numbers(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def keys_values(rows: int, seed: int) -> KeysValues:
    """Two layers of two heads, whose rows have more numbers than a program copies at once."""
    tensors = [numbers(2 * rows, 700, 10 * seed + idx).view(2, rows, 700) for idx in range(4)]
    return KeysValues.of(tensors[::2], tensors[1::2])


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_sliding", "gemma2", "qwen3"])
def test_graphs_give_the_tokens_of_plain_steps(name: str, tokenizer: Any) -> None:
    model = FAMILIES[name]().cuda()
    lm = LM(model, tokenizer)
    found = generate(texts_of(lm), max_new_tokens=30)
    assert lm.session.evaluator.executor.steps.refusal is None
    assert counts_of(lm)["replayed"] > 15
    assert counts_of(lm)["taken"] > 10
    for text in found:
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 30)


@pytest.mark.cuda
def test_a_captured_step_allocates_nothing_in_the_model(model: Any, tokenizer: Any) -> None:
    lm = LM(FAMILIES["gpt2"]().cuda(), tokenizer)
    stream = Text("The cat", lm).stream(max_new_tokens=40)
    for _ in range(12):
        stream.run.step()
    captured = lm.session.evaluator.executor.steps
    assert captured.counts["replayed"] > 3
    replay = next(iter(captured.graphs.values())).recording.replay
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    replay()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_table_of_sources_lives_as_long_as_its_graph(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph keeps addresses, and no tensors."""
    sources = []

    def noted(like: Any, is_finite: Any, *tables: Any) -> None:
        sources.append(weakref.ref(tables[0]))
        place_by_hand(like, is_finite, *tables)

    def record_addresses(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        recording = record(compute, finish)
        return Recording(recording.plain, recording.plain, lambda: None)

    capture(monkeypatch, record_addresses, place=noted)
    lm = LM(model, tokenizer)
    generate(texts_of(lm), max_new_tokens=6)
    gc.collect()
    assert counts_of(lm)["recorded"] == 1
    assert sources[-1]() is not None


@pytest.mark.parametrize(
    ("work", "is_refused"),
    [
        (lambda numbers: numbers.sum().item(), True),
        (lambda numbers: numbers.nonzero(), True),
        (lambda numbers: numbers[numbers > 1], True),
        (lambda numbers: torch.where(numbers > 1), True),
        (lambda numbers: numbers.to("meta"), True),
        (lambda numbers: numbers[BACKWARDS.to("meta")], True),
        (lambda numbers: torch.tensor([1.0], device="cpu") + numbers, True),
        (lambda numbers: numbers[BACKWARDS].to(torch.float64) + 1, False),
    ],
)
def test_work_that_waits_is_refused_before_it_is_recorded(work: Callable[..., Any], is_refused: bool) -> None:
    numbers = torch.arange(4.0)
    with pytest.raises(CannotStandError) if is_refused else nullcontext(), NoWaits("cpu"):
        work(numbers)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("what", ["memory", "numbers"])
def test_what_says_nothing_about_graphs_leaves_them_on(
    what: str, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt fails, and a later one succeeds."""
    attempts = []

    def failing(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        attempts.append(what)
        if len(attempts) > 1:
            return record(compute, finish)
        if what == "memory":
            raise torch.OutOfMemoryError
        recording = record(compute, finish)
        recording.plain.is_finite.zero_()
        return recording

    capture(monkeypatch, failing)
    lm = LM(model, tokenizer)
    generate(texts_of(lm), max_new_tokens=16)
    assert len(attempts) == 2
    assert counts_of(lm)["recorded"] == 1


# Counts and memory


def record_taking(num_bytes: int) -> Any:
    """Records, and says how much memory that took."""
    return lambda compute, finish: replace(record(compute, finish), num_bytes=num_bytes)


def test_stats_count_steps_and_the_memory_of_graphs(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(monkeypatch, record_taking(10_000))
    lm = LM(model, tokenizer)
    assert lm.stats.graph_bytes == 0
    stepping(lm, 12)
    stats, counts = lm.stats, counts_of(lm)
    assert (stats.steps_recorded, stats.steps_plain) == (1, counts["eager"])
    assert stats.steps_replayed == counts["replayed"] - 1 > 5
    (graph,) = lm.session.evaluator.executor.steps.graphs.values()
    assert stats.graph_bytes == 10_000 + graph.num_bytes
    assert graph.num_bytes > 100
    assert graph.recording.plain is None  # whose rows would be held for nothing
    lm.clear()
    after = lm.stats
    assert after.graph_bytes == 0
    assert (after - stats).steps_replayed == 0
    assert stepping(lm, 12) == plain_greedy(model, Text("The cat", lm).tokens, 12)
    assert (lm.stats - after).steps_recorded == 1


def test_steps_without_graphs_are_counted(model: Any, tokenizer: Any) -> None:
    lm = LM(model, tokenizer)
    stepping(lm, 12)
    assert lm.stats.steps_plain > 5
    assert (lm.stats.steps_replayed, lm.stats.steps_recorded, lm.stats.graph_bytes) == (0, 0, 0)


def test_graphs_that_take_too_much_memory_are_left(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of four rows take more than there is; a step of one row fits."""

    def taking(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        recording = record(compute, finish)
        return replace(recording, num_bytes=10_000 * len(recording.output.hidden))

    capture(monkeypatch, taking, max_bytes=25_000)
    lm = LM(model, tokenizer)
    captured = lm.session.evaluator.executor.steps
    with caplog.at_level("INFO", logger="backprompt.model.steps"):
        for _ in range(2):
            for text in generate(texts_of(lm), max_new_tokens=12):
                assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 12)
    assert "Steps of 4 rows are not captured: with them graphs would take" in caplog.text
    assert captured.counts["recorded"] == 1
    assert (captured.graphs, captured.num_bytes) == ({}, 0)
    assert stepping(lm, 12) == plain_greedy(model, Text("The cat", lm).tokens, 12)
    assert list(captured.graphs) == [1]
    assert 10_000 < captured.num_bytes < 25_000


@pytest.mark.usefixtures("captured")
def test_graphs_make_room_for_a_pass(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = LM(model, tokenizer)
    stepping(lm, 12)
    executor = lm.session.evaluator.executor
    run, calls = executor.run, []

    def short_of_memory(*args: Any, **options: Any) -> Any:
        calls.append(bool(executor.steps.graphs))
        if executor.steps.graphs or len(calls) > 2:
            raise torch.OutOfMemoryError
        return run(*args, **options)

    monkeypatch.setattr(executor, "run", short_of_memory)
    text = Text("Hello", lm)
    assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))
    assert calls == [True, False]
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to free
        lm.evaluate([Text("Another", lm)])
    assert calls == [True, False, False]


class FakeGraph:
    """As torch has it: a pool lives as long as a graph in it, and is of no more use afterwards."""

    pools: ClassVar[dict[int, int]] = {}
    reserved = 0

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert self.pools.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        self.pools[pool] = self.pools.get(pool, 0) + 1
        weakref.finalize(self, self.release, pool)

    def capture_end(self) -> None:
        FakeGraph.reserved += 1000

    def replay(self) -> None:
        pass

    @classmethod
    def release(cls, pool: int) -> None:
        cls.pools[pool] -= 1


def test_a_pool_is_of_no_more_use_when_its_graphs_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter(range(1, 100))
    cuda = SimpleNamespace(
        Stream=lambda device: SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None),
        CUDAGraph=FakeGraph,
        current_stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        device=lambda device: nullcontext(),
        graph_pool_handle=lambda: next(handles),
        memory_reserved=lambda: FakeGraph.reserved,
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(FakeGraph, "pools", {})
    recorder = CudaRecorder(torch.device("cpu"))
    output = Output(torch.zeros(1), keys_values(1, 1), torch.ones(()), None, None, torch.ones(2, 1))
    first, second = (recorder(lambda: output, lambda _: None) for _ in range(2))
    assert FakeGraph.pools == {1: 2}
    assert first.num_bytes == second.num_bytes == 1000
    del first
    gc.collect()
    third = recorder(lambda: output, lambda _: None)
    assert FakeGraph.pools == {1: 2}
    del second, third
    gc.collect()
    assert FakeGraph.pools == {1: 0}
    recorder(lambda: output, lambda _: None)
    assert set(FakeGraph.pools) == {1, 2}


@pytest.mark.cuda
def test_graphs_are_recorded_again_after_all_are_gone(tokenizer: Any) -> None:
    model = FAMILIES["gpt2"]().cuda()
    lm = LM(model, tokenizer)
    for num in range(1, 4):
        assert stepping(lm, 12) == plain_greedy(model, Text("The cat", lm).tokens, 12)
        assert lm.session.evaluator.executor.steps.refusal is None
        assert lm.stats.steps_recorded == num
        assert lm.stats.graph_bytes > 0
        lm.clear()
        assert lm.stats.graph_bytes == 0


@pytest.mark.cuda
def test_the_memory_of_graphs_is_counted(tokenizer: Any) -> None:
    """What a graph takes is what torch reserves when it is recorded, and gives back when it is left."""
    lm = LM(FAMILIES["llama"]().cuda(), tokenizer)
    stepping(lm, 12)
    num_bytes = lm.stats.graph_bytes
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    lm.session.evaluator.executor.forget_graphs()
    gc.collect()
    torch.cuda.empty_cache()
    assert 0 < before - torch.cuda.memory_reserved() <= num_bytes + (2 << 20)
