"""Pins, streams, scores, saves and clears in any order: only spans with a holder stay held, and no number changes."""

import contextlib
import gc

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backprompt import LM, MemoryBudgetError, Text, evaluate, generate
from backprompt.store import MemoryStore
from comparing import assert_close
from reference import plain_greedy, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

NEW = 8
SEGMENTS = ["The cat", " sat", " on the mat", "s", "'s", " 12", "34", ", and", " Question: What is it?", "\n\n"]
MODEL = FAMILIES["gpt2"]()
TOKENIZER = byte_level_bpe()
LOGITS: dict[tuple[int, ...], torch.Tensor] = {}


def logits_of(ids):
    if ids not in LOGITS:
        LOGITS[ids] = plain_logits(MODEL, ids)
    return LOGITS[ids]


class Holders(RuleBasedStateMachine):
    @initialize(
        joins=st.sampled_from(["exact", "split"]),
        memory_tokens=st.sampled_from([0, 20, 60, 200, 10_000]),
        host_tokens=st.sampled_from([0, 0, 40]),
        pass_tokens=st.sampled_from([1, 3, 17, 1000]),
        with_store=st.sampled_from([None, "always", "explicit"]),
    )
    def start(self, joins, memory_tokens, host_tokens, pass_tokens, with_store):
        self.lm = LM(
            MODEL,
            TOKENIZER,
            joins=joins,
            memory_bytes=memory_tokens * 646,
            host_memory_bytes=host_tokens * 646,
            max_tokens_per_forward=pass_tokens,
            store=None if with_store is None else MemoryStore(persist=with_store),
        )
        self.texts = [Text("The cat", self.lm) + " sat"]
        self.pins = []
        self.streams = []
        self.reprs = []

    def pick(self, idx):
        return self.texts[idx % len(self.texts)]

    def add(self, text):
        if 0 < len(text.tokens) <= 60:
            self.texts.append(text)

    @rule(idx=st.integers(0, 50), pieces=st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3))
    def compose(self, idx, pieces):
        text = self.pick(idx)
        for piece in pieces:
            text = text + piece
        self.add(text)

    @rule(idx=st.integers(0, 50), stop=st.integers(1, 30))
    def cut(self, idx, stop):
        self.add(Text.from_tokens(self.pick(idx).tokens[:stop], self.lm))

    @rule(indices=st.lists(st.integers(0, 50), min_size=1, max_size=4))
    def evaluate(self, indices):
        texts = [self.pick(idx) for idx in indices]
        self.reprs += zip(texts, evaluate(texts), strict=True)

    @rule(idx=st.integers(0, 50))
    def read(self, idx):
        if self.reprs:
            text, found = self.reprs[idx % len(self.reprs)]
            assert_close(found.logits, logits_of(text.tokens)[-1])
            assert_close(found.token_logprobs, plain_token_logprobs(MODEL, text.tokens))

    @rule(idx=st.integers(0, 50))
    def read_logits(self, idx):
        assert_close(self.pick(idx).logits, logits_of(self.pick(idx).tokens)[-1])

    @rule(indices=st.lists(st.integers(0, 50), min_size=1, max_size=4), start=st.integers(0, 5))
    def score(self, indices, start):
        texts = [self.pick(idx) for idx in indices]
        starts = [min(start, len(text.tokens)) for text in texts]
        for text, first, logprobs in zip(texts, starts, self.lm.token_logprobs(texts, starts), strict=True):
            assert_close(logprobs, plain_token_logprobs(MODEL, text.tokens)[first:])

    @rule(idx=st.integers(0, 50), ids=st.lists(st.integers(0, 20), min_size=1, max_size=3))
    def score_next(self, idx, ids):
        (found,) = self.lm.next_token_logprobs([self.pick(idx)], [ids])
        assert_close(found, logits_of(self.pick(idx).tokens)[-1].log_softmax(dim=-1)[ids])

    @rule(idx=st.integers(0, 50))
    def pin(self, idx):
        with contextlib.suppress(MemoryBudgetError):
            text = self.pick(idx)
            self.pins.append((text, text.pin()))

    @rule(idx=st.integers(0, 50))
    def unpin(self, idx):
        if self.pins:
            _, pin = self.pins.pop(idx % len(self.pins))
            pin.release()

    @rule(idx=st.integers(0, 50), lookup=st.sampled_from([None, 3]))
    def stream(self, idx, lookup):
        options = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        self.streams.append(self.pick(idx).stream(max_new_tokens=NEW, **options))

    @rule(idx=st.integers(0, 50), num_steps=st.integers(1, NEW))
    def step(self, idx, num_steps):
        if self.streams:
            stream = self.streams[idx % len(self.streams)]
            for _ in range(num_steps):
                next(stream, None)
            found = stream.text
            expected = plain_greedy(MODEL, found.prompt.tokens, len(found.completion_tokens))
            assert found.completion_tokens == expected
            self.add(found)

    @rule(idx=st.integers(0, 50), how=st.sampled_from(["close", "drop"]))
    def stop_stream(self, idx, how):
        if self.streams:
            stream = self.streams.pop(idx % len(self.streams))
            if how == "close":
                stream.close()

    @rule(indices=st.lists(st.integers(0, 50), min_size=1, max_size=3), beams=st.sampled_from([1, 1, 2]))
    def generate(self, indices, beams):
        texts = [self.pick(idx) for idx in indices]
        for text in generate(texts, max_new_tokens=3, num_beams=beams):
            self.add(text)

    @rule(idx=st.integers(0, 50))
    def save(self, idx):
        if self.lm.session.store is not None:
            self.pick(idx).save()

    @rule()
    def clear(self):
        self.lm.clear()
        self.pins.clear()

    @rule(idx=st.integers(1, 50))
    def forget_text(self, idx):
        if len(self.texts) > 1:
            del self.texts[idx % len(self.texts)]
            gc.collect()

    @rule()
    def forget_reprs(self):
        self.reprs.clear()
        gc.collect()

    @invariant()
    def only_what_somebody_holds_is_pinned(self):
        if not hasattr(self, "lm"):
            return
        evaluator = self.lm.session.evaluator
        pinned = {evaluator.forest.insert(text.tokens) for text, _ in self.pins}
        assert set(evaluator.holders.pinned_ends()) == pinned
        assert all(span.keys_values is not None for end in pinned for span in end.closure())
        growing = set().union(*(stream.run.ends for stream in self.streams))
        assert evaluator.holders.ends() == pinned | growing

    @invariant()
    def budgets_hold(self):
        if hasattr(self, "lm") and not any(stream.run.ends for stream in self.streams):
            assert self.lm.stats.bytes_held <= self.lm.session.evaluator.memory.max_bytes
            assert self.lm.stats.host_bytes_held <= self.lm.session.evaluator.host.max_bytes


Holders.TestCase.settings = settings(max_examples=6, stateful_step_count=20, deadline=None)
TestHolders = Holders.TestCase


def test_a_stream_that_nobody_keeps_holds_nothing_whatever_is_done_next():
    """A random program streamed, scored and unpinned, and nothing after that looked for dropped streams."""
    lm = LM(MODEL, TOKENIZER, joins="split", store=MemoryStore(), max_tokens_per_forward=17)
    pin = Text("The cat", lm).pin()
    stream = Text("The cat sat", lm).stream(max_new_tokens=5)
    next(stream)
    lm.token_logprobs([Text("The cat sat on", lm)])
    assert len(lm.session.evaluator.holders.ends()) == 2
    del stream
    pin.release()
    assert not lm.session.evaluator.holders.ends()
