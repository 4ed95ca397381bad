"""Many texts in one call: the numbers of each by itself, and work on the host that does not grow with them."""

import gc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backprompt import LM, MixedModelsError, Text
from backprompt.classify import log_probs
from backprompt.evaluation.pools import TENSOR_BYTES
from backprompt.model.weights import WeightsMonitor
from backprompt.session.sharing import Line
from backprompt.tokens.tokenizer import PrivateTokenizer
from comparing import assert_close
from operations import Operations
from tiny_models import build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe

MODEL, TOKENIZER = build("gpt2"), byte_level_bpe()

segments = st.one_of(
    st.sampled_from(["The cat", " sat", " on a mat", "s", " ", "", ".", "\n", "é", "Question:"]),
    st.lists(st.integers(0, 255), min_size=1, max_size=3).map(tuple),
)


@st.composite
def trees(draw):
    """Texts as lists of segments, many of which go on from another one: `(the other's number or None, segments)`."""
    num_texts = draw(st.integers(1, 8))
    return [
        (
            draw(st.none() if idx == 0 else st.one_of(st.none(), st.integers(0, idx - 1))),
            draw(st.lists(segments, min_size=1, max_size=3)),
        )
        for idx in range(num_texts)
    ]


def leaf(segment, lm):
    return Text(segment, lm) if isinstance(segment, str) else Text.from_tokens(segment, lm)


def shared(tree, lm):
    """The texts, each built on the object that it goes on from."""
    texts = []
    for parent, own in tree:
        text = Text("", lm) if parent is None else texts[parent]
        for segment in own:
            text = text + leaf(segment, lm)
        texts.append(text)
    return texts


def apart(text, lm):
    """The same text, joined from the right, of which no part is shared."""
    whole = Text("", lm)
    for segment in reversed(text.segments):
        whole = leaf(segment, lm) + whole
    return whole


@pytest.mark.parametrize("joins", ["exact", "split"])
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=30)
@given(tree=trees())
def test_ids_do_not_depend_on_what_texts_share(name, joins, tree):
    lms = [LM(MODEL, TOKENIZERS[name](), joins=joins) for _ in range(2)]
    together = lms[0].session.encoder.encode(shared(tree, lms[0]))
    assert together == [apart(text, lms[1]).tokens for text in shared(tree, lms[1])]


def test_equal_texts_are_encoded_once(monkeypatch):
    """In one call, and for as long as one of them lives."""
    lm = LM(MODEL, byte_level_bpe())
    first = [Text("The cat", lm) + " sat", Text("The cat", lm) + " sat"]
    assert first[0].tokens is not None
    encoder = lm.session.encoder
    monkeypatch.setattr(encoder.tokenizer, "encode", lambda *_, **__: pytest.fail("encoded again"))
    another = Text("", lm) + "The cat" + " sat"
    assert len({id(token_ids) for token_ids in encoder.encode([*first, another])}) == 1


@settings(max_examples=100)
@given(tree=trees(), data=st.data())
def test_scores_of_many_are_those_of_each(tree, data):
    """Whatever was evaluated before, from wherever they are scored, and in whichever order; also over the budget."""
    lm = LM(MODEL, TOKENIZER, memory_bytes=data.draw(st.sampled_from([4_000, 10_000_000])), max_tokens_per_forward=16)
    texts = [text for text in shared(tree, lm) if text.tokens]
    texts = data.draw(st.lists(st.sampled_from(texts), max_size=10)) if texts else []
    starts = [data.draw(st.integers(0, len(text.tokens))) for text in texts]
    for text in texts:
        if data.draw(st.booleans()):
            text()
    fresh = LM(MODEL, TOKENIZER)
    expected = [Text.from_tokens(text.tokens, fresh).token_logprobs for text in texts]
    for _ in range(2):
        found = lm.token_scores(texts, starts)
        for scores, logprobs, start in zip(found, expected, starts, strict=True):
            assert_close(scores.logprobs, logprobs[start:])
            assert scores.is_argmax.shape == scores.logprobs.shape
    assert [scores.logprobs.shape for scores in lm.token_scores([])] == []


def test_a_prompt_without_a_model_is_scored_with_its_ends():
    lm = LM(MODEL, TOKENIZER)
    prompt, ends = Text("The cat"), [Text.from_tokens(ids, lm) for ids in ([5, 6], [7])]
    texts = [prompt + end for end in ends]
    expected = [Text.from_tokens(text.tokens, LM(MODEL, TOKENIZER)).token_logprobs for text in texts]
    for start in (0, prompt):
        num_before = len(lm.tokens(Text("The cat", lm))) if start else 0
        for found, logprobs in zip(lm.token_logprobs(texts, [start] * 2), expected, strict=True):
            assert_close(found, logprobs[num_before:])
    with pytest.raises(MixedModelsError, match="two different LM"):
        lm.token_logprobs(texts, [Text("The", LM(MODEL, TOKENIZER))] * 2)


def test_tensors_of_texts_are_views_that_do_not_overlap():
    lm = LM(MODEL, TOKENIZER)
    texts = [Text("The cat sat on the mat", lm), Text("The cat sat", lm), Text("The cat sat on the mat", lm)]
    found = lm.token_logprobs(texts)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    before = [tensor.clone() for tensor in found]
    found[0].zero_()
    assert found[2].equal(before[2]) or found[2][1:].equal(before[2][1:])
    assert lm.token_logprobs(texts)[0][1:].equal(before[0][1:])


def many(lm, num_texts):
    prompts = [Text.from_tokens((idx % 250, 3, 5, 8), lm) for idx in range(num_texts // 4)]
    return [prompt + Text.from_tokens((ending, ending + 1), lm) for prompt in prompts for ending in (10, 20, 30, 40)]


def operations_of(work, lm):
    with Operations(lm.session.evaluator.executor) as operations:
        work()
    return operations.num


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_a_thousand_texts_take_as_many_operations_as_a_hundred(is_evaluated):
    nums = []
    for num_texts in (100, 1000):
        lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=10_000)
        texts = many(lm, num_texts)
        lm.evaluate(many(lm, 4))  # the probe
        if is_evaluated:
            lm.evaluate(texts)
        nums.append(operations_of(lambda lm=lm, texts=texts: lm.token_logprobs(texts), lm))
    assert nums[1] <= min(100, nums[0] + 8), nums


def test_completions_that_prompts_share_take_no_operation_each():
    nums = []
    for num_prompts in (8, 80):
        lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=10_000)
        lm.evaluate(many(lm, 4))
        prompts = [f"{idx} cats sat on" for idx in range(num_prompts)]
        completions = ["a mat", "a mat again", "the floor", "it", "nothing at all"]
        nums.append(operations_of(lambda lm=lm, p=prompts, c=completions: log_probs(p, c, lm), lm))
    assert nums[1] <= min(100, nums[0] + 8), nums


@pytest.mark.parametrize(("work", "num_with_texts"), [("token_logprobs", 8), ("evaluate", 11)])
def test_a_text_leaves_few_objects(work, num_with_texts):
    """Its span, and where its rows lie: the collector walks through all of them, and most of all when there are many.

    The texts themselves and what is known of them take some more.
    """
    lm = LM(MODEL, TOKENIZER, max_tokens_per_forward=10_000)
    lm.token_logprobs(many(lm, 400))
    gc.collect()
    before = len(gc.get_objects())
    texts = [Text.from_tokens((idx % 250, 9, idx // 250, 9, 9), lm) for idx in range(1000)]
    found = getattr(lm, work)(texts)
    gc.collect()
    assert len(gc.get_objects()) - before < num_with_texts * 1000
    del texts, found
    gc.collect()
    assert len(gc.get_objects()) - before < 4600  # 1,250 spans, 250 of which have a dict of children


def test_nothing_is_read_twice():
    """Scores of texts that are known take no row of the head, and one gather."""
    lm = LM(MODEL, TOKENIZER)
    texts = many(lm, 100)
    first = lm.token_logprobs(texts)
    before = lm.stats
    num = operations_of(lambda: torch.stack(lm.token_logprobs(texts)), lm)
    assert (lm.stats - before).logit_rows == (lm.stats - before).tokens_computed == 0
    assert num < 40, num
    assert all(a[1:].equal(b[1:]) for a, b in zip(first, lm.token_logprobs(texts), strict=True))


def test_a_property_of_a_computed_text_takes_one_hold_one_look_and_hardly_a_launch(monkeypatch):
    """Tokens need no look at the weights."""
    lm = LM(MODEL, TOKENIZER)
    text = Text("The cat sat", lm)
    expected = text.logits, text.token_logprobs, text.tokens
    looks = Counter()
    for of_type, name in ((WeightsMonitor, "has_changed"), (PrivateTokenizer, "has_changed"), (Line, "leave")):
        plain = getattr(of_type, name)

        def counted(self, *given, of_type=of_type, plain=plain):
            looks[of_type] += 1
            return plain(self, *given)

        monkeypatch.setattr(of_type, name, counted)
    for name, before, num_looks, max_operations in (
        ("logits", expected[0], 1, 12),
        ("token_logprobs", expected[1], 1, 12),
        ("tokens", expected[2], 0, 0),
    ):
        looks.clear()
        with Operations(lm.session.evaluator.executor) as operations:
            found = getattr(text, name)
        assert (found == before) if name == "tokens" else torch.equal(found.nan_to_num(), before.nan_to_num())
        assert looks == Counter({WeightsMonitor: num_looks, PrivateTokenizer: 1, Line: 1})
        assert operations.num <= max_operations, name


def test_log_probabilities_that_are_read_again_are_one_copy():
    """However many spans the text has."""
    lm = LM(MODEL, TOKENIZER)
    texts = [Text("The cat" + " sat" * num, lm) for num in range(12)]
    lm.evaluate(texts)
    expected = lm.token_logprobs(texts)
    for text, logprobs in zip(texts, expected, strict=True):
        text.token_logprobs.zero_()
        with Operations(lm.session.evaluator.executor) as operations:
            found = text.token_logprobs
        assert torch.equal(found.nan_to_num(), logprobs.nan_to_num())
        assert operations.num <= 2
        found.zero_()
    assert all(t.token_logprobs[1:].equal(logprobs[1:]) for t, logprobs in zip(texts, expected, strict=True))
    lm.clear()
    assert lm.stats.result_bytes_held == 0


def test_log_probabilities_that_were_read_are_counted_and_leave_with_their_spans():
    lm = LM(MODEL, TOKENIZER)
    text = Text("The cat sat", lm)
    lm.evaluate([text])
    lm.token_logprobs([text])
    assert lm.stats.result_bytes_held == 0
    num_bytes = text.token_logprobs.nbytes
    assert lm.stats.result_bytes_held == num_bytes + TENSOR_BYTES
    lm.session.evaluator.pools.retain(())
    assert lm.stats.result_bytes_held == 0


def test_groups_with_the_same_branches_keep_their_order():
    """They end in the same place."""
    lm = LM(MODEL, TOKENIZER)
    cat, dog = Text(" the cat", lm), Text(" a small dog", lm)
    texts = [Text("Here is", lm) + (cat | dog) + " again", Text("Here is", lm) + (dog | cat) + " again"]
    expected = lm.token_logprobs(texts)
    assert not expected[0][1:-1].equal(expected[1][1:-1])
    for _ in range(3):
        for text, logprobs in zip(texts, expected, strict=True):
            torch.testing.assert_close(text.token_logprobs, logprobs, rtol=0, atol=0, equal_nan=True)
