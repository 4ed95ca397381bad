"""Beam search through the forest: the results of transformers, each token once, and discarded beams leave no trace."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, GenerationError, Text, evaluate, generate
from comparing import assert_close
from reference import plain_logits, plain_token_logprobs
from tiny_models import FAMILIES

PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is 12 + 34? Answer:", "The cat"]
FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def theirs(model, ids, n=1, **options):
    """The ids that `generate` of transformers appends to one prompt, the best first, padding cut off."""
    ids = torch.tensor([ids])
    options = {"do_sample": False, "pad_token_id": 0, "num_return_sequences": n, **options}
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_scores=True, **options
    )
    lengths = (found.beam_indices >= 0).sum(dim=1).tolist()
    return [tuple(row[ids.shape[1] :][:length].tolist()) for row, length in zip(found.sequences, lengths, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_find_what_transformers_finds(family, tokenizer):
    model = FAMILIES[family]()
    lm = LM(model, tokenizer)
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    num_new = 9 if family != "phi3_longrope" else 4  # of 32 positions
    for text, found in zip(texts, generate(texts, max_new_tokens=num_new, num_beams=4), strict=True):
        assert [found.completion_tokens] == theirs(model, text.tokens, max_new_tokens=num_new, num_beams=4)
        assert found.finish_reason == "length"
        expected = plain_token_logprobs(model, found.tokens)
        assert_close(found.completion_logprobs, expected[-num_new:])
        assert_close(found.token_logprobs, expected)
        assert_close(found.logits, plain_logits(model, found.tokens)[-1])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 5, "eos_token_id": list(range(0, 320, 5))},
        {"num_beams": 3, "eos_token_id": list(range(0, 320, 3)), "early_stopping": True},
        {"num_beams": 3, "eos_token_id": list(range(0, 320, 4)), "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 4, "eos_token_id": list(range(0, 320, 4)), "length_penalty": -1.0},
        {"num_beams": 3, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "min_new_tokens": 6, "eos_token_id": list(range(0, 320, 2))},
        {"num_beams": 3, "bad_words_ids": [[5], [6, 7]], "forced_eos_token_id": 9},
    ],
    ids=str,
)
def test_the_rules_are_those_of_transformers(lm, model, options):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    n = options["num_beams"]
    for text, found in zip(texts, generate(texts, max_new_tokens=10, n=n, **options), strict=True):
        expected = theirs(model, text.tokens, n=n, max_new_tokens=10, **options)
        assert [one.completion_tokens for one in found] == expected
        ends = options.get("eos_token_id", [])
        assert [one.finish_reason for one in found] == ["eos" if ids[-1] in ends else "length" for ids in expected]
        for one in found:
            expected_logprobs = plain_token_logprobs(model, one.tokens)[len(text.tokens) :]
            assert_close(one.completion_logprobs, expected_logprobs)


def beams_by_hand(model, ids, num_beams, num_tokens):
    """All that plain beam search looks at: the beams of each step, without an end token."""
    beams = [((), 0.0)]
    forwarded = set()
    for _ in range(num_tokens):
        candidates = []
        for added, score in beams:
            if added:
                forwarded.add(added)
            logprobs = plain_logits(model, [*ids, *added])[-1].log_softmax(dim=-1)
            candidates += [((*added, token_id), score + float(value)) for token_id, value in enumerate(logprobs)]
        beams = sorted(candidates, key=lambda candidate: -candidate[1])[:num_beams]
    return beams, forwarded


def test_each_distinct_token_is_computed_once_in_a_pass_a_step_and_only_the_best_stays(lm, model):
    text = Text(PROMPTS[0], lm)
    found = text.generate(max_new_tokens=10, num_beams=4)
    beams, forwarded = beams_by_hand(model, text.tokens, 4, 10)
    assert found.completion_tokens == beams[0][0]
    stats = lm.stats
    assert stats.tokens_computed == len(text.tokens) + len(forwarded)
    assert stats.forward_passes == 10
    held = {ids[:-1][:stop] for ids, _ in beams for stop in range(1, 10)}  # finished beams stay held, to be continued
    assert stats.bytes_held == (len(text.tokens) + len(held)) * lm.session.evaluator.executor.token_bytes
    again = text + Text.from_tokens(found.completion_tokens[:-1], lm)
    before = lm.stats
    evaluate([again])
    assert (lm.stats - before).tokens_computed == 0


def test_a_long_beam_is_few_spans(lm):
    found = Text(PROMPTS[0], lm).generate(max_new_tokens=60, num_beams=3)
    end = lm.session.evaluator.forest.insert(found.tokens[:-1])
    assert len(end.path()) <= 5


@pytest.mark.parametrize("memory_tokens", [0, 25, 60])
def test_any_budget(model, tokenizer, memory_tokens):
    lm = LM(model, tokenizer, memory_bytes=memory_tokens * 646)
    texts = [Text(f"{number} cats sat on the mat and", lm) for number in range(5)]
    for text, found in zip(texts, generate(texts, max_new_tokens=6, num_beams=3, n=2), strict=True):
        expected = theirs(model, text.tokens, n=2, max_new_tokens=6, num_beams=3)
        assert [one.completion_tokens for one in found] == expected
    assert lm.stats.bytes_held <= memory_tokens * 646


@FLAT
@given(
    numbers=st.lists(st.integers(0, 99), min_size=1, max_size=5),
    num_beams=st.integers(2, 5),
    max_live=st.sampled_from([1, 6, 256]),
    data=st.data(),
)
def test_texts_do_not_see_each_others_beams(model, tokenizer, numbers, num_beams, max_live, data):
    lm = LM(model, tokenizer)
    options = {"max_new_tokens": 7, "num_beams": num_beams, "eos_token_id": list(range(0, 320, 6))}
    texts = [Text(f"{number} cats sat", lm) for number in numbers]
    if data.draw(st.booleans()):
        texts[0].generate(max_new_tokens=9)  # some of it is there already
    pinned = texts[-1].pin() if data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backprompt.generation.run.MAX_LIVE_TEXTS", max_live)
        for text, found in zip(texts, generate(texts, **options, show_progress_bar=False), strict=True):
            assert [found.completion_tokens] == theirs(model, text.tokens, **options)
    if pinned is not None:
        pinned.release()
    assert not lm.session.evaluator.holders.ends()


def test_an_interrupted_beam_search_keeps_nothing_pinned(lm, monkeypatch):
    executor = lm.session.evaluator.executor
    forward, passes = executor.forward, []

    def interrupt(pass_):
        passes.append(pass_)
        if len(passes) == 4:
            raise KeyboardInterrupt
        return forward(pass_)

    monkeypatch.setattr(executor, "forward", interrupt)
    text = Text(PROMPTS[0], lm)
    with pytest.raises(KeyboardInterrupt):
        text.generate(max_new_tokens=10, num_beams=3)
    assert not lm.session.evaluator.holders.ends()
    monkeypatch.undo()
    assert [text.generate(max_new_tokens=10, num_beams=3).completion_tokens] == theirs(
        lm.model, text.tokens, max_new_tokens=10, num_beams=3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "n": 3}, r"2 beams cannot give 3 continuations.*num_beams=3"),
        ({"num_beams": 2, "do_sample": True}, r"beam search .* not beam sample"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, r"looks ahead for one continuation"),
    ],
)
def test_options_that_make_no_sense(lm, options, message):
    with pytest.raises(GenerationError, match=message):
        generate([Text("The cat", lm)], max_new_tokens=3, **options)
    assert lm.stats.tokens_computed == 0


def test_beams_are_not_streamed(lm):
    with pytest.raises(GenerationError, match="no pieces to stream"):
        Text("The cat", lm).stream(max_new_tokens=3, num_beams=2)
