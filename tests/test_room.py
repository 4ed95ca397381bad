"""Generations that run at the same time hold no more together than the budget, and all of them end."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, Text, evaluate, generate
from backprompt.generation import run
from backprompt.generation.decoding import Decoding
from backprompt.generation.stops import StopStrings
from backprompt.session import room
from backprompt.store import DiskStore
from reference import plain_greedy
from threads import within
from tiny_models import build
from tiny_tokenizers import byte_level_bpe
from waiting import all_at_once, wait_until

TOKEN_BYTES = 646
NEW = 24


@pytest.fixture(scope="module")
def model():
    return build("gpt2")


class Watched:
    """An `LM` with a budget in tokens, and the largest number of tokens that generations held after a step."""

    def __init__(self, model, num_tokens):
        self.lm = LM(model, byte_level_bpe(), memory_bytes=num_tokens * TOKEN_BYTES)
        self.peak = 0

    def note(self):
        with self.lm.session.exclusive():
            evaluator = self.lm.session.evaluator
            self.peak = max(self.peak, evaluator.num_bytes_to_hold(evaluator.holders.ends()) // TOKEN_BYTES)


@pytest.fixture
def watched(model, monkeypatch):
    """Return a function that makes a watched `LM`."""
    made, decide = [], run.Run.decide

    def noting(self, found):
        goes_on = decide(self, found)
        for one in made:
            if one.lm is self.lm:
                one.note()
        return goes_on

    monkeypatch.setattr(run.Run, "decide", noting)

    def make(num_tokens):
        made.append(Watched(model, num_tokens))
        return made[-1]

    return make


def prompts_for(lm, num, beginning="The cat sat on mat"):
    return [Text(f"{beginning} {idx}", lm) for idx in range(num)]


def step_in_thread(stream):
    thread = threading.Thread(target=stream.run.step)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def let_go(monkeypatch):
    """The runs that let their texts go."""
    runs, plain = [], run.Run.let_go

    def noting(self):
        runs.append(self)
        plain(self)

    monkeypatch.setattr(run.Run, "let_go", noting)
    return runs


def size_of(text):
    return len(text.tokens) + NEW


def test_generations_of_threads_wait_for_room(watched, model, monkeypatch, let_go):
    """None lets its texts go: each goes on to its end. Room that is left wakes those that wait."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 60)
    monkeypatch.setattr(room, "MAX_SECONDS_TO_WAIT", 60)
    seen = watched(100)
    prompts = prompts_for(seen.lm, 12)
    assert sum(map(size_of, prompts)) > 300
    found = all_at_once(seen.lm, [lambda own=own: own.generate(max_new_tokens=NEW) for own in prompts])
    for own, prompt in zip(found, prompts, strict=True):
        assert own.completion_tokens == plain_greedy(model, prompt.tokens, NEW)
    assert size_of(prompts[0]) < seen.peak <= 100
    assert not let_go
    assert seen.lm.stats.bytes_held <= 100 * TOKEN_BYTES


def test_texts_of_several_calls_begin_when_there_is_room(watched, model):
    seen = watched(70)
    calls = [prompts_for(seen.lm, 6, beginning) for beginning in ("The cat sat on", "A dog", "Who sat on")]
    found = all_at_once(seen.lm, [lambda own=own: generate(own, max_new_tokens=NEW) for own in calls])
    for texts, prompts in zip(found, calls, strict=True):
        for text, prompt in zip(texts, prompts, strict=True):
            assert text.completion_tokens == plain_greedy(model, prompt.tokens, NEW)
    assert seen.peak <= 70


def test_texts_begin_where_another_generation_has_ended(watched):
    """Not only where one of their own call is finished."""
    seen = watched(100)
    other = Text("The cat sat on", seen.lm).stream(max_new_tokens=60)
    other.run.step()
    stops = StopStrings(None, seen.lm.tokenizer)
    decoding = Decoding(seen.lm.session.causal_lm, seen.lm.tokenizer, max_new_tokens=20, stops=stops, seed=0, given={})
    several = run.Run(seen.lm, prompts_for(seen.lm, 3, "A"), decoding)
    several.step()
    assert len(several.live) == 1
    other.close()
    several.step()
    assert len(several.live) > 1
    several.close()


def test_common_beginnings_count_once(watched, let_go):
    """Counted apart, the prompts would take more than the budget."""
    beginning = "The cat sat on the mat. " * 5
    num_common = len(byte_level_bpe().encode(beginning))
    seen = watched(num_common + 8 * (NEW + 6))
    prompts = prompts_for(seen.lm, 8, beginning)
    streams = [prompt.stream(max_new_tokens=NEW) for prompt in prompts]
    for _ in range(NEW):
        for stream in streams:
            stream.run.step()
    assert not let_go
    assert sum(map(size_of, prompts)) > num_common + 8 * (NEW + 6) >= seen.peak > num_common + 8 * (NEW - 2)


def test_streams_that_nobody_reads_give_their_room_up(watched, model):
    seen = watched(70)
    streams = [prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(seen.lm, 5)]
    for stream in streams:
        step_in_thread(stream)
    prompts = prompts_for(seen.lm, 3, "A dog")
    found = all_at_once(seen.lm, [lambda own=own: own.generate(max_new_tokens=NEW) for own in prompts])
    for own, prompt in zip(found, prompts, strict=True):
        assert own.completion_tokens == plain_greedy(model, prompt.tokens, NEW)
    for stream in streams:
        list(stream)
        assert stream.text.completion_tokens == plain_greedy(model, stream.text.prompt.tokens, NEW)
    assert seen.peak <= 70
    assert not seen.lm.session.evaluator.holders.ends()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "seed": 3, "n": 2},
    ],
    ids=str,
)
def test_any_way_of_generating_goes_on_where_it_let_go(watched, model, options):
    """The run lets go of its texts, and others take the room, before each step."""
    alone = LM(model, byte_level_bpe())
    expected = generate(prompts_for(alone, 2), max_new_tokens=8, **options)
    seen = watched(60)
    step = run.Run.step
    others = iter(range(1000))

    def letting_go(self):
        with self.lm.session.exclusive():
            self.let_go()
            self.lm.session.room.leave(self)
            evaluate([Text(f"Who sat on the mat {next(others)}? " * 3, self.lm)])
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "step", letting_go)
        found = generate(prompts_for(seen.lm, 2), max_new_tokens=8, **options)
    for own, other in zip(found, expected, strict=True):
        own, other = (own, other) if isinstance(own, list) else ([own], [other])
        assert [one.completion_tokens for one in own] == [one.completion_tokens for one in other]
    assert not seen.lm.session.evaluator.holders.ends()


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_streams_read_in_any_order_keep_to_the_budget(model, data):
    budget = data.draw(st.integers(30, 70))
    seen = Watched(model, budget)
    prompts = prompts_for(seen.lm, 4, data.draw(st.sampled_from(["", "The cat sat on the mat and"])))
    streams = [prompt.stream(max_new_tokens=NEW) for prompt in prompts]
    largest = max(map(size_of, prompts))
    for _ in range(60):
        stream = streams[data.draw(st.integers(0, 3))]
        if data.draw(st.integers(0, 40)) == 40:
            stream.close()
        stream.run.step()
        seen.note()
    for stream in streams:
        completion = stream.text.completion_tokens
        assert completion == plain_greedy(model, stream.text.prompt.tokens, NEW)[: len(completion)]
        stream.close()
    assert seen.peak <= max(budget, largest)
    assert not seen.lm.session.evaluator.holders.ends()


def test_streams_of_tasks_all_end(watched, model):
    seen = watched(100)
    prompts = prompts_for(seen.lm, 16)

    async def read(prompt):
        stream = seen.lm.astream(prompt, max_new_tokens=NEW)
        assert "".join([piece async for piece in stream]) == stream.text.completion
        return stream.text.completion_tokens

    async def main():
        return await asyncio.gather(*map(read, prompts))

    for completion, prompt in zip(asyncio.run(main()), prompts, strict=True):
        assert completion == plain_greedy(model, prompt.tokens, NEW)
    assert seen.peak <= 100


def test_a_generation_that_waits_may_be_closed(watched, monkeypatch):
    monkeypatch.setattr(room, "IDLE_SECONDS", 30)
    monkeypatch.setattr(room, "MAX_SECONDS_TO_WAIT", 30)
    seen = watched(40)
    held, closed = (prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(seen.lm, 2))
    step_in_thread(held)
    with ThreadPoolExecutor() as threads:
        pieces = threads.submit(list, closed)
        wait_until(lambda: seen.lm.session.room.is_awaited)
        closed.close()
        assert pieces.result(10) == []


def test_a_generation_that_waits_may_be_cancelled(watched, monkeypatch):
    """Also behind another one that waits."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 60)
    monkeypatch.setattr(room, "MAX_SECONDS_TO_WAIT", 0.01)
    begun, ended, wait = [], [], room.Room.wait

    def noting(self, generation):
        begun.append(generation)
        wait(self, generation)
        ended.append(generation)

    monkeypatch.setattr(room.Room, "wait", noting)
    seen = watched(40)
    held, first = (prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(seen.lm, 2))
    step_in_thread(held)

    async def main():
        task = asyncio.create_task(seen.lm.agenerate(Text("A dog", seen.lm), max_new_tokens=NEW))
        while len(set(begun)) < 2:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with ThreadPoolExecutor() as threads:
        pieces = threads.submit(list, first)
        wait_until(lambda: begun)
        asyncio.run(main())
        wait_until(lambda: len(set(ended)) == 2, 10)
        held.close()
        assert "".join(pieces.result(60)) == first.text.completion
    wait_until(lambda: not seen.lm.session.room.is_awaited)


def test_a_thread_that_answers_for_another_one_keeps_the_room_of_its_stream(watched, monkeypatch, let_go):
    """Only a caller that waits asks for no steps of the streams that it has read."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 60)
    seen = watched(40)
    held, other = (prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(seen.lm, 2))
    held.run.step()
    line = seen.lm.session.line
    with ThreadPoolExecutor() as threads:
        with line.lock:
            pieces = threads.submit(list, other)
            wait_until(lambda: line.places)
            seen.lm.token_logprobs([Text("A dog", seen.lm)])
        wait_until(lambda: seen.lm.session.room.is_awaited)
        assert not let_go
        held.close()
        assert "".join(pieces.result(60)) == other.text.completion


def test_a_generation_whose_step_was_interrupted_does_not_wait(watched, monkeypatch):
    """Another thread may ask for its room after the interrupt; those that came later would wait for it forever."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 60)
    seen = watched(40)
    held, interrupted = (prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(seen.lm, 2))
    step_in_thread(held)
    session = seen.lm.session
    with session.exclusive():
        with session.room.stepping(interrupted.run):
            assert not session.room.admit(interrupted.run, session.current(), may_wait=True)
            assert session.room.is_awaited
        assert not session.room.admit(interrupted.run, session.current(), may_wait=True)
        assert not session.room.is_awaited


def test_a_generation_within_a_call_does_not_wait(watched, model, monkeypatch):
    """The thread has the lock, so no other generation could go on."""
    monkeypatch.setattr(room, "IDLE_SECONDS", 60)
    seen = watched(40)
    held = Text("The cat sat", seen.lm).stream(max_new_tokens=NEW)
    step_in_thread(held)
    prompt = Text("A dog sat on", seen.lm)

    def nested():
        with seen.lm.session.exclusive():
            return prompt.generate(max_new_tokens=NEW).completion_tokens

    assert within(30, nested) == plain_greedy(model, prompt.tokens, NEW)


def test_texts_that_let_go_are_stored_once_they_end(model, tmp_path, let_go):
    budget = 50 * TOKEN_BYTES
    with DiskStore(tmp_path / "s") as store:
        lm = LM(model, byte_level_bpe(), memory_bytes=budget, store=store)
        streams = [prompt.stream(max_new_tokens=NEW) for prompt in prompts_for(lm, 3)]
        for stream in streams:
            stream.run.step()
        num_stored = store.stats().num_entries
        for _ in range(NEW - 4):  # longer than the shortest run that is stored
            for stream in streams:
                stream.run.step()
        assert let_go
        assert store.stats().num_entries == num_stored
        for stream in streams:
            list(stream)
        assert store.stats().num_entries > num_stored
