"""Log-probabilities as numbers: precision, -inf, NaN, +inf, ties. The reference is the plain call's log-softmax."""

import numpy as np
import pytest
import torch

from backprompt import LM, Text, evaluate, verify
from backprompt.classify import log_probs, predict, predict_proba, token_logprobs
from backprompt.store import DiskStore, MemoryStore
from backprompt.store.base import Entry
from reference import plain_logits, plain_token_logprobs
from tiny_models import FAMILIES

PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says"]
COMPLETIONS = ["mat", "mat and the cat", "46"]


# float64


@pytest.fixture(scope="module")
def double():
    return FAMILIES["llama"]().double()


@pytest.fixture
def double_lm(double, tokenizer):
    return LM(double, tokenizer)


def assert_is_exact(found, expected):
    """In float64, and as near as float64 allows: the float32 log-softmax is 1e-7 and more away."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_float64_log_probabilities_of_texts(double, double_lm):
    """Each way to them: a text's own, of many from a start on, behind groups, of candidates before and after."""
    texts = [Text(prompt, double_lm) for prompt in PROMPTS]
    expected = [plain_token_logprobs(double, text.tokens) for text in texts]
    for found, row in zip(double_lm.token_logprobs(texts, [3, 0]), expected, strict=True):
        assert_is_exact(found, row[len(row) - len(found) :])
    assert_is_exact(double_lm.token_logprobs(texts[:1], [len(texts[0].tokens)])[0], expected[0][:0])
    for text, row in zip(texts, expected, strict=True):
        assert_is_exact(text.token_logprobs, row)
        candidates = plain_logits(double, text.tokens)[-1].log_softmax(dim=-1)[[5, 60, 5]]
        for _ in range(2):  # computed, and kept as candidates
            assert_is_exact(double_lm.next_token_logprobs([text], [[5, 60, 5]])[0], candidates)
        longer = Text.from_tokens((*text.tokens, 60), double_lm)  # forwarded: the candidate's score moves to its row
        assert_is_exact(longer.token_logprobs[-1], candidates[1])
    group = texts[0] + (Text(" a", double_lm) | Text(" b", double_lm))
    first = plain_logits(double, texts[0].tokens)[-1].log_softmax(dim=-1)
    branches = [len(texts[0].tokens), len(texts[0].tokens) + 1]
    assert_is_exact(group.token_logprobs[branches], first[[group.tokens[idx] for idx in branches]])


def test_float64_log_probabilities_of_completions(double, double_lm):
    def expected(before, ids):
        return plain_token_logprobs(double, [*before, *ids])[len(before) :].numpy()

    def ids_of(completion):
        return double_lm.tokenizer(" " + completion, add_special_tokens=False)["input_ids"]

    for prompt, rows in zip(PROMPTS, log_probs(PROMPTS, COMPLETIONS, double_lm), strict=True):
        own = [expected(double_lm.tokenizer(prompt)["input_ids"], ids_of(c)) for c in COMPLETIONS]
        for row, logprobs in zip(rows, own, strict=True):
            np.testing.assert_allclose(row, logprobs, rtol=0, atol=1e-12)
        found = predict_proba(prompt, COMPLETIONS, double_lm, normalize=False)
        np.testing.assert_allclose(found, np.exp([row.mean() for row in own]), rtol=1e-12)
        assert predict(prompt, COMPLETIONS, double_lm, search="best-first") == COMPLETIONS[found.argmax()]
    alone = token_logprobs(COMPLETIONS, double_lm)
    for completion, row in zip(COMPLETIONS, alone, strict=True):
        ids = ids_of(completion)
        np.testing.assert_allclose(row[1:], plain_token_logprobs(double, ids)[1:].numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 3}], ids=str)
def test_float64_log_probabilities_of_what_is_generated(double, double_lm, options):
    """The texts', and, as they are kept, those of the continued text."""
    for prompt in PROMPTS:
        text = Text(prompt, double_lm)
        found = text.generate(max_new_tokens=4, **options)
        expected = plain_token_logprobs(double, found.tokens)
        assert_is_exact(found.completion_logprobs, expected[len(text.tokens) :])
        assert_is_exact(found.token_logprobs, expected)


def test_float64_log_probabilities_that_are_shown(double, double_lm):
    text = Text(PROMPTS[0], double_lm)
    tokens = text.show(top=2).tokens
    expected = plain_token_logprobs(double, text.tokens)
    best = plain_logits(double, text.tokens).log_softmax(dim=-1).amax(dim=-1)
    for idx in range(1, len(tokens)):
        assert tokens[idx].logprob == pytest.approx(float(expected[idx]), abs=1e-12)
        assert tokens[idx].alternatives[0][1] == pytest.approx(float(best[idx - 1]), abs=1e-12)


def test_float64_log_probabilities_of_the_harness(double, double_lm):
    from backprompt.integrations.lm_eval import BackpromptLM

    context, continuation = tuple(range(5, 15)), (7, 8, 9)
    ((total, _),) = BackpromptLM(double_lm)._loglikelihood_tokens(
        [(None, list(context), list(continuation))], disable_tqdm=True
    )
    expected = plain_token_logprobs(double, (*context, *continuation))[-3:].sum()
    assert total == pytest.approx(float(expected), abs=1e-12)


def test_half_precision_log_probabilities_are_float32(tokenizer):
    """Of the logits as they are: half precision would round them away."""
    model = FAMILIES["llama"]().bfloat16()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    for found in (text.token_logprobs, text.generate(max_new_tokens=2).completion_logprobs):
        assert found.dtype == torch.float32
    rows = text.model_repr.all_logits().float().log_softmax(dim=-1)[:-1]
    expected = rows.gather(1, torch.tensor(text.tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(text.token_logprobs[1:], expected, rtol=0, atol=1e-6)


def test_float64_log_probabilities_come_back_from_a_store(double, tokenizer, tmp_path):
    with DiskStore(tmp_path / "prompts.bp") as store:
        text = Text(" ".join(PROMPTS), LM(double, tokenizer, store=store))
        text.token_logprobs  # noqa: B018
        text.save()
        lm = LM(double, tokenizer, store=store)
        assert_is_exact(Text(text.string, lm).token_logprobs, plain_token_logprobs(double, text.tokens))
        assert lm.stats.tokens_computed == 0


def test_float32_log_probabilities_of_a_store_of_before_are_scored_anew_in_float64(double, tokenizer):
    scored, old = MemoryStore(persist="explicit"), MemoryStore()
    text = Text(" ".join(PROMPTS), LM(double, tokenizer, store=scored))
    text.token_logprobs  # noqa: B018
    text.save()
    for header in scored.list():
        tensors = dict(scored.get(header.name).tensors)
        assert tensors["logprobs"].dtype == torch.float64
        old.put(Entry(header, tensors | {"logprobs": tensors["logprobs"].float()}))
    lm = LM(double, tokenizer, store=old)
    assert_is_exact(Text(text.string, lm).token_logprobs, plain_token_logprobs(double, text.tokens))
    assert (lm.stats.tokens_computed, lm.stats.logit_rows) == (0, len(text.tokens) - 1)


def test_verify_sees_log_probabilities_of_float64_that_were_taken_in_float32(double_lm):
    """They lie beside hidden states that are right; the models of this file are 1e-6 off then, larger ones more."""
    texts = [Text(prompt, double_lm) for prompt in PROMPTS]
    evaluate(texts)
    assert verify(texts, tolerance=1e-11).passed
    for span in double_lm._evaluator.forest.spans():
        if span.states is not None:
            block = span.states.block
            block.logprobs.copy_(block.logprobs.float())
    verified = verify(texts, tolerance=1e-11)
    assert not verified.passed
    assert 1e-9 < verified.gap < 1e-5
