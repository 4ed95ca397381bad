"""Classification: the plain call's log-probabilities, CAPPr's arithmetic, and errors before anything is computed."""

import ast
import inspect
import json
import typing
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt import (
    LM,
    EmptyTextError,
    GroupError,
    MixedModelsError,
    Text,
    TextTooLongError,
    TokenizerError,
    UnboundTextError,
    classify,
)
from backprompt.classify import (
    Example,
    best_threshold,
    calibrate,
    log_probs,
    predict,
    predict_proba,
    search,
    token_logprobs,
    weighing,
)
from backprompt.classify.options import Options
from comparing import num_distinct_ids
from reference import ATOL, plain_token_logprobs
from tiny_models import FAMILIES
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, sentencepiece_bpe

PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is 12 + 34? Answer:"]
COMPLETIONS = ["mat", "mat and the cat", "46", "hello there"]


@pytest.fixture(scope="module")
def lm(model):
    return LM(model, byte_level_bpe())


def plain(lm, prompt, completion, end=" "):
    """The completion's token log-probabilities, its ids encoded by itself behind those of the prompt."""
    before = lm.tokenizer(prompt)["input_ids"]
    ids = lm.tokenizer(end + completion, add_special_tokens=False)["input_ids"]
    return plain_token_logprobs(lm.model, [*before, *ids])[len(before) :].double().numpy()


def plain_likelihoods(lm, prompts, completions, reduce=np.mean):
    return np.array([[reduce(plain(lm, prompt, c)) for c in completions] for prompt in prompts])


# Numbers


def test_log_probs_are_those_of_the_plain_call(lm):
    found = log_probs(PROMPTS, COMPLETIONS, lm)
    for prompt, rows in zip(PROMPTS, found, strict=True):
        for completion, row in zip(COMPLETIONS, rows, strict=True):
            assert isinstance(row, list)
            np.testing.assert_allclose(row, plain(lm, prompt, completion), rtol=0, atol=ATOL[torch.float32])
    assert log_probs(PROMPTS[0], COMPLETIONS, lm) == found[0]


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
@pytest.mark.parametrize("prior", [None, [0.1, 0.2, 0.3, 0.4], [0, 0, 0.5, 0.5]])
@pytest.mark.parametrize("normalize", [True, False])
def test_probabilities(lm, aggregate, prior, normalize):
    likelihoods = np.exp(plain_likelihoods(lm, PROMPTS, COMPLETIONS, getattr(np, aggregate)))
    expected = likelihoods if prior is None else likelihoods * prior
    expected = expected / expected.sum(axis=1, keepdims=True) if normalize else expected
    options = {"aggregate": aggregate, "prior": prior, "normalize": normalize}
    found = predict_proba(PROMPTS, COMPLETIONS, lm, **options)
    assert found.shape == (3, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(predict_proba(PROMPTS[1], COMPLETIONS, lm, **options), found[1], rtol=1e-6)
    assert predict(PROMPTS, COMPLETIONS, lm, **options) == [COMPLETIONS[idx] for idx in expected.argmax(axis=1)]
    assert predict(PROMPTS[0], COMPLETIONS, lm, **options) == COMPLETIONS[expected[0].argmax()]


def test_long_completions_do_not_underflow(lm):
    completions = ["the cat sat on the mat " * 5, "a question and an answer " * 5]
    found = predict_proba(PROMPTS[0], completions, lm, aggregate="sum")
    assert found.sum() == pytest.approx(1)


def test_discounting(lm):
    marginals = token_logprobs(COMPLETIONS, lm)
    assert [row[0] for row in marginals] == [None] * 4
    ids = lm.tokenizer(" " + COMPLETIONS[1], add_special_tokens=False)["input_ids"]
    np.testing.assert_allclose(
        marginals[1][1:], plain_token_logprobs(lm.model, ids)[1:].numpy(), rtol=0, atol=ATOL[torch.float32]
    )
    discounted = [
        [
            np.exp(np.mean(plain(lm, p, c) - 0.5 * np.array([0, *row[1:]])))
            for c, row in zip(COMPLETIONS, marginals, strict=True)
        ]
        for p in PROMPTS
    ]
    expected = np.array(discounted) / np.sum(discounted, axis=1, keepdims=True)
    found = predict_proba(PROMPTS, COMPLETIONS, lm, discount_completions=-0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    given_ = predict_proba(PROMPTS, COMPLETIONS, lm, discount_completions=-0.5, log_marg_probs_completions=marginals)
    np.testing.assert_array_equal(given_, found)


def test_a_neutral_prompt_divides(lm):
    likelihoods = np.exp(plain_likelihoods(lm, [*PROMPTS, "N/A"], COMPLETIONS))
    expected = likelihoods[:3] / likelihoods[3]
    found = predict_proba(PROMPTS, COMPLETIONS, lm, neutral_prompt="N/A")
    np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), rtol=1e-4)


def test_examples_have_completions_of_their_own(lm):
    examples = [
        Example(PROMPTS[0], COMPLETIONS[:2], prior=[0.3, 0.7]),
        Example(PROMPTS[1], COMPLETIONS[1:]),
        Example(PROMPTS[2], ["46"], normalize=False),
    ]
    found = predict_proba(examples, lm=lm)
    assert [row.shape for row in found] == [(2,), (3,), (1,)]
    np.testing.assert_allclose(found[0], predict_proba(PROMPTS[0], COMPLETIONS[:2], lm, prior=[0.3, 0.7]), rtol=1e-6)
    np.testing.assert_allclose(found[1], predict_proba(PROMPTS[1], COMPLETIONS[1:], lm), rtol=1e-6)
    np.testing.assert_allclose(found[2], np.exp(np.mean(plain(lm, PROMPTS[2], "46"))), rtol=1e-4)
    assert predict(examples[:2], lm=lm) == [
        example.completions[row.argmax()] for example, row in zip(examples[:2], found[:2], strict=True)
    ]
    np.testing.assert_array_equal(predict_proba(examples[1], lm=lm), found[1])


def test_sentencepiece_puts_the_space_itself(model):
    """With a space the ids are those of CAPPr, without a space those of the whole string."""
    lm = LM(model, sentencepiece_bpe())
    assert not lm.session.needs_space_between
    for prompt in PROMPTS:
        (found,) = log_probs(prompt, ["mat"], lm)
        np.testing.assert_allclose(found, plain(lm, prompt, "mat", end=""), rtol=0, atol=ATOL[torch.float32])
    assert log_probs(PROMPTS[0], ["mat"], lm, end_of_prompt=" ") == log_probs(PROMPTS[0], ["mat"], lm)
    (found,) = log_probs("hello (", ["a"], lm, end_of_prompt="")
    whole = Text("hello (a", lm)
    assert len(found) == 1
    np.testing.assert_allclose(found, whole.token_logprobs[-1:].cpu().numpy(), rtol=0, atol=ATOL[torch.float32])
    assert Text("hello (", lm).select(["a", "b"], end_of_prompt="").tokens in (
        whole.tokens,
        Text("hello (b", lm).tokens,
    )


@pytest.mark.parametrize("joins", ["exact", "split", "error"])
def test_a_completion_is_a_hard_boundary_whatever_the_joins(model, joins):
    lm = LM(model, byte_level_bpe(), joins=joins)
    (found,) = log_probs("the sea", ["t"], lm, end_of_prompt="")
    np.testing.assert_allclose(found, plain(lm, "the sea", "t", end=""), rtol=0, atol=ATOL[torch.float32])


def test_texts_with_groups_are_prompts(lm):
    text = Text("See ", lm) + (Text("the cat") | "the mat") + " and"
    (found,) = log_probs(text, ["sat"])
    ids = lm.tokenizer(" sat", add_special_tokens=False)["input_ids"]
    expected = (text + Text.from_tokens(ids, lm)).token_logprobs[-len(ids) :]
    np.testing.assert_allclose(found, expected.cpu().numpy(), rtol=0, atol=1e-6)
    with pytest.raises(GroupError, match="ends in a group"):
        log_probs(Text("See ", lm) + (Text("the cat") | "the mat"), ["sat"])


# Work


def test_prompts_are_computed_once_whatever_the_completions(model):
    lm = LM(model, byte_level_bpe())
    completions = [f"{first} {second}" for first in ("the cat", "a dog") for second in ("sat", "ran", "was there")]
    log_probs(PROMPTS, completions, lm)
    prompts = [tuple(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    ids = [tuple(lm.tokenizer(" " + c)["input_ids"]) for c in completions]
    texts = [prompt + completion for prompt in prompts for completion in ids]
    # A completion's last token is scored by the row before it, and not forwarded.
    assert lm.stats.tokens_computed == num_distinct_ids(ids[:-1] for ids in texts)


def test_prompts_stream_through_within_the_budget(model, monkeypatch):
    monkeypatch.setattr("backprompt.classify.scoring.TOKENS_AT_A_TIME", 200)
    lm = LM(model, byte_level_bpe(), memory_bytes=60 * 646)
    instruction = "Question: What is it? "
    prompts = [instruction + f"{number} cats sat on the mat, and" for number in range(30)]
    found = predict_proba(prompts, COMPLETIONS, lm)
    expected = predict_proba(prompts, COMPLETIONS, LM(model, byte_level_bpe()))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert lm.stats.bytes_held <= 60 * 646
    assert lm.stats.tokens_recomputed <= 0.2 * lm.stats.tokens_computed


def test_a_shared_instruction_outlives_any_number_of_prompts(model, monkeypatch):
    """Rows of many scored prompts are evicted before the keys and values of their shared beginning."""
    monkeypatch.setattr("backprompt.classify.scoring.TOKENS_AT_A_TIME", 200)
    lm = LM(model, byte_level_bpe(), memory_bytes=100 * 645)
    instruction = "Question: What is it?"
    prompts = [instruction + f" {number} cats sat on the mat, and" for number in range(100, 300)]
    num_recomputed = []
    for start in range(0, 200, 50):
        before = lm.stats
        predict_proba(prompts[start : start + 50], COMPLETIONS, lm, show_progress_bar=False)
        num_recomputed.append((lm.stats - before).tokens_recomputed)
    assert num_recomputed == [0, 0, 0, 0]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_prompt_without_tokens_is_refused(model, tokenizer):
    """Also where the tokenizer would append one."""
    lm = LM(model, TOKENIZERS[tokenizer]())
    if lm.session.prompt_ids([Text("", lm)]) != [()]:
        pytest.skip("this tokenizer begins every text with a token")
    with pytest.raises(EmptyTextError, match=r"prompts\[1\], Text\(''\), has no tokens"):
        log_probs([Text("The cat", lm), Text("", lm)], ["the cat", "a"], lm)
    assert lm.stats.forward_passes == 0


def test_options_and_numbers_of_the_wrong_kind(lm):
    with pytest.raises(TypeError, match="predict has no option 'agregate'"):
        predict(PROMPTS, COMPLETIONS, lm, agregate="sum")
    marginals = [
        [0.0] * len(ids) for ids in lm.session.completion_ids([" " + completion for completion in COMPLETIONS])
    ]
    options = {"discount_completions": 1.0, "log_marg_probs_completions": [marginals[0], [0.0], *marginals[2:]]}
    with pytest.raises(ValueError, match="has 1 numbers for 'mat and the cat', which has"):
        predict_proba(PROMPTS, COMPLETIONS, lm, **options)
    assert predict(PROMPTS, np.array(COMPLETIONS), lm) == predict(PROMPTS, COMPLETIONS, lm)


def test_a_bar_on_long_work_only(lm, capsys, monkeypatch):
    predict_proba(PROMPTS * 2, COMPLETIONS, lm)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    predict_proba(PROMPTS, COMPLETIONS, lm)
    assert "prompts" not in capsys.readouterr().err
    predict_proba(PROMPTS * 2, COMPLETIONS, lm)
    assert "prompts: 100%" in capsys.readouterr().err
    predict_proba(PROMPTS * 2, COMPLETIONS, lm, show_progress_bar=False)
    assert "prompts" not in capsys.readouterr().err


# Calibration


def test_contextual_calibration(lm):
    completions = COMPLETIONS[:3]
    given_, neutral = predict_proba(PROMPTS, completions, lm), predict_proba(["N/A", "..."], completions, lm)
    expected = given_ / neutral.mean(axis=0)
    np.testing.assert_allclose(calibrate(given_, neutral), expected / expected.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(calibrate(neutral[0], neutral[0]), np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="same completions"):
        calibrate(given_, neutral[:, :2])
    with pytest.raises(ValueError, match="is 0"):
        calibrate(given_, [0.5, 0.5, 0])


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=8))
def test_no_other_threshold_is_right_more_often(labelled):
    probabilities, labels = map(np.array, zip(*labelled, strict=True))

    def num_right(threshold):
        return int(((probabilities >= threshold) == labels).sum())

    best = best_threshold(probabilities, labels)
    assert num_right(best) == max(map(num_right, [*np.linspace(-0.1, 1.1, 121), best]))


# Errors


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((PROMPTS, []), {}, ValueError, "no completions"),
        ((PROMPTS, ["a", ""]), {}, ValueError, r"completions\[1\] is empty"),
        ((PROMPTS, ["a", "b", "a"]), {}, ValueError, "'a' is given more than once"),
        ((PROMPTS, "ab"), {}, TypeError, "sequence of strings"),
        ((PROMPTS, {"a", "b"}), {}, TypeError, "a set has no order"),
        ((PROMPTS, ["a", 1]), {}, TypeError, r"completions\[1\] is a int"),
        (([], ["a", "b"]), {}, ValueError, "no prompts"),
        ((["x", ""], ["a", "b"]), {}, ValueError, r"prompts\[1\] is empty"),
        ((["x", 3], ["a", "b"]), {}, TypeError, r"prompts\[1\] is a int"),
        (({"text": "x"}, ["a", "b"]), {}, TypeError, r"prompts .* not a mapping \(dict\).*list\(d.values\(\)\)"),
        ((PROMPTS, {"a": 1, "b": 2}), {}, TypeError, r"completions .* not a mapping \(dict\)"),
        (
            (pd.DataFrame({"text": PROMPTS}), ["a", "b"]),
            {},
            TypeError,
            r'prompts .* not a table \(DataFrame\).*df\["text"\]',
        ),
        ((b"ab", ["a", "b"]), {}, TypeError, "not the bytes"),
        ((PROMPTS, ["a", "b\udc80"]), {}, TokenizerError, r"completions\[1\].* lone surrogate at character 1"),
        ((["x", "\udc80"], ["a", "b"]), {}, TokenizerError, r"prompts\[1\].* lone surrogate at character 0"),
        (
            (PROMPTS, ["a", "b"]),
            {"discount_completions": "0.5"},
            TypeError,
            "discount_completions must be a finite number",
        ),
        ((PROMPTS, ["a", "b"]), {"discount_completions": float("nan")}, ValueError, "must be a finite number"),
        ((PROMPTS, ["a", "b"]), {"prior": {"a": 0.5, "b": 0.5}}, TypeError, r"prior .* not a mapping \(dict\)"),
        ((PROMPTS, ["a", "b"]), {"prior": "0.5"}, TypeError, "prior must be numbers"),
        ((PROMPTS, ["a", "b"]), {"prior": ["0.5", "0.5"]}, TypeError, "prior must be numbers"),
        ((PROMPTS, ["a", "b"]), {"prior": [[0.5], [0.2, 0.3]]}, ValueError, "rows of one length"),
        ((PROMPTS, ["a", "b"]), {"prior": [0.5, None]}, TypeError, "not NoneType"),
        (([Example("x", ["a", "b"])],), {"end_of_prompt": ""}, TypeError, "its own end_of_prompt"),
        ((PROMPTS, ["a", "b"]), {"prior": [1.0]}, ValueError, r"shape \(1,\) for 2"),
        ((PROMPTS, ["a", "b"]), {"prior": [0.5, 0.6]}, ValueError, "sum to 1"),
        ((PROMPTS, ["a", "b"]), {"prior": [-0.5, 1.5]}, ValueError, "sum to 1"),
        ((PROMPTS, ["a"]), {}, ValueError, "normalize=False"),
        ((PROMPTS, ["a", "b"]), {"end_of_prompt": "\n"}, ValueError, "end_of_prompt"),
        ((PROMPTS, ["a", "b"]), {"aggregate": "max"}, ValueError, "'mean', 'sum'"),
        ((PROMPTS, ["a", "b"]), {"log_marg_probs_completions": [[0], [0]]}, TypeError, "discount_completions"),
        ((PROMPTS,), {}, TypeError, "needs completions"),
        (([Example("x", ["a", "b"]), "x"],), {}, TypeError, "not both"),
        (([Example("x", ["a", "b"])], ["a", "b"]), {}, TypeError, "its own completions"),
        ((["x", "very " * 200], ["a", "b"]), {}, TextTooLongError, "positions"),
    ],
)
def test_arguments_that_make_no_sense(lm, arguments, options, error, match):
    before = lm.stats
    with pytest.raises(error, match=match):
        predict_proba(*arguments, **options, lm=lm)
    assert (lm.stats - before).tokens_computed == 0


def test_one_completion_is_not_predicted(lm):
    with pytest.raises(ValueError, match="nothing to predict"):
        predict(PROMPTS, ["a"], lm)


def test_which_lm(model, lm):
    other = LM(model, byte_level_bpe())
    assert log_probs(Text("the cat", lm), ["sat"]) == log_probs("the cat", ["sat"], lm)
    with pytest.raises(UnboundTextError, match="lm="):
        log_probs("the cat", ["sat"])
    with pytest.raises(MixedModelsError, match="another LM"):
        log_probs(Text("the cat", other), ["sat"], lm)
    with pytest.raises(MixedModelsError):
        log_probs([Text("the cat", other), Text("the cat", lm)], ["sat"])


def test_numbers_are_float64_arrays(lm):
    found = predict_proba(PROMPTS, COMPLETIONS, lm)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float64
    assert not isinstance(found, torch.Tensor)


# How it is put together


def test_public_names():
    assert classify.__all__ == [
        "AGGREGATES",
        "STRATEGIES",
        "Aggregate",
        "EndOfPrompt",
        "Example",
        "Prompt",
        "Prompts",
        "Strategy",
        "best_threshold",
        "calibrate",
        "log_probs",
        "predict",
        "predict_proba",
        "probability_of",
        "token_logprobs",
    ]
    for name in ("log_probs", "predict", "predict_proba", "token_logprobs", "Example"):
        assert typing.get_type_hints(getattr(classify, name))  # its annotations mean something where it is defined


def test_options_are_the_keywords_of_predict_proba():
    """With the same defaults; `predict` takes them by name."""
    parameters = inspect.signature(predict_proba).parameters.values()
    keywords = {found.name: found.default for found in parameters if found.kind is found.KEYWORD_ONLY}
    assert keywords == {field.name: field.default for field in fields(Options)}


def test_predict_hands_on_each_option(lm):
    """The choice is that of predict_proba with the same options, whatever the option."""
    marginals = token_logprobs(COMPLETIONS, lm)
    for options in (
        {"prior": [0.97, 0.01, 0.01, 0.01]},
        {"prior": [0.01, 0.01, 0.01, 0.97]},
        {"normalize": False},
        {"end_of_prompt": ""},
        {"aggregate": "sum"},
        {"discount_completions": -1.0},
        {"discount_completions": -1.0, "log_marg_probs_completions": marginals},
        {"neutral_prompt": "N/A"},
        {"show_progress_bar": False},
    ):
        found = predict(PROMPTS, COMPLETIONS, lm, **options)
        probabilities = predict_proba(PROMPTS, COMPLETIONS, lm, **options)
        assert found == [COMPLETIONS[idx] for idx in probabilities.argmax(axis=1)], options


def test_search_and_weighing_know_no_model():
    """They import numpy, checks of arguments and errors, and nothing else of the package or of torch."""
    for module, known in ((search, set()), (weighing, {"numpy", "backprompt.arguments", "backprompt.errors"})):
        body = ast.parse(inspect.getsource(module)).body
        imported = {node.module for node in body if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        others = {name for name in imported if name.startswith(("backprompt", "torch", "transformers", "numpy"))}
        assert others - {"numpy.typing"} == known


# CAPPr's own numbers

RECORDED = json.loads((Path(__file__).parent / "cappr" / "numbers.json").read_text(encoding="utf-8"))
CAPPR_LMS = {
    "gpt2 byte-level": lambda: LM(FAMILIES["gpt2"](), byte_level_bpe()),
    "llama sentencepiece": lambda: LM(FAMILIES["llama"](), sentencepiece_bpe()),
}


@pytest.mark.parametrize("name", CAPPR_LMS)
def test_cappr_gives_the_same_numbers(name):
    """Recorded from CAPPr 0.9.6 on the same weights by tests/cappr/record.py.

    CAPPr leaves `end_of_prompt` out where the tokenizer puts a space before a string by itself, so one is there always.
    """
    lm, recorded = CAPPR_LMS[name](), RECORDED[name]
    no_space = "" if lm.session.needs_space_between else " "
    found = log_probs(PROMPTS, COMPLETIONS, lm, end_of_prompt=" ")
    for ours, theirs in zip(found, recorded["log_probs"], strict=True):
        for row, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(row, expected, rtol=0, atol=2e-5)
    examples = [
        Example(PROMPTS[0], COMPLETIONS[:2], prior=[0.3, 0.7], end_of_prompt=" "),
        Example(PROMPTS[1], COMPLETIONS[1:], end_of_prompt=" "),
    ]
    spaced = partial(predict_proba, PROMPTS, COMPLETIONS, lm, end_of_prompt=" ")
    found = {
        "predict_proba": spaced(),
        "prior": spaced(prior=[0.1, 0.2, 0.3, 0.4]),
        "not normalized": spaced(normalize=False),
        "no space": spaced(end_of_prompt=no_space),
        "discounted": spaced(discount_completions=-0.5),
        "examples": predict_proba(examples, lm=lm),
    }
    for case, ours in found.items():
        for row, expected in zip(ours, recorded[case], strict=True):
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-6, err_msg=case)
    assert predict(PROMPTS, COMPLETIONS, lm, end_of_prompt=" ") == recorded["predict"]
