"""Choosing for many texts together gives the choices of the clear rule for each text alone, with any options."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

from backprompt import LM, GenerationError, Text
from backprompt.generation.choosing import Logits, choose
from backprompt.generation.decoding import Decoding, TextDecoding
from backprompt.generation.options import SAMPLING_FIELDS
from backprompt.generation.run import Run
from backprompt.generation.stops import StopStrings
from operations import Operations

VOCAB = 320
FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=5)

LIKELY = st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True)  # `drawn_logits` favours these ids
RULES = {
    "bad_words_ids": st.lists(LIKELY, min_size=1, max_size=3),
    "begin_suppress_tokens": LIKELY,
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "encoder_repetition_penalty": st.sampled_from([0.5, 2.0]),
    "eos_token_id": LIKELY,
    "epsilon_cutoff": st.sampled_from([1e-3, 0.1]),
    "eta_cutoff": st.sampled_from([1e-3, 0.1]),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 2), st.sampled_from([0.5, 2.0])),
    "forced_bos_token_id": st.integers(0, VOCAB - 1),
    "forced_eos_token_id": LIKELY,
    "max_time": st.sampled_from([0.0, 1000.0]),
    "min_length": st.integers(2, 8),
    "min_new_tokens": st.integers(1, 5),
    "min_p": st.sampled_from([0.01, 0.3]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "remove_invalid_values": st.just(True),
    "renormalize_logits": st.just(True),
    "repetition_penalty": st.sampled_from([0.5, 2.0]),
    "sequence_bias": st.lists(st.tuples(LIKELY, st.sampled_from([-4.0, 4.0])).map(list), min_size=1, max_size=2),
    "stop_strings": st.sampled_from([["e"], ["the", "a"]]),
    "suppress_tokens": LIKELY,
    "temperature": st.sampled_from([0.3, 1.7]),
    "top_h": st.sampled_from([0.2, 0.8]),
    "top_k": st.sampled_from([0, 1, 5, 400]),
    "top_p": st.sampled_from([0.3, 0.9]),
    "typical_p": st.sampled_from([0.3, 0.9]),
}
NEED_AN_END = {"exponential_decay_length_penalty", "min_length", "min_new_tokens"}


def drawn_logits(generator, num_rows, dtype):
    """Logits with ties, of which the first few are the largest."""
    logits = torch.randn(num_rows, VOCAB, generator=generator).mul(4).round().div(2)
    logits[:, :12] += 3
    return logits.to(dtype)


def by_itself(decoding, prompt_ids, sample_idx, rows):
    """The clear rule: the tokens chosen for one text by rows of logits until its end, and the reason for the end."""
    rules = decoding.rules(torch.tensor([prompt_ids]))
    generator = decoding.generator(prompt_ids, sample_idx, torch.device("cpu")) if decoding.is_sampling else None
    ids, found, watched = torch.tensor([prompt_ids]), [], decoding.stops.begin(prompt_ids)
    for logits in rows:
        scores = rules.processors(ids, logits.float()[None].clone())
        if generator is None:
            token_id = int(scores.argmax(dim=-1))
        else:
            token_id = int(torch.multinomial(scores.softmax(dim=-1), num_samples=1, generator=generator))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprob = float(logits.to(dtype).log_softmax(dim=-1)[token_id])
        found.append((token_id, logprob, int(logits.float().argmax()) == token_id))
        ids = torch.cat([ids, torch.tensor([[token_id]])], dim=1)
        watched = decoding.stops.with_token(watched, token_id)
        met = [type(criterion) for criterion in rules.criteria if bool(criterion(ids, None).any())]
        if watched.is_stopped:
            return found, "stop"
        if EosTokenCriteria in met:
            return found, "eos"
        if StopStringCriteria in met:
            return found, "stop"
        if len(found) == decoding.max_new_tokens:
            return found, "length"
        if met:
            return found, "criteria"
    return found, "interrupted"


def make_decoding(model, tokenizer, given, max_new_tokens=4, stop=None):
    stops = StopStrings(stop, tokenizer)
    return Decoding(model, tokenizer, max_new_tokens=max_new_tokens, stops=stops, seed=5, given=given)


@FLAT
@given(
    others=st.sets(st.sampled_from(sorted(RULES)), max_size=2),
    prompts=st.lists(
        st.tuples(st.lists(st.integers(0, 11), min_size=1, max_size=6), st.integers(0, 2)), min_size=2, max_size=6
    ),
    max_new_tokens=st.integers(2, 6),
    stop=st.sampled_from([None, None, ["e"]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    slice_rows=st.sampled_from([1, 3, 9]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@pytest.mark.parametrize("name", sorted(RULES))
def test_texts_together_are_as_each_by_itself(
    model, tokenizer, name, others, prompts, max_new_tokens, stop, dtype, slice_rows, seed, data
):
    """Texts begin at different steps, and each leaves when it is finished."""
    names = {name, *others, *(["eos_token_id"] if name in NEED_AN_END else [])}
    options = {name: data.draw(RULES[name]) for name in sorted(names)}
    if not names.isdisjoint(SAMPLING_FIELDS) or data.draw(st.booleans()):
        options["do_sample"] = True
    try:
        decoding = make_decoding(model, tokenizer, options, max_new_tokens, stop)
    except GenerationError:
        reject()
    texts = [TextDecoding(decoding, ids, sample_idx) for sample_idx, (ids, _) in enumerate(prompts)]
    seen = {text: [] for text in texts}
    logits_from = torch.Generator().manual_seed(seed)
    for step in range(max_new_tokens + 3):
        live = [text for text, (_, start) in zip(texts, prompts, strict=True) if start <= step and not text.is_finished]
        if not live:
            continue
        rows = drawn_logits(logits_from, len(live), dtype)
        order = torch.randperm(len(live), generator=logits_from).tolist() if step % 2 else range(len(live))
        for text, row in zip(live, order, strict=True):
            seen[text].append(rows[row])
        logits = Logits(rows.split(slice_rows), slice_rows)
        choose(live, [{text.completion: row} for text, row in zip(live, order, strict=True)], logits)
    for sample_idx, (text, (ids, _)) in enumerate(zip(texts, prompts, strict=True)):
        expected, reason = by_itself(decoding, ids, sample_idx, seen[text])
        (found,) = text.found(1)
        assert [(choice.token_id, choice.logprob, choice.is_argmax) for choice in found.choices] == expected
        assert found.finish_reason == reason
        assert found.cut is None or found.finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "num_a_text"),
    [
        ({}, 0),
        ({"min_new_tokens": 9, "eos_token_id": 0, "begin_suppress_tokens": [3]}, 0),
        ({"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9}, 1),  # its random numbers
    ],
    ids=str,
)
def test_operations_of_a_step_are_few_however_many_texts_it_has(model, tokenizer, options, num_a_text):
    def num_operations(num_texts):
        lm = LM(model, tokenizer)
        texts = [Text(f"{number} cats sat on the mat and", lm) for number in range(num_texts)]
        run = Run(lm, texts, make_decoding(model, tokenizer, options, 9))
        for _ in range(3):
            run.step()
        with Operations(lm.session.evaluator.executor) as operations:
            run.step()
        run.close()
        return operations.num - num_texts * num_a_text

    assert num_operations(64) == num_operations(8) < 150


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("num_tokens", [1, 7, 320, 3526])
def test_random_numbers_are_those_of_multinomial(model, tokenizer, num_tokens, device):
    """Step after step, in one tensor, each row gets the numbers that it would get alone."""
    decoding = make_decoding(model, tokenizer, {"do_sample": True, "top_k": 0}, 50)
    texts = [TextDecoding(decoding, [3, 4], idx) for idx in range(9)]
    generators = [decoding.generator([3, 4], idx, torch.device(device)) for idx in range(9)]
    for _ in range(20):
        rows = torch.randn(9, num_tokens, device=device) * 3
        choose(texts, [{text.completion: row} for row, text in enumerate(texts)], Logits([rows], 9))
        expected = [
            int(torch.multinomial(row.softmax(dim=-1), 1, generator=generator))
            for row, generator in zip(rows, generators, strict=True)
        ]
        assert [text.completion[-1] for text in texts] == expected


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (math.nan, {}, "scores into nan"),
        (math.nan, {"do_sample": True}, "scores into nan"),
        (math.inf, {"do_sample": True}, "scores into inf"),
        (-math.inf, {}, "scores into -inf for every token"),
        (-math.inf, {"do_sample": True}, "scores into -inf for every token"),
    ],
)
def test_what_cannot_be_chosen_by_is_refused_before_any_text_has_chosen(model, tokenizer, value, options, message):
    decoding = make_decoding(model, tokenizer, {**options, "top_k": 0} if options else {})
    texts = [TextDecoding(decoding, [idx], 0) for idx in range(3)]
    rows = torch.zeros(3, VOCAB)
    rows[2] = value
    with pytest.raises(GenerationError, match=message):
        choose(texts, [{(): row} for row in range(3)], Logits(rows.split(2), 2))
    assert [text.completion for text in texts] == [()] * 3


def test_the_largest_may_be_infinite_where_nothing_is_drawn(model, tokenizer):
    text = TextDecoding(make_decoding(model, tokenizer, {}), [1], 0)
    rows = torch.zeros(1, VOCAB)
    rows[0, 7] = math.inf
    choose([text], [{(): 0}], Logits([rows], 1))
    assert text.completion == (7,)
