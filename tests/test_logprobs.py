"""Log-probabilities as numbers: precision, -inf, NaN, +inf, ties. The reference is the plain call's log-softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backprompt import LM, GenerationError, NonFiniteError, Text, evaluate, generate, independence_gap, verify
from backprompt.classify import best_threshold, calibrate, log_probs, predict, predict_proba, token_logprobs
from backprompt.classify.weighed import as_candidate
from backprompt.classify.weighing import Weighing
from backprompt.cli import generate as cli_generate
from backprompt.generation.selected import select
from backprompt.integrations.sklearn import PromptClassifier
from backprompt.model import probe
from backprompt.store import DiskStore, MemoryStore
from backprompt.store.base import Entry
from comparing import assert_close
from devices import DEVICE, on_test_device
from reference import ATOL, ids_for, plain_logits, plain_token_logprobs
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
    assert_close(found, expected, atol=1e-12)


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
    """The log-probabilities of the result, and those kept for the continued text."""
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


@pytest.mark.parametrize("is_evaluated", [False, True])
@pytest.mark.parametrize("starts", [None, [3]])
def test_a_change_to_returned_scores_reaches_no_kept_score(is_evaluated, starts, double_lm):
    text = Text(PROMPTS[0], double_lm)
    if is_evaluated:
        double_lm.evaluate([text])
    expected = [found.clone() for found in (double_lm.token_logprobs([text], starts)[0], text.token_logprobs)]
    for found in (double_lm.token_logprobs([text], starts)[0], text.token_logprobs):
        found.fill_(7.0)
    for found, own in zip((double_lm.token_logprobs([text], starts)[0], text.token_logprobs), expected, strict=True):
        assert torch.equal(found.nan_to_num(), own.nan_to_num())


def test_half_precision_log_probabilities_are_float32(tokenizer):
    """Of the logits as they are: half precision would round them away."""
    model = FAMILIES["llama"]().bfloat16()
    lm = LM(model, tokenizer)
    text = Text(PROMPTS[0], lm)
    for found in (text.token_logprobs, text.generate(max_new_tokens=2).completion_logprobs):
        assert found.dtype == torch.float32
    rows = text.model_repr.all_logits().float().log_softmax(dim=-1)[:-1]
    assert_close(text.token_logprobs[1:], rows[range(len(rows)), text.tokens[1:]], atol=1e-6)


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
    for span in double_lm.session.evaluator.forest.spans():
        if span.states is not None:
            block = span.states.block
            block.logprobs.copy_(block.logprobs.float())
    verified = verify(texts, tolerance=1e-11)
    assert not verified.passed
    assert 1e-9 < verified.gap < 1e-5


# Tokens of probability 0: logits of -inf


def with_head(model, make_logits):
    """The model with another output head: from hidden states and the logits of the model's own to logits."""

    class Head(nn.Linear):
        def forward(self, hidden):
            return make_logits(hidden, super().forward(hidden))

    head = Head(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return on_test_device(model)


def masked_model(token_ids, dtype=torch.float32):
    """A model whose vocabulary is masked: -inf in the bias of its head, as for rows that only pad it."""
    model = FAMILIES["llama"]().to(dtype)
    head = nn.Linear(*reversed(model.lm_head.weight.shape), dtype=dtype)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()[list(token_ids)] = -torch.inf
    model.lm_head = head
    return on_test_device(model)


def completion_ids(tokenizer, completion):
    return tokenizer(" " + completion, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def masked(tokenizer):
    """ "46" ends in a token that is masked; the other completions do not have it."""
    (*_, token_id) = completion_ids(tokenizer, "46")
    assert all(token_id not in completion_ids(tokenizer, c) for c in COMPLETIONS[:2])
    return masked_model([token_id, 3, 300])


@pytest.fixture
def masked_lm(masked, tokenizer):
    return LM(masked, tokenizer)


def weights_of(lm, prompt, completions=COMPLETIONS):
    """The plain log-probabilities of the tokens of each completion."""
    before = lm.tokenizer(prompt)["input_ids"]
    rows = [plain_token_logprobs(lm.model, [*before, *completion_ids(lm.tokenizer, c)]) for c in completions]
    return [row[len(before) :].double().numpy() for row in rows]


def test_masked_tokens_have_the_log_probability_minus_infinity(masked, masked_lm, tokenizer, tmp_path):
    for prompt in PROMPTS:
        text = Text(prompt, masked_lm) + " 46 mat"
        expected = plain_token_logprobs(masked, text.tokens)
        assert expected.isneginf().sum() == 1
        assert_close(text.token_logprobs, expected)
        assert_close(text.logits, plain_logits(masked, text.tokens)[-1])
        (following,) = masked_lm.next_token_logprobs([text], [[3, 5]])
        assert following.isneginf().tolist() == [True, False]
        for row, plain in zip(log_probs(prompt, COMPLETIONS, masked_lm), weights_of(masked_lm, prompt), strict=True):
            np.testing.assert_allclose(row, plain, rtol=0, atol=ATOL[torch.float32])
    assert -np.inf in token_logprobs("46", masked_lm)
    assert verify(text).gap < 1e-4
    shown = text.show(top=400)
    assert any(token.logprob == -np.inf for token in shown.tokens)
    assert "p 0 (log p -inf)" in shown._repr_html_()
    assert {len(token.alternatives) for token in shown.tokens[1:]} == {320 - 3}  # a masked token is none
    with DiskStore(tmp_path / "prompts.bp") as store:
        stored = Text(text.string, LM(masked, tokenizer, store=store))
        stored.token_logprobs  # noqa: B018
        stored.save()
        lm = LM(masked, tokenizer, store=store)
        found = Text(text.string, lm).token_logprobs
        assert_close(found, expected)
        assert lm.stats.tokens_computed == 0


@pytest.mark.parametrize(
    ("num", "options"), [(1, {}), (2, {"do_sample": True, "temperature": 3.0, "seed": 1}), (3, {"num_beams": 3})]
)
def test_masked_tokens_are_not_generated(num, options, tokenizer):
    """All but four: without the mask none of these would be chosen."""
    model = masked_model(set(range(320)) - {7, 8, 9, 10})
    for found in generate([Text(PROMPTS[0], LM(model, tokenizer))], max_new_tokens=6, n=num, **options)[0]:
        assert set(found.completion_tokens) <= {7, 8, 9, 10}
        expected = plain_token_logprobs(model, found.tokens)[-6:]
        assert_close(found.completion_logprobs, expected)


SCHEMES = {
    "plain": {},
    "sum": {"aggregate": "sum"},
    "not normalized": {"normalize": False},
    "prior": {"prior": [0.0, 0.5, 0.5]},
    "negative discount": {"discount_completions": -1.0},
    "positive discount": {"discount_completions": 0.5},
    "neutral prompt": {"neutral_prompt": "N/A"},
    "all": {"discount_completions": 0.5, "neutral_prompt": "N/A", "prior": [0.0, 0.5, 0.5], "aggregate": "sum"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_completion_with_a_masked_token_has_probability_0_whatever_it_is_divided_by(scheme, masked_lm):
    """0 divided by 0, and 0 times anything, are 0."""
    options = SCHEMES[scheme]
    reduce = np.sum if options.get("aggregate") == "sum" else np.mean
    ids = [completion_ids(masked_lm.tokenizer, c) for c in COMPLETIONS[:2]]
    alone = [plain_token_logprobs(masked_lm.model, own).nan_to_num(nan=0.0).numpy() for own in ids]
    expected = np.zeros((2, 3))
    for row, prompt in zip(expected, PROMPTS, strict=True):
        own, neutral = (weights_of(masked_lm, before, COMPLETIONS[:2]) for before in (prompt, "N/A"))
        for idx in range(2):
            weight = reduce(own[idx] + options.get("discount_completions", 0.0) * alone[idx])
            weight -= reduce(neutral[idx]) if "neutral_prompt" in options else 0.0
            row[idx] = np.exp(weight) * options.get("prior", [1.0, 1.0])[idx]
    if options.get("normalize", True):
        expected /= expected.sum(axis=1, keepdims=True)
    found = predict_proba(PROMPTS, COMPLETIONS, masked_lm, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-12)
    assert (found[:, 2] == 0).all()
    best = [COMPLETIONS[row.argmax()] for row in found]
    assert predict(PROMPTS, COMPLETIONS, masked_lm, **options) == best
    assert predict(PROMPTS, COMPLETIONS, masked_lm, search="best-first", **options) == best


@given(data=st.data())
def test_weights_are_never_nan_and_what_a_search_takes_for_them(data):
    """For every log-probability, prior, discount and neutral weight, -inf and inf among them."""
    logprobs = np.array(data.draw(st.lists(st.sampled_from([-np.inf, -3.0, -0.5, 0.0]), min_size=1, max_size=4)))
    added = st.sampled_from([data.draw(st.sampled_from([-np.inf, np.inf])), -1.0, 0.5])  # one discount: one sign
    discounts = np.array(data.draw(st.lists(added, min_size=len(logprobs), max_size=len(logprobs))))
    weighing = Weighing(
        data.draw(st.sampled_from(["mean", "sum"])),
        data.draw(st.sampled_from([None, [discounts]])),
        data.draw(st.sampled_from([None, [-np.inf], [-2.0]])),
        data.draw(st.sampled_from([None, [-np.inf], [-1.0]])),
    )
    weight = weighing.weight(0, logprobs)
    assert not np.isnan(weight)
    if -np.inf in logprobs:
        assert weight == -np.inf
    candidate = as_candidate(weighing, 0, tuple(range(len(logprobs))))
    assert candidate.bound(float(logprobs.sum())) == pytest.approx(weight)


def test_where_no_completion_is_possible_an_error_says_so(masked_lm):
    completions = ["46", "46 mat"]
    message = r"Each of the 2 completions has probability 0 behind prompts\[1\], Text\('General Kenobi"
    prior = [1.0, 0.0, 0.0]
    good = Text(PROMPTS[0], masked_lm)
    for search in ("exhaustive", "best-first"):
        with pytest.raises(NonFiniteError, match=message.replace("1", "0").replace("General Kenobi", "The cat")):
            predict(PROMPTS, completions, masked_lm, search=search)
        with pytest.raises(NonFiniteError, match="Each of the 3 completions"):
            predict(PROMPTS, ["46", *COMPLETIONS[:2]], masked_lm, search=search, prior=prior)
    with pytest.raises(NonFiniteError, match="Each of the 2 completions"):
        predict_proba(PROMPTS, completions, masked_lm)
    with pytest.raises(NonFiniteError, match="Each of the 2 completions"):
        select(good, completions)
    assert predict_proba(PROMPTS, completions, masked_lm, normalize=False).tolist() == [[0.0, 0.0]] * 2
    assert -np.inf in log_probs(PROMPTS[0], completions, masked_lm)[0]
    classifier = PromptClassifier(masked_lm, "{text}", ["46", "46 mat"]).fit(["a", "b"], [0, 1])
    with pytest.raises(NonFiniteError, match="Each of the 2 completions"):
        classifier.predict(["The cat"])


def test_a_probability_divided_by_0_is_an_error(masked_lm):
    lengths = [len(completion_ids(masked_lm.tokenizer, c)) for c in COMPLETIONS]
    marginals = [[-1.0] * (num - 1) + [-np.inf] for num in lengths]
    nans = [[np.nan] * num for num in lengths]
    options = {"discount_completions": -1.0, "log_marg_probs_completions": marginals}
    for search in ("exhaustive", "best-first"):
        with pytest.raises(
            NonFiniteError, match=r"'mat.*' is possible behind a prompt, but has probability 0 by itself"
        ):
            predict(PROMPTS, COMPLETIONS, masked_lm, search=search, **options)
    with pytest.raises(ValueError, match="must be a finite number, not nan"):
        predict_proba(PROMPTS, COMPLETIONS, masked_lm, discount_completions=1.0, log_marg_probs_completions=nans)


def test_calibrating_with_probabilities_of_0():
    np.testing.assert_allclose(calibrate([[0.2, 0.8, 0.0]], [0.5, 0.5, 0.0]), [[0.2, 0.8, 0.0]])
    with pytest.raises(ValueError, match="A neutral probability is 0"):
        calibrate([0.2, 0.8], [1.0, 0.0])
    with pytest.raises(ValueError, match="All completions of a row have probability 0"):
        calibrate([[0.5, 0.5], [0.0, 0.0]], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"^probabilities must be numbers in order that are finite, not nan"):
        calibrate([np.nan, 0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="neutral_probabilities must be numbers in order that are finite, not nan"):
        calibrate([0.5, 0.5], [[0.5, np.nan]])
    with pytest.raises(ValueError, match="probabilities must be numbers in order that are finite, not nan"):
        best_threshold([0.5, np.nan], [True, False])


def test_the_gap_of_independence_under_a_mask(masked, masked_lm):
    text = Text("See ", masked_lm) + (Text("the cat", masked_lm) | Text("the mat", masked_lm)) + " and"
    found = independence_gap(text)
    full, declared = (
        row.cpu().double().log_softmax(dim=-1) for row in (plain_logits(masked, text.tokens)[-1], text.logits)
    )
    expected = sum(float(f.exp() * (f - d)) for f, d in zip(full, declared, strict=True) if f > -torch.inf)
    assert found.divergences[0] == pytest.approx(expected, abs=1e-5)
    assert found.divergences[0] > 0


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_options_that_leave_no_token_are_an_error(options, masked_lm):
    text = Text(PROMPTS[0], masked_lm)
    with pytest.raises(GenerationError, match="-inf for every token, so that none may follow"):
        text.generate(max_new_tokens=2, suppress_tokens=list(range(320)), **options)
    assert not masked_lm.session.evaluator.holders.ends()


def test_beams_of_probability_0_are_no_continuations(tokenizer):
    """Two tokens are possible, and only 7 behind 8: at the second token there are fewer ways than beams."""
    lm = LM(masked_model(set(range(320)) - {7, 8}), tokenizer)
    excluded = [[7, 7], [7, 8], [8, 8]]
    found = generate(Text(PROMPTS[0], lm), max_new_tokens=2, num_beams=2, n=2, bad_words_ids=excluded)
    assert [text.completion_tokens for text in found] == [(8, 7)]


def test_a_probability_of_0_is_null_on_the_command_line(masked, tokenizer):
    """JSON has no infinity. Token 300 is masked, and the options force it."""
    text = Text(PROMPTS[0], LM(masked, tokenizer)).generate(max_new_tokens=2, forced_eos_token_id=300)
    assert text.completion_logprobs[-1] == -torch.inf
    assert cli_generate.result_of(text, 0, None)["logprob"] is None


# Rows that are no distribution

SPOILED = {"NaN logits": torch.nan, r"logits of \+inf": torch.inf, "-inf for every logit": -torch.inf}


def spoiled_behind(text_ids, value, token_id=7):
    """A model whose logits behind one text are no distribution."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        state = model.model(input_ids=ids_for(model, text_ids)).last_hidden_state[0, -1]

    def spoil(hidden, logits):
        is_bad = ((hidden - state).abs().amax(dim=-1, keepdim=True) < 1e-3).expand_as(logits)
        if value > -torch.inf or value != value:
            is_bad = is_bad & (torch.arange(logits.shape[-1], device=logits.device) == token_id)
        return logits.masked_fill(is_bad, value)

    return with_head(model, spoil)


@pytest.mark.parametrize("what", SPOILED)
def test_logits_that_are_no_distribution_are_an_error_that_names_the_text(what, tokenizer):
    """The last text's own row, and a row in the middle of the third, which begins with it; both are read ahead."""
    prompt = PROMPTS[0] + " mat"
    model = spoiled_behind(tokenizer(prompt)["input_ids"], SPOILED[what])
    lm = LM(model, tokenizer)
    strings = [PROMPTS[1], "Question: What is 12 + 34?", prompt + " and the cat", prompt]
    good, other, longer, bad = texts = [Text(string, lm) for string in strings]
    match = f"LlamaForCausalLM returned {what}.* at the end of '.*{prompt[-10:]}'"
    evaluate(texts)
    assert_close(good.logits, plain_logits(model, good.tokens)[-1])
    for _ in range(2):  # reading ahead, and when all is there
        assert_close(longer.logits, plain_logits(model, longer.tokens)[-1])
        for text in (good, other):
            expected = plain_token_logprobs(model, text.tokens)
            assert_close(text.token_logprobs, expected)
        assert torch.isfinite(bad.token_logprobs[1:]).all()  # its own last row predicts nothing of it
    start = len(bad.tokens) + 1
    (found,) = lm.token_logprobs([longer], [start])  # no bad row is asked for
    assert_close(found, plain_token_logprobs(model, longer.tokens)[start:])
    reads = {
        "logits": lambda: bad.logits,
        "all logits": lambda: longer.model_repr.all_logits(),
        "scores": lambda: longer.token_logprobs,
        "scores from a start": lambda: lm.token_logprobs([good, longer], [0, len(bad.tokens)]),
        "candidates": lambda: lm.next_token_logprobs([good, bad], [[5], [6]]),
        "entropies": lambda: lm.entropies([good, longer], [0, len(bad.tokens)]),
        "most probable": lambda: lm.top_logprobs([good, longer], 2),
        "completions": lambda: predict_proba([good, bad], COMPLETIONS, lm),
        "best-first": lambda: predict([good, bad], COMPLETIONS, lm, search="best-first"),
        "generate": lambda: generate([good, bad], max_new_tokens=2),
        "sample": lambda: generate([good, bad], max_new_tokens=2, do_sample=True),
        "beams": lambda: generate([good, bad], max_new_tokens=2, num_beams=2),
        "show": lambda: longer.show(),
        "verify": lambda: verify([good, longer]),
        "independence": lambda: independence_gap(bad),
    }
    for read in [*reads.values(), *reads.values()]:
        with pytest.raises(NonFiniteError, match=match):
            read()
    assert torch.isfinite(good.generate(max_new_tokens=2).completion_logprobs).all()
    evaluator = lm.session.evaluator
    pooled = [evaluator.computation.pools.logits.get(span) for span in evaluator.forest.spans()]
    assert any(row is not None for row in pooled)
    assert all(torch.isfinite(row).all() for row in pooled if row is not None)
    assert not lm.session.evaluator.holders.ends()


def test_nothing_that_is_no_distribution_is_stored(tokenizer):
    prompt = PROMPTS[0] + " mat"
    model = spoiled_behind(tokenizer(prompt)["input_ids"], torch.nan)
    store = MemoryStore()
    lm = LM(model, tokenizer, store=store)
    longer = Text(prompt, lm) + " and the cat sat on the mat"
    with pytest.raises(NonFiniteError):
        longer.token_logprobs  # noqa: B018
    longer.save()
    for header in store.list():
        tensors = store.get(header.name).tensors
        assert not tensors["logprobs"][1:].isnan().any()
        assert not tensors["has_logprobs"].all()
    other = Text(longer.string, LM(model, tokenizer, store=store))
    with pytest.raises(NonFiniteError, match=r"NaN logits at the end of '.* mat'"):
        other.token_logprobs  # noqa: B018


def test_the_text_that_is_not_finite_is_named_not_those_beside_it(tokenizer):
    """In one tile, whose masked keys are multiplied by 0; the bad text comes last."""
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    texts = [Text(PROMPTS[0], lm) + end for end in (" mat", " hello", "46", "?")]
    evaluate(texts[0])
    assert all(texts[-1].tokens[-1] not in text.tokens for text in texts[:-1])
    with torch.no_grad():
        model.model.embed_tokens.weight[texts[-1].tokens[-1]] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN hidden states at the end of 'The cat sat on the\?' .*embed_tokens"):
        evaluate(texts)
    evaluate(texts[:-1])


def test_a_model_is_not_refused_for_rows_of_its_embedding_that_nobody_uses(tokenizer):
    """Such as rows that pad it: the tokens that the probe begins with are among them."""
    model = FAMILIES["llama"]()
    text = Text(PROMPTS[0], LM(FAMILIES["llama"](), tokenizer))
    unused = sorted(set(probe.token_ids_of("aaaabbbcc", 320, 0)) - set(text.tokens))
    assert unused
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = torch.nan
    found = Text(PROMPTS[0], LM(model, tokenizer)).logits
    assert_close(found, plain_logits(model, text.tokens)[-1])


WEIGHTS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
    "model.norm",
    "lm_head",
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_that_is_not_finite_is_named(name, value, tokenizer):
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.get_submodule(name).weight[..., 3] = value
    what = "NaN" if value != value else "infinity"
    with pytest.raises(NonFiniteError, match=f"Its weight '{name}.weight' has {what}. Check"):
        Text(PROMPTS[0], LM(model, tokenizer)).logits  # noqa: B018


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_scores_of_nan_that_torch_hides_are_an_error(name, tokenizer):
    """For few keys its attention returns numbers, and so does the plain call. Only the first numbers are probed."""
    model = FAMILIES["llama"]()
    lm = LM(model, tokenizer)
    assert torch.isfinite(Text.from_tokens((9,), lm).logits).all()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.self_attn.{name}").weight[...] = torch.nan
    text = Text.from_tokens((5, 6, 7), lm)
    what = "queries or keys of NaN or infinity" if DEVICE.type == "cpu" else "(queries or keys|NaN hidden states).*"
    with pytest.raises(NonFiniteError, match=rf"{what} at the end of .*{name}.weight' has NaN"):
        text.logits  # noqa: B018


@pytest.mark.parametrize(
    ("name", "scale", "what"),
    [
        ("lm_head", 5e4, r"logits of \+inf"),
        ("model.layers.1.mlp.down_proj", 3e4, "NaN"),
        ("model.layers.0.self_attn.v_proj", 6e4, "NaN"),
    ],
)
def test_what_overflows_in_float16_says_so(name, scale, what, tokenizer):
    """Not that the family is to blame: the same model in bfloat16 is evaluated."""
    for dtype in (torch.float16, torch.bfloat16):
        model = FAMILIES["llama"]()
        with torch.no_grad():
            model.get_submodule(name).weight *= scale
        text = Text(PROMPTS[0], LM(model.to(dtype), tokenizer))
        if dtype is torch.bfloat16:
            assert torch.isfinite(text.logits).all()
            continue
        with pytest.raises(
            NonFiniteError, match=rf"returned {what}.*the largest of float16, 65,504. Load it in bfloat16"
        ):
            text.logits  # noqa: B018


# Ties


def test_of_equals_the_first_is_chosen(tokenizer):
    """Tokens 40 and 41 have one row in the head, and there are completions that differ in these alone."""
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight[41] = model.lm_head.weight[40] = model.lm_head.weight.norm(dim=0) * 3
        model.model.embed_tokens.weight[41] = model.model.embed_tokens.weight[40]
    lm = LM(model, tokenizer)
    text = Text.from_tokens((5, 6, 9), lm)
    logits = plain_logits(model, text.tokens)[-1]
    assert logits[40] == logits[41]
    scores = lm.token_scores([Text.from_tokens((*text.tokens, t), lm) for t in (40, 41)], [3, 3])
    assert scores[0].logprobs == scores[1].logprobs
    first = int(logits.argmax())
    assert [bool(score.is_argmax) for score in scores] == [first == 40, False]
    assert text.generate(max_new_tokens=1).completion_tokens == (first,)
    strings = [tokenizer.decode(t) for t in (40, 41)]
    assert [completion_ids(tokenizer, s)[-1] for s in strings] == [40, 41]
    for order in (strings, strings[::-1]):
        assert predict_proba("The cat", order, lm).tolist() == [0.5, 0.5]
        for search in ("exhaustive", "best-first"):
            assert predict("The cat", order, lm, search=search) == order[0]
        assert select(Text("The cat", lm), order).option == order[0]


class HeadThatWrites(torch.nn.Linear):
    """Scales its input in place."""

    def forward(self, rows):
        return super().forward(rows.mul_(1.5))


def test_a_head_that_writes_to_its_input_changes_no_held_state(tokenizer):
    model = on_test_device(FAMILIES["llama"]())
    model.lm_head.__class__ = HeadThatWrites
    lm = LM(model, tokenizer)
    text = Text("The cat sat on the mat", lm)
    assert_close(lm.token_logprobs([text])[0], plain_token_logprobs(model, text.tokens))
    assert_close(text.model_repr.all_logits(), plain_logits(model, text.tokens))
