"""Best-first search: the result of exhaustive search, with less work."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backprompt import LM, GroupError, Text, TokenIdError
from backprompt.classify import Example, predict
from backprompt.classify.search import Candidate, Search, make_trie
from reference import ATOL, plain_token_logprobs
from tiny_models import FAMILIES
from tiny_tokenizers import TOKENIZERS, byte_level_bpe

WORDS = ["mat", "cat", "sat", "the", "a", "hello", "46", "there"]
PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is 12 + 34? Answer:", "A b"]
FLAT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def lm(model):
    return LM(model, byte_level_bpe())


# Tries with made-up log-probabilities


def exhaustive(candidates, follow):
    """Scores by definition, and the first of the highest."""
    scores = []
    for candidate in candidates:
        total = sum(follow(candidate.token_ids[:i])[t] for i, t in enumerate(candidate.token_ids))
        scores.append(total / candidate.divisor + candidate.offset)
    return scores, max(range(len(scores)), key=lambda idx: (scores[idx], -idx))


def search(candidates, follow, nodes_at_a_time):
    num_expanded = 0

    def score(idx, logprobs):
        return sum(logprobs) / candidates[idx].divisor + candidates[idx].offset

    found = Search(make_trie(candidates), score)
    while nodes := found.expand(nodes_at_a_time):
        num_expanded += len(nodes)
        assert len(nodes) <= nodes_at_a_time
        for node in nodes:
            found.tell(node, {t: follow(node.token_ids)[t] for t in node.children})
    return found, num_expanded


def follower(seed, num_tokens):
    """Log-probabilities of the tokens behind any path; some are equal, some impossible."""

    def follow(path):
        random = np.random.default_rng([seed, *path])
        chosen = random.choice([-np.inf, -4.0, -2.0, -1.0, -0.25, 0.0], size=num_tokens, p=[0.1, *[0.18] * 5])
        return dict(enumerate(chosen.tolist()))

    return follow


@given(
    paths=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), min_size=1, max_size=30),
    offsets=st.lists(st.sampled_from([0.0, -1.0, -1.0, 0.5, -np.inf]), min_size=30, max_size=30),
    is_mean=st.booleans(),
    seed=st.integers(0, 1000),
    nodes_at_a_time=st.sampled_from([1, 2, 5, 100]),
)
def test_a_search_finds_the_first_of_the_best(paths, offsets, is_mean, seed, nodes_at_a_time):
    """Completions that are equal, begin others, tie, or are impossible; offsets of any kind."""
    candidates = [
        Candidate(path, offset, len(path) if is_mean else 1)
        for path, offset in zip(paths, offsets, strict=False)  # there are more offsets
    ]
    follow = follower(seed, 4)
    scores, best = exhaustive(candidates, follow)
    found, _ = search(candidates, follow, nodes_at_a_time)
    assert found.best_score == pytest.approx(scores[best], abs=1e-12)
    if scores[best] > -np.inf:
        assert found.best_idx == best


def test_what_cannot_win_is_not_expanded():
    r"""
    (root) -- 0 (-0.1) -- 1 (-0.1)
           -- 2 (-3.0) -- 3, 4, ... : never looked at
    """
    candidates = [Candidate((0, 1), 0.0, 1)] + [Candidate((2, t), 0.0, 1) for t in range(3, 20)]
    logprobs = {(): {0: -0.1, 2: -3.0}, (0,): {1: -0.1}}
    found, num_expanded = search(candidates, logprobs.__getitem__, 1)
    assert (found.best_idx, num_expanded) == (0, 2)


def test_of_equals_the_first_wins_though_it_is_found_last():
    candidates = [Candidate((1, 2), 0.0, 1), Candidate((0,), 0.0, 1)]
    logprobs = {(): {0: -1.0, 1: -1.0}, (1,): {2: 0.0}}
    found, num_expanded = search(candidates, logprobs.__getitem__, 1)
    assert (found.best_idx, num_expanded) == (0, 2)


def test_the_bound_is_that_of_the_best_below_whatever_the_path_costs():
    """By the mean: behind an improbable token the longer completion can still win, though its offset is lower."""
    candidates = [Candidate((0, 1), 0.0, 2), Candidate((0, 2, 3, 4), -0.5, 4), Candidate((5,), -1.0, 1)]
    logprobs = {(): {0: -4.0, 5: -0.6}, (0,): {1: -4.0, 2: 0.0}, (0, 2): {3: 0.0}, (0, 2, 3): {4: 0.0}}
    found, _ = search(candidates, logprobs.__getitem__, 1)
    assert (found.best_idx, found.best_score) == (1, -1.5)


def test_what_ended_already_is_no_reason_to_expand():
    """(root) -- 0, complete -- 1, complete with a low prior."""
    candidates = [Candidate((0,), 0.0, 1), Candidate((0, 1), -5.0, 1)]
    found, num_expanded = search(candidates, {(): {0: -0.1}}.__getitem__, 1)
    assert (found.best_idx, num_expanded) == (0, 1)


def test_a_long_completion_keeps_others_in_play_by_its_mean():
    """By the mean the bound of a path is that of its longest completion."""
    candidates = [Candidate((0,), 0.0, 1), Candidate((1, 2, 3, 4), 0.0, 4)]
    logprobs = {(): {0: -1.0, 1: -3.0}, (1,): {2: 0.0}, (1, 2): {3: 0.0}, (1, 2, 3): {4: 0.0}}
    found, num_expanded = search(candidates, logprobs.__getitem__, 1)
    assert (found.best_idx, found.best_score, num_expanded) == (1, -0.75, 4)


# With a model


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_lm(request, model):
    """Some tokenizers put a space before a string, some append a token."""
    return LM(model, TOKENIZERS[request.param]())


@FLAT
@given(data=st.data())
def test_best_first_finds_what_exhaustive_search_finds(any_lm, data):
    lm = any_lm
    completions = data.draw(
        st.lists(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), min_size=2, max_size=12, unique=True
        )
    )
    prompts = data.draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3))
    options = {"aggregate": data.draw(st.sampled_from(["sum", "mean"]))}
    if data.draw(st.booleans()):
        weights = data.draw(
            st.lists(st.floats(0, 1), min_size=len(completions), max_size=len(completions)).filter(lambda w: sum(w) > 0)
        )
        options["prior"] = [weight / sum(weights) for weight in weights]
    if data.draw(st.booleans()):
        options["discount_completions"] = data.draw(st.sampled_from([-1.0, -0.3, 0.7]))
    if data.draw(st.booleans()):
        options["neutral_prompt"] = "N/A"
    if data.draw(st.booleans()):
        lm.clear()
    expected = predict(prompts, completions, lm, **options)
    lm.clear()
    assert predict(prompts, completions, lm, search="best-first", **options) == expected
    assert predict(prompts[0], completions, lm, search="best-first", **options) == expected[0]


@pytest.mark.parametrize("memory_tokens", [0, 40])
@pytest.mark.parametrize("max_live", [1, 2])
def test_best_first_within_a_budget(model, monkeypatch, memory_tokens, max_live):
    monkeypatch.setattr("backprompt.classify.weighed.MAX_LIVE_SEARCHES", max_live)
    completions = [f"{a} {b}" for a in WORDS for b in WORDS]
    lm = LM(model, byte_level_bpe(), memory_bytes=memory_tokens * 645)
    assert predict(PROMPTS, completions, lm, search="best-first") == predict(
        PROMPTS, completions, LM(model, lm.tokenizer)
    )


def test_best_first_takes_fewer_tokens(lm):
    completions = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    tokens = {}
    for search_ in ("exhaustive", "best-first"):
        lm.clear()
        before = lm.stats
        tokens[search_, "answer"] = predict(PROMPTS[0], completions, lm, search=search_, aggregate="sum")
        tokens[search_] = (lm.stats - before).tokens_computed
    assert tokens["exhaustive", "answer"] == tokens["best-first", "answer"]
    assert 5 * tokens["best-first"] < tokens["exhaustive"]


def test_best_first_of_examples(lm):
    examples = [
        Example(PROMPTS[0], ["mat", "mat and the cat", "46"], prior=[0.2, 0.3, 0.5]),
        Example(PROMPTS[1], ["a", "the cat"], end_of_prompt=""),
        Example(PROMPTS[2], ["a", "the cat"]),
    ]
    assert predict(examples, lm=lm, search="best-first") == predict(examples, lm=lm)


def test_best_first_behind_groups(lm):
    prompt = Text("See ", lm) + (Text("the cat") | "the mat") + " and"
    completions = ["sat", "sat there", "the mat"]
    assert predict(prompt, completions, search="best-first") == predict(prompt, completions)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_best_first_encodes_each_prompt_once(model, tokenizer, monkeypatch):
    lm = LM(model, TOKENIZERS[tokenizer]())
    completions = [f"{a} {b}" for a in WORDS for b in WORDS]
    lengths = []
    encode = lm.session.private_tokenizer.encode
    monkeypatch.setattr(
        lm.session.private_tokenizer,
        "encode",
        lambda strings, **options: lengths.append(sum(map(len, strings))) or encode(strings, **options),
    )
    monkeypatch.setattr(lm.session.encoder.tokenizer, "encode", lm.session.private_tokenizer.encode)
    predict(PROMPTS, completions, lm, search="best-first")
    assert sum(lengths) <= 3 * sum(map(len, PROMPTS)) + 2 * sum(map(len, completions)) + 100


def test_an_unknown_search_is_refused_before_anything_runs(model):
    lm = LM(model, byte_level_bpe())
    with pytest.raises(ValueError, match="must be one of 'exhaustive', 'best-first', not 'beam'"):
        predict(PROMPTS, ["a", "b"], lm, search="beam")
    assert lm.stats.forward_passes == 0


# Next tokens of a text


def test_next_token_logprobs_are_those_of_the_plain_call(lm, model):
    texts = [Text(prompt, lm) for prompt in PROMPTS]
    ids = [[5], [], [40, 41, 40], [7, 8]]
    for text, token_ids, found in zip(texts, ids, lm.next_token_logprobs(texts, ids), strict=True):
        expected = [plain_token_logprobs(model, [*text.tokens, token_id])[-1].item() for token_id in token_ids]
        np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=ATOL[torch.float32])
    assert lm.next_token_logprobs([], []) == []


def test_next_token_logprobs_refuses_what_makes_no_sense():
    lm = LM(FAMILIES["gpt2"](), byte_level_bpe())
    text = Text("The cat", lm)
    with pytest.raises(ValueError, match="2 elements for 1 texts"):
        lm.next_token_logprobs([text], [[1], [2]])
    with pytest.raises(TokenIdError, match="Token id 320 is not one of the model's ids, which are 0 to 319"):
        lm.next_token_logprobs([text], [[320]])
    with pytest.raises(GroupError, match="ends in a group"):
        lm.next_token_logprobs([text + (Text(" a") | " b")], [[1]])
    assert lm.stats.forward_passes == 0
