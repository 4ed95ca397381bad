"""Look-ahead by n-grams: the same tokens in fewer passes, and nothing that was proposed in vain stays."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, GenerationError, Text, generate
from backprompt.generation.choosing import Logits, choose
from backprompt.generation.decoding import Decoding, TextDecoding
from backprompt.generation.lookahead import Ngrams
from backprompt.generation.stops import StopStrings
from comparing import assert_close
from reference import plain_greedy, plain_token_logprobs
from tiny_models import FAMILIES

FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def proposals(ids, num_tokens, max_ngram):
    """Those of a text whose ids came in two parts."""
    ngrams = Ngrams(max_ngram)
    for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
        ngrams.extend(part)
    return ngrams.proposals(num_tokens)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], [(3, 9, 1), (9, 1, 2)][:1]),
        ([1, 2, 3, 7, 2, 4, 1, 2], [(3, 7, 2), (4, 1, 2)]),  # the longer n-gram first, then the latest
        ([1, 2, 3, 1, 2, 4, 1, 2], [(4, 1, 2), (3, 1, 2)]),
        ([5, 5, 5, 5], [(5, 5, 5)]),  # not its beginnings, which also followed
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_what_followed_before_is_proposed(ids, expected):
    found = proposals(ids, 3, 2)
    assert found[: len(expected)] == expected
    assert bool(found) == bool(expected)


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=40), num_tokens=st.integers(1, 5), max_ngram=st.integers(1, 4)
)
def test_proposals_stand_in_the_text_behind_its_last_tokens(ids, num_tokens, max_ngram):
    found = proposals(ids, num_tokens, max_ngram)
    assert len(found) <= 3
    assert bool(found) == (ids[-1] in ids[:-1])
    for tokens in found:
        assert 1 <= len(tokens) <= num_tokens
        assert any(
            ids[start] == ids[-1] and tuple(ids[start + 1 : start + 1 + num_tokens]) == tokens
            for start in range(len(ids) - 1)
        )
        assert not any(other != tokens and other[: len(tokens)] == tokens for other in found)


def repeating(lm, times=5):
    return Text("The cat sat on the mat. " * times, lm)


def count(lm, text, **options):
    lm.clear()
    before = lm.stats
    found = text.generate(**options)
    return found, lm.stats - before


def test_the_tokens_are_the_same_in_fewer_passes(lm, model):
    """A model with random weights soon repeats itself."""
    text = repeating(lm)
    plain, plainly = count(lm, text, max_new_tokens=40)
    found, ahead = count(lm, text, max_new_tokens=40, prompt_lookup_num_tokens=8)
    assert found.completion_tokens == plain.completion_tokens == plain_greedy(model, text.tokens, 40)
    assert plainly.forward_passes == 40
    assert ahead.forward_passes < 20
    assert_close(found.completion_logprobs, plain.completion_logprobs)
    expected = plain_token_logprobs(model, found.tokens)
    assert_close(found.token_logprobs, expected)


def test_what_was_proposed_in_vain_is_not_held(lm):
    text = Text("The cat sat. The dog sat. The sad", lm)
    found, done = count(lm, text, max_new_tokens=30, prompt_lookup_num_tokens=5)
    num_held = len(text.tokens) + 29
    assert done.tokens_computed > num_held
    assert lm.stats.bytes_held == num_held * lm.session.evaluator.executor.token_bytes
    assert len(lm.session.evaluator.forest.insert(found.tokens[:-1]).path()) == 2
    before = lm.stats
    assert text.generate(max_new_tokens=30).completion_tokens == found.completion_tokens
    assert (lm.stats - before).tokens_computed == 0


@FLAT
@given(
    family=st.sampled_from(["gpt2", "llama", "mistral_sliding"]),
    num_tokens=st.integers(1, 12),
    max_ngram=st.sampled_from([None, 1, 3]),
    options=st.sampled_from(
        [
            {},
            {"eos_token_id": list(range(0, 320, 9))},
            {"repetition_penalty": 1.3},
            {"do_sample": True, "seed": 3, "temperature": 0.7},
            {"do_sample": True, "seed": 4, "top_k": 3, "n": 3},
        ]
    ),
    max_new_tokens=st.integers(1, 20),
)
def test_what_is_chosen_does_not_change(tokenizer, family, num_tokens, max_ngram, options, max_new_tokens):
    lm = LM(FAMILIES[family](), tokenizer)
    texts = [repeating(lm, times) for times in (2, 3)] + [Text("12 cats and 12 cats and", lm)]
    options = {"max_new_tokens": max_new_tokens, "show_progress_bar": False, "n": 1, **options}
    lookup = {"prompt_lookup_num_tokens": num_tokens, "max_matching_ngram_size": max_ngram}
    plain = generate(texts, **options)
    lm.clear()
    for row, expected in zip(generate(texts, **options, **lookup), plain, strict=True):
        for found, one in zip(row, expected, strict=True):
            assert found.completion_tokens == one.completion_tokens
            assert found.finish_reason == one.finish_reason
            assert_close(found.completion_logprobs, one.completion_logprobs)
    assert not lm.session.evaluator.holders.ends()


def test_less_is_proposed_after_what_was_wrong_and_more_after_what_was_right(lm):
    """The prompt counts from 100 to 129, so what follows a number there is the next one."""
    options = Decoding(
        lm.session.causal_lm,
        lm.tokenizer,
        max_new_tokens=50,
        stops=StopStrings(None, lm.tokenizer),
        seed=None,
        given={"prompt_lookup_num_tokens": 8},
    )
    text = TextDecoding(options, list(range(100, 130)), 0)

    def num_proposed_after(*token_ids):
        rows, completion = {ids: row for row, ids in enumerate(text.ahead)}, text.ahead[0]
        logits = torch.zeros(len(rows), 320)
        for token_id in token_ids:
            logits[rows[completion], token_id] = 1.0
            completion = (*completion, token_id)
        choose([text], [rows], Logits([logits], 8))
        return len(text.ahead) - 1

    assert [num_proposed_after(wrong) for wrong in (103, 110, 120, 105, 115)] == [8, 4, 2, 1, 1]
    assert num_proposed_after(116, 108) == 2
    assert num_proposed_after(109, 110, 101) == 4
    assert num_proposed_after(102, 107) == 8
    assert num_proposed_after(117) == 4


def test_streams_look_ahead_too(lm):
    text = repeating(lm)
    assert (
        "".join(text.stream(max_new_tokens=30, prompt_lookup_num_tokens=6))
        == text.generate(max_new_tokens=30).completion
    )


def test_nothing_beyond_the_last_position_is_forwarded(lm, model):
    text = repeating(lm, 6)
    num_left = model.config.n_positions - len(text.tokens)
    found = text.generate(max_new_tokens=num_left, prompt_lookup_num_tokens=20)
    assert len(found.completion_tokens) == num_left


def test_another_kind_of_assistance_is_refused(lm):
    with pytest.raises(GenerationError, match=r"not assisted generation"):
        Text("The cat", lm).generate(max_new_tokens=3, assistant_early_exit=1)
