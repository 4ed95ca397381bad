"""The LM: what it counts, holds, returns and refuses, and what a failure leaves behind.

Work is counted where GPT-2 does it (`calls`), not where the library says so.
"""

import copy
import dataclasses
import gc
import pickle
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2LMHeadModel,
    GPT2Model,
)

from backprompt import (
    LM,
    EmptyTextError,
    NonFiniteError,
    NotPicklableError,
    Text,
    TextTooLongError,
    TextTypeError,
    TokenIdError,
    TokenizerError,
    UnboundTextError,
    evaluate,
    load,
)
from backprompt.evaluation.pools import CANDIDATE_BYTES, CANDIDATE_END_BYTES
from backprompt.memory.blocks import KeysValues, States
from comparing import assert_close, assert_equals_plain, num_distinct, num_distinct_ids
from reference import plain_greedy, plain_is_argmax, plain_logits, plain_token_logprobs
from tiny_models import FAMILIES, MAX_POSITIONS, VOCAB_SIZE
from tiny_tokenizers import TOKENIZERS

ROW_BYTES = VOCAB_SIZE * 4  # of logits
FOUR_LMS = {name: LM(FAMILIES["gpt2"](), make()) for name, make in TOKENIZERS.items()}
TOKEN_BYTES = 2 * (2 * 32 * 4) + 32 * 4 + 4 + 1 + 1  # keys, values, hidden state, log-probability, argmax, known


@pytest.fixture
def model():
    return FAMILIES["gpt2"]()


@pytest.fixture
def lm(model, tokenizer):
    """Probed already, and empty."""
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    evaluate(Text("probe", lm))
    lm.clear()
    return lm


@pytest.fixture
def calls(monkeypatch, lm):
    """How many rows went through GPT-2's decoder and its head, a number a call; `errors[n]` is what call n raises."""
    calls = SimpleNamespace(bodies=[], heads=[], errors={})
    forward_body, forward_head = GPT2Model.forward, GPT2LMHeadModel.forward

    def body(self, input_ids=None, **kwargs):
        calls.bodies.append(input_ids.shape[1])
        if len(calls.bodies) in calls.errors:
            raise calls.errors.pop(len(calls.bodies))
        return forward_body(self, input_ids=input_ids, **kwargs)

    def head(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is not None:
            calls.heads.append(inputs_embeds.shape[1])
        return forward_head(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", body)
    monkeypatch.setattr(GPT2LMHeadModel, "forward", head)
    return calls


def forest(lm):
    """One root, two branches with three leaves each, and one text that shares nothing; 4 to 46 tokens."""
    root = Text("Question: What is 12 + 34?", lm)
    leaves = [root + twig + leaf for twig in (" The cat sat", " General") for leaf in (" on the mat", " Kenobi", "!")]
    return [root, *leaves, Text("One alone.", lm)]


# Counting


def test_stats_count_tokens_passes_and_rows_where_they_happen(lm, calls):
    texts = forest(lm)
    before = lm.stats
    started = time.perf_counter()
    evaluate(texts)
    evaluate(texts[:2])
    wall = time.perf_counter() - started
    done = lm.stats - before

    assert done.tokens_requested == sum(len(text.tokens) for text in [*texts, *texts[:2]])
    assert done.tokens_computed == sum(calls.bodies) == num_distinct(texts)
    assert done.tokens_reused == done.tokens_requested - done.tokens_computed
    assert done.forward_passes == len(calls.bodies)
    assert max(calls.bodies) <= 16
    assert done.logit_rows == sum(calls.heads) == 0
    assert 0 < done.seconds < wall

    before = lm.stats
    assert texts[1].logits.shape == (VOCAB_SIZE,)
    done = lm.stats - before
    assert done.logit_rows == sum(calls.heads) == 1
    assert done.seconds > 0
    assert done.tokens_computed == done.forward_passes == 0
    assert done.result_bytes_held == ROW_BYTES


def test_stats_are_a_frozen_moment(lm):
    before = lm.stats
    evaluate(Text("The cat sat", lm))
    after = lm.stats
    assert before.tokens_computed != after.tokens_computed == lm.stats.tokens_computed
    with pytest.raises(dataclasses.FrozenInstanceError):
        after.seconds = 0.0

    difference = after - before
    assert difference.kernel == after.kernel == "flash_cpu"
    for field in dataclasses.fields(after):
        if field.name not in ("kernel", "linears"):
            assert getattr(difference, field.name) == getattr(after, field.name) - getattr(before, field.name)


def test_the_probe_is_not_counted(model, tokenizer):
    lm = LM(model, tokenizer)
    assert lm.stats.kernel == "none yet"
    text = Text("The cat sat", lm)
    evaluate(text)
    stats = lm.stats
    assert (stats.tokens_computed, stats.forward_passes, stats.logit_rows) == (len(text.tokens), 1, 0)


def test_what_is_all_cached_forwards_nothing(lm, calls):
    texts = forest(lm)
    evaluate(texts)
    text, length = texts[1], len(texts[1].tokens)
    calls.bodies.clear()
    evaluate(texts)
    assert [each.logits.shape for each in texts] == [(VOCAB_SIZE,)] * len(texts)
    # Texts built differently, and beginnings of evaluated texts.
    evaluate([Text("", lm) + text, Text(text.string, lm), Text("Question: What", lm)])
    cut = [Text.from_tokens(text.tokens[:end], lm) for end in range(1, length)]
    assert len(evaluate(cut)) == length - 1
    assert calls.bodies == []


def test_a_longer_text_forwards_only_what_is_new(lm, calls):
    text = Text("Question: What is 12 + 34?", lm)
    evaluate(text)
    calls.bodies.clear()
    longer = text + " The cat"
    evaluate([longer, longer])
    assert calls.bodies == [len(longer.tokens) - len(text.tokens)]


def test_tokens_reused_counts_no_less_than_nothing(lm):
    """Tokens that are computed again after `clear` count as requested again."""
    text = Text("The cat sat", lm)
    before = lm.stats
    representation = evaluate(text)
    lm.clear()
    representation.logits  # noqa: B018
    done = lm.stats - before
    assert done.tokens_requested == done.tokens_computed == 2 * len(text.tokens)
    assert done.tokens_reused == 0


# Bytes


def all_blocks():
    """The blocks of all LMs that are alive."""
    gc.collect()
    return {found for found in gc.get_objects() if type(found) in (KeysValues, States)}


def tensors_of(block):
    return list(block.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gpt_oss"])
def test_bytes_held_are_those_of_distinct_tokens(family, dtype, tokenizer):
    """Keys, values and final hidden states: 5% is for log-probabilities. Counted in the storages, too."""
    model = FAMILIES[family]().to(dtype)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token_bytes = (2 * config.num_hidden_layers * kv_heads * head_dim + config.hidden_size) * dtype.itemsize

    others = all_blocks()
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    texts = forest(lm)
    evaluate(texts[3])  # the forest then branches off in the middle of a span
    evaluate(texts)
    texts[1].token_logprobs  # noqa: B018
    expected = num_distinct(texts) * token_bytes
    assert expected <= lm.stats.bytes_held <= 1.05 * expected

    tensors = [tensor for block in all_blocks() - others for tensor in tensors_of(block)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == lm.stats.bytes_held


def test_num_bytes_of_a_text_are_those_of_its_tokens(lm):
    texts = forest(lm)
    evaluate(texts)
    distinct = num_distinct(texts)
    for text in texts:
        share = lm.stats.bytes_held * len(text.tokens) / distinct
        assert text.model_repr.num_bytes == pytest.approx(share, rel=0.01)


def test_clear_frees_all_and_what_is_asked_for_later_is_computed_again(lm, model, calls):
    texts = forest(lm)
    representations = evaluate(texts)
    logits = [representation.logits for representation in representations]
    logprobs = texts[1].token_logprobs
    lm.clear()
    assert lm.stats.bytes_held == lm.stats.result_bytes_held == 0

    calls.bodies.clear()
    assert_close(representations[1].logits, logits[1])
    assert sum(calls.bodies) == len(texts[1].tokens)
    assert_close(texts[1].token_logprobs, logprobs)
    assert_equals_plain(model, texts)


# Rows of the head


def test_rows_are_computed_only_where_asked_and_once(lm, model, calls):
    """A text of n tokens: one row for its logits, n - 1 for its log-probabilities, and none a second time."""
    text = Text("Question: What is 12 + 34?", lm)
    representation = evaluate(text)
    for read, rows in [
        (lambda: representation.logits, 1),
        (lambda: representation.token_logprobs, len(text.tokens) - 1),
        (lambda: representation.all_logits(2, 5), 3),
        (lambda: representation.all_logits(-1), 1),
    ]:
        before = lm.stats
        read()
        assert (lm.stats - before).logit_rows == rows
    calls.heads.clear()
    assert_close(text.logits, plain_logits(model, text.tokens)[-1])
    assert text.token_logprobs.shape == (len(text.tokens),)
    assert calls.heads == []


def test_the_row_that_predicts_many_first_tokens_is_computed_once(lm, model, calls):
    """Forty completions of one prompt: the rows that predict anything are the proper beginnings of texts."""
    prompt = Text("Question: What is 12 + 34? Answer:", lm)
    texts = [prompt + f" {number}" for number in range(100, 140)]
    evaluate(texts)
    for text in texts:
        logprobs = plain_token_logprobs(model, text.tokens)
        assert_close(text.token_logprobs, logprobs)
    assert sum(calls.heads) == num_distinct_ids(text.tokens[:-1] for text in texts)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_scored_from_a_start_on_and_no_other_rows_are_computed(data, lm, model):
    """Any texts, any starts, in two calls: the plain numbers; rows are the distinct beginnings before wanted tokens."""
    lm.clear()
    texts = forest(lm)
    evaluate(texts)
    rows: set[tuple[int, ...]] = set()
    before = lm.stats
    for _ in range(2):
        chosen = data.draw(st.lists(st.sampled_from(texts), max_size=6))
        starts = [data.draw(st.integers(0, len(text.tokens))) for text in chosen]
        for text, start, logprobs in zip(chosen, starts, lm.token_logprobs(chosen, starts), strict=True):
            expected = plain_token_logprobs(model, text.tokens)[start:]
            assert_close(logprobs, expected)
            rows |= {text.tokens[:end] for end in range(max(1, start), len(text.tokens))}
    assert (lm.stats - before).logit_rows == len(rows)


def test_a_last_token_is_scored_without_being_forwarded_and_what_is_known_of_it_is_kept(model, lm):
    lm.clear()
    prompt = "The cat sat on the"
    texts = [Text(prompt, lm) + Text.from_tokens([token_id], lm) for token_id in range(40, 60)]
    num_before = len(Text(prompt, lm).tokens)
    before = lm.stats
    found = torch.cat(lm.token_logprobs(texts, [num_before] * 20))
    done = lm.stats - before
    assert (done.tokens_computed, done.logit_rows) == (num_before, 1)
    expected = [plain_token_logprobs(model, text.tokens)[-1] for text in texts]
    assert_close(found, torch.stack(expected))
    torch.testing.assert_close(torch.cat(lm.token_logprobs(texts, [num_before] * 20)), found, rtol=0, atol=0)
    assert (lm.stats - before).logit_rows == 1
    evaluate(texts[:2])  # now two are forwarded: their log-probabilities are those that were scored, bit by bit
    assert [text.token_logprobs[-1] for text in texts[:2]] == found[:2].tolist()
    assert (lm.stats - before).logit_rows == num_before  # those before the last were not asked for until now
    assert lm.stats.result_bytes_held > 0
    lm.clear()
    assert lm.stats.result_bytes_held == 0


def test_a_scored_text_may_have_one_token_more_than_the_model_has_positions(model, lm):
    ids = [*range(5, 45)] * (MAX_POSITIONS // 40 + 1)
    text = Text.from_tokens(ids[: MAX_POSITIONS + 1], lm)
    (found,) = lm.token_logprobs([text], [MAX_POSITIONS])
    expected = plain_logits(model, text.tokens[:-1])[-1].log_softmax(dim=-1)[text.tokens[-1]]
    assert_close(found[0], expected)
    with pytest.raises(TextTooLongError, match="Shorten the text by 1"):
        lm.token_logprobs([text + Text.from_tokens([5], lm)])
    with pytest.raises(TextTooLongError):
        evaluate(text)


def test_one_token_more_is_refused_where_it_would_be_forwarded(lm):
    """Nothing is scored; the text ends in a group; no one token stands before the last one."""
    ids = [*range(5, 45)] * (MAX_POSITIONS // 40 + 1)
    full = Text.from_tokens(ids[:MAX_POSITIONS], lm)
    long = Text.from_tokens(ids[: MAX_POSITIONS + 1], lm)
    start = Text.from_tokens(ids[: MAX_POSITIONS - 1], lm)
    before = lm.stats
    for text, starts in [
        (long, [MAX_POSITIONS + 1]),
        (start + (Text.from_tokens([1, 2], lm) | Text.from_tokens([3], lm)), None),
        (start + (Text.from_tokens([1], lm) | Text.from_tokens([3], lm)) + Text.from_tokens([4], lm), None),
    ]:
        with pytest.raises(TextTooLongError, match="Shorten the text by 1"):
            lm.token_logprobs([text], starts)
    with pytest.raises(TextTooLongError):
        lm.token_logprobs([long, long], [5, MAX_POSITIONS + 1])
    assert (lm.stats - before).forward_passes == 0
    assert len(lm.token_logprobs([full], [MAX_POSITIONS])[0]) == 0


def test_next_token_logprobs_are_float32_whatever_the_default_dtype(lm):
    torch.set_default_dtype(torch.bfloat16)
    try:
        (found,) = lm.next_token_logprobs([Text("The cat", lm)], [[5, 6]])
        (scored,) = lm.token_logprobs([Text("The cat", lm)], [1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype is scored.dtype is torch.float32


BEGINNINGS = {
    "evaluate": lambda text: evaluate(text),
    "logits": lambda text: text.logits,
    "token_logprobs": lambda text: text.lm.token_logprobs([text]),
    "next_token_logprobs": lambda text: text.lm.next_token_logprobs([text], [[1, 2]]),
    "generate": lambda text: text.generate(max_new_tokens=3),
    "pin": lambda text: text.pin(),
}


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_an_evaluation_is_counted_once(begin, model, tokenizer):
    """Any beginning and any number of passes count once; evaluating a text that is held counts as none."""
    lm = LM(model, tokenizer, max_tokens_per_forward=2)
    for number, string in enumerate(["The cat sat", "A dog ran off", "Somebody"], 1):
        begin(Text(string, lm))
        assert lm.session.evaluator.forest.evaluation == number
    begin(Text("The cat sat", lm))
    begin(Text("Nobody", lm))
    assert lm.session.evaluator.forest.evaluation == 4


def test_results_do_not_keep_what_is_forgotten_alive(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.evaluation.computation.MAX_EMPTY_SPANS", 10)
    lm = LM(model, tokenizer, memory_bytes=0)
    for first in range(40):
        lm.token_logprobs([Text.from_tokens([first, 5, 6, 7], lm)])
    evaluator = lm.session.evaluator
    candidates = evaluator.computation.pools.candidates
    num_known = sum(candidates.get(span, 7) is not None for span in evaluator.forest.spans())
    assert candidates.num_bytes == num_known * (CANDIDATE_END_BYTES + CANDIDATE_BYTES) > 0
    assert num_known <= 20


def test_what_is_known_of_tokens_not_forwarded_is_bounded(model, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.evaluation.pools.MAX_CANDIDATE_BYTES", CANDIDATE_END_BYTES + 2 * CANDIDATE_BYTES)
    lm = LM(model, tokenizer)
    texts = [Text("The cat", lm) + Text.from_tokens([token_id], lm) for token_id in range(40, 60)]
    for chosen in (texts[:2], texts, texts[5:]):
        for text, logprobs in zip(chosen, lm.token_logprobs(chosen), strict=True):
            expected = plain_token_logprobs(model, text.tokens)
            assert_close(logprobs, expected)
        assert lm.stats.result_bytes_held <= CANDIDATE_END_BYTES + 2 * CANDIDATE_BYTES


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scores_say_which_tokens_are_the_most_probable(data, lm, model):
    """Greedy runs anywhere in texts that share beginnings and branch off within them."""
    lm.clear()
    ids, texts, starts = (5, 6, 7), [], []
    for _ in range(data.draw(st.integers(1, 4))):
        ids = ids[: data.draw(st.integers(1, len(ids)))]
        ids += data.draw(st.lists(st.integers(0, 9), max_size=3).map(tuple))
        ids += plain_greedy(model, ids, data.draw(st.integers(0, 3)))
        texts.append(Text.from_tokens(ids, lm))
        starts.append(data.draw(st.integers(0, len(ids))))
    for text, start, scores in zip(texts, starts, lm.token_scores(texts, starts), strict=True):
        assert torch.equal(scores.is_argmax, plain_is_argmax(model, text.tokens)[start:])
        expected = plain_token_logprobs(model, text.tokens)[start:]
        assert_close(scores.logprobs, expected)


def test_of_equally_probable_tokens_the_lowest_id_is_the_argmax(tokenizer):
    """As `logits.argmax` chooses."""
    model = FAMILIES["gpt2"]()
    with torch.no_grad():
        best = int(plain_logits(model, (5, 6, 7))[-1].argmax())
        twin = (best + 150) % VOCAB_SIZE
        model.transformer.wte.weight[twin] = model.transformer.wte.weight[best]  # the head is tied to it
    lm = LM(model, tokenizer)
    ids = sorted([best, twin])
    found = lm.token_scores([Text.from_tokens((5, 6, 7, token_id), lm) for token_id in ids], [3, 3])
    assert found[0].logprobs == found[1].logprobs
    assert [scores.is_argmax.tolist() for scores in found] == [[True], [False]]


def test_starts_that_fit_no_text_are_refused_before_anything_runs(lm, calls):
    texts = forest(lm)[:2]
    for starts, message in [([0], "1 elements for 2"), ([0, -1], "not -1"), ([0, len(texts[1].tokens) + 1], "must be")]:
        with pytest.raises(ValueError, match=message):
            lm.token_logprobs(texts, starts)
    assert calls.bodies == []
    assert lm.token_logprobs([]) == []


def test_a_start_that_is_a_text(model, tokenizer):
    """Scored from behind its tokens; refused where a token spans the join."""
    lm = LM(model, tokenizer)
    prompt = Text("The cat sat on the", lm)
    texts = [prompt + " mat", prompt + " mat, and the cat", prompt]
    found = lm.token_logprobs(texts, [prompt, len(prompt.tokens), prompt])
    for text, logprobs in zip(texts, found, strict=True):
        expected = plain_token_logprobs(model, text.tokens)[len(prompt.tokens) :]
        assert_close(logprobs, expected)
    scores = lm.token_scores(texts, [Text(prompt.string)] * 3)  # without an LM it is of this one
    assert [score.logprobs.tolist() for score in scores] == [logprobs.tolist() for logprobs in found]
    before = lm.stats
    merging = Text("The other c", lm)
    assert (merging + "at").tokens[: len(merging.tokens)] != merging.tokens
    with pytest.raises(
        ValueError, match=r"starts\[1\], Text\('The other c'\), is not the beginning of .*token \d+ of the text"
    ):
        lm.token_logprobs([texts[0], merging + "at"], [prompt, merging])
    with pytest.raises(ValueError, match="tokens, and the text has"):
        lm.token_logprobs([prompt], [prompt + " mat"])
    assert (lm.stats - before).tokens_computed == 0


@given(st.lists(st.sampled_from(["The", " cat", "c", "at", " sat", " ", "\n"]), min_size=2, max_size=6), st.data())
def test_a_start_is_taken_where_its_tokens_are_a_beginning(parts, data):
    lm = FOUR_LMS[data.draw(st.sampled_from(sorted(FOUR_LMS)))]
    num_before = data.draw(st.integers(0, len(parts)))
    start, text = (Text("", lm).join(some) for some in (parts[:num_before], parts))
    (ids,) = lm.session.prompt_ids([start])
    if text.tokens[: len(ids)] == ids:
        (found,) = lm.token_logprobs([text], [start])
        assert len(found) == len(text.tokens) - len(ids)
        assert_close(found, text.token_logprobs[len(ids) :])
    else:
        with pytest.raises(ValueError, match="is not the beginning of"):
            lm.token_logprobs([text], [start])


def test_starts_of_texts_with_groups(model, tokenizer):
    lm = LM(model, tokenizer)
    group = Text("See", lm) + (Text(" the cat") | " the mat")
    text = group + " and" + "."
    for start, num_scored in [(group, len(text.tokens) - len(group.tokens)), (group + " and", 1)]:
        (found,) = lm.token_logprobs([text], [start])
        assert len(found) == num_scored
        assert_close(found, text.token_logprobs[-num_scored:])
    for other in (Text("See the cat the mat", lm), Text("See", lm) + (Text(" the cat") | " the dog")):
        with pytest.raises(ValueError, match="is not the beginning of"):
            lm.token_logprobs([text], [other])


@pytest.mark.parametrize(
    ("starts", "error", "match"),
    [
        (["The"], TypeError, r"starts\[0\] must be a Text or an int, not str"),
        ([True], TypeError, r"starts\[0\] must be a Text or an int, not bool"),
        ([1.0], TypeError, "not float"),
        ({0: 1}, TypeError, "not a mapping"),
        ([-1], ValueError, "between 0 and [0-9]+, not -1"),
        ([1, 1], ValueError, "one start for each text"),
    ],
)
def test_starts_that_make_no_sense(model, tokenizer, starts, error, match):
    lm = LM(model, tokenizer)
    with pytest.raises(error, match=match):
        lm.token_scores([Text("The cat sat", lm)], starts)
    assert lm.stats.tokens_computed == 0


@pytest.mark.parametrize("what", ["logits", "token_logprobs"])
@pytest.mark.parametrize("order", [1, -1])
def test_reading_all_of_many_texts_takes_few_calls_of_the_head(what, order, lm, calls):
    texts = [Text(f"{number} cats", lm) for number in range(100, 200)]
    evaluate(texts)
    assert len({id(getattr(text, what)) for text in texts[::order]}) > 0
    assert len(calls.heads) <= 8
    assert what != "logits" or sum(calls.heads) == 100


def test_rows_are_computed_in_bounded_slices(lm, model, calls, monkeypatch):
    monkeypatch.setattr("backprompt.model.executor.HEAD_SLICE_BYTES", 7 * ROW_BYTES)
    texts = [Text(f"The cat sat on the mat {number} times", lm) for number in range(100, 130)]
    evaluate(texts)
    assert_equals_plain(model, texts)
    for text in texts:
        logprobs = plain_token_logprobs(model, text.tokens)
        assert_close(text.token_logprobs, logprobs)
    assert max(calls.heads) == 7


@pytest.mark.parametrize("num_rows", [0, 3])
def test_rows_held_are_bounded_and_computed_again_when_dropped(num_rows, model, tokenizer, monkeypatch):
    monkeypatch.setattr("backprompt.session.session.MAX_RESULT_BYTES", num_rows * ROW_BYTES)
    lm = LM(model, tokenizer)
    texts = [Text(f"{number} cats", lm) for number in range(10)]
    evaluate(texts)
    before = lm.stats
    for _ in range(2):
        for text in texts:
            assert_close(text.logits, plain_logits(model, text.tokens)[-1])
            assert lm.stats.result_bytes_held <= num_rows * ROW_BYTES
    assert lm.stats.result_bytes_held == num_rows * ROW_BYTES
    assert (lm.stats - before).tokens_computed == 0


@pytest.mark.parametrize("bounds", [(0, None), (3, 5), (-2, None), (4, 4), (7, 3), (0, 1000), (None, -1)])
def test_all_logits_takes_the_indices_of_a_slice(bounds, lm, model):
    text = Text("The cat sat on the mat", lm)
    start, stop = bounds
    rows = evaluate(text).all_logits(stop=stop) if start is None else evaluate(text).all_logits(start, stop)
    assert_close(rows, plain_logits(model, text.tokens)[start:stop])


# Returned values


def test_returned_tensors_are_copies_on_the_models_device_without_gradients(lm, model):
    texts = forest(lm)
    evaluate(texts)
    for text in texts:
        before = text.logits, text.token_logprobs, text.model_repr.all_logits()
        representation = text.model_repr
        cache = representation.past_key_values()
        returned = [representation.logits, representation.token_logprobs, representation.all_logits()]
        returned += [representation.hidden_states, *(t for layer in cache.layers for t in (layer.keys, layer.values))]
        returned.append(representation.input_ids)
        for tensor in returned:
            assert not tensor.requires_grad
            assert tensor.device == model.device
            tensor.fill_(-7)
        for tensor, unchanged in zip(
            (text.logits, text.token_logprobs, text.model_repr.all_logits()), before, strict=True
        ):
            torch.testing.assert_close(tensor, unchanged, rtol=0, atol=0, equal_nan=True)
        assert text.model_repr.input_ids.tolist() == list(text.tokens)
    assert_equals_plain(model, [text + " and it" for text in texts])


# Failures


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt(), RuntimeError("boom")])
@pytest.mark.parametrize("failing_pass", [1, 2, 4])
def test_a_failed_pass_keeps_what_was_computed_and_stores_nothing_half(error, failing_pass, lm, model, calls):
    texts = forest(lm)
    calls.errors[failing_pass] = error
    with pytest.raises(type(error)):
        evaluate(texts)
    kept = sum(calls.bodies[: failing_pass - 1])
    assert lm.stats.bytes_held == kept * TOKEN_BYTES
    assert all(span.keys_values is not None for span in lm.session.evaluator.forest.spans())

    calls.bodies.clear()
    evaluate(texts)
    assert sum(calls.bodies) == num_distinct(texts) - kept
    assert lm.stats.bytes_held == num_distinct(texts) * TOKEN_BYTES
    assert_equals_plain(model, texts)


def test_a_failed_call_of_the_head_changes_nothing(lm, model, monkeypatch):
    texts = forest(lm)
    evaluate(texts)
    with monkeypatch.context() as patch:
        patch.setattr(GPT2LMHeadModel, "forward", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            texts[0].token_logprobs  # noqa: B018
    assert lm.stats.logit_rows == 0
    before = lm.stats
    assert_equals_plain(model, texts)
    assert (lm.stats - before).tokens_computed == 0


def raise_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


def test_a_failed_probe_is_done_again(model, tokenizer, monkeypatch):
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    with monkeypatch.context() as patch:
        patch.setattr(GPT2Model, "forward", raise_out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            evaluate(text)
    assert lm.stats.bytes_held == 0
    assert_equals_plain(model, [text])


def test_nan_in_an_embedding_is_an_error_for_the_texts_that_use_it(tokenizer):
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    good = Text("The cat", lm)
    bad = good + " sat on the mat?"
    assert bad.tokens[-1] not in bad.tokens[:-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[bad.tokens[-1]] = torch.nan
    evaluate(good)
    held = lm.stats.bytes_held
    with pytest.raises(NonFiniteError, match="LlamaForCausalLM returned NaN hidden states"):
        evaluate([good, bad])
    assert lm.stats.bytes_held == held > 0
    assert_equals_plain(model, [good, Text.from_tokens(bad.tokens[:-1], lm)])


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_nan_in_a_weight_is_an_error_and_nothing_is_stored(where, tokenizer):
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    evaluate(text)
    with torch.no_grad():
        model.get_submodule(where).weight[3] = torch.nan
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"LlamaForCausalLM returned NaN .*Check"):
            text.logits  # noqa: B018
    assert lm.stats.result_bytes_held == 0
    assert (lm.stats.bytes_held > 0) == (where == "lm_head")  # the states before the head are right
    with torch.no_grad():
        model.get_submodule(where).weight[3] = 0.5
    assert_equals_plain(model, [text])


# Bad input: each is refused before anything is computed, and the message says what to do

BAD_TEXTS = {
    "no tokens": (EmptyTextError, r"no tokens.*Text.from_tokens\(\[tokenizer.bos_token_id\]", lambda lm: Text("", lm)),
    "a str": (TextTypeError, r"texts\[1\] is a str, not a Text. Wrap strings: Text", lambda lm: "a cat"),
    "None": (TextTypeError, r"texts\[1\] is a NoneType", lambda lm: None),
    "no model": (
        UnboundTextError,
        r"texts\[1\], Text\('a cat'\), has no model. Build it with",
        lambda lm: Text("a cat"),
    ),
    "too long": (
        TextTooLongError,
        r"Text\('<131 token ids>'\) has 131 tokens, but the model has 128 positions.*learned.*Shorten the text by 3\.",
        lambda lm: Text.from_tokens([5] * (MAX_POSITIONS + 3), lm),
    ),
    "an id too large": (
        TokenIdError,
        r"token id 320 at position 1, but the model's embedding and head have ids 0 to 319. Use the model's own",
        lambda lm: Text.from_tokens([5, VOCAB_SIZE, 6], lm),
    ),
    "a negative id": (TokenIdError, r"token id -1 at position 2", lambda lm: Text.from_tokens([5, 6, -1], lm)),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_bad_text_is_refused_before_anything_is_computed(kind, lm, calls):
    error, message, make = BAD_TEXTS[kind]
    with pytest.raises(error, match=message):
        evaluate([Text("The cat", lm), make(lm)])
    assert calls.bodies == []
    assert lm.stats.bytes_held == 0


def test_other_kinds_of_texts_are_refused(lm, model, tokenizer):
    with pytest.raises(TextTypeError, match=r"evaluate takes a Text or .*, not the str 'a cat'. Wrap the string: Text"):
        evaluate("a cat")
    with pytest.raises(UnboundTextError, match=r"Text\('a cat'\) has no model.*Text\(string, lm\)"):
        Text("a cat").logits  # noqa: B018
    other = Text("a cat", LM(model, tokenizer))
    with pytest.raises(UnboundTextError, match=r"texts\[0\], Text\('a cat'\), belongs to another LM"):
        lm.evaluate([other])
    assert evaluate([]) == []


def test_texts_of_several_models_are_evaluated_with_their_own(lm, tokenizer):
    other = LM(FAMILIES["llama"](), tokenizer)
    texts = [Text(string, each) for string in ("a cat", "The mat") for each in (lm, other)]
    assert [representation.num_tokens for representation in evaluate(texts)] == [len(text.tokens) for text in texts]
    for text in texts:
        assert_equals_plain(text.lm.model, [text])


def test_lm_evaluate_takes_what_evaluate_takes(lm):
    """An iterator, too, rather than nothing of it."""
    strings = ["a cat", "The mat"]
    assert len(lm.evaluate(Text(string, lm) for string in strings)) == 2


def test_beyond_the_trained_length_a_rotary_model_is_refused_unless_asked_to(tokenizer):
    model = FAMILIES["llama"]()
    ids = [(7 * idx) % VOCAB_SIZE for idx in range(MAX_POSITIONS + 2)]
    with pytest.raises(TextTooLongError, match=r"130 tokens.* trained for. Shorten .* 2, .*beyond_trained_length=True"):
        evaluate(Text.from_tokens(ids, LM(model, tokenizer)))
    assert_equals_plain(model, [Text.from_tokens(ids, LM(model, tokenizer, beyond_trained_length=True))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joins": "exactly"}, "joins must be one of 'exact', 'split', 'error', not 'exactly'"),
        ({"joins": None}, "joins must be one of"),
        ({"max_tokens_per_forward": 0}, r"max_tokens_per_forward must be an int of at least 1, not 0"),
        ({"max_tokens_per_forward": -5}, r"max_tokens_per_forward must be an int of at least 1, not -5"),
        ({"max_tokens_per_forward": 1.5}, "max_tokens_per_forward must be .*, not 1.5"),
        ({"max_tokens_per_forward": "16"}, "max_tokens_per_forward must be .*, not '16'"),
        ({"max_tokens_per_forward": True}, "max_tokens_per_forward must be .*, not True"),
        ({"memory_bytes": "banana"}, "memory_bytes must be a number of bytes"),
        ({"memory_bytes": True}, "memory_bytes must be a number of bytes"),
        ({"host_memory_bytes": -1}, "host_memory_bytes must be a number of bytes"),
        ({"add_special_tokens": "no"}, "add_special_tokens must be True or False, not 'no'"),
        ({"pin_memory": 1}, "pin_memory must be True or False, not 1"),
        ({"beyond_trained_length": "yes"}, "beyond_trained_length must be True or False"),
        ({"pack_weights": None}, "pack_weights must be True or False"),
        ({"store": 3}, "store must be a path or a backprompt.Store, not 3"),
        ({"store": ""}, "store must be a path or a backprompt.Store, not ''"),
    ],
)
def test_bad_options_are_refused(options, message, model, tokenizer):
    with pytest.raises((ValueError, TypeError), match=message):
        LM(model, tokenizer, **options)
    with pytest.raises((ValueError, TypeError), match=message):
        load("not looked for", device="cpu", **options)


@pytest.mark.parametrize("tokenizer", ["gpt2", None, len])
def test_what_is_no_tokenizer_is_refused(tokenizer, model):
    with pytest.raises(TokenizerError, match=r"needs a tokenizer of transformers, not .*AutoTokenizer.from_pretrained"):
        LM(model, tokenizer)


# Copies, and the end


def test_a_copy_of_an_lm_is_the_lm_and_it_cannot_be_pickled(lm):
    assert copy.copy(lm) is lm
    assert copy.deepcopy({"lm": [lm]})["lm"][0] is lm
    for value in (lm, Text("a cat", lm)):
        with pytest.raises(NotPicklableError, match=r"Pickle texts without a model.*load\(name\)"):
            pickle.dumps(value)


def test_an_lm_and_its_tensors_go_with_the_last_reference(tokenizer):
    """At once: nothing waits for the cycle collector."""
    others = all_blocks()
    gc.disable()
    try:
        model = FAMILIES["gpt2"]()
        lm = LM(model, tokenizer)
        texts = forest(lm)
        representations = evaluate(texts)
        texts[0].token_logprobs  # noqa: B018
        found = gc.get_objects()
        blocks = weakref.WeakSet(
            block for block in found if type(block) in (KeysValues, States) and block not in others
        )
        alive = weakref.ref(lm)
        del texts, found
        assert len(blocks) > 0  # a representation holds its LM
        del representations, lm
        assert alive() is None
        assert len(blocks) == 0
    finally:
        gc.enable()


def test_no_registration_of_an_attention_function_is_left_behind(model, tokenizer):
    gc.collect()
    interfaces = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [set(interface) for interface in interfaces]
    lm = LM(model, tokenizer)
    for _ in range(5):  # each change of a weight renews the private copy
        evaluate(Text("The cat", lm))
        with torch.no_grad():
            model.transformer.ln_f.bias += 1
    gc.collect()
    assert [len(set(interface) - names) for interface, names in zip(interfaces, before, strict=True)] == [1, 1]
    del lm
    gc.collect()
    assert [set(interface) for interface in interfaces] == before
