"""Ctrl-C at any line: afterwards the numbers are right, only spans with a holder are held, and the budgets are kept.

A tracer raises KeyboardInterrupt at the n-th line of the package that an operation runs through. Here a sample of lines
is taken; `BACKPROMPT_EVERY_LINE=1` takes every distinct line of each operation, and every instruction of what must be
all or nothing: half an hour on one core.
"""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import backprompt
from backprompt import LM, Text, classify, evaluate, forking, generate
from backprompt.forest.fan import Fan
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_close, num_distinct_ids
from reference import plain_greedy, plain_logits, plain_token_logprobs
from stores import change_index, make_entry
from threads import within
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TOKEN_BYTES = 646
PACKAGE = str(Path(backprompt.__file__).parent)
TAKES_ALL = bool(os.environ.get("BACKPROMPT_EVERY_LINE"))
NUM_SAMPLED = 4  # lines of each operation

# The lock and torch's settings are let go of by Python itself, at whose own lines no signal arrives.
EXEMPT = {"exclusive", "plain_surroundings", "_without_modes"}

# Their methods return the result of another method in Python: CPython handles no signal between the two returns.
FACADES = {"node.py", "lm.py"}

# Functions that change several things that belong together: always taken.
CRITICAL = {
    "split",
    "unfold",
    "absorb",
    "discard",
    "clear",
    "changing",
    "place",
    "_start_over",
    "release",
    "pin",
    "unpin",
    "step",
    "extend",
    "_take_in",
}


class Event(NamedTuple):
    """A line that is run, or an instruction of it."""

    file: str
    function: str
    line: int
    instruction: int


class Tracer:
    """Notes what is run of the package, and raises at one event.

    Args:
        raise_at: the number of the event to raise at; None for none.

    """

    def __init__(self, raise_at: int | None = None) -> None:
        self.events: list[Event] = []
        self._raise_at = raise_at

    def run(self, work: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(before)

    def _enter(self, frame, event, argument):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name in EXEMPT:
            return None
        is_passed_on = Path(code.co_filename).name in FACADES
        frame.f_trace_opcodes = TAKES_ALL and code.co_name in CRITICAL and not is_passed_on
        return self._trace

    def _trace(self, frame, event, argument):
        if event == ("opcode" if frame.f_trace_opcodes else "line"):
            instruction = frame.f_lasti if frame.f_trace_opcodes else -1
            code = frame.f_code
            self.events.append(Event(Path(code.co_filename).name, code.co_name, frame.f_lineno, instruction))
            if len(self.events) - 1 == self._raise_at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def chosen(events, seen, seed):
    """Return the numbers of events to raise at: the first of each distinct one, or of a sample of those not `seen`."""
    first = {event: idx for idx, event in reversed(list(enumerate(events)))}
    if TAKES_ALL:
        return list(first.values())
    new = sorted(set(first) - seen)
    seen.update(new)
    always = {event for event in new if event.function in CRITICAL}
    sample = random.Random(seed).sample(sorted(set(new) - always), min(NUM_SAMPLED, len(new) - len(always)))
    return [first[event] for event in (*always, *sample)]


class World:
    """An `LM` with a pin, a stream under way and a full memory, and what one may do with it."""

    def __init__(self, model, tokenizer, operation):
        self.model = model
        # Shared completions are one span only where a pass has room for several such spans, and without a store.
        passes = {"max_tokens_per_forward": 17, "store": MemoryStore(persist="explicit")}
        self.lm = LM(
            model,
            tokenizer,
            memory_bytes=40 * TOKEN_BYTES,
            host_memory_bytes=20 * TOKEN_BYTES,
            **({"max_tokens_per_forward": 64} if operation == "classify" else passes),
        )
        self.pinned = Text("The cat sat", self.lm)
        self.pins = [(self.pinned, self.pinned.pin())]
        self.stream = Text("The cat is", self.lm).stream(max_new_tokens=12)
        next(self.stream)
        self.other = Text("Question: What is 12 + 34?", self.lm)
        self.found = evaluate([self.other, self.other + " Answer: 46", self.pinned + " on the mat and slept"])
        self.texts = [self.pinned, self.other + " Answer", Text("The dog", self.lm), self.pinned + " on a hat"]
        self.shared = [Text("It is on", self.lm), Text("It lies on", self.lm)]
        self.evaluator = self.lm.session.evaluator

    def evaluate(self):
        evaluate(self.texts)

    def read_logits(self):
        [found.logits for found in self.found]

    def read_logprobs(self):
        [found.token_logprobs for found in self.found]

    def token_scores(self):
        self.lm.token_scores(self.texts, [1, 2, 0, 3])

    def next_token_logprobs(self):
        self.lm.next_token_logprobs(self.texts, [[1, 2], [3], [4], [5, 6]])

    def entropies(self):
        self.lm.entropies(self.texts, [1, 2, 0, 3])

    def classify(self):
        prompts = [self.other, *self.shared]
        classify.predict_proba(prompts, ["a mat", "a hat", "it"], self.lm)
        assert any(isinstance(span, Fan) for span in self.lm.session.evaluator.forest.spans())
        self.lm.evaluate([self.shared[0] + " a mat"])

    def generate(self):
        generate(self.texts[:3], max_new_tokens=4)

    def beams(self):
        generate(self.texts[:2], max_new_tokens=3, num_beams=2)

    def go_on_with_the_stream(self):
        next(self.stream)

    def close_the_stream(self):
        self.stream.close()

    def begin_a_stream(self):
        with self.texts[3].stream(max_new_tokens=3) as stream:
            list(stream)

    def pin_another(self):
        text = self.pinned + " on a"
        pin = text.pin()
        self.pins.append((text, pin))

    def unpin(self):
        self.pins[0][1].release()

    def clear(self):
        self.lm.clear()

    def save(self):
        (self.pinned + " on the mat").save()

    def load(self):
        self.lm.evaluate([self.pinned + " on the mat, loaded"])

    def refresh(self):
        self.lm.refresh()

    def check_holders(self, operation):
        """Check that only spans with a holder are held, also while the traceback keeps all frames alive."""
        lm = self.lm
        assert not lm.session.line.lock._is_owned()
        assert torch.is_grad_enabled()
        lm.check([])  # renews, recomputes or ends everything that needs it
        evaluator = lm.session.evaluator
        held = [text for text, pin in self.pins if pin.num_bytes > 0]
        assert self.pinned in held or operation in ("unpin", "clear", "refresh")
        assert len(evaluator.holders.pins) == len(held)
        ends = evaluator.holders.pinned_ends()
        assert set(ends) == {evaluator.forest.insert(text.tokens) for text in held}
        assert evaluator.holders.ends() == self.stream.run.ends | set(ends)
        assert all(span.keys_values is not None for end in ends for span in end.closure())

    def check(self):
        """Check all else that is promised."""
        lm = self.lm
        self.check_counts()
        self.check_numbers()
        self.check_counts()
        self.stream.close()
        assert lm.stats.bytes_held <= 40 * TOKEN_BYTES
        assert lm.stats.host_bytes_held <= 20 * TOKEN_BYTES
        lm.clear()
        assert (lm.stats.bytes_held, lm.stats.host_bytes_held, lm.stats.result_bytes_held) == (0, 0, 0)
        before = lm.stats
        evaluate(self.texts[2:])
        ids = [text.tokens for text in self.texts[2:]]
        distinct = num_distinct_ids(ids)
        assert (lm.stats - before).tokens_computed + (lm.stats - before).tokens_loaded == distinct

    def check_counts(self):
        evaluator, stats = self.lm.session.evaluator, self.lm.stats
        for num_bytes, slots in (
            (stats.bytes_held, ("keys_values", "states")),
            (stats.host_bytes_held, ("host_keys_values", "host_states")),
        ):
            places = (getattr(span, slot) for span in evaluator.forest.spans() for slot in slots)
            blocks = {place.block for place in places if place is not None and place.block is not None}
            assert num_bytes == sum(block.num_bytes for block in blocks)

    def check_numbers(self):
        for text in [*self.texts, self.other, self.shared[0] + " a hat"]:
            assert_close(text.logits, expected(self.model, text)[-1])
        for text, found in zip(self.texts, self.lm.token_logprobs(self.texts), strict=True):
            logprobs = plain_token_logprobs(self.model, text.tokens)
            assert_close(found, logprobs)
        if self.lm.session.evaluator is self.evaluator:
            for text, found in zip((self.other,), self.found, strict=False):
                assert_close(found.logits, expected(self.model, text)[-1])
                next(self.stream, None)
        completion = self.stream.text.completion_tokens
        assert completion == plain_greedy(self.model, self.stream.text.prompt.tokens, len(completion))


LOGITS = {}


def expected(model, text):
    if text.tokens not in LOGITS:
        LOGITS[text.tokens] = plain_logits(model, text.tokens)
    return LOGITS[text.tokens]


OPERATIONS = [
    "evaluate",
    "read_logits",
    "read_logprobs",
    "token_scores",
    "next_token_logprobs",
    "entropies",
    "classify",
    "generate",
    "beams",
    "go_on_with_the_stream",
    "close_the_stream",
    "begin_a_stream",
    "pin_another",
    "unpin",
    "clear",
    "save",
    "load",
    "refresh",
]


def interrupt(world, operation, raise_at):
    """Run an operation up to an event, check what it leaves, and return the events that came."""
    tracer = Tracer(raise_at)
    try:
        tracer.run(getattr(world, operation))
    except KeyboardInterrupt:
        world.check_holders(operation)
    else:
        assert raise_at is None, f"only {len(tracer.events)} events came"
    world.check_holders(operation)
    world.check()
    return tracer.events


def test_an_interrupt_at_any_line():
    model, tokenizer = build("gpt2"), byte_level_bpe()
    seen: set[Event] = set()
    for seed, operation in enumerate(OPERATIONS):
        if TAKES_ALL and os.environ["BACKPROMPT_EVERY_LINE"] not in ("1", operation):
            continue
        events = interrupt(World(model, tokenizer, operation), operation, None)
        for idx in chosen(events, seen, seed):
            try:
                interrupt(World(model, tokenizer, operation), operation, idx)
            except Exception as error:
                raise AssertionError(f"{operation}, interrupted at event {idx}, {events[idx]}") from error


def close_to_fork(store):
    forking.before_fork()
    forking.after_fork()


def damage_the_index(store):
    change_index(store, "UPDATE entries SET name = x'ff'")


# A file that was opened right before the interrupt is closed by Python, which warns of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("spoil", [close_to_fork, damage_the_index])
def test_a_disk_store_is_of_use_after_an_interrupt_at_any_line_while_it_opens_its_index(spoil, tmp_path):
    with DiskStore(tmp_path / "sound") as store:
        store.put(make_entry(1))

    def find(raise_at):
        """Return the events of the first `find`, interrupted at one of them."""
        folder = tmp_path / str(raise_at)
        shutil.copytree(tmp_path / "sound", folder)
        tracer = Tracer(raise_at)
        with DiskStore(folder) as store:
            spoil(store)
            try:
                tracer.run(lambda: store.find(""))
            except KeyboardInterrupt:
                assert raise_at is not None
            else:
                assert raise_at is None
            assert within(30, lambda: [header.text for header in store.find("text")]) == ["text 1"]
            store.put(make_entry(2))
            assert store.stats().num_entries == 2
        shutil.rmtree(folder)
        return tracer.events

    events = find(None)
    assert any(event.function == "_open_index" for event in events)
    first = {event: idx for idx, event in reversed(list(enumerate(events)))}
    for event, idx in first.items():
        try:
            find(idx)
        except Exception as error:
            raise AssertionError(f"interrupted at event {idx}, {event}") from error
