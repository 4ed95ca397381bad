"""Engines over several workers, with workers in this process: placement, travel, refusals; no Ray."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt as bp
from backprompt import LM, Text, classify
from backprompt.engines import layout as layouts
from backprompt.engines.explanation import PlacedExplanation
from backprompt.engines.layout import Layout
from backprompt.engines.ray import RayLM
from backprompt.engines.travel import PackedIds, text_of
from backprompt.errors import MissingDependencyError, TextTypeError, UnsupportedModelError
from backprompt.forest.partition import Rates
from crews import crew_lm, plain_lm, tiny_gpt2
from engine_contract import LABELS, PROMPTS, EngineContract
from tiny_models import build
from tiny_tokenizers import byte_level_bpe


class TestLM(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return plain_lm()


class TestCrewLM(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls):
        return crew_lm()


# Refusals


def test_what_needs_a_model_here_is_refused_by_name():
    lm = crew_lm()
    text = Text(PROMPTS[0], lm)
    for ask in (
        lambda: lm.model,
        lambda: text.draw(),
        lambda: text().attention(),
        lambda: bp.to_networkx([text]),
        lambda: bp.verify([text]),
        lambda: lm.refresh(),
        lambda: text.with_adapter("other").tokens,
    ):
        with pytest.raises(UnsupportedModelError, match="workers"):
            ask()


def test_without_ray_its_engine_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("backprompt.engines.crew.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install ray"):
        RayLM(tiny_gpt2)


def test_texts_of_workers_and_of_an_lm_do_not_mix():
    lm, plain = crew_lm(), plain_lm()
    with pytest.raises(bp.MixedModelsError):
        Text("a", lm) + Text("b", plain)
    with pytest.raises(bp.UnboundTextError, match="another LM"):
        lm.evaluate([Text("a", plain)])
    with pytest.raises(TextTypeError):
        lm.evaluate("a")


def test_a_changed_tokenizer_is_noticed():
    lm, plain = crew_lm(), plain_lm()
    before = Text("The cat sat", lm).tokens
    for engine in (lm, plain):
        engine.tokenizer.add_tokens(["cat sat"])
    assert Text("The cat sat", lm).tokens == Text("The cat sat", plain).tokens != before


# Placement

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


def asked_of(lm, of):
    """The questions that a call asks, each with the number of the worker."""
    before = len(lm.session.crew.asked)
    of()
    return lm.session.crew.asked[before:]


def long_texts(lm, beginnings=("The cat sat", "They're sure", "In 2024", "Hello there"), num_each=12):
    return [Text(f"{beginning} {idx} and the other {idx}", lm) for beginning in beginnings for idx in range(num_each)]


def test_a_call_is_cut_over_the_workers_and_repeats_little():
    lm, plain = crew_lm(), plain_lm()
    assert asked_of(lm, lambda: lm.evaluate(long_texts(lm))) == [(0, "evaluate"), (1, "evaluate")]
    plain.evaluate(long_texts(plain))
    computed = [stats.tokens_computed for stats in lm.worker_stats]
    assert min(computed) > 0.8 * max(computed)
    assert sum(computed) <= 1.05 * plain.stats.tokens_computed
    assert lm.stats.tokens_computed == sum(computed)


def test_later_calls_go_where_the_beginnings_are():
    lm = crew_lm()
    texts = long_texts(lm)
    lm.evaluate(texts)
    before = lm.stats.tokens_computed
    lm.evaluate(texts[::-1])
    assert lm.stats.tokens_computed == before
    lm.token_logprobs([text + Text.from_tokens([5, 6], lm) for text in texts])
    # One token a text is forwarded: the last needs no row of its own.
    assert lm.stats.tokens_computed == before + len(texts)
    for text in texts[:3]:
        assert len(asked_of(lm, lambda text=text: text.model_repr.logits)) == 2
    assert lm.stats.tokens_computed == before + len(texts)


def moved(lm):
    """Let a worker compute some texts, and then so many that begin with them that both workers share these."""
    texts = long_texts(lm)
    lm.evaluate(texts)
    first_part, _ = lm.session.layout.place([text.tokens for text in texts], remember=False)
    own = [texts[idx] for idx in first_part.indices.tolist()]
    few = [text + " cat" for text in own]
    assert sum(len(text.tokens) for text in few) < layouts.FEW_TOKENS
    assert len(asked_of(lm, lambda: lm.evaluate(few))) == 1
    many = [text + f" film {idx}" for text in own for idx in range(20)]
    assert len(asked_of(lm, lambda: lm.evaluate(many))) == 2


def test_a_worker_that_would_be_much_busier_gives_texts_away():
    moved(crew_lm())


def test_a_worker_fetches_what_another_computed_where_there_is_a_store(tmp_path):
    alone, storing = crew_lm(), crew_lm(store=str(tmp_path / "prompts.bp"))
    for lm in (alone, storing):
        moved(lm)
    assert [stats.tokens_loaded for stats in alone.worker_stats] == [0, 0]
    assert storing.stats.tokens_loaded > 0
    assert storing.stats.tokens_computed + storing.stats.tokens_loaded == alone.stats.tokens_computed


IDS = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.lists(IDS, min_size=1), min_size=1, max_size=4), st.integers(1, 4))
def test_every_text_is_placed_once_and_found_again(calls, num_workers):
    layout = Layout(num_workers)
    placed = []
    for texts in calls:
        parts = layout.place(texts)
        assert sorted(idx for part in parts for idx in part.indices.tolist()) == list(range(len(texts)))
        assert len({part.worker for part in parts}) == len(parts)
        assert all(0 <= part.worker < num_workers for part in parts)
        worker_of = {texts[idx]: part.worker for part in parts for idx in part.indices.tolist()}
        assert all(worker_of[texts[idx]] == part.worker for part in parts for idx in part.indices.tolist())
        again = {texts[idx]: part.worker for part in layout.place(texts) for idx in part.indices.tolist()}
        assert again == worker_of
        placed += texts
        for text in worker_of:
            if all(other == text or other[: len(text)] != text for other in placed):
                (part,) = layout.place([text + (9,) * 8], remember=False)
                assert part.worker == worker_of[text]


def test_long_texts_cost_more_a_token_where_attention_costs():
    # A text of 100 tokens, or of 10 with 90 behind it, and 40 of 10 tokens: see tests/test_partition.py.
    texts, long = [(1,) * 100, *((10 + leaf,) * 10 for leaf in range(40))], [[0], list(range(1, 41))]

    def parts_of(texts, more=None, **rates):
        parts = Layout(2, Rates(**rates)).place(texts, more)
        return [part.indices.tolist() for part in parts]

    assert parts_of(texts, attention=0.1) == long
    assert len(parts_of(texts)[0]) > 10
    short = [(1,) * 10, *texts[1:]]
    assert parts_of(short, [390] + [0] * 40, attention=0.1) == long
    assert len(parts_of(short, [90] + [0] * 40, attention=0.1)[0]) > 10  # these do not see each other


def test_texts_that_share_nothing_go_to_whoever_was_given_least():
    layout = Layout(3)
    workers = [layout.place([(first,) * 5])[0].worker for first in range(6)]
    assert workers == [0, 1, 2, 0, 1, 2]
    assert layout.place([(4, 4, 4, 9)])[0].worker == workers[4]


def test_slices_and_searches_are_as_many_times_larger_as_there_are_workers(monkeypatch):
    monkeypatch.setattr("backprompt.classify.scoring.TOKENS_AT_A_TIME", 150)

    def num_calls(num_workers, **options):
        lm = crew_lm(num_workers)
        asked = asked_of(lm, lambda: classify.predict(PROMPTS * 4, LABELS, lm, **options))
        return sum(1 for worker, method in asked if worker == asked[0][0])

    assert num_calls(1) >= 2 * num_calls(4) > 2
    monkeypatch.setattr("backprompt.classify.weighed.NODES_AT_A_TIME", 1)
    monkeypatch.setattr("backprompt.classify.weighed.MAX_LIVE_SEARCHES", 2)
    assert num_calls(1, search="best-first") >= 2 * num_calls(4, search="best-first") > 2


def test_samples_of_a_prompt_are_on_one_worker():
    lm = crew_lm()
    asked = asked_of(lm, lambda: bp.generate(Text("The cat", lm), max_new_tokens=2, n=5, seed=1, do_sample=True))
    assert [method for _, method in asked] == ["generate"]


def test_reading_all_texts_takes_few_questions():
    lm = crew_lm(num_workers=1)
    reprs = lm.evaluate(long_texts(lm))
    asked = asked_of(lm, lambda: [found.token_logprobs for found in reprs])
    assert len(asked) == 6  # 1 + 2 + 4 + 8 + 16 + 17 texts


def test_an_explanation_says_what_runs_where():
    lm = crew_lm()
    explained = bp.explain(long_texts(lm))
    assert isinstance(explained, PlacedExplanation)
    assert [part.worker for part in explained.parts] == [0, 1]
    assert sum(part.explanation.tokens_to_compute for part in explained.parts) == explained.tokens_to_compute
    assert "Worker 1: " in str(explained)
    lm.evaluate(long_texts(lm))
    lm.clear()
    again = bp.explain(long_texts(lm))
    assert again.seconds == max(part.explanation.seconds for part in again.parts) > 0
    assert sorted(idx for part in explained.parts for idx in part.text_idxs) == list(range(explained.num_texts))


# Travel


@given(st.lists(st.lists(st.integers(0, 2**31 - 1)).map(tuple)))
def test_ids_travel(texts):
    packed = PackedIds.of(texts)
    assert packed.unpacked() == texts
    assert packed.ids.dtype == np.int32


def test_graphs_travel_and_become_texts_again():
    lm = plain_lm()
    shared = Text("The cat ", lm)
    deep = (shared + "sat" | ("on" + (Text("the mat", lm).frozen() | "it"))) + "and"
    for text in (shared + ("a" | shared) + "b", deep, bp.parallel([shared, "b"], positions="sequential") + "it"):
        (ids,) = lm.session.encoder.encode([text])
        (travelled,) = PackedIds.of([ids]).unpacked()
        (again,) = lm.session.encoder.encode([text_of(travelled, lm)])
        assert again == ids


# Workers


def test_a_stream_goes_on_with_a_worker_that_knows_nothing_of_it():
    lm, plain = crew_lm(), plain_lm()
    options = {"max_new_tokens": 8, "seed": 2, "temperature": 1.5}
    stream = Text(PROMPTS[0], lm).stream(**options)
    first = next(stream)
    lm.session.crew.workers = crew_lm().session.crew.workers
    assert [first, *stream] == list(Text(PROMPTS[0], plain).stream(**options))


def test_loaders_are_checked():
    with pytest.raises(TypeError, match="too late"):
        crew_lm(loader=plain_lm, max_tokens_per_forward=64)
    with pytest.raises(TypeError, match="LM or a"):
        crew_lm(loader=int)
    assert crew_lm(loader=plain_lm).stats.tokens_computed == 0
    lm = crew_lm(loader=tiny_gpt2, max_tokens_per_forward=16)
    lm.evaluate(long_texts(lm))
    assert lm.stats.forward_passes > 10
    assert isinstance(lm, LM)


def test_workers_with_different_weights_have_no_fingerprint():
    seeds = iter(range(4))
    lm = crew_lm(loader=lambda: (build("gpt2", seed=next(seeds)), byte_level_bpe()))
    with pytest.raises(UnsupportedModelError, match="different weights"):
        lm.fingerprint  # noqa: B018
    assert crew_lm().fingerprint == plain_lm().fingerprint


def test_workers_store_what_they_compute(tmp_path):
    options = {"store": str(tmp_path / "prompts.bp")}

    def texts(lm):
        return [Text(beginning + " and the other cat sat on the mat" * 6, lm) for beginning in PROMPTS]

    first = crew_lm(**options)
    first.evaluate(texts(first))
    texts(first)[0].save()
    again = crew_lm(num_workers=3, **options)
    again.evaluate(texts(again))
    assert again.stats.tokens_loaded > 0.5 * first.stats.tokens_computed
