"""The space between a prompt and a completion: one rule for all that scores completions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backprompt import LM, GroupError, Text, TokenIdError, TokenizerError, chat, classify
from backprompt.classify import Example, log_probs, predict, predict_proba, token_logprobs
from backprompt.classify.completions import completion_ids, ends_behind
from tiny_models import FAMILIES, build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, sentencepiece_bpe

LMS = {name: LM(FAMILIES["gpt2"](), make()) for name, make in TOKENIZERS.items()}
OPTIONS = ["mat", "a cat", " the", "46"]
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def lm(model):
    return LM(model, byte_level_bpe())


def scored_ids(prompt, completion, lm, end_of_prompt="auto"):
    (end,) = ends_behind(lm, [(prompt, end_of_prompt)])
    (ids,) = completion_ids(lm, [(end, completion)]).values()
    return ids


def continued(string, lm):
    """The ids of a string behind token ids, where nothing is put before it."""
    return (Text.from_tokens([5], lm) + string).tokens[1:]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(st.data())
def test_a_space_between_two_that_have_none(tokenizer, data):
    lm = LMS[tokenizer]
    special = lm.tokenizer.eos_token
    pieces = st.lists(st.sampled_from(["The cat", "sat", " ", "\n", "(", special, "a.", "\u00a0"]), min_size=1)
    parts = data.draw(pieces)
    completion = data.draw(st.sampled_from(["mat", " mat", "\nmat", "the cat", "46"]))
    prompt = Text("", lm).join(parts)
    string = "".join(parts)
    has_one = string[-1].isspace() or completion[0].isspace() or string.endswith(special)
    ids = scored_ids(prompt, completion, lm)
    assert ids == continued(completion if has_one else f" {completion}", lm)
    assert scored_ids(prompt, completion, lm, "") == continued(completion, lm)


def test_a_word_that_was_added_is_a_word():
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["covid", "<think>", "</tool_call>", "2026"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["END"]})
    lm = LM(build("gpt2", vocab_size=len(tokenizer)), tokenizer)
    for end, space in (("covid", " "), ("2026", " "), ("<think>", ""), ("</tool_call>", ""), ("END", "")):
        prompt = Text(f"Is it {end}", lm)
        assert prompt.select(["yes", "no"]).string.removeprefix(prompt.string) in (f"{space}yes", f"{space}no")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_behind_what_is_no_string(tokenizer):
    lm = LMS[tokenizer]
    behind_ids = Text("The cat", lm) + Text.from_tokens([7, 8], lm)
    assert scored_ids(behind_ids, "mat", lm) == continued("mat", lm)
    assert scored_ids(behind_ids + " sat", "mat", lm) == continued(" mat", lm)


def test_all_that_scores_completions_does_it_alike(lm):
    for prompt in [Text("The cat sat on the", lm), Text("The cat:\n", lm), Text("The cat<|endoftext|>", lm)]:
        texts = [prompt + Text.from_tokens(scored_ids(prompt, option, lm), lm) for option in OPTIONS]
        expected = [row.tolist() for row in lm.token_logprobs(texts, [prompt] * len(texts))]
        for row, expected_row in zip(log_probs(prompt, OPTIONS), expected, strict=True):
            np.testing.assert_allclose(row, expected_row, atol=1e-6)
        weights = np.array([np.mean(row) for row in expected])
        probabilities = predict_proba(prompt, OPTIONS)
        np.testing.assert_allclose(probabilities, np.exp(weights) / np.exp(weights).sum(), atol=1e-6)
        best = OPTIONS[int(weights.argmax())]
        selected = prompt.select(OPTIONS)
        assert selected.option == best == predict(prompt, OPTIONS) == predict(prompt, OPTIONS, search="best-first")
        assert selected.tokens == prompt.tokens + scored_ids(prompt, best, lm)
        np.testing.assert_array_equal(predict_proba([Example(prompt, OPTIONS)])[0], probabilities)


def test_a_chat_is_answered_without_a_space(lm):
    lm.tokenizer.chat_template = CHATML
    prompt = chat(lm, [{"role": "user", "content": "The cat sat?"}])
    assert prompt.string.endswith("<|assistant|>\n")
    answer = prompt.select(["yes", "no"])
    assert answer.string == prompt.string + answer.option
    assert prompt.select(["yes", "no"], end_of_prompt=" ").string.endswith("\n " + answer.option)


def test_a_discount_scores_the_ids_that_stand_behind_each_prompt(lm):
    prompts, completions = ["The cat sat on the", "The cat:\n", "There were"], ["mat", "a cat"]
    expected = []
    for prompt, space in zip(prompts, [" ", "", " "], strict=True):
        options = {"end_of_prompt": space, "discount_completions": -0.5}
        marginals = token_logprobs(completions, lm, end_of_prompt=space)
        expected.append(predict_proba(prompt, completions, lm, log_marg_probs_completions=marginals, **options))
    np.testing.assert_allclose(predict_proba(prompts, completions, lm, discount_completions=-0.5), expected, atol=1e-9)
    given_ = {"discount_completions": -0.5, "log_marg_probs_completions": token_logprobs(completions, lm)}
    with pytest.raises(ValueError, match=r"no space stands before 'mat' behind prompts\[1\]"):
        predict_proba(prompts, completions, lm, **given_)
    found = predict_proba(prompts[::2], completions, lm, **given_)
    np.testing.assert_allclose(found, expected[::2], atol=1e-9)
    best = predict(prompts, completions, lm, discount_completions=-0.5, search="best-first")
    assert best == [completions[int(row.argmax())] for row in expected]


@pytest.mark.parametrize(
    ("tokenizer", "pair"), [("byte_level_bpe", ["mat", " mat"]), ("unigram", ["\u2603", "\u2604"])]
)
def test_what_the_model_cannot_tell_apart_is_refused(tokenizer, pair):
    lm = LMS[tokenizer]
    before = lm.stats
    for call in (
        lambda: log_probs("The cat", pair, lm),
        lambda: predict("The cat", ["dog", *pair], lm, search="best-first"),
        lambda: Text("The cat", lm).select(pair),
        lambda: predict_proba([Example("The cat", pair)], lm=lm),
    ):
        with pytest.raises(ValueError, match="have the same token ids") as caught:
            call()
        assert all(ascii(completion) in str(caught.value) for completion in pair)
    assert (lm.stats - before).tokens_computed == 0


def test_a_frozen_text_alone_is_that_text(lm):
    for text in [Text("The cat sat on the", lm), Text("The cat:\n", lm)]:
        np.testing.assert_allclose(predict_proba(text.frozen(), OPTIONS), predict_proba(text, OPTIONS), atol=1e-6)
        assert log_probs(text.frozen(), OPTIONS) == log_probs(text, OPTIONS)
        assert predict(text.frozen(), OPTIONS, search="best-first") == predict(text, OPTIONS)
        assert text.frozen().select(OPTIONS).option == text.select(OPTIONS).option
    for refused in [Text("See", lm) + Text("The cat", lm).frozen(), Text("a", lm) | "b", Text("a", lm).frozen() | "b"]:
        for call in (log_probs, predict_proba, predict, lambda text, options: text.select(options)):
            with pytest.raises(GroupError, match="ends in a group"):
                call(refused, OPTIONS)


class Slow:
    """A tokenizer in Python: one without a `tokenizers` backend."""

    def __init__(self, fast):
        self._fast = fast
        self.init_kwargs, self.all_special_tokens = {}, fast.all_special_tokens
        self.get_vocab, self.get_added_vocab, self.decode = fast.get_vocab, fast.get_added_vocab, fast.decode

    def __len__(self):
        return len(self._fast)

    def __call__(self, *arguments, **options):
        return self._fast(*arguments, **options)


def test_tokenizers_in_python_do_what_they_can(model):
    slow, fast = LM(model, Slow(byte_level_bpe())), LM(model, byte_level_bpe())
    for end_of_prompt in ("auto", " ", ""):
        options = {"end_of_prompt": end_of_prompt}
        assert log_probs("The cat:\n", ["mat"], slow, **options) == log_probs("The cat:\n", ["mat"], fast, **options)
    slow, fast = LM(model, Slow(sentencepiece_bpe())), LM(model, sentencepiece_bpe())
    assert log_probs("The cat", ["mat"], slow) == log_probs("The cat", ["mat"], fast)
    with pytest.raises(TokenizerError, match="completion without a space before it"):
        log_probs("The cat", ["mat"], slow, end_of_prompt="")


@pytest.mark.parametrize("bad", ["<new>", "<new> a", "a <new> a"])
def test_an_id_that_the_model_lacks_is_named_before_anything_is_computed(bad):
    """Also in a completion that is not the longest one, as its last token or within."""
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(["<new>"])
    lm = LM(build("gpt2"), tokenizer)
    completions = ["sat on the mat and slept for days", bad]
    calls = [
        lambda: classify.log_probs("the cat", completions, lm),
        lambda: classify.predict_proba(["the cat"], completions, lm),
        lambda: classify.predict("the cat", completions, lm, search="best-first"),
        lambda: Text("the cat", lm).select(completions),
    ]
    for call in calls:
        with pytest.raises(TokenIdError, match="has token id 320 at position"):
            call()
    assert lm.stats.tokens_computed == 0
