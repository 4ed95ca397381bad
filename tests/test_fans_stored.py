"""Fans with a store: the same is loaded, the same is stored, and the same tokens are computed as without fans."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fans import TOKENIZER, as_prompt, completions, fans, make_lm, model, prompts_of_ids

import tiny_cached_models
from backprompt import LM, Text, evaluate, explain
from backprompt.evaluation.behind import Behind
from backprompt.forest.fan import Shape
from backprompt.session.text_scores import scores_behind
from backprompt.store import DiskStore, MemoryStore, Store
from comparing import assert_close, assert_equals_plain
from stores import file_of

COMPLETIONS = [(7, 1, 2), (7, 3), (8, 2, 4), (9,)]
LONG, SHORT = tuple(range(20, 44)), (20, 21, 22, 23)  # stored by itself, and not


class Plain(MemoryStore):
    """A store that implements only what it must."""

    goes_on = Store.goes_on


def without_fans():
    return mock.patch("backprompt.evaluation.behind.FANS_IN_A_PASS", 1 << 40)


def score(lm, prompts, listed=COMPLETIONS):
    """The log-probabilities of all completions behind each prompt, one after the other."""
    texts = [prompt if isinstance(prompt, Text) else Text.from_tokens(prompt, lm) for prompt in prompts]
    shape = Shape(listed)
    return scores_behind(lm.session, [Behind(ids, shape) for ids in lm.session.prompt_ids(texts)]).scores.logprobs


def prompts_behind(beginning, num_own=3):
    """Three prompts with this beginning, and so many tokens of their own."""
    return [(*beginning, 50 + idx, *range(60, 59 + num_own)) for idx in range(3)]


def names(store):
    return sorted(header.name for header in store.list())


def work(lm):
    return lm.stats.tokens_computed, lm.stats.tokens_loaded


def both(act, make_store=MemoryStore):
    """Act on an empty store with fans, and on another one without. The same must come of it. Return both results.

    `act` returns an `LM` and the scores that it found.
    """
    lms, scores, stored = [], [], []
    for context in (nullcontext(), without_fans()):
        store = make_store()
        with context:
            lm, found = act(store)
        lms.append(lm)
        scores.append(found)
        stored.append(names(store))
    assert_close(*scores)
    assert work(lms[0]) == work(lms[1])
    assert stored[0] == stored[1]
    assert not fans(lms[1])
    return lms[0]


@contextmanager
def counted(store):
    """The lookups and reads of a store while the context lasts."""
    queries = []
    with mock.patch.multiple(store, **{name: noting(queries, getattr(store, name)) for name in ("longest", "goes_on")}):
        yield queries


def noting(queries, ask):
    def noted(start, token_ids):
        queries.append(start)
        return ask(start, token_ids)

    return noted


@pytest.mark.parametrize("persist", ["always", "explicit", "never"])
@pytest.mark.parametrize("beginning", [LONG, SHORT])
def test_an_empty_store_gets_the_same_entries(beginning, persist):
    """Where all is stored, short prompts are stored with their completions, so no fan stands behind them."""

    def act(store):
        lm = make_lm(store=store)
        return lm, score(lm, prompts_behind(beginning), [*COMPLETIONS, tuple(range(70, 81))])

    lm = both(act, lambda: MemoryStore(persist=persist))
    assert len(fans(lm)) == (0 if persist == "always" and beginning == SHORT else 3)


@pytest.mark.parametrize("is_beginning_stored", [True, False])
@pytest.mark.parametrize(
    ("num_own", "num_rows", "is_fan"), [(13, 2, True), (13, 3, False), (16, 15, True), (16, 16, False)]
)
def test_completions_that_would_not_be_stored_are_a_fan(num_own, num_rows, is_fan, is_beginning_stored):
    """An own end of 13 tokens would be stored together with 3 more; one of 16 tokens is stored by itself."""

    def act(store):
        lm = make_lm(store=store)
        if is_beginning_stored:
            evaluate(Text.from_tokens(LONG, lm))
        prompts = prompts_behind(LONG if is_beginning_stored else (), num_own)
        return lm, score(lm, prompts, [tuple(range(70, 71 + num_rows)), (7, 8)])

    assert len(fans(both(act))) == 3 * is_fan


@pytest.mark.parametrize("num_own", range(64, 96, 3))
def test_a_prompt_that_is_cut_between_passes_is_stored_as_a_whole(num_own):
    """Without fans, its rest would be stored with its completions."""
    store = MemoryStore()
    prompts = [(*[own] * 60, 9) for own in range(3)] + [(3, *[7] * (num_own - 1))]
    lm = make_lm(store=store, max_tokens_per_forward=80)
    score(lm, prompts, [tuple(range(70, 79)), (7, 8)])
    assert len(fans(lm)) == 4
    assert sum(len(header.token_ids) for header in store.list()) == sum(map(len, prompts))


def test_a_beginning_that_is_stored_with_one_prompt_leaves_another_prompt_too_short():
    """The first prompt is stored as a whole. The own end of the second one would be stored with its completions."""

    def act(store):
        lm = make_lm(store=store)
        prompts = [(*range(20, 30), own, *range(9)) for own in (50, 51)]
        return lm, score(lm, prompts, [(7, 1, 2, 3, 4, 5, 6, 8), (7, 3)])

    assert not fans(both(act))


def test_an_unstored_text_that_grew_long_in_memory_is_stored_with_completions():
    """For example because it was computed while nothing could be stored."""

    def act(store):
        lm = make_lm(store=store)
        with mock.patch.object(store, "persist", "explicit"):
            evaluate([Text.from_tokens(prompt, lm) for prompt in prompts_behind(LONG)])
        return lm, score(lm, prompts_behind(LONG))

    assert not fans(both(act))


def test_another_lm_finds_the_prompts_in_any_store(store):
    """The number of queries does not depend on the number of completions."""
    prompts = prompts_behind(LONG, num_own=16)
    lm = make_lm(store=store)
    evaluate([Text.from_tokens(prompt, lm) for prompt in prompts])
    stored, num_queries = names(store), []
    assert len(stored) == 4
    for num_completions in (4, 40):
        listed = [*COMPLETIONS, *((70 + idx, 3, 4) for idx in range(num_completions - 4))]
        lm = make_lm(store=store)
        with counted(store) as queries:
            found = score(lm, prompts, listed)
        num_queries.append(len(queries))
        assert len(fans(lm)) == 3
        assert lm.stats.tokens_loaded == 24 + 3 * 16
        assert_close(found, score(make_lm(), prompts, listed))
    assert num_queries[0] == num_queries[1] == 3 + 6 * 3  # of the beginning that they share, and of each prompt
    assert names(store) == stored


def test_completions_that_were_saved_are_loaded():
    """Behind the prompts that have some; the completions of other prompts are fans."""

    def act(store):
        first = make_lm(store=store)
        for prompt in prompts_behind(SHORT)[:2]:
            Text.from_tokens((*prompt, *COMPLETIONS[0]), first).save()
        lm = make_lm(store=store)
        return lm, score(lm, prompts_behind(SHORT))

    lm = both(act, lambda: MemoryStore(persist="explicit"))
    assert len(fans(lm)) == 1
    assert lm.stats.tokens_loaded == 4 + 2 * (3 + 2)


@pytest.mark.parametrize("cut", [None, 10, 27])
def test_completions_within_longer_entries_are_loaded(cut, store):
    """One text from its beginning, or from the end of another stored one that is a beginning of the prompt."""
    prompt = prompts_behind(LONG)[0]
    first = make_lm(store=store)
    if cut is not None:
        Text.from_tokens(prompt[:cut], first).save()
    evaluate(Text.from_tokens((*prompt, 7, 1, *range(100, 120)), first))
    stored = names(store)
    assert len(stored) == 1 + (cut is not None)
    loaded = []
    for context in (nullcontext(), without_fans()):
        lm = make_lm(store=store)
        with context:
            found = score(lm, [prompt])
        assert not fans(lm)
        loaded.append(work(lm))
        assert_close(found, score(make_lm(), [prompt]))
    assert loaded[0] == loaded[1]
    assert loaded[0][1] == len(prompt) + 2


def test_a_store_that_knows_no_better_is_asked_about_each_completion():
    def act(store):
        score(make_lm(store=store), prompts_behind(LONG, 16)[:2])
        lm = make_lm(store=store)
        return lm, score(lm, prompts_behind(LONG, 16))

    lm = both(act, Plain)
    assert not fans(lm)
    assert lm.stats.tokens_loaded == 24 + 2 * 16


@pytest.mark.parametrize("persist", ["always", "explicit"])
def test_a_completion_of_a_fan_can_be_saved(persist, store):
    store.persist = persist
    lm = make_lm(store=store)
    prompts = prompts_behind(LONG)
    score(lm, prompts)
    assert len(fans(lm)) == 3
    text = (*prompts[1], *COMPLETIONS[2])
    Text.from_tokens(text, lm).save()
    assert len(fans(lm)) == 2
    again = make_lm(store=store)
    assert_equals_plain(model("gpt2"), [Text.from_tokens(text, again)])
    assert (again.stats.tokens_computed, again.stats.tokens_loaded) == (0, len(text))


@pytest.mark.parametrize("name", ["lfm2", "mpt"])
def test_models_that_go_by_levels_find_their_prompts(name):
    """States of all tokens before come with the entry that ends where the prompt does."""
    levels, store, prompts = tiny_cached_models.build(name), MemoryStore(), prompts_behind(LONG, 16)
    expected = score(LM(levels, TOKENIZER), prompts)
    for num_loaded in (0, 24 + 3 * 16):
        lm = LM(levels, TOKENIZER, store=store)
        assert_close(score(lm, prompts), expected)
        assert len(fans(lm)) == 3
        assert lm.stats.tokens_loaded == num_loaded
        assert lm.stats.tokens_computed == 24 + 3 * (16 + 4) - num_loaded


def test_results_behind_inexact_prompts_are_those_of_texts():
    """They become exact as soon as the prompts are computed again, as a prompt's own results do."""

    def act(store):
        score(make_lm(store=store), prompts_behind(LONG))
        lm = make_lm(store=store)
        inexact = score(lm, prompts_behind(LONG)).clone()
        num_fans.append(len(fans(lm)))
        errors.append(Text.from_tokens(prompts_behind(LONG)[0], lm).model_repr.stored_error)
        for name in names(store):
            store.delete(name)
        lm.session.evaluator.computation.memory.max_bytes = 0
        lm.evaluate([Text.from_tokens((1,), lm)])  # drops all others
        lm.session.evaluator.computation.memory.max_bytes = 10_000_000
        exact = score(lm, prompts_behind(LONG)).clone()
        assert_close(exact, score(make_lm(), prompts_behind(LONG)))
        assert not inexact.allclose(exact, atol=1e-6)
        return lm, torch.cat([inexact, exact])

    num_fans, errors = [], []
    both(act, lambda: MemoryStore(dtype="int8"))
    assert num_fans == [3, 0]
    assert errors[0] == errors[1] > 0


@pytest.mark.parametrize("query", ["goes_on", "longest"])
def test_a_store_that_fails_in_the_middle_is_asked_no_more(query, caplog):
    store = MemoryStore()
    score(make_lm(store=store), prompts_behind(LONG))
    plain, num_asked = getattr(store, query), []

    def failing(*given):
        num_asked.append(1)
        if len(num_asked) > 1:
            raise OSError("gone")
        return plain(*given)

    lm = make_lm(store=store)
    with mock.patch.object(store, query, failing):
        found = score(lm, prompts_behind(LONG))
    assert_close(found, score(make_lm(), prompts_behind(LONG)))
    assert len(num_asked) == 2
    assert caplog.text.count("cannot be read") == 1


@pytest.mark.parametrize("where", [0.5, 0.99])
def test_damaged_prompts_are_computed_again_and_stored_again(tmp_path, where):
    """In the middle of a file are keys and values, at its end the states."""

    def act(store):
        score(make_lm(store=store), prompts_behind(LONG, 16))
        for name in names(store):
            file = file_of(store, name)
            content = bytearray(file.read_bytes())
            content[int(where * len(content))] ^= 1
            file.write_bytes(content)
        lm = make_lm(store=store)
        return lm, score(lm, prompts_behind(LONG, 16))

    folders = iter(("fans", "texts"))
    lm = both(act, lambda: DiskStore(tmp_path / next(folders)))
    assert len(fans(lm)) == 3
    assert lm.stats.tokens_computed == 24 + 3 * (16 + 4)


def test_a_look_finds_fans_and_the_store():
    store = MemoryStore()
    score(make_lm(store=store), prompts_behind(LONG))
    lm = make_lm(store=store)
    texts = [Text.from_tokens((*prompt, 7, 1), lm) for prompt in prompts_behind(LONG)]
    forecast = explain(texts)
    score(lm, prompts_behind(LONG))
    assert (forecast.tokens_on_disk, forecast.tokens_to_compute) == (24, 3 * 5)
    assert [[piece.where for piece in pieces] for pieces in lm.look_up(texts)] == [["memory"]] * 3


@settings(max_examples=100)
@given(
    beginnings=prompts_of_ids(),
    groups=st.lists(st.booleans(), min_size=5, max_size=5),
    persist=st.sampled_from(["always", "explicit", "never"]),
    min_tokens=st.sampled_from([1, 3, 5, 8]),
    max_tokens=st.sampled_from([40, 1000]),
    data=st.data(),
)
def test_a_store_is_read_and_written_as_without_fans(beginnings, groups, persist, min_tokens, max_tokens, data):
    """Whatever is scored, evaluated, saved, looked at, deleted and forgotten, by one `LM` after the other."""
    choose = data.draw
    prompts = list(zip(beginnings, groups, strict=False))
    tails = st.lists(st.integers(0, 3), max_size=6).map(tuple)
    texts = st.tuples(st.sampled_from(prompts), tails)
    steps = choose(
        st.lists(
            st.tuples(st.just("score"), st.lists(st.sampled_from(prompts), min_size=1, max_size=4), completions)
            | st.tuples(st.sampled_from(["evaluate", "save", "look_up"]), texts)
            | st.tuples(st.just("delete"), st.integers(0, 9))
            | st.tuples(st.sampled_from(["clear", "another"])),
            min_size=2,
            max_size=8,
        )
    )
    logs = []
    with mock.patch("backprompt.evaluation.archive.MIN_TOKENS", min_tokens):
        for context in (nullcontext(), without_fans()):
            with context:
                logs.append(list(done(steps, MemoryStore(persist=persist), max_tokens)))
    for step, found, expected in zip(steps, *logs, strict=True):
        assert found[:-1] == expected[:-1], step
        if found[-1] is not None:
            assert_close(found[-1], expected[-1])


def done(steps, store, max_tokens):
    """Carry out the steps; yield the work so far, the stored entries, and the scores of each."""
    lm = make_lm(store=store, max_tokens_per_forward=max_tokens)
    for kind, *details in steps:
        scores = None
        if kind == "score":
            prompts, listed = details
            scores = score(lm, [as_prompt(ids, lm, has_group) for ids, has_group in prompts], listed).clone()
        elif kind == "clear":
            lm.clear()
        elif kind == "another":
            lm = make_lm(store=store, max_tokens_per_forward=max_tokens)
        elif kind == "delete":
            for name in names(store)[details[0] :: 10]:
                store.delete(name)
        else:
            (((ids, has_group), tail),) = details
            text = as_prompt([*ids, *tail], lm, has_group)
            if kind == "evaluate":
                evaluate(text)
            elif kind == "look_up":
                lm.look_up([text])
            elif store.persist != "never":
                text.save()
        yield work(lm), names(store), scores
