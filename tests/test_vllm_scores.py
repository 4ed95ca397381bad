"""Scores behind vLLM's prefix cache, against a pretended vLLM: what it caches, and what it leaves out for it."""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backprompt.engines import vllm_run, vllm_scores
from backprompt.engines.vllm_scores import MAX_CANDIDATES, Scoring
from backprompt.errors import NonFiniteError
from backprompt.evaluation.reading import Wanted
from backprompt.generation.decoding import Decoding
from backprompt.generation.stops import StopStrings
from tiny_models import build

VOCABULARY = 3


def logprob(before, token_id):
    digest = hashlib.sha256(repr((tuple(before), token_id)).encode()).digest()
    return -1 - int.from_bytes(digest[:4], "little") / 2**32


def best(before):
    return max(range(VOCABULARY), key=lambda token_id: logprob(before, token_id))


class PretendedVllm:
    """Takes the place of `Requests`: vLLM 0.32 as it was read and measured.

    A request reads whole blocks of tokens from the cache, but never its last token. Rows of tokens that it read are
    left out (the V2 runner), or have no meaning (the V1 runner).
    """

    def __init__(self, block_size, leaves_out):
        self.block_size, self.leaves_out = block_size, leaves_out
        self.blocks = set()
        self.num_computed = 0
        self.num_rows = 0  # of logits, of the texts' own tokens

    def finish(self, asked):
        return [self.answer(tuple(ids), params) for ids, params in asked]

    def answer(self, ids, params):
        num_cached = 0
        if not params.skip_reading_prefix_cache:
            while num_cached + self.block_size < len(ids) and ids[: num_cached + self.block_size] in self.blocks:
                num_cached += self.block_size
        self.num_computed += len(ids) - num_cached
        self.blocks |= {ids[:stop] for stop in range(self.block_size, len(ids) + 1, self.block_size)}
        rows = [{ids[idx]: self.of(ids[:idx], ids[idx])} for idx in range(num_cached + 1, len(ids))]
        self.num_rows += 0 if params.prompt_logprobs is None else len(rows)
        unread = [] if self.leaves_out else [{7: SimpleNamespace(logprob=1e30, rank=-1)} for _ in range(num_cached)]
        assert len(params.logprob_token_ids or []) <= MAX_CANDIDATES
        chosen = SimpleNamespace(
            token_ids=[best(ids)],
            logprobs=[{token_id: self.of(ids, token_id) for token_id in params.logprob_token_ids or []}],
        )
        output = SimpleNamespace(
            outputs=[chosen], prompt_logprobs=None if params.prompt_logprobs is None else [None, *unread, *rows]
        )
        return SimpleNamespace(output=output, num_cached=num_cached)

    def of(self, before, token_id):
        return SimpleNamespace(logprob=logprob(before, token_id), rank=1 if token_id == best(before) else 2)


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.setattr(vllm_scores, "imported_vllm", lambda: SimpleNamespace(SamplingParams=SimpleNamespace))


def expected(wanted):
    pairs = [(wanted.token_ids[:idx], wanted.token_ids[idx]) for idx in range(wanted.start, len(wanted.token_ids))]
    pairs += [(wanted.token_ids, token_id) for token_id in wanted.candidates]
    return [(logprob(*pair), pair[1] == best(pair[0])) if pair[0] else (math.nan, False) for pair in pairs]


TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def texts_to_score(draw):
    ids = tuple(draw(st.lists(TOKENS, min_size=1, max_size=9)))
    return Wanted(ids, draw(st.integers(0, len(ids))), tuple(draw(st.lists(TOKENS, max_size=3))))


@given(st.lists(st.lists(texts_to_score(), max_size=6), max_size=3), st.integers(1, 4), st.booleans())
def test_scores_are_right_whatever_is_cached(calls, block_size, leaves_out):
    scoring = Scoring(PretendedVllm(block_size, leaves_out), block_size)
    for wanted in calls:
        found = scoring.scored(wanted)
        assert list(found.lengths) == [len(expected(text)) for text in wanted]
        for own, text in zip(found.split(), wanted, strict=True):
            logprobs, are_argmax = zip(*expected(text), strict=True) if expected(text) else ((), ())
            assert own.logprobs.tolist() == pytest.approx(logprobs, rel=1e-6, nan_ok=True)
            assert tuple(own.is_argmax.tolist()) == are_argmax


def labels_behind(prompt, num_labels):
    """Completions of three tokens, which share their first two by threes."""
    labels = [(idx // 9 % 3, idx // 3 % 3, idx % 3) for idx in range(num_labels)]
    return [Wanted(prompt + ids[:-1], len(prompt), ids[-1:]) for ids in labels]


@pytest.mark.parametrize("num_tokens", [40, 47, 48], ids=["inside a block", "across its end", "at its end"])
def test_completions_cost_a_part_of_a_block_each(num_tokens):
    vllm = PretendedVllm(block_size=16, leaves_out=False)
    prompt = tuple(idx % VOCABULARY for idx in range(num_tokens))
    wanted = labels_behind(prompt, 27)
    for num_before in (num_tokens, 0):  # the first time the prompt is computed, too
        vllm.num_computed = vllm.num_rows = 0
        Scoring(vllm, 16).scored(wanted)
        assert vllm.num_rows <= 9 * (num_tokens % 16 + 2)  # none of the prompt's whole blocks
        assert vllm.num_computed <= num_before + 16 + 9 * (16 + 2) + 12 * 16  # prompt, labels, what the cache took
    assert sum(len(text.token_ids) for text in wanted) > 3 * vllm.num_computed


def test_a_text_whose_scored_part_is_cached_is_computed_whole_once_more():
    vllm = PretendedVllm(block_size=4, leaves_out=True)
    text = Wanted(tuple(idx % VOCABULARY for idx in range(40)), 6)
    Scoring(vllm, 4).scored([text])
    vllm.num_computed = 0
    Scoring(vllm, 4).scored([text])
    assert vllm.num_computed <= 6 + 4 + 40


def test_candidates_beyond_the_limit_go_into_several_requests():
    vllm = PretendedVllm(block_size=4, leaves_out=True)
    found = Scoring(vllm, 4).scored([Wanted((0, 1), 2, range(300))])
    assert found.scores.logprobs.tolist() == pytest.approx([logprob((0, 1), idx) for idx in range(300)], rel=1e-6)
    assert vllm.num_computed == 3 * 2


def test_nan_is_an_error(monkeypatch):
    monkeypatch.setattr(f"{__name__}.logprob", lambda before, token_id: math.nan)
    with pytest.raises(NonFiniteError, match="NaN for a text of 2 tokens"):
        Scoring(PretendedVllm(4, True), 4).scored([Wanted((0, 1), 2, (1,))])


def test_suppressed_tokens_do_not_free_those_that_are_refused(monkeypatch):
    pretended = SimpleNamespace(
        SamplingParams=SimpleNamespace, exceptions=SimpleNamespace(VLLMValidationError=TypeError)
    )
    monkeypatch.setattr(vllm_run, "imported_vllm", lambda: pretended)
    model = build("gpt2")
    decoding = Decoding(
        model,
        None,
        max_new_tokens=3,
        stops=StopStrings(None, None),
        seed=0,
        given={"suppress_tokens": [5, 6]},
        refused=lambda: frozenset([90]),
    )
    processors = decoding.rules(torch.zeros((1, 1), dtype=torch.long)).processors
    allowed = vllm_run.sampling_params(decoding, processors, 1).allowed_token_ids
    assert set(range(model.config.vocab_size)) - set(allowed) == {5, 6, 90}
