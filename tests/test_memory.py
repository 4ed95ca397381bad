"""The byte budgets: held rows stay within them, dropped spans are computed again, and no number changes."""

import gc
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backprompt import LM, MemoryBudgetError, Text, TokenIdError, evaluate, load
from backprompt.memory import tier
from backprompt.memory.budget import default_host_bytes, default_max_bytes, free_bytes, parse_bytes
from backprompt.memory.host import HostMemory
from backprompt.memory.location import Location
from backprompt.store import DiskStore, MemoryStore
from comparing import assert_close, assert_equals_plain, num_distinct
from devices import DEVICE
from quick import up_to
from ranking import compare_with_plain
from reference import ids_for, plain_greedy, plain_is_argmax, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

STATE_BYTES = 32 * 4 + 4 + 1 + 1  # hidden state, log-probability, whether argmax, whether known
KEY_BYTES = 2 * (2 * 32 * 4)  # keys and values of two layers
TOKEN_BYTES = KEY_BYTES + STATE_BYTES


def make_lm(model, tokenizer, num_tokens, pass_tokens=16, *, host_tokens=0, **options):
    """An LM that may hold this many tokens, and so many in its second pool, probed already."""
    lm = LM(
        model,
        tokenizer,
        memory_bytes=num_tokens * TOKEN_BYTES,
        host_memory_bytes=host_tokens * TOKEN_BYTES,
        max_tokens_per_forward=pass_tokens,
        **options,
    )
    evaluate(Text("probe", lm))
    lm.clear()
    return lm


def wide_forest(lm, num_branches=12, num_leaves=6):
    """One root, branches, and leaves under each."""
    root = Text("Question: What is 12 + 34? ", lm)
    branches = [root + f"The {number} cats sat on the mat. " for number in range(100, 100 + num_branches)]
    return [branch + f"Answer {leaf}!" for branch in branches for leaf in range(num_leaves)]


def check_is_sound(lm):
    """Check that held spans have held ancestors, keys come with states, pools share no rows, and all is counted.

    On the device, every row of a block has a reference.
    """
    evaluator = lm.session.evaluator
    spans = list(evaluator.forest.spans())
    for kind in ("keys_values", "states"):
        for span in spans:
            places = getattr(span, kind), getattr(span, f"host_{kind}")
            assert None in places
            if places == (None, None):
                continue
            parent = span.parent
            assert parent.parent is None or (getattr(parent, kind), getattr(parent, f"host_{kind}")) != (None, None)
            assert parent.parent is None or places[0] is None or getattr(parent, kind) is not None
    for pool, prefix in ((evaluator.memory, ""), (evaluator.host, "host_")):
        blocks = set()
        for kind in ("keys_values", "states"):
            num_rows = {}
            for place in filter(None, (getattr(span, prefix + kind) for span in spans)):
                num_rows[place.block] = num_rows.get(place.block, 0) + place.stop - place.start
            assert all(block.num_rows == num or (prefix and block.num_rows > num) for block, num in num_rows.items())
            blocks |= set(num_rows)
        assert blocks == set(pool.blocks)
    for span in spans:
        for place in filter(None, (span.keys_values, span.states, span.host_keys_values, span.host_states)):
            assert place.stop - place.start == len(span.token_ids)
    assert all(span.keys_values is None or span.states is not None for span in spans)
    assert not any(span.is_empty and (span.keys_values or span.host_keys_values) for span in spans)


def tensors_of(block):
    """All tensors of a block, with their kinds."""
    return [(name.split(".")[0], tensor) for name, tensor in block.tensors.items()]


def watch_peaks(lm):
    """Note the most that either pool holds, whenever something is added to one."""
    peaks = {"device": 0, "host": 0}
    for name, pool in (("device", lm.session.evaluator.memory), ("host", lm.session.evaluator.host)):

        def add(blocks, add=pool.add, pool=pool, name=name):
            add(blocks)
            peaks[name] = max(peaks[name], pool.num_bytes)

        pool.add = add
    return peaks


# The law


EXPECTED: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}


class AnyUse(RuleBasedStateMachine):
    """Any budgets, any order of use: the plain numbers, never more than the budgets after a call, nothing needless."""

    model = FAMILIES["gpt2"]()
    tokenizer = byte_level_bpe()

    @initialize(
        num_tokens=st.sampled_from([0, 1, 10, 30, 60, 120, 1000]),
        host_tokens=st.sampled_from([0, 3, 20, 60, 1000]),
        pass_tokens=st.sampled_from([1, 7, 64]),
        max_small_blocks=st.sampled_from([0, 2, tier.MAX_SMALL_BLOCKS]),
    )
    def start(self, num_tokens, host_tokens, pass_tokens, max_small_blocks):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(tier, "MAX_SMALL_BLOCKS", max_small_blocks)
        self.lm = make_lm(self.model, self.tokenizer, num_tokens, pass_tokens, host_tokens=host_tokens)
        compare_with_plain(self.patch, lambda _: self.lm.session.evaluator.forest)
        self.texts = wide_forest(self.lm, num_branches=3, num_leaves=3)
        self.texts += [Text("Question: What is 12 + 34? ", self.lm), Text("One alone.", self.lm)]
        for text in self.texts:
            ids = text.tokens
            if ids not in EXPECTED:
                EXPECTED[ids] = plain_logits(self.model, ids)[-1], plain_token_logprobs(self.model, ids)
        self.pins = []
        self.reprs = []
        self.has_room_for_all = 1000 in (num_tokens, host_tokens)
        self.peaks = watch_peaks(self.lm)
        self.num_tokens, self.pass_tokens = num_tokens, pass_tokens
        self.longest = max(len(text.tokens) for text in self.texts)
        self.max_peak_tokens = max(num_tokens, self.longest) + pass_tokens

    @rule(indices=st.lists(st.integers(0, 10), min_size=1, max_size=11))
    def evaluate(self, indices):
        texts = [self.texts[idx] for idx in indices]
        self.reprs += zip(texts, evaluate(texts), strict=True)

    @rule(idx=st.integers(0, 10))
    def read_logits(self, idx):
        assert_close(self.texts[idx].logits, EXPECTED[self.texts[idx].tokens][0])

    @rule(idx=st.integers(0, 10))
    def read_logprobs(self, idx):
        assert_close(self.texts[idx].token_logprobs, EXPECTED[self.texts[idx].tokens][1])

    @rule(idx=st.integers(0, 100))
    def read_an_old_representation(self, idx):
        if self.reprs:
            text, found = self.reprs[idx % len(self.reprs)]
            assert_close(found.all_logits(-1)[0], EXPECTED[text.tokens][0])

    @rule(idx=st.integers(0, 100))
    def read_the_logits_of_an_old_representation(self, idx):
        if self.reprs:
            text, found = self.reprs[idx % len(self.reprs)]
            assert_close(found.logits, EXPECTED[text.tokens][0])

    @rule(idx=st.integers(0, 10))
    def continue_a_cache(self, idx):
        text = self.texts[idx]
        cache = text.model_repr.past_key_values()
        assert cache.get_seq_length() == len(text.tokens)
        logits = self.model(ids_for(self.model, [5]), past_key_values=cache).logits[0, -1]
        assert_close(logits, plain_logits(self.model, (*text.tokens, 5))[-1])

    @rule(indices=st.lists(st.integers(0, 10), max_size=11), data=st.data())
    def score(self, indices, data):
        texts = [self.texts[idx] for idx in indices]
        starts = [data.draw(st.integers(0, len(text.tokens))) for text in texts]
        for text, start, logprobs in zip(texts, starts, self.lm.token_logprobs(texts, starts), strict=True):
            assert_close(logprobs, EXPECTED[text.tokens][1][start:])

    @rule(idx=st.integers(0, 10))
    def pin(self, idx):
        self.max_peak_tokens = max(self.max_peak_tokens, self.num_tokens + self.longest + self.pass_tokens)
        try:
            self.pins.append((self.texts[idx], self.texts[idx].pin()))
        except MemoryBudgetError:
            held = [text for text, _ in self.pins]
            assert num_distinct([*held, self.texts[idx]]) * TOKEN_BYTES > self.lm.session.evaluator.memory.max_bytes

    @rule(idx=st.integers(0, 10))
    def release(self, idx):
        if self.pins:
            self.pins.pop(idx % len(self.pins))[1].release()

    @rule()
    def clear(self):
        self.lm.clear()
        self.pins.clear()

    @invariant()
    def budgets_hold(self):
        if hasattr(self, "lm"):
            assert self.lm.stats.bytes_held <= self.lm.session.evaluator.memory.max_bytes
            assert self.lm.stats.host_bytes_held <= self.lm.session.evaluator.host.max_bytes
            check_is_sound(self.lm)
            assert self.peaks["device"] <= self.max_peak_tokens * TOKEN_BYTES
            assert self.peaks["host"] <= self.lm.session.evaluator.host.max_bytes
            if self.has_room_for_all:
                assert self.lm.stats.tokens_recomputed == 0

    @invariant()
    def pins_hold(self):
        if hasattr(self, "lm") and self.pins:
            before = self.lm.stats
            for text, _ in self.pins:
                assert text.model_repr.past_key_values().get_seq_length() == len(text.tokens)
            done = self.lm.stats - before
            assert (done.tokens_computed, done.tokens_fetched) == (0, 0)

    def teardown(self):
        if hasattr(self, "patch"):
            self.patch.undo()


AnyUse.TestCase.settings = settings(max_examples=up_to(40), stateful_step_count=15, deadline=None)
TestAnyUse = AnyUse.TestCase


# Counted


@pytest.mark.parametrize("pass_tokens", [8, 32, 256])
def test_a_forest_ten_times_over_the_budget_is_computed_once(model, tokenizer, pass_tokens):
    """And at no time is more held than the budget and one pass."""
    lm = make_lm(model, tokenizer, 0, pass_tokens)
    texts = wide_forest(lm, num_branches=20)
    distinct = num_distinct(texts)
    lm = make_lm(model, tokenizer, distinct // 10, pass_tokens)
    texts = wide_forest(lm, num_branches=20)
    peaks = []
    compute = lm.session.evaluator.executor.compute

    def compute_and_note(pass_):
        computed = compute(pass_)
        blocks = (computed.keys_values, computed.states)
        peaks.append(
            lm.session.evaluator.memory.num_bytes + sum(block.num_bytes for block in blocks if block is not None)
        )
        return computed

    lm.session.evaluator.executor.compute = compute_and_note
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    assert distinct <= done.tokens_computed <= 1.2 * distinct
    assert done.tokens_recomputed == done.tokens_computed - distinct
    assert max(peaks) <= (distinct // 10 + pass_tokens) * TOKEN_BYTES
    assert len(peaks) == done.forward_passes


def test_scoring_a_forest_over_the_budget_reads_each_pass_before_it_goes(model, tokenizer):
    lm = make_lm(model, tokenizer, 40)
    texts = wide_forest(lm)
    before = lm.stats
    for text, logprobs in zip(texts, lm.token_logprobs(texts), strict=True):
        expected = plain_token_logprobs(model, text.tokens)
        assert_close(logprobs, expected)
    assert (lm.stats - before).tokens_computed <= 1.2 * num_distinct(texts)


def test_keys_and_values_go_first_and_results_stay(model, tokenizer):
    """A budget for all states and the keys of little more than one path: reading all results needs no forward."""
    lm = make_lm(model, tokenizer, 0)
    num_tokens = num_distinct(wide_forest(lm))
    memory_bytes = num_tokens * STATE_BYTES + 80 * KEY_BYTES
    lm = LM(model, tokenizer, memory_bytes=memory_bytes, host_memory_bytes=0, max_tokens_per_forward=16)
    texts = wide_forest(lm)
    reprs = evaluate(texts)
    before = lm.stats
    for text, found in zip(texts, reprs, strict=True):
        assert_close(found.logits, plain_logits(model, text.tokens)[-1])
        expected = plain_token_logprobs(model, text.tokens)
        assert_close(found.token_logprobs, expected)
    evaluate(texts)
    assert (lm.stats - before).tokens_computed == 0

    continued = texts[0] + " And so on."
    assert_close(continued.logits, plain_logits(model, continued.tokens)[-1])
    done = lm.stats - before
    assert done.tokens_recomputed > 0
    assert done.tokens_computed <= len(continued.tokens)


def test_what_was_used_last_stays(model, tokenizer):
    """Room for two of three texts: the one that was not used for longest goes."""
    strings = ["The cat sat on the mat", "General Kenobi was here", "Question: What is it?"]
    longest = max(len(Text(string, LM(model, tokenizer)).tokens) for string in strings)
    lm = make_lm(model, tokenizer, 2 * longest)
    first, second, third = (Text(string, lm) for string in strings)
    evaluate([first, second])
    evaluate(first)
    evaluate(third)
    evaluator = lm.session.evaluator
    held = [evaluator.forest.num_computed(text.tokens) == len(text.tokens) for text in (first, second, third)]
    assert held == [True, False, True]


def test_the_memory_of_what_is_dropped_is_freed(model, tokenizer):
    """Counted in storages: spans of one pass share tensors, and the tensors shrink when spans are dropped."""
    lm = make_lm(model, tokenizer, 60, pass_tokens=512)
    evaluate(wide_forest(lm))
    gc.collect()
    blocks = lm.session.evaluator.memory.blocks
    tensors = [tensor for block in blocks for _, tensor in tensors_of(block)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == lm.stats.bytes_held <= 60 * TOKEN_BYTES


def test_a_text_larger_than_the_budget_is_computed_and_then_dropped(model, tokenizer):
    lm = make_lm(model, tokenizer, 3)
    text = Text("Question: What is 12 + 34? The cat sat on the mat.", lm)
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    assert lm.stats.bytes_held <= 3 * TOKEN_BYTES


# Long runs


KEPT = ("Span", "Junction", "KeysValues", "States", "BlockRows", "Tensor", "TokenScore", "Evaluated", "Batch")


def count_live():
    """How many objects there are of each type of which an evaluation leaves some."""
    gc.collect()
    types = Counter(type(found).__name__ for found in gc.get_objects())
    return {name: types[name] for name in KEPT}


def differences(before, after):
    return {name: after[name] - before[name] for name in KEPT}


@pytest.mark.parametrize("limit", [("SPANS", 20), ("TOKENS", 60)])
def test_spans_that_hold_nothing_do_not_pile_up(limit, model, tokenizer, monkeypatch):
    what, bound = limit
    monkeypatch.setattr(f"backprompt.evaluation.computation.MAX_EMPTY_{what}", bound)
    lm = make_lm(model, tokenizer, 10)
    for number in range(100):
        evaluate(Text(f"{number} cats", lm))
        empty = [span for span in lm.session.evaluator.forest.spans() if span.is_empty]
        assert len(empty if what == "SPANS" else [i for span in empty for i in span.token_ids]) <= bound
    before = lm.stats
    evaluate(Text("84 cats", lm))  # dropped, and remembered
    done = lm.stats - before
    assert 0 < done.tokens_recomputed == done.tokens_computed
    before = lm.stats
    evaluate(Text("13 cats", lm))  # forgotten
    done = lm.stats - before
    assert done.tokens_recomputed < done.tokens_computed


def test_twenty_thousand_texts_leave_no_more_than_ten_thousand(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.evaluation.computation.MAX_EMPTY_SPANS", 500)
    lm = make_lm(model, tokenizer, 200, pass_tokens=256)
    counts = [count_live()]
    for first in range(0, 20_000, 50):
        evaluate([Text.from_tokens([number % 317, number // 317], lm) for number in range(first, first + 50)])
        if first in (9_950, 19_950):
            counts.append(count_live())
    half, whole = (differences(counts[0], later) for later in counts[1:])
    assert whole["Span"] <= 500 + 200 * TOKEN_BYTES // STATE_BYTES
    assert whole["KeysValues"] + whole["States"] <= 2 * tier.MAX_SMALL_BLOCKS
    assert all(whole[name] <= 1.15 * half[name] + 50 for name in KEPT), (half, whole)


WAYS = {
    "evaluated": lambda lm, n: evaluate(Text.from_tokens([n, 5], lm)),
    "read": lambda lm, n: (Text.from_tokens([n, 5], lm).logits, Text.from_tokens([n, 5], lm).token_logprobs),
    "scored": lambda lm, n: lm.token_logprobs([Text.from_tokens([n, 5, 6], lm)]),
    "followed": lambda lm, n: lm.next_token_logprobs([Text.from_tokens([n, 5], lm)], [[7, 8]]),
    "branched": lambda lm, n: evaluate(Text("The ", lm) + (Text.from_tokens([n], lm) | Text("cat", lm)) + " sat"),
    "generated": lambda lm, n: Text.from_tokens([n, 5], lm).generate(max_new_tokens=3),
    "streamed": lambda lm, n: next(Text.from_tokens([n, 5], lm).stream(max_new_tokens=3)),
    "saved": lambda lm, n: Text.from_tokens([n, 5], lm).save(),
    "pinned": lambda lm, n: Text.from_tokens([n, 5], lm).pin().release(),
}


@pytest.mark.parametrize(("way", "host_tokens"), [*((way, 0) for way in WAYS), ("evaluated", 8), ("generated", 8)])
def test_a_long_run_keeps_no_more_than_a_short_one(way, host_tokens, model, tokenizer, monkeypatch, tmp_path):
    """Texts that are asked for once, over budgets that some of them fill."""
    monkeypatch.setattr("backprompt.evaluation.computation.MAX_EMPTY_SPANS", 20)
    monkeypatch.setattr("backprompt.session.session.MAX_RESULT_BYTES", 20 * 1280)
    monkeypatch.setattr("backprompt.evaluation.pools.MAX_CANDIDATE_BYTES", 20 * 600)
    monkeypatch.setattr("backprompt.memory.tier.MAX_SMALL_BLOCKS", 4)
    options = {"store": DiskStore(tmp_path, persist="explicit")} if way == "saved" else {}
    lm = make_lm(model, tokenizer, 8, host_tokens=host_tokens, **options)
    counts = [count_live()]
    for number in range(120):
        WAYS[way](lm, number)
        if number in (59, 119):
            counts.append(count_live())
    half, whole = (differences(counts[0], later) for later in counts[1:])
    assert whole["KeysValues"] + whole["States"] <= 2 * (4 + 2 + 2)
    assert all(whole[name] <= half[name] + 25 for name in KEPT), (half, whole)


def test_one_text_that_is_kept_keeps_none_that_it_was_evaluated_with(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.evaluation.computation.MAX_EMPTY_SPANS", 20)
    lm = make_lm(model, tokenizer, 30, pass_tokens=64)
    kept = []
    for first in range(0, 1000, 50):
        texts = [Text.from_tokens([number % 317, number // 317, 5], lm) for number in range(first, first + 50)]
        kept.append(evaluate(texts)[7])
        if first == 0:
            before = count_live()
    after = count_live()
    assert after["Evaluated"] <= before["Evaluated"] + len(kept)
    assert after["Span"] <= before["Span"] + 3 * len(kept) + 20


def test_small_blocks_become_one_and_no_row_changes(model, tokenizer, monkeypatch):
    lm = make_lm(model, tokenizer, 1000)
    texts = [Text(f"{number} cats sat", lm) for number in range(30)]
    expected = [evaluate(text).hidden_states for text in texts]
    for text in texts[::2]:
        assert text.token_logprobs.shape == (len(text.tokens),)
    memory, before = lm.session.evaluator.memory, lm.stats
    assert len(memory.blocks) >= 60
    monkeypatch.setattr(tier, "MAX_SMALL_BLOCKS", 8)
    evaluate(Text("And 1 more.", lm))
    assert len(memory.blocks) <= 8
    check_is_sound(lm)
    assert lm.stats.bytes_held - before.bytes_held == TOKEN_BYTES * (lm.stats - before).tokens_computed
    before = lm.stats
    for text, hidden in zip(texts, expected, strict=True):
        assert torch.equal(text.model_repr.hidden_states, hidden)
        logprobs = plain_token_logprobs(model, text.tokens)
        assert_close(text.token_logprobs, logprobs)
        logits = plain_logits(model, (*text.tokens, 5))[-1]
        assert_close((text + Text.from_tokens([5], lm)).logits, logits)
    assert (lm.stats - before).tokens_computed == len(texts)


def test_texts_grow_on_while_small_blocks_become_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tier, "MAX_SMALL_BLOCKS", 0)
    lm = make_lm(model, tokenizer, 1000)
    streams = [Text(f"The cat {number}", lm).stream(max_new_tokens=20) for number in range(3)]
    for number in range(20):
        evaluate(Text(f"{number} more", lm))
        for stream in streams:
            stream.run.step()
    for number, stream in enumerate(streams):
        plain = plain_greedy(model, Text(f"The cat {number}", lm).tokens, 20)
        assert stream.text.completion_tokens == plain
    check_is_sound(lm)


def test_logits_are_those_of_their_own_text_after_a_clear(model, tokenizer):
    """Old representations, and rows in the pool that texts computed again have left there."""
    lm = make_lm(model, tokenizer, 1000)
    texts = wide_forest(lm, num_branches=2, num_leaves=2)
    old = evaluate(texts)
    lm.clear()
    _ = [texts[0].logits, old[0].logits, old[2].logits, old[1].token_logprobs, texts[1].logits]
    for text, found in zip(texts, old, strict=True):
        assert_close(found.logits, plain_logits(model, text.tokens)[-1])


def test_a_failed_compaction_leaves_nothing_half_cut(model, tokenizer, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    lm = make_lm(model, tokenizer, 60)
    texts = wide_forest(lm)
    with monkeypatch.context() as patch:
        patch.setattr("backprompt.memory.blocks.States.keep", fail)
        with pytest.raises(torch.OutOfMemoryError):
            [evaluate(texts[:num_texts]) for num_texts in range(1, len(texts))]
    assert lm.stats.bytes_held == 0
    for text in texts:
        assert_close(text.logits, plain_logits(model, text.tokens)[-1])


# The second pool


@pytest.mark.parametrize("pass_tokens", [8, 32, 256])
def test_a_forest_that_both_pools_hold_is_computed_once(model, tokenizer, pass_tokens):
    """Ten times over the device's budget: evaluated, read, evaluated again, continued, and no token computed twice."""
    distinct = num_distinct(wide_forest(make_lm(model, tokenizer, 0), num_branches=20))
    lm = make_lm(model, tokenizer, distinct // 10, pass_tokens, host_tokens=10 * distinct)
    peaks = watch_peaks(lm)
    texts = wide_forest(lm, num_branches=20)
    continued = [text + " And so on." for text in texts]
    before = lm.stats
    evaluate(texts)
    evaluate(texts)
    assert (lm.stats - before).tokens_computed == distinct
    assert_equals_plain(model, texts[::7])
    for text, logprobs in zip(continued, lm.token_logprobs(continued), strict=True):
        expected = plain_token_logprobs(model, text.tokens)
        assert_close(logprobs, expected)
    evaluate(continued)  # their last tokens were scored and not forwarded
    assert_equals_plain(model, continued[::7])
    done = lm.stats - before
    assert done.tokens_computed == num_distinct(texts + continued)
    assert done.tokens_recomputed == 0
    assert done.tokens_fetched > distinct // 2
    assert done.bytes_held <= distinct // 10 * TOKEN_BYTES
    assert done.bytes_held + done.host_bytes_held >= done.tokens_computed * TOKEN_BYTES
    assert peaks["device"] <= (distinct // 10 + pass_tokens) * TOKEN_BYTES
    check_is_sound(lm)


def test_what_comes_back_is_what_went(model, tokenizer):
    """Bit by bit, log-probabilities included: no row of logits is computed again for them."""
    lm = make_lm(model, tokenizer, 30, 64, host_tokens=1000)
    text = Text("Question: What is 12 + 34? ", lm)

    def read():
        found = text.model_repr
        layers = found.past_key_values().layers
        return [found.token_logprobs, found.hidden_states, *(t for layer in layers for t in (layer.keys, layer.values))]

    expected = read()
    evaluate([Text(f"{number} cats sat on the mat", lm) for number in range(20)])
    assert lm.session.evaluator.forest.num_computed(text.tokens) == 0
    before = lm.stats
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(read(), expected, strict=True))
    done = lm.stats - before
    assert (done.tokens_computed, done.logit_rows, done.tokens_fetched) == (0, 0, 2 * len(text.tokens))  # states, keys


def test_the_second_pool_lets_go_of_what_was_used_longest_ago(model, tokenizer):
    """No room on the device, and for two of three texts in the second pool."""
    strings = ["The cat sat on the mat", "General Kenobi was here", "Question: What is it?"]
    longest = max(len(Text(string, LM(model, tokenizer)).tokens) for string in strings)
    lm = make_lm(model, tokenizer, 0, host_tokens=2 * longest)
    first, second, third = (Text(string, lm) for string in strings)
    evaluate([first, second])
    before = lm.stats
    evaluate(first)
    assert (lm.stats - before).tokens_fetched == len(first.tokens)
    evaluate(third)
    before = lm.stats
    for text in (first, third):
        text.model_repr.past_key_values()
    assert (lm.stats - before).tokens_computed == 0
    second.model_repr.past_key_values()
    assert (lm.stats - before).tokens_recomputed > 0


@pytest.mark.parametrize("host_tokens", [1, 25, 60, 120])
def test_the_second_pool_stays_within_its_budget(host_tokens, model, tokenizer):
    """The budget holds even while rows move, and no storage is larger than its counted bytes."""
    lm = make_lm(model, tokenizer, 40, host_tokens=host_tokens)
    peaks = watch_peaks(lm)
    texts = wide_forest(lm)
    for start in range(0, len(texts), 10):
        evaluate(texts[start : start + 10])
        evaluate(texts[start // 2])
        check_is_sound(lm)
    assert 0 < peaks["host"] <= host_tokens * TOKEN_BYTES
    gc.collect()
    blocks = lm.session.evaluator.host.blocks
    tensors = [tensor for block in blocks for _, tensor in tensors_of(block)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == lm.stats.host_bytes_held


@pytest.mark.parametrize("num_tokens", [20, 30, 45])
@pytest.mark.parametrize("host_tokens", [20, 40])
def test_what_is_about_to_move_back_is_not_pushed_out(host_tokens, num_tokens, model, tokenizer):
    """Both pools are full: rows that leave the device to make room, states too, replace other rows."""
    lm = make_lm(model, tokenizer, num_tokens, 1, host_tokens=host_tokens)
    texts = wide_forest(lm, num_branches=3, num_leaves=3)
    lm.token_logprobs(texts)
    for text in texts * 2:
        assert text.model_repr.token_logprobs.shape == (len(text.tokens),)
        assert text.model_repr.past_key_values().get_seq_length() == len(text.tokens)
        check_is_sound(lm)


def test_what_a_part_of_a_text_continues_stays_when_the_part_moves_back(model, tokenizer):
    """Room for the first text and a beginning of the second, whose first span is what went unused for longest.

    (root) --+-- 30 tokens (in the second pool) -- 1 (asked for)
             +-- 20 tokens (on the device) -- 20 tokens (in the second pool) -- 1 (asked for)
             +-- 20 tokens (on the device)
    """
    lm = make_lm(model, tokenizer, 60, 64, host_tokens=1000)
    ids = tuple(range(10, 50))
    first, stem, second, other = (
        Text.from_tokens(ids, lm) for ids in (tuple(range(100, 130)), ids[:20], ids, tuple(range(200, 220)))
    )
    for text in (stem, second, first, stem, other):
        evaluate(text)
    spans = [lm.session.evaluator.forest.insert(text.tokens) for text in (first, stem, second, other)]
    assert [span.keys_values is None for span in spans] == [True, False, True, False]
    add = lm.session.evaluator.memory.add
    lm.session.evaluator.memory.add = lambda blocks: (add(blocks), check_is_sound(lm))
    evaluate([Text.from_tokens((*text.tokens, 7), lm) for text in (first, second)])
    assert lm.stats.tokens_recomputed == 0


def test_what_would_not_fit_pushes_nothing_out(model, tokenizer):
    """A text of three times the second pool's budget passes through; the rows there stay."""
    lm = make_lm(model, tokenizer, 0, 64, host_tokens=20)
    small = Text("The cat sat", lm)
    evaluate(small)
    evaluate(Text.from_tokens(range(5, 65), lm))
    check_is_sound(lm)
    before = lm.stats
    cache = small.model_repr.past_key_values()
    assert cache.get_seq_length() == len(small.tokens)
    assert (lm.stats - before).tokens_computed == 0


def test_a_pass_that_goes_is_one_block_and_one_copy_a_tensor(model, tokenizer, monkeypatch):
    """However many spans it has; likewise on the way back."""
    lm = make_lm(model, tokenizer, 0, 1000, host_tokens=1000)
    copied = []
    copy = Location.copy
    monkeypatch.setattr(Location, "copy", lambda self, tensor: copied.append(tensor) or copy(self, tensor))
    before = lm.stats
    texts = wide_forest(lm, num_branches=3)
    evaluate(texts)
    assert len(list(lm.session.evaluator.forest.spans())) > 20
    assert len(lm.session.evaluator.host.blocks) == 2  # keys and values; states
    assert len(copied) == 2 * 2 + 3  # of each of two layers; hidden states, log-probabilities, argmax flags
    lm.session.evaluator.memory.max_bytes = 1000 * TOKEN_BYTES
    evaluate(texts)
    assert len(copied) == (2 * 2 + 3) + 3  # states
    evaluate([text + " And so on." for text in texts])
    assert len(copied) == (2 * 2 + 3) + 3 + 2 * 2  # keys and values
    assert lm.stats.host_bytes_held < KEY_BYTES * 100
    assert (lm.stats - before).forward_passes == 2


def test_scores_move_with_their_tokens(model, tokenizer):
    """Half of a pass's states go to the second pool, so what stays is made smaller; then they come back."""
    starts = [(first, 6, 7)[: 1 + first % 3] for first in range(20, 30)]
    ids = [(*start, *plain_greedy(model, start, 3), 8, 9) for start in starts]
    expected = [plain_is_argmax(model, own) for own in ids]
    assert sum(int(flags.sum()) for flags in expected) >= 30
    lm = make_lm(model, tokenizer, 1000, 1000, host_tokens=1000)
    texts = [Text.from_tokens(own, lm) for own in ids]
    first = lm.token_scores(texts)
    lm.session.evaluator.memory.max_bytes = 40 * STATE_BYTES  # of 70 tokens
    evaluate(Text("Something else.", lm))
    num_moved = sum(len(span.token_ids) for span in lm.session.evaluator.forest.spans() if span.host_states is not None)
    assert 20 < num_moved < 60
    lm.session.evaluator.memory.max_bytes = 1000 * TOKEN_BYTES
    before = lm.stats
    for scores, earlier, flags in zip(lm.token_scores(texts), first, expected, strict=True):
        assert torch.equal(scores.is_argmax.cpu(), flags)
        assert_close(scores.logprobs, earlier.logprobs, atol=0)
    done = lm.stats - before
    assert (done.logit_rows, done.tokens_computed, done.tokens_fetched > 0) == (0, 0, True)


def test_a_store_serves_what_neither_pool_holds(model, tokenizer):
    """Three tiers: room for a tenth of the texts on the device and in host memory, and all of them in the store."""
    token_ids = [tuple(range(first, first + 40)) for first in range(5, 15)]
    lm = make_lm(model, tokenizer, 10, 64, host_tokens=40, store=MemoryStore())
    texts = [Text.from_tokens(ids, lm) for ids in token_ids]
    evaluate(texts)
    before = lm.stats
    for text in texts[::-1]:
        assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    continued = [Text.from_tokens([*ids, 7], lm) for ids in token_ids]
    evaluate(continued)
    done = lm.stats - before
    assert done.tokens_computed == len(texts)
    assert done.tokens_fetched >= 40
    assert done.tokens_loaded >= 40
    assert_equals_plain(model, continued)
    assert lm.stats.host_bytes_held <= 40 * TOKEN_BYTES
    check_is_sound(lm)


def test_a_refused_request_forgets_nothing_of_what_was_dropped(model, tokenizer):
    lm = make_lm(model, tokenizer, 0)
    texts = wide_forest(lm, num_branches=4)
    evaluate(texts)
    with pytest.raises(TokenIdError):
        lm.next_token_logprobs(texts[:1], [[10**6]])
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    assert done.tokens_recomputed == done.tokens_computed == num_distinct(texts)


@pytest.mark.parametrize("num_copies", [0, 1, 3, 5])
def test_a_failed_move_leaves_nothing_half_moved(num_copies, model, tokenizer, monkeypatch):
    """On the way out everything is dropped; on the way back everything stays where it is, and comes later."""
    lm = make_lm(model, tokenizer, 60, pass_tokens=64, host_tokens=1000)
    texts = wide_forest(lm)

    def fail_after(patch):
        copy, left = Location.copy, iter(range(num_copies))

        def fail(self, tensor):
            if next(left, None) is None:
                raise torch.OutOfMemoryError
            return copy(self, tensor)

        patch.setattr(Location, "copy", fail)

    with monkeypatch.context() as patch:
        fail_after(patch)
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(texts)
    assert lm.stats.bytes_held == lm.stats.host_bytes_held == 0

    evaluate(texts)
    before = lm.stats
    fetch = HostMemory.fetch

    def failing_fetch(self, forest, planned):
        with monkeypatch.context() as patch:
            fail_after(patch)
            return fetch(self, forest, planned)

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "fetch", failing_fetch)
        with pytest.raises(torch.OutOfMemoryError):
            [text.model_repr.past_key_values() for text in texts]
    check_is_sound(lm)
    assert_equals_plain(model, texts[::5])
    assert (lm.stats - before).tokens_computed == 0


def test_a_pin_brings_a_text_back_and_holds_it_on_the_device(model, tokenizer):
    lm = make_lm(model, tokenizer, 60, host_tokens=1000)
    texts = wide_forest(lm)
    evaluate(texts)
    before = lm.stats
    pin = texts[0].pin()
    assert (lm.stats - before).tokens_fetched >= len(texts[0].tokens) - len(texts[1].tokens)
    evaluate(texts[::-1])
    assert lm.session.evaluator.forest.num_computed(texts[0].tokens) == len(texts[0].tokens)
    assert (lm.stats - before).tokens_computed == 0
    pin.release()
    lm.clear()
    assert lm.stats.bytes_held == lm.stats.host_bytes_held == 0


def test_what_moves_back_leaves_room_for_pins(model, tokenizer):
    """60 of 100 tokens are pinned. Of six texts of 19 more tokens two move back at a time, not one and not six."""
    lm = make_lm(model, tokenizer, 100, 16, host_tokens=1000)
    stem = tuple(range(10, 70))
    leaves = [(*stem, *range(first, first + 19)) for first in range(100, 220, 20)]
    texts = [Text.from_tokens(ids, lm) for ids in leaves]
    with Text.from_tokens(stem, lm).pin():
        evaluate(texts)
        peaks = watch_peaks(lm)
        before = lm.stats
        evaluate([Text.from_tokens((*ids, 7), lm) for ids in leaves])
        done = lm.stats - before
        assert done.tokens_computed == len(leaves)
        assert done.forward_passes == len(leaves) // 2
        assert peaks["device"] <= (100 + 16) * TOKEN_BYTES


@pytest.mark.timeout(60)
def test_texts_that_cannot_go_on_together_go_on_alone(model, tokenizer, monkeypatch):
    """Whatever is let go of meanwhile: an evaluation ends."""
    monkeypatch.setattr(
        "backprompt.evaluation.computation.is_cut_off", lambda spans: len({span.path()[0] for span in spans}) > 1
    )
    lm = make_lm(model, tokenizer, 1000, 64)
    texts = [Text.from_tokens(range(first, first + 10), lm) for first in (10, 20, 30)]
    before = lm.stats
    evaluate(texts)
    done = lm.stats - before
    assert (done.tokens_computed, done.forward_passes) == (30, 3)


def test_the_second_pool_is_off_where_the_model_lies_in_host_memory(model, tokenizer):
    assert LM(FAMILIES["gpt2"]().cpu(), tokenizer).session.evaluator.host.max_bytes == 0
    assert default_host_bytes(torch.device("mps")) == 0
    assert 10**6 < default_host_bytes(torch.device("cuda")) < 10**13
    assert LM(model, tokenizer, host_memory_bytes="2 GB").session.evaluator.host.max_bytes == 2 * 10**9
    with pytest.raises(ValueError, match="host_memory_bytes must be"):
        LM(model, tokenizer, host_memory_bytes="some")


def test_pinned_memory_is_refused_for_a_model_on_the_cpu_before_anything_else():
    with pytest.raises(ValueError, match="lies on 'cpu'"):
        LM(FAMILIES["gpt2"]().cpu(), "no tokenizer at all", pin_memory=True)
    with pytest.raises(ValueError, match="lies on 'cpu'"):
        load("a model that is not there", device="cpu", pin_memory=True)


def test_all_that_moves_between_the_pools_is_page_locked(model, tokenizer, monkeypatch):
    """Also the argmax flags, which are small; `has_logprobs` stays on the CPU, whichever pool the block lies in.

    Without CUDA nothing can be page-locked, so here tensors are only noted that would be.
    """
    page_locked = {}

    def empty(self, shape, dtype):
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        if self.is_pinned:
            page_locked[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def of(tensor):
        return Location(tensor.device, tensor.untyped_storage().data_ptr() in page_locked)

    monkeypatch.setattr(Location, "empty", empty)
    monkeypatch.setattr(Location, "of", of)
    monkeypatch.setattr("backprompt.session.session.check_can_pin", lambda device: None)
    lm = make_lm(model, tokenizer, 60, host_tokens=100, pin_memory=True)
    texts = wide_forest(lm)
    for start in range(0, len(texts), 10):
        evaluate(texts[start : start + 10])
    for is_host, pool in enumerate((lm.session.evaluator.memory, lm.session.evaluator.host)):
        names = {}
        for name, tensor in (named for block in pool.blocks for named in tensors_of(block)):
            names.setdefault(name, set()).add(of(tensor).is_pinned)
        expected = {name: {bool(is_host)} for name in ("keys", "values", "hidden", "logprobs", "is_argmax")}
        assert names == {**expected, "has_logprobs": {False}}


@pytest.mark.cuda
@pytest.mark.parametrize("is_pinned", [False, True])
def test_on_cuda_the_second_pool_lies_on_the_host(is_pinned, tokenizer):
    """Also the blocks that were made smaller; numbers read from the host are right."""
    model = FAMILIES["gpt2"]().cuda()
    lm = make_lm(model, tokenizer, 60, host_tokens=100, pin_memory=is_pinned)
    texts = wide_forest(lm)
    for start in range(0, len(texts), 10):
        evaluate(texts[start : start + 10])
    blocks = lm.session.evaluator.host.blocks
    assert blocks
    for block in blocks:
        for name, tensor in tensors_of(block):
            assert tensor.device.type == "cpu"
            assert tensor.is_pinned() == (is_pinned and name != "has_logprobs"), name
    before = lm.stats
    for text in texts[-20:]:
        plain = plain_logits(model, text.tokens)[-1]
        assert_close(text.logits, plain, atol=1e-3)  # ATOL was measured on the CPU
    assert (lm.stats - before).tokens_fetched > 0


# Pins


def test_a_pin_holds_a_text_and_is_counted(model, tokenizer):
    lm = make_lm(model, tokenizer, 60)
    context = Text("Question: What is 12 + 34? ", lm)
    with context.pin() as pin:
        assert pin.num_bytes == len(context.tokens) * TOKEN_BYTES
        evaluate([Text(f"{number} cats sat on the mat", lm) for number in range(50)])
        before = lm.stats
        evaluate(context + "46")
        kept = len(context.tokens) - 1  # the last token may merge with what follows
        assert (lm.stats - before).tokens_computed <= len((context + "46").tokens) - kept
        assert "held" in repr(pin)
    assert pin.num_bytes == 0
    assert "released" in repr(pin)
    pin.release()
    evaluate([Text(f"{number} cats sat on the mat", lm) for number in range(50, 100)])
    before = lm.stats
    context.pin().release()
    assert (lm.stats - before).tokens_recomputed > 0


def test_pins_over_the_budget_are_refused_before_anything_is_computed(model, tokenizer):
    lm = make_lm(model, tokenizer, 30)
    first, second = (
        Text("Question: What is 12 + 34?", lm),
        Text("The cat sat on the mat and would not go away at all.", lm),
    )
    pin = first.pin()
    before = lm.stats
    with pytest.raises(MemoryBudgetError, match="Release other pins") as error:
        second.pin()
    assert isinstance(error.value, MemoryError)
    assert (lm.stats - before).tokens_computed == 0
    first.pin().release()  # a pinned text takes no more bytes
    pin.release()
    second.pin().release()


def test_a_pin_of_what_was_cleared_or_changed_holds_nothing(tokenizer):
    model = FAMILIES["gpt2"]()
    lm = make_lm(model, tokenizer, 100)
    text = Text("The cat sat", lm)
    cleared = text.pin()
    lm.clear()
    assert lm.stats.bytes_held == 0
    assert cleared.num_bytes == 0
    assert "released" in repr(cleared)
    cleared.release()
    changed = text.pin()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight += 0.1
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    changed.release()
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])


# Values of the budget


@pytest.mark.parametrize(
    ("given_", "num_bytes"),
    [(0, 0), (123, 123), ("123", 123), ("2 GB", 2 * 10**9), ("1.5kb", 1500), ("2 GiB", 2 << 30), ("3M", 3 * 10**6)],
)
def test_budgets_that_are_understood(given_, num_bytes):
    assert parse_bytes(given_) == num_bytes


@pytest.mark.parametrize("given_", [-1, 1.5, True, "", "two", "-1 GB", "1 PB", None, "nan"])
def test_budgets_that_are_not(given_):
    with pytest.raises(ValueError, match="memory_bytes must be"):
        parse_bytes(given_)


def test_the_default_is_a_share_of_what_is_free(model, tokenizer):
    default = default_max_bytes(DEVICE)
    assert 10**6 < default < 10**13
    assert LM(model, tokenizer).session.evaluator.memory.max_bytes == pytest.approx(default, rel=0.5)
    with pytest.raises(ValueError, match="2 GB"):
        LM(model, tokenizer, memory_bytes="a lot")


@settings(max_examples=up_to(30), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_tokens=st.integers(0, 150), host_tokens=st.integers(0, 150), order=st.permutations(range(9)))
def test_no_budget_costs_more_than_one_text_after_the_other_would(num_tokens, host_tokens, order, model, tokenizer):
    """Whatever is dropped: an evaluation never forwards more than the texts' own tokens, each text alone."""
    lm = make_lm(model, tokenizer, num_tokens, host_tokens=host_tokens)
    texts = [wide_forest(lm, num_branches=3, num_leaves=3)[idx] for idx in order]
    before = lm.stats
    evaluate(texts)
    assert (lm.stats - before).tokens_computed <= sum(len(text.tokens) for text in texts)


def test_what_torch_keeps_of_a_gpu_and_does_not_use_is_free(monkeypatch):
    """After a step of training most of the memory may lie in torch's pool."""
    found = {"mem_get_info": (10, 100), "memory_reserved": 80, "memory_allocated": 30}
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 10 + 80 - 30
