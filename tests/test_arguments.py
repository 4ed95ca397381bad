"""Whatever takes many takes them in order, and nothing that only looks as if it held them."""

from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt as bp
from backprompt import LM, Text, TextTypeError, TokenizerError
from backprompt.arguments import as_choice, as_floats, as_number
from backprompt.bound import as_lm
from backprompt.classify import Example, log_probs, predict, predict_proba, token_logprobs
from backprompt.classify.calibration import best_threshold, calibrate
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe

MODEL, TOKENIZER = FAMILIES["gpt2"](), byte_level_bpe()
LM_ = LM(MODEL, TOKENIZER)
TEXT = Text("The cat", LM_)
OPTIONS = ["mat", "hat"]

# Functions that take texts, strings, numbers ...
TAKE_TEXTS = {
    "evaluate": bp.evaluate,
    "generate": lambda given: bp.generate(given, max_new_tokens=1),
    "draw": bp.draw,
    "to_networkx": bp.to_networkx,
    "explain": bp.explain,
    "verify": bp.verify,
    "independence_gap": bp.independence_gap,
    "parallel": bp.parallel,
    "join": TEXT.join,
    "LM.evaluate": LM_.evaluate,
    "LM.token_logprobs": LM_.token_logprobs,
    "LM.token_scores": LM_.token_scores,
    "LM.next_token_logprobs": lambda given: LM_.next_token_logprobs(given, [[1]]),
    "LM.entropies": LM_.entropies,
    "LM.top_logprobs": lambda given: LM_.top_logprobs(given, 2),
    "LM.check": LM_.check,
    "LM.look_up": LM_.look_up,
    "LM.extents": LM_.extents,
    "starts": lambda given: LM_.token_logprobs([TEXT], given),
    "log_probs": lambda given: log_probs(given, OPTIONS, LM_),
    "predict_proba": lambda given: predict_proba(given, OPTIONS, LM_),
    "predict": lambda given: predict(given, OPTIONS, LM_),
    "token_logprobs": lambda given: token_logprobs(given, LM_),
}
TAKE_STRINGS = {
    "completions": lambda given: predict_proba(TEXT, given),
    "predict's completions": lambda given: predict(TEXT, given),
    "an example's": lambda given: Example("The cat", given),
    "options": TEXT.select,
    "plot_probabilities": lambda given: bp.plot_probabilities([0.5, 0.5], given),
}
TAKE_OTHERS = {
    "token ids": lambda given: Text.from_tokens(given, LM_),
    "next ids": lambda given: LM_.next_token_logprobs([TEXT], given),
    "next ids of a text": lambda given: LM_.next_token_logprobs([TEXT], [given]),
    "messages": lambda given: bp.chat(LM_, given),
    "prior": lambda given: predict_proba(TEXT, OPTIONS, prior=given),
    "calibrate": lambda given: calibrate(given, [0.5, 0.5]),
    "neutral": lambda given: calibrate([0.5, 0.5], given),
    "best_threshold": lambda given: best_threshold(given, [True, False]),
    "is_positive": lambda given: best_threshold([0.2, 0.5], given),
    "marginals": lambda given: predict_proba(TEXT, OPTIONS, discount_completions=1, log_marg_probs_completions=given),
    "marginals of one": lambda given: predict_proba(
        TEXT, OPTIONS, discount_completions=1, log_marg_probs_completions=[given, [None]]
    ),
}
TAKE = {**TAKE_TEXTS, **TAKE_STRINGS, **TAKE_OTHERS}
TAKE_A_STRING = ("join", "log_probs", "predict_proba", "predict", "token_logprobs")  # as one text, or as its characters
NO_SEQUENCES = [{}, {"text": TEXT, "label": 1}, OrderedDict(a=0.5, b=0.5), {TEXT}, {"a", "b"}, b"ab", bytearray(b"ab")]


@pytest.mark.parametrize("name", TAKE)
def test_what_has_no_order_is_refused(name):
    before = LM_.stats
    for given_ in NO_SEQUENCES:
        with pytest.raises(TextTypeError) as caught:
            TAKE[name](given_)
        kind = type(given_).__name__
        assert kind in str(caught.value)
        assert not isinstance(given_, dict) or "list(d.values())" in str(caught.value)
    assert (LM_.stats - before).tokens_computed == 0


@pytest.mark.parametrize("name", {**TAKE_TEXTS, **TAKE_STRINGS, "messages": TAKE["messages"]})
def test_a_data_frame_is_refused(name):
    for table in (pd.DataFrame({"text": [TEXT, TEXT]}), pd.DataFrame({"mat": ["a"], "hat": ["b"]})):
        with pytest.raises(TextTypeError, match=r'table \(DataFrame\).*df\["text"\]'):
            TAKE[name](table)


@pytest.mark.parametrize("name", [name for name in TAKE if name not in TAKE_A_STRING])
def test_a_string_is_no_sequence(name):
    with pytest.raises(TextTypeError, match="not the str 'ab'"):
        TAKE[name]("ab")


@pytest.mark.parametrize("make", [list, tuple, iter, pd.Series, np.array, lambda given: dict.fromkeys(given).keys()])
def test_sequences_of_all_kinds_are_taken(make):
    prompts = ["The cat sat", "There were"]
    expected = predict_proba(prompts, OPTIONS, LM_)
    np.testing.assert_array_equal(predict_proba(make(prompts), make(OPTIONS), LM_), expected)
    assert predict(make(prompts), make(OPTIONS), LM_) == predict(prompts, OPTIONS, LM_)
    assert TEXT.select(make(OPTIONS)).probabilities == TEXT.select(OPTIONS).probabilities
    numbers = [0.25, 0.75]
    np.testing.assert_array_equal(calibrate(make(numbers), numbers), calibrate(numbers, numbers))


@given(st.lists(st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(-9, 9)), min_size=1))
def test_numbers_are_floats(values):
    expected = np.array(values, dtype=float)
    for make in (list, tuple, iter, pd.Series, np.array):
        np.testing.assert_array_equal(as_floats(make(values), "values"), expected)
    assert [as_number(value, "value") for value in values] == expected.tolist()


@pytest.mark.parametrize("odd", [True, "0.5", None, [1], 1j, float("nan"), float("-inf")])
def test_what_is_no_number_is_refused(odd):
    with pytest.raises((TypeError, ValueError), match="value must be a"):
        as_number(odd, "value")
    with pytest.raises((TypeError, ValueError), match="values must be numbers in order"):
        as_floats([odd, 0.5] if odd is not True else [True], "values")


TAKE_INTS = {
    "top": (0, lambda top: TEXT.show(top=top)),
    "sample": (1, lambda sample: bp.verify([TEXT], sample=sample)),
    "max_children": (2, lambda number: bp.draw(TEXT, max_children=number)),
    "max_characters": (2, lambda number: bp.draw(TEXT, max_characters=number)),
}


@pytest.mark.parametrize("name", TAKE_INTS)
def test_ints_have_one_rule(name):
    """A bool, a float and a string are none; whole numbers of numpy are, as they come from arrays."""
    least, call = TAKE_INTS[name]
    for odd in (True, float(least), str(least), None, least - 1):
        if odd is None and name == "sample":
            continue  # all of the texts
        with pytest.raises(ValueError, match=f"^{name} must be an int of at least {least}, not {odd!r}"):
            call(odd)
    call(np.int64(least))


def test_bars_to_plot():
    with pytest.raises(ValueError, match="top must be an int of at least 1, not False"):
        bp.plot_probabilities([0.5, 0.5], OPTIONS, top=False)


TAKE_CHOICES = {
    "search": ("'exhaustive', 'best-first'", lambda odd: predict(TEXT, OPTIONS, search=odd)),
    "aggregate": ("'mean', 'sum'", lambda odd: predict_proba(TEXT, OPTIONS, aggregate=odd)),
    "end_of_prompt": ("'auto', ' ', ''", lambda odd: log_probs(TEXT, OPTIONS, end_of_prompt=odd)),
    "positions": ("'shared', 'sequential'", lambda odd: bp.parallel([TEXT, "a"], positions=odd)),
}


@pytest.mark.parametrize("name", TAKE_CHOICES)
def test_choices_are_named(name):
    choices, call = TAKE_CHOICES[name]
    with pytest.raises(ValueError, match=f"^{name} must be one of {choices}, not 'odd'"):
        call("odd")
    assert as_choice("b", name, ("a", "b")) == "b"


@pytest.mark.parametrize("labels", [["yes", "no"], [2, 0], [None, True]])
def test_labels_are_booleans(labels):
    with pytest.raises(TypeError, match=r"is_positive\[0\] must be True or False"):
        best_threshold([0.2, 0.5], labels)


# Strings that no tokenizer takes


@pytest.mark.parametrize(
    ("call", "which"),
    [
        (lambda bad: predict_proba(TEXT, ["a", bad]), r"completions\[1\]"),
        (lambda bad: predict(["a", bad], OPTIONS, LM_), r"prompts\[1\]"),
        (lambda bad: token_logprobs(["a", bad], LM_), r"texts\[1\]"),
        (lambda bad: TEXT.select(["a", bad]), r"completions\[1\]"),
        (lambda bad: Example("a", ["a", bad]), r"completions\[1\]"),
        (lambda bad: Example(bad, ["a", "b"]), "prompt"),
        (lambda bad: predict_proba(TEXT, OPTIONS, neutral_prompt=bad), "neutral_prompt"),
        (lambda bad: Text(bad, LM_).joins(), "string"),
        (lambda bad: LM_.extents([Text(bad, LM_)]), "string"),
        (lambda bad: (Text(bad, LM_) + Text.from_tokens([7], LM_)).string, "string"),
        (lambda bad: bp.explain(Text(bad, LM_)), r"Text\('x\\udc80'\)"),
        (lambda bad: TEXT.generate(max_new_tokens=1, stop=["a", bad]), "stop string"),
    ],
)
def test_a_lone_surrogate_is_named(call, which):
    with pytest.raises(TokenizerError, match=rf"{which}.* holds a lone surrogate at character 1"):
        call("x\udc80")


# (model, tokenizer)


def test_a_model_and_a_tokenizer_are_an_lm():
    pair = (MODEL, TOKENIZER)
    lm = as_lm(pair)
    assert as_lm(pair) is lm is Text("a", pair).lm
    for call in (
        lambda lm: log_probs("The cat", OPTIONS, lm),
        lambda lm: predict(["The cat"], OPTIONS, lm),
        lambda lm: predict_proba([Example("The cat", OPTIONS)], lm=lm)[0].tolist(),
        lambda lm: token_logprobs("The cat", lm),
        lambda lm: predict(Text("The cat", lm), OPTIONS, lm),
        lambda lm: Text("The cat", lm).select(OPTIONS).probabilities,
        lambda lm: bp.evaluate([Text("The cat", lm), Text(" sat", lm)])[0].logits.tolist(),
        lambda lm: Text("The cat", lm).generate(max_new_tokens=3).tokens,
        lambda lm: bp.parallel([Text("The cat", lm), Text("a", lm)]).tokens,
    ):
        assert call(pair) == call(lm)
    for odd in ("gpt2", 3, (MODEL,), [MODEL, TOKENIZER], MODEL):
        for call in (lambda lm: log_probs("a", OPTIONS, lm), lambda lm: bp.chat(lm, []), lambda lm: Text("a", lm)):
            with pytest.raises(TextTypeError, match=r"an LM or a \(model, tokenizer\) tuple"):
                call(odd)


# Flags and numbers

EXAMPLE_TEXTS = ["The cat", "There were"]
BOOLS = {
    "Text": ("add_special_tokens", lambda given: Text("a", LM_, add_special_tokens=given)),
    "LM": ("pack_weights", lambda given: LM(MODEL, TOKENIZER, pack_weights=given)),
    "Example": ("normalize", lambda given: Example("The cat", OPTIONS, normalize=given)),
    "predict_proba": ("normalize", lambda given: predict_proba(TEXT, OPTIONS, normalize=given)),
    "select": ("normalize", lambda given: TEXT.select(OPTIONS, normalize=given)),
    "verify": ("raise_on_drift", lambda given: bp.verify(TEXT, raise_on_drift=given)),
    "explain": ("analyze", lambda given: bp.explain(TEXT, analyze=given)),
    "generate": ("include_stop", lambda given: TEXT.generate(max_new_tokens=1, stop="x", include_stop=given)),
    "do_sample": ("do_sample", lambda given: TEXT.generate(max_new_tokens=1, do_sample=given)),
    "chat": ("add_generation_prompt", lambda given: bp.chat(CHATTY, MESSAGES, add_generation_prompt=given)),
    "chat's last": ("continue_final_message", lambda given: bp.chat(CHATTY, ANSWERED, continue_final_message=given)),
}
BARS = {
    "evaluate": lambda given: bp.evaluate(TEXT, show_progress_bar=given),
    "load": lambda given: bp.load("nowhere", show_progress_bar=given),
    "generate": lambda given: bp.generate(TEXT, max_new_tokens=1, show_progress_bar=given),
    "verify": lambda given: bp.verify(TEXT, show_progress_bar=given),
    "independence_gap": lambda given: bp.independence_gap(TEXT, show_progress_bar=given),
    "log_probs": lambda given: log_probs(EXAMPLE_TEXTS, OPTIONS, LM_, show_progress_bar=given),
    "predict_proba": lambda given: predict_proba(EXAMPLE_TEXTS, OPTIONS, LM_, show_progress_bar=given),
    "with a discount": lambda given: predict_proba(
        EXAMPLE_TEXTS, OPTIONS, LM_, discount_completions=-0.5, show_progress_bar=given
    ),
    "predict": lambda given: predict(EXAMPLE_TEXTS, OPTIONS, LM_, show_progress_bar=given),
    "best-first": lambda given: predict(EXAMPLE_TEXTS, OPTIONS, LM_, search="best-first", show_progress_bar=given),
    "token_logprobs": lambda given: token_logprobs(EXAMPLE_TEXTS, LM_, show_progress_bar=given),
    "LM.token_logprobs": lambda given: LM_.token_logprobs([TEXT], show_progress_bar=given),
    "LM.next_token_logprobs": lambda given: LM_.next_token_logprobs([TEXT], [[1]], show_progress_bar=given),
    "LM.entropies": lambda given: LM_.entropies([TEXT], show_progress_bar=given),
    "LM.top_logprobs": lambda given: LM_.top_logprobs([TEXT], 2, show_progress_bar=given),
}
INTS = {
    "sample": (1, lambda given: bp.verify(TEXT, sample=given)),
    "seed": (0, lambda given: bp.verify(TEXT, seed=given)),
    "top": (1, lambda given: bp.plot_probabilities([0.5, 0.5], OPTIONS, top=given)),
    "top of show": (0, lambda given: TEXT.show(top=given)),
    "max_children": (2, lambda given: bp.draw(TEXT, max_children=given)),
    "max_characters": (2, lambda given: bp.draw(TEXT, max_characters=given)),
    "max_new_tokens": (1, lambda given: TEXT.generate(max_new_tokens=given)),
    "n": (1, lambda given: bp.generate(TEXT, max_new_tokens=1, do_sample=True, n=given)),
    "max_tokens_per_forward": (1, lambda given: LM(MODEL, TOKENIZER, max_tokens_per_forward=given)),
    "top_k": (0, lambda given: TEXT.generate(max_new_tokens=1, do_sample=True, top_k=given)),
}
MESSAGES = [{"role": "user", "content": "a"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "b"}]


def _chatty():
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return LM(MODEL, tokenizer)


CHATTY = _chatty()


@pytest.mark.parametrize("where", BOOLS)
def test_a_flag_is_true_or_false(where):
    name, call = BOOLS[where]
    before = LM_.stats
    for given_ in ("no", 1, 0, np.int64(1), [True])[where == "chat's last" :]:  # there a string names a field
        with pytest.raises((ValueError, TypeError), match=f"{name} must be True or False, not "):
            call(given_)
    assert (LM_.stats - before).tokens_requested == 0
    for given_ in (True, np.True_, np.False_):
        call(given_)


@pytest.mark.parametrize("where", BARS)
def test_a_bar_shows_or_does_not(where, capfd):
    before = LM_.stats
    for given_ in ("no", 0, 1):
        with pytest.raises(ValueError, match="show_progress_bar must be True or False, not "):
            BARS[where](given_)
    assert (LM_.stats - before).tokens_requested == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("where", INTS)
def test_a_count_is_a_whole_number(where):
    least, call = INTS[where]
    name, before = where.split()[0], LM_.stats
    for given_ in (least - 1, True, np.True_, 2.0, "2", np.float32(2)):
        with pytest.raises(ValueError, match=f"{name} must be an int of at least {least}, not "):
            call(given_)
    assert (LM_.stats - before).tokens_computed == 0
    call(np.int64(max(least, 1)))


def test_a_tolerance_is_a_number_of_nats():
    for given_, error in (("0.1", TypeError), (True, TypeError), (-1, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match="tolerance must be a finite number of at least 0, not "):
            bp.verify(TEXT, tolerance=given_)
    assert bp.verify(TEXT, tolerance=np.float32(0.5)).tolerance == 0.5


def test_bytes_are_counted_by_numbers_of_numpy_too(tmp_path):
    assert bp.DiskStore(tmp_path / "store", max_bytes=np.int64(10**6)).max_bytes == 10**6
    with pytest.raises(ValueError, match="max_bytes must be a number of bytes"):
        bp.DiskStore(tmp_path / "store", max_bytes=True)


def test_what_takes_texts_is_named():
    for name in ("draw", "to_networkx"):
        with pytest.raises(TextTypeError, match=f"^{name} takes a Text"):
            getattr(bp, name)({})
    with pytest.raises(TextTypeError, match="a set has no order"):
        bp.draw({TEXT})
