"""Beam searches side by side: each the same to the bit as alone, with one call of transformers' functions for all."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from test_beams import theirs

from backprompt import LM, GenerationError, Regex, Text, generate
from backprompt.generation.beams import BeamDecoding, choose_beams
from backprompt.generation.choosing import Logits
from backprompt.generation.constrained import constraints_of
from backprompt.generation.decoding import Decoding
from backprompt.generation.searches import Searches
from backprompt.generation.stops import StopStrings
from operations import Operations
from tiny_models import VOCAB_SIZE

FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
MAX_NEW = 6

options_of_searches = st.fixed_dictionaries(
    {"num_beams": st.integers(2, 4)},
    optional={
        "length_penalty": st.sampled_from([-1.0, 0.0, 0.7, 2.0]),
        "early_stopping": st.sampled_from([True, "never"]),
        "eos_token_id": st.sampled_from([7, list(range(0, VOCAB_SIZE, 9)), list(range(0, VOCAB_SIZE, 3))]),
        "repetition_penalty": st.just(1.7),
        "no_repeat_ngram_size": st.just(2),
        "min_new_tokens": st.integers(1, 4),
        "forced_eos_token_id": st.just(9),
    },
)
texts_to_search = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=9).map(tuple),
        st.integers(0, 3),  # the step at which the text begins
        st.sampled_from([None, Regex("[ab]{2}ccc[ab]{9}"), Regex("aaa|b+")]),
    ),
    min_size=2,
    max_size=6,
)


def logits_behind(ids):
    """Logits that depend only on the ids, rounded so that some are equal."""
    generator = torch.Generator().manual_seed(hash(ids))
    return torch.randn(VOCAB_SIZE, generator=generator).mul_(3).round_(decimals=1)


def asked_of(searches, slice_rows):
    """Return the texts of searches, and for each the rows of the logits behind all that it asks for."""
    asked = [(prompt, text, text.ahead) for prompt, text in searches]
    row_of, ids = {}, []
    for prompt, _, ahead in asked:
        for completion in ahead:
            if row_of.setdefault((*prompt, *completion), len(ids)) == len(ids):
                ids.append((*prompt, *completion))
    logits = torch.stack([logits_behind(own) for own in ids])
    rows = [{completion: row_of[(*prompt, *completion)] for completion in ahead} for prompt, _, ahead in asked]
    return [text for _, text in searches], rows, Logits(torch.split(logits, slice_rows), slice_rows)


def step(searches, slice_rows):
    choose_beams(*asked_of(searches, slice_rows))


@FLAT
@given(
    given_texts=texts_to_search,
    options=options_of_searches,
    stop=st.sampled_from([None, "a", ["e", "t "]]),
    are_constrained=st.booleans(),
    slice_rows=st.tuples(*[st.sampled_from([1, 5, 1000])] * 2),  # of steps in turns
)
@example([((1,), 0, None), ((2, 3), 0, None), ((4,), 0, Regex("b+"))], {"num_beams": 2}, None, True, (5, 1000))
def test_searches_together_are_those_alone(
    lm, model, tokenizer, given_texts, options, stop, are_constrained, slice_rows
):
    """Texts begin at different steps, and constraints force tokens: the numbers of new tokens differ."""
    constraints = [constraint for _, _, constraint in given_texts] if are_constrained else None
    decoding = Decoding(
        model,
        tokenizer,
        max_new_tokens=MAX_NEW,
        stops=StopStrings(stop, tokenizer),
        seed=0,
        given=options,
        constraints=constraints_of(lm, constraints, len(given_texts)),
    )

    def begun():
        return [
            (prompt, BeamDecoding(decoding, prompt, decoding.matching(idx)))
            for idx, (prompt, _, _) in enumerate(given_texts)
        ]

    alone = begun()
    for one in alone:
        try:
            while not one[1].is_finished:
                step([one], slice_rows=1000)
        except GenerationError:  # the options exclude every token that the constraint allows
            reject()
    together = begun()
    for step_idx in range(MAX_NEW + 4):
        live = [
            one
            for one, (_, start, _) in zip(together, given_texts, strict=True)
            if start <= step_idx and not one[1].is_finished
        ]
        if live:
            step(live, slice_rows[step_idx % 2])
    for (_, one), (_, expected) in zip(together, alone, strict=True):
        assert one.found(one.num_beams) == expected.found(one.num_beams)
        assert one.num_new == expected.num_new


@settings(FLAT, max_examples=25)
@given(
    words=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    options=options_of_searches,
    max_live=st.sampled_from([8, 256]),
    data=st.data(),
)
def test_each_text_of_many_is_as_transformers_continues_it(model, tokenizer, words, options, max_live, data):
    lm = LM(model, tokenizer)
    texts = [Text("The cat" + " sat" * num, lm) for num in words]
    n = data.draw(st.integers(1, options["num_beams"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backprompt.generation.run.MAX_LIVE_TEXTS", max_live)
        found = generate(texts, max_new_tokens=MAX_NEW, n=n, show_progress_bar=False, **options)
    for text, own in zip(texts, found, strict=True):
        expected = theirs(model, text.tokens, n=n, max_new_tokens=MAX_NEW, **options)
        assert [one.completion_tokens for one in own] == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 0.3},
        {"early_stopping": "never", "length_penalty": -1.0},
    ],
    ids=str,
)
def test_a_search_has_as_many_steps_as_in_transformers(lm, model, monkeypatch, options):
    calls = []
    plain = model._get_top_k_continuations
    monkeypatch.setattr(model, "_get_top_k_continuations", lambda **given: (calls.append(0), plain(**given))[1])

    def num_steps(work):
        calls.clear()
        work()
        return len(calls)

    options = {"max_new_tokens": 12, "num_beams": 2, "eos_token_id": list(range(0, VOCAB_SIZE, 3)), **options}
    nums = []
    for num in range(8):
        text = Text("The cat" + " sat" * num, lm)
        nums.append(num_steps(lambda text=text: text.generate(**options)))
        assert nums[-1] == num_steps(lambda text=text: theirs(model, text.tokens, **options))
    assert len(set(nums)) > 1


def test_each_function_of_transformers_is_called_once_a_step(lm, model, monkeypatch):
    """For texts of different lengths; the head's rows of all of them are one slice."""
    names = [
        "_get_top_k_continuations",
        "_get_running_beams_for_next_iteration",
        "_update_finished_beams",
        "_check_early_stop_heuristic",
        "_beam_search_has_unfinished_sequences",
    ]
    calls = []
    for name in names:
        plain = getattr(model, name)
        monkeypatch.setattr(
            model, name, lambda *args, name=name, plain=plain, **more: (calls.append(name), plain(*args, **more))[1]
        )
    texts = [Text("The cat" + " sat" * num, lm) for num in range(8)]
    generate(texts, max_new_tokens=MAX_NEW, num_beams=4)
    assert sorted(calls) == sorted(names * MAX_NEW)


@pytest.mark.parametrize("options", [{}, {"eos_token_id": list(range(0, VOCAB_SIZE, 3)), "min_new_tokens": 2}], ids=str)
def test_operations_of_a_step_are_as_many_for_any_number_of_texts(lm, model, tokenizer, options):
    stops = StopStrings(None, tokenizer)
    given = {"num_beams": 3, **options}
    decoding = Decoding(model, tokenizer, max_new_tokens=MAX_NEW, stops=stops, seed=0, given=given)

    def num_operations(num_texts):
        searches = [(prompt, BeamDecoding(decoding, prompt)) for prompt in zip(range(num_texts), strict=True)]
        for _ in range(3):
            step(searches, slice_rows=1000)
        asked = asked_of(searches, slice_rows=1000)
        with Operations(lm.session.evaluator.executor) as operations:
            choose_beams(*asked)
        return operations.num

    assert num_operations(64) == num_operations(8) < 200


def alive_searches():
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Searches]


def test_a_finished_search_keeps_no_tensors_of_the_others(model, tokenizer):
    ends = list(range(0, VOCAB_SIZE, 5))
    given = {"num_beams": 2, "early_stopping": True, "eos_token_id": ends}
    stops = StopStrings(None, tokenizer)
    decoding = Decoding(model, tokenizer, max_new_tokens=MAX_NEW, stops=stops, seed=0, given=given)
    searches = [(prompt, BeamDecoding(decoding, prompt)) for prompt in zip(range(16), strict=True)]
    of_other_tests = alive_searches()
    nums_live = []
    while live := [one for one in searches if not one[1].is_finished]:
        nums_live.append(len(live))
        step(live, slice_rows=1000)
        num_alive = len(alive_searches()) - len(of_other_tests)
        assert num_alive == any(not text.is_finished for _, text in searches)  # one object for all of them
    assert len(set(nums_live)) > 2  # they end at different steps
