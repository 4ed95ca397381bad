"""Captured steps that are launched before their tokens are read: nothing but the order of the work differs."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

import test_captured
from test_captured import capture, captured, counts_of, stepping

from backprompt import LM, NonFiniteError, StaleRepresentationError, Text, generate
from backprompt.memory import growth
from backprompt.memory.blocks import States
from backprompt.memory.places import Places
from backprompt.model import graphs
from backprompt.model.recording import Output, Recording
from backprompt.model.weights import WeightsMonitor
from comparing import assert_close
from other_device import OtherDevice
from reference import plain_greedy, plain_token_logprobs
from tiny_models import FAMILIES
from waiting import all_at_once

__all__ = ["captured"]

ENDS = {"eos_token_id": list(range(0, 320, 9))}
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_new_tokens": 6, "seed": 3}
ACTIONS = ("nothing", "nothing", "evaluate", "clear", "pin", "unpin", "other", "longer", "split")
PROMPTS = ("The cat sat on", "A", "The cat sat and", "The dog")


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_step_is_launched_before_the_tokens_of_the_step_before_are_read(
    options: dict[str, Any], model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the last step has none behind it."""
    events: list[str] = []

    def noting(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
        recording = test_captured.record(compute, finish)

        def replay() -> None:
            events.append("launched")
            recording.replay()

        return replace(recording, replay=replay)

    class Noted(graphs.Arriving):
        def numbers(self) -> Any:
            events.append("read")
            return super().numbers()

    monkeypatch.setattr(graphs, "Arriving", Noted)
    monkeypatch.setattr(growth, "ROWS_AT_A_TIME", 64)  # a text without room moves first
    capture(monkeypatch, noting)
    lm, plain = (LM(model, tokenizer) for _ in range(2))
    plain.session.evaluator.executor.steps = None
    found, expected = (Text("The cat", one).generate(max_new_tokens=20, **options) for one in (lm, plain))
    assert found.completion_tokens == expected.completion_tokens
    assert_close(found.completion_logprobs, expected.completion_logprobs)
    del events[0]  # the comparison with the plain run
    counts = counts_of(lm)
    assert events == ["launched", *["launched", "read"] * counts["ahead"], "read"]
    assert counts["taken"] == counts["ahead"] == counts["replayed"] - 1
    assert lm.stats.tokens_dropped == 0


def act(action: str, lm: LM, run: Any, other: Any, pins: list[Any]) -> None:
    """Do something between two steps of a generation."""
    (first, *_), ids = run.results(), [text.tokens for (text,) in run.results()]
    if action == "evaluate":
        first[0].logits  # noqa: B018
    elif action == "clear":
        lm.clear()
    elif action == "pin":
        pins.append(first[0].pin())
    elif action == "unpin" and pins:
        pins.pop().release()
    elif action == "other":
        other.run.step()
    elif action == "longer":
        lm.evaluate([Text.from_tokens([*own, 5, 6], lm) for own in ids])
    elif action == "split":
        lm.evaluate([Text.from_tokens([*own[:-2], 7], lm) for own in ids if len(own) > 3])


def outcome(lm: LM, prompts: list[str], actions: list[str], options: dict[str, Any]) -> tuple[Any, ...]:
    """The texts of a generation with actions between its steps, and the work that it took."""
    stream = Text(prompts[0], lm).stream(max_new_tokens=24, **options)
    run = type(stream.run)(lm, [Text(prompt, lm) for prompt in prompts], stream.run.decoding)
    other = Text("The cat", lm).stream(max_new_tokens=24)
    pins: list[Any] = []
    is_going_on, left = True, list(actions)
    while is_going_on:
        is_going_on = run.step()
        act(left.pop() if left else "nothing", lm, run, other, pins)
    found = [text for (text,) in run.results()]
    more = [text for text in (*found, other.text) if text.tokens]
    lm.session.evaluator.executor.forget_graphs()
    gc.collect()  # the fakes of this machine keep blocks
    stats = lm.stats
    logprobs = torch.cat([text.token_logprobs.nan_to_num() for text in more])
    run.close(), other.run.close()
    return [text.tokens for text in more], logprobs, stats.tokens_computed, stats.bytes_held


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=5),
    actions=st.lists(st.sampled_from(ACTIONS), max_size=24),
    options=st.sampled_from([{}, ENDS, {"temperature": 0.8, "seed": 3}, SAMPLED | ENDS]),
    rows_at_a_time=st.sampled_from([3, 16]),
    budget=st.sampled_from([None, None, 60]),
)
@settings(max_examples=12, phases=[Phase.generate])
def test_nothing_but_the_order_of_the_work_differs(
    name: str,
    prompts: list[str],
    actions: list[str],
    options: dict[str, Any],
    rows_at_a_time: int,
    budget: int | None,
    tokenizer: Any,
) -> None:
    """Tokens, scores, computed tokens and held bytes are those of steps without graphs, whatever happens between."""
    with pytest.MonkeyPatch.context() as patch:
        capture(patch)
        patch.setattr(growth, "ROWS_AT_A_TIME", rows_at_a_time)
        model = FAMILIES[name]()
        memory = {} if budget is None else {"memory_bytes": budget * token_bytes(model, tokenizer)}
        lms = [LM(model, tokenizer, **memory) for _ in range(2)]
        lms[1].session.evaluator.executor.steps = None
        found, expected = (outcome(lm, prompts, actions, options) for lm in lms)
        assert found[0] == expected[0]
        assert_close(found[1], expected[1])
        assert budget is not None or found[2:] == expected[2:]  # with a budget, rows that the fakes keep count


def token_bytes(model: Any, tokenizer: Any) -> int:
    lm = LM(model, tokenizer)
    lm.evaluate([Text("A", lm)])
    return lm.session.evaluator.executor.token_bytes


@pytest.mark.usefixtures("captured")
def test_texts_that_end_leave_the_steps_of_the_others_ahead(model: Any, tokenizer: Any) -> None:
    """Also where the others go on with a smaller graph. The rows of ended texts are the only ones too many."""
    lm = LM(model, tokenizer)
    options = {"max_new_tokens": 30, "eos_token_id": list(range(0, 320, 5))}
    for num_texts in (8, 4, 2, 1):
        generate([Text(f"{number} cats sat", lm) for number in range(num_texts)], max_new_tokens=8)  # records graphs
    before, num_ahead = counts_of(lm), lm.stats.tokens_dropped
    found = generate([Text(f"{number} dogs sat on", lm) for number in range(8)], **options)
    lengths = [len(text.completion_tokens) for text in found]
    assert len(set(lengths)) > 2, "the texts end at different steps"
    for text, length in zip(found, lengths, strict=True):
        assert text.completion_tokens == plain_greedy(model, text.prompt.tokens, 30)[:length]
        assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))
    new = {name: count - before[name] for name, count in counts_of(lm).items()}
    assert new["eager"] <= 1
    assert new["ahead"] - new["taken"] <= 1 < new["taken"]  # the step behind the last text
    assert lm.stats.tokens_dropped - num_ahead <= len(found)


@pytest.mark.usefixtures("captured")
def test_greedy_and_sampled_texts_share_a_step(model: Any, tokenizer: Any) -> None:
    """Then the logits of the step serve both."""
    lm = LM(model, tokenizer)
    options = {"max_new_tokens": 16, "temperature": 0.9, "seed": 5}
    alone = Text("The cat", LM(model, tokenizer)).generate(**options).completion_tokens
    greedy, sampled = Text("The dog", lm).stream(max_new_tokens=16), Text("The cat", lm).stream(**options)
    for stream in (greedy, sampled):
        next(stream)
    all_at_once(lm, [lambda stream=stream: list(stream) for stream in (greedy, sampled)])
    assert sampled.text.completion_tokens == alone
    assert greedy.text.completion_tokens == plain_greedy(model, Text("The dog", lm).tokens, 16)
    assert 2 in lm.session.evaluator.executor.steps.graphs


# The look at the weights


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Looks at the weights as on a device: the host need not read their numbers. Notes who looks, "step" or "host"."""
    capture(monkeypatch)
    noted: list[str] = []
    has_changed = WeightsMonitor.has_changed

    def by_step(monitor: WeightsMonitor) -> torch.Tensor:
        noted.append("step")
        return torch.tensor(not has_changed(monitor))

    def by_host(monitor: WeightsMonitor) -> bool:
        noted.append("host")
        return has_changed(monitor)

    monkeypatch.setattr(WeightsMonitor, "look", by_step)
    monkeypatch.setattr(WeightsMonitor, "has_changed", by_host)
    return noted


def test_a_captured_step_looks_at_the_weights_itself(model: Any, tokenizer: Any, looks: list[str]) -> None:
    lm = LM(model, tokenizer)
    by_step: list[int] = []
    tokens = stepping(lm, 20, lambda num, run: by_step.append(looks.count("host")))
    assert tokens == plain_greedy(model, Text("The cat", lm).tokens, 20)
    assert by_step[-1] == by_step[-10] > 0
    assert looks.count("step") > 10


def test_a_look_is_computed_where_the_weights_are(model: Any) -> None:
    assert WeightsMonitor(model).look() is None, "numpy reads numbers on the CPU"
    with OtherDevice() as device:
        moved = device.moved(FAMILIES["gpt2"]())
        monitor = WeightsMonitor(moved)
        num_waits = sum(device.waits.values())
        found = [monitor.look()]
        moved.transformer.h[0].mlp.c_fc.weight.data.mul_(1.5)
        found.append(monitor.look())
        assert sum(device.waits.values()) == num_waits
        assert [bool(same) for same in found] == [True, False]


@pytest.mark.usefixtures("looks")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 1}], ids=str)
def test_numbers_that_change_unseen_by_the_host_end_a_generation(options: dict[str, Any], tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    stream = Text("The cat", lm).stream(max_new_tokens=30, **options)
    for _ in range(12):
        stream.run.step()
    assert counts_of(lm)["replayed"] > 6
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(StaleRepresentationError):
        take_two_steps(stream)
    after = Text("The cat", lm).generate(max_new_tokens=8).completion_tokens
    assert after == plain_greedy(model, Text("The cat", lm).tokens, 8)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 1}], ids=str)
def test_logits_of_a_graph_that_are_no_distribution(
    options: dict[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    for look in ("has_changed", "has_moved"):
        monkeypatch.setattr(WeightsMonitor, look, lambda self: False)
    stream = Text("The cat", lm).stream(max_new_tokens=30, **options)
    for _ in range(12):
        stream.run.step()
    model.lm_head.weight.data[7] = math.nan
    with pytest.raises(NonFiniteError):
        take_two_steps(stream)


def take_two_steps(stream: Any) -> None:
    """The first one may be computed already, by the weights of before."""
    stream.run.step(), stream.run.step()


@pytest.mark.usefixtures("captured")
def test_a_step_with_other_tokens_is_not_taken(model: Any, tokenizer: Any) -> None:
    lm = LM(model, tokenizer)
    stream = Text("The cat", lm).stream(max_new_tokens=30)
    for _ in range(8):
        stream.run.step()
    evaluator = lm.session.evaluator
    launched, captured_steps = evaluator.forest.next_step.launched, evaluator.executor.steps
    expected = plain_greedy(model, Text("The cat", lm).tokens, 30)[7]
    assert not captured_steps.take(launched, [expected + 1])
    assert captured_steps.take(launched, [expected])
    ((_, states),) = launched.step.places.blocks
    states.keep([slice(0, 3)])
    assert not captured_steps.take(launched, [expected]), "its hidden states went to a tensor that is gone"


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("num_samples", [1, 4])
def test_new_spans_take_the_rows_of_a_graph_that_exists(num_samples: int, model: Any, tokenizer: Any) -> None:
    """Of the first token behind a prompt, and of samples that part."""
    options = {"max_new_tokens": 12, "temperature": 0.5, "seed": 4, "n": num_samples}
    lms = [LM(model, tokenizer) for _ in range(2)]
    lms[1].session.evaluator.executor.steps = None
    for lm in lms:
        for prompt in (*PROMPTS, *PROMPTS):
            generate(Text(prompt, lm), **options)  # records graphs
    before = counts_of(lms[0])
    found, expected = (generate([Text("Hello, the cat", lm)], **options)[0] for lm in lms)
    assert lms[0].stats.tokens_computed == lms[1].stats.tokens_computed
    for text, other in zip(found, expected, strict=True):
        assert text.tokens == other.tokens
        assert_close(text.completion_logprobs, other.completion_logprobs)
        assert_close(text.token_logprobs, plain_token_logprobs(model, text.tokens))
    assert counts_of(lms[0])["eager"] == before["eager"]


# What a reader found


def record_as_cuda(compute: Callable[[], Output], finish: Callable[[Output], None]) -> Recording:
    """The order of `CudaRecorder`: a run that is checked for waits follows one that is finished."""
    plain = compute()
    finish(plain)
    compute()
    return replace(test_captured.record(compute, finish), plain=plain)


def test_a_head_that_scores_more_tokens_than_there_are_embeddings(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a token may be the most probable one, and a graph must not embed it."""
    model = FAMILIES["llama"]()
    size, hidden = model.lm_head.weight.shape
    head = torch.nn.Linear(hidden, size + 8)
    head.weight.data[:size] = model.lm_head.weight.data
    head.bias.data[:size], head.bias.data[size:] = 0.0, 100.0
    model.lm_head = head
    capture(monkeypatch, record_as_cuda)
    lms = [LM(model, tokenizer) for _ in range(2)]
    lms[1].session.evaluator.executor.steps = None
    for options in ({}, SAMPLED):
        found, expected = (
            generate([Text(prompt, lm) for prompt in PROMPTS[:3]], max_new_tokens=12, **options) for lm in lms
        )
        assert [text.tokens for text in found] == [text.tokens for text in expected]
    assert lms[0].session.evaluator.executor.steps.refusal is None
    assert counts_of(lms[0])["replayed"] > 10


@pytest.mark.usefixtures("captured")
def test_graphs_give_their_memory_back_though_a_step_is_launched(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM(model, tokenizer)
    stream = Text("The cat", lm).stream(max_new_tokens=40)
    for _ in range(10):
        stream.run.step()
    executor = lm.session.evaluator.executor
    (graph,) = executor.steps.graphs.values()
    run = executor.run

    def short_of_memory(*args: Any, **options: Any) -> Any:
        if not graph.is_released:
            raise torch.OutOfMemoryError
        return run(*args, **options)

    monkeypatch.setattr(executor, "run", short_of_memory)
    lm.evaluate([Text("Hello", lm)])
    list(stream)
    assert stream.text.completion_tokens == plain_greedy(model, Text("The cat", lm).tokens, 40)


@pytest.mark.usefixtures("captured")
def test_generations_in_turn_are_not_launched_ahead(model: Any, tokenizer: Any) -> None:
    """Each would push the other's step aside."""
    lm = LM(model, tokenizer)
    streams = [Text(prompt, lm).stream(max_new_tokens=30) for prompt in ("The cat", "A dog")]
    for _ in range(20):
        for stream in streams:
            stream.run.step()
    assert lm.stats.tokens_dropped == 0
    assert counts_of(lm)["replayed"] > 20
    for stream in streams:
        list(stream)
        assert stream.text.completion_tokens == plain_greedy(model, stream.text.prompt.tokens, 30)
    assert counts_of(lm)["taken"] > 0


def test_places_of_ended_texts_keep_no_blocks() -> None:
    blocks = [(test_captured.keys_values(12, seed), States.of(torch.zeros(12, 4))) for seed in range(3)]
    places = Places(blocks, np.array([0, 1, 2, 2]), np.array([3, 5, 7, 9]))
    found = places.next_rows([0, 3])
    assert found.blocks == [blocks[0], blocks[2]]
    assert (found.block_idx.tolist(), found.target_rows.tolist()) == ([0, 1], [4, 10])
