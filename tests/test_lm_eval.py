"""lm-evaluation-harness: the answers of its own `hf` models, with each distinct token computed once.

The tasks in `lm_eval_tasks` are two groups: multiple choice with answers of one token and of many, and prose.
"""

import copy
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparing import num_distinct_ids

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm-eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from backprompt import LM, GenerationError, ModelLoadError, TextTooLongError
from backprompt.integrations import lm_eval as integration
from backprompt.integrations.lm_eval import BackpromptLM
from reference import plain_greedy, plain_token_logprobs
from tiny_models import MAX_POSITIONS, build
from tiny_tokenizers import TOKENIZERS, byte_level_bpe, unigram

TASKS = Path(__file__).parent / "lm_eval_tasks"
SUM_ATOL = 1e-4  # of sums of log-probabilities
FAMILIES = {"gpt2": "byte_level_bpe", "llama": "llama3_bpe", "gemma": "sentencepiece_bpe"}
SENTENCES = "The cat sat on the mat. The dog sat on the cat. General Kenobi says hello there. "
PAIRS = [
    ("The cat sat on the", " mat"),
    ("The cat sat on the", " mat and the dog"),
    ("The cat sat on the ", "mat"),  # the space belongs to what follows
    ("", "Hello there"),
    ("", " General Kenobi"),
    (SENTENCES * 5, "The end."),
    (SENTENCES * 5, "The end."),
    (SENTENCES, SENTENCES[:40]),
    ("Question: What is 12 + 34? Answer:", " 46"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family, the folder of a saved model and its tokenizer."""
    folders = {}
    for family, tokenizer in FAMILIES.items():
        folders[family] = str(tmp_path_factory.mktemp(family))
        build(family).save_pretrained(folders[family])
        TOKENIZERS[tokenizer]().save_pretrained(folders[family])
    return folders


def both(folder, **options):
    return HFLM(pretrained=folder, device="cpu", batch_size=3, **options), BackpromptLM(folder, **options)


@pytest.fixture(scope="module")
def models(folders):
    return {family: both(folder) for family, folder in folders.items()}


def instances(arguments):
    return [Instance("loglikelihood", {}, args, idx) for idx, args in enumerate(arguments)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for (logprob, is_greedy), (expected_logprob, expected_is_greedy) in zip(found, expected, strict=True):
        assert logprob == pytest.approx(expected_logprob, abs=SUM_ATOL)
        assert is_greedy is expected_is_greedy


def num_given(requests, max_length=MAX_POSITIONS):
    """Distinct tokens given to the model: of each request the last ones, without the very last."""
    given = [tuple((*context, *continuation)[-max_length - 1 : -1]) for _, context, continuation in requests]
    return num_distinct_ids(given)


# Whole tasks


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory):
    """Results of both model types by their names, and what ours was asked for, as ids."""
    requests = []
    original = BackpromptLM._loglikelihood_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)  # files are named relative to it
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(
            BackpromptLM,
            "_loglikelihood_tokens",
            lambda self, asked, *rest, **options: requests.extend(asked) or original(self, asked, *rest, **options),
        )
        results = {
            name: lm_eval.simple_evaluate(
                model=name,
                model_args={"pretrained": folders["gpt2"]},
                tasks=["bp_choices", "bp_prose"],
                task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
                device="cpu",
                batch_size=4,
                bootstrap_iters=0,
                log_samples=True,
            )
            for name in ("hf", "backprompt")
        }
    return results, requests


def test_tasks_have_the_results_of_hf(evaluated):
    results, _ = evaluated
    found, expected = results["backprompt"], results["hf"]
    assert set(found["samples"]) == {"bp_letters", "bp_phrases", "bp_cloze", "bp_passages"}
    for task, own in found["samples"].items():
        for sample, expected_sample in zip(own, expected["samples"][task], strict=True):
            assert sample["arguments"] == expected_sample["arguments"]
            answers, expected_answers = (s["filtered_resps"] for s in (sample, expected_sample))
            if task == "bp_passages":
                assert answers == pytest.approx(expected_answers, abs=SUM_ATOL)
            else:
                assert_same(answers, expected_answers)
    for task in ("bp_letters", "bp_phrases", "bp_cloze", "bp_choices"):
        assert found["results"][task]["acc,none"] == expected["results"][task]["acc,none"]
    assert 0 < found["groups"]["bp_choices"]["acc,none"] < 1
    perplexities = [r["results"]["bp_passages"]["byte_perplexity,none"] for r in (found, expected)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)


def test_tasks_compute_each_distinct_token_once(evaluated):
    results, requests = evaluated
    stats = results["backprompt"]["config"]["backprompt"]
    assert stats["tokens_computed"] == num_given(requests) < stats["tokens_requested"] / 4
    assert stats["tokens_recomputed"] == 0
    letters = [len(request[2]) for request in requests if request[0] and request[0][1] in "ABCD"]
    assert letters == [1] * 40
    assert max(len(request[2]) for request in requests if request[0]) > 5
    assert max(len(request[1]) + len(request[2]) for request in requests) == MAX_POSITIONS + 1  # of a long passage


# Requests


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_have_the_answers_of_hf(family, models):
    """Without a context, with spaces at its end, too long for the model, several times the same."""
    hf, ours = models[family]
    expected = hf.loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert_same(ours.loglikelihood(instances(PAIRS), disable_tqdm=True), expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_ids_have_the_answers_of_hf(data, models, monkeypatch):
    """Any lengths, greedy continuations among them, any max_length, in one forest or several."""
    hf, ours = models["gpt2"]
    monkeypatch.setattr(
        "backprompt.integrations.lm_eval_requests.TOKENS_AT_A_TIME", data.draw(st.sampled_from([1, 30, 1000]))
    )
    max_length = data.draw(st.integers(4, 12))
    monkeypatch.setattr(hf, "_max_length", max_length)
    ours = BackpromptLM(ours.lm, max_length=max_length)
    requests = []
    for idx in range(data.draw(st.integers(1, 6))):
        context = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
        continuation = list(plain_greedy(ours.lm.model, context, data.draw(st.integers(0, 2))))
        continuation += data.draw(st.lists(st.integers(1, 3), min_size=not continuation, max_size=2))
        requests.append(((str(idx), ""), context, continuation))
    before = ours.lm.clear() or ours.lm.stats
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert (ours.lm.stats - before).tokens_computed == num_given(requests, max_length)
    assert_same(found, hf._loglikelihood_tokens(requests, disable_tqdm=True))


def test_what_shares_a_beginning_is_scored_together(folders, monkeypatch):
    """Requests of four contexts in turn, in slices of about one context's, in an LM that holds nothing in between."""
    contexts = [[first] * 40 for first in range(4)]
    requests = [(None, contexts[idx % 4], [300, 50 + idx]) for idx in range(24)]
    ours = BackpromptLM(folders["gpt2"], memory_bytes=0)
    monkeypatch.setattr("backprompt.integrations.lm_eval_requests.TOKENS_AT_A_TIME", 6 * 42)
    before = ours.lm.stats
    ours._loglikelihood_tokens(requests, disable_tqdm=True)
    done = ours.lm.stats - before
    assert (done.tokens_computed, done.tokens_recomputed) == (num_given(requests), 0)


def test_a_greedy_continuation_is_called_one(models):
    _, ours = models["gpt2"]
    context = [5, 6, 7]
    greedy = list(plain_greedy(ours.lm.model, context, 3))
    other = [*greedy[:2], (greedy[2] + 1) % 300]
    long = [9] * (MAX_POSITIONS - 2)
    last = list(plain_greedy(ours.lm.model, [*long[1:], *context], 1))  # predicted by all that the model takes
    requests = [(None, context, greedy), (None, context, other), (None, [*long, *context], last)]
    assert [is_greedy for _, is_greedy in ours._loglikelihood_tokens(requests, disable_tqdm=True)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("max_length", [7, None])
def test_strings_have_the_rolling_loglikelihoods_of_hf_where_asked_for(family, max_length, models, monkeypatch):
    hf, ours = models[family]
    monkeypatch.setattr(hf, "_max_length", max_length)
    own, as_hf = (BackpromptLM(ours.lm, max_length=max_length, rolling_as_hf=value) for value in (False, True))
    strings = instances([(SENTENCES * num,) for num in (0, 1, 5)] + [("Hello",)])
    expected = hf.loglikelihood_rolling(strings, disable_tqdm=True)
    found = as_hf.loglikelihood_rolling(strings, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=SUM_ATOL)
    assert 0 >= found[0] > found[1] > found[2]
    if family == "gpt2":  # its tokenizer adds nothing
        assert own.loglikelihood_rolling(strings, disable_tqdm=True) == found


def test_a_rolling_loglikelihood_is_that_of_the_strings_own_tokens(folders):
    """By hand: BOS once, and the string's tokens behind it; `hf` scores a second BOS behind the first."""
    ours, as_hf = (BackpromptLM(folders["llama"], rolling_as_hf=value) for value in (False, True))
    tokenizer, model = ours.tokenizer, ours.lm.model
    strings = ["The cat sat on the mat.", "<|begin_of_text|>The cat", "<|begin_of_text|>"]
    encoded = [tokenizer.encode(string, add_special_tokens=False) for string in strings]
    bos = tokenizer.bos_token_id
    assert encoded[1][0] == bos
    behind = [encoded[0], encoded[1][1:], []]
    expected = [float(plain_token_logprobs(model, [bos, *ids])[1:].double().sum()) for ids in behind]
    found = ours.loglikelihood_rolling(instances([(string,) for string in strings]), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=SUM_ATOL)
    (behind_nothing,) = ours.loglikelihood(instances([("", strings[0])]), disable_tqdm=True)
    assert found[0] == pytest.approx(behind_nothing[0], abs=1e-9)
    with_two = float(plain_token_logprobs(model, [bos, bos, *behind[0]])[1:].double().sum())
    (found_as_hf,) = as_hf.loglikelihood_rolling(instances([(strings[0],)]), disable_tqdm=True)
    assert found_as_hf == pytest.approx(with_two, abs=SUM_ATOL)
    assert abs(found_as_hf - found[0]) > 0.1
    other = BackpromptLM(folders["llama"], prefix_token_id=7)
    (found_behind_7,) = other.loglikelihood_rolling(instances([(strings[0],)]), disable_tqdm=True)
    behind_7 = float(plain_token_logprobs(model, [7, *behind[0]])[1:].double().sum())
    assert found_behind_7 == pytest.approx(behind_7, abs=SUM_ATOL)


@pytest.mark.parametrize("options", [{"add_bos_token": True}, {"add_bos_token": False}, {"prefix_token_id": 7}])
def test_special_tokens_are_those_of_hf(options, folders):
    hf, ours = both(folders["llama"], **options)
    begun = [("<|begin_of_text|>The cat", " sat"), *PAIRS]
    for string, _ in begun:
        assert ours.tok_encode(string) == hf.tok_encode(string)
    assert_same(
        ours.loglikelihood(instances(begun), disable_tqdm=True), hf.loglikelihood(instances(begun), disable_tqdm=True)
    )


def test_chat_templates_are_applied_as_by_hf(models, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[{{ name or 'model' }}]{% endif %}"
    )
    hf, ours = models["llama"]
    for model in (hf, ours):
        monkeypatch.setattr(model.tokenizer, "chat_template", template)
        monkeypatch.setattr(model, "chat_template_args", {"name": "answer"})
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello."}]
    expected = "[user] Hello.\n[answer]"
    assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat) == expected
    chat.append({"role": "assistant", "content": "Hi"})
    continued = [model.apply_chat_template(chat, add_generation_prompt=False) for model in (hf, ours)]
    assert continued[0] == continued[1] == "[user] Hello.\n[assistant] Hi"
    assert ours.chat_template(True) == template
    assert ours.tokenizer_name == hf.tokenizer_name


def test_answers_go_to_the_cache_under_the_names_of_hf(models, monkeypatch):
    class Hook:
        def __init__(self):
            self.answers = {}

        def add_partial(self, name, request, answer):
            self.answers[name, tuple(request)] = answer

    hooks = []
    for model in models["gpt2"]:
        hooks.append(Hook())
        monkeypatch.setattr(model, "cache_hook", hooks[-1])
        answers = model.loglikelihood(instances(PAIRS), disable_tqdm=True)
        totals = model.loglikelihood_rolling(instances([("Hello",), (SENTENCES * 4,)]), disable_tqdm=True)
        assert hooks[-1].answers["loglikelihood", PAIRS[1]] == answers[1]
        assert hooks[-1].answers["loglikelihood_rolling", (SENTENCES * 4,)] == totals[1]
    assert set(hooks[0].answers) == set(hooks[1].answers)


def test_bars(models, capsys):
    _, ours = models["gpt2"]
    ours.loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert capsys.readouterr().err == ""
    ours.loglikelihood(instances(PAIRS))
    assert f"{len(PAIRS)}/{len(PAIRS)}" in capsys.readouterr().err


# Models


def test_an_lm_serves_with_its_own_options(tmp_path):
    """With the tokenizer of another object, and with spans computed before."""
    model, tokenizer = build("gpt2"), byte_level_bpe()
    lm = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    first = BackpromptLM(lm).loglikelihood(instances(PAIRS), disable_tqdm=True)
    before = lm.stats
    pair = BackpromptLM((lm.model, lm.tokenizer))
    assert pair.lm is not lm
    assert pair.loglikelihood(instances(PAIRS), disable_tqdm=True) == first  # computed anew
    assert BackpromptLM(lm, tokenizer=byte_level_bpe()).loglikelihood(instances(PAIRS), disable_tqdm=True) == first
    assert (lm.stats - before).tokens_computed == 0


def test_options_of_the_lm(folders):
    ours = BackpromptLM(folders["gpt2"], memory_bytes="1 kB", max_tokens_per_forward=16, batch_size="auto:4")
    assert_same(
        ours.loglikelihood(instances(PAIRS), disable_tqdm=True),
        BackpromptLM(folders["gpt2"], dtype="float32").loglikelihood(instances(PAIRS), disable_tqdm=True),
    )
    assert ours.lm.stats.bytes_held <= 1000
    assert ours.lm.stats.forward_passes > 3


def test_the_dtype_is_the_checkpoints(tmp_path):
    build("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    assert BackpromptLM(str(tmp_path)).lm.model.dtype is torch.bfloat16
    assert BackpromptLM(str(tmp_path), dtype="float32").lm.model.dtype is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_where_no_cuda_is_the_default_of_the_command_line_is_not_taken_literally(folders):
    assert BackpromptLM(folders["gpt2"], device="cuda:0").lm.model.device.type != "cuda"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda lm: BackpromptLM("nowhere", peft="x", revision="y"), TypeError, "no argument 'peft', 'revision'"),
        (lambda lm: BackpromptLM(lm, dtype="float16", memory_bytes=3), TypeError, "give memory_bytes, dtype to the LM"),
        (lambda lm: BackpromptLM(lm.model), TypeError, "not GPT2LMHeadModel"),
        (lambda lm: BackpromptLM("nowhere"), ModelLoadError, "nowhere"),
        (lambda lm: BackpromptLM("nowhere", rolling_as_hf="yes"), ValueError, "rolling_as_hf must be True or False"),
        (lambda lm: BackpromptLM("nowhere", add_bos_token=1), ValueError, "add_bos_token must be True or False"),
        (lambda lm: BackpromptLM("nowhere", max_length="many"), ValueError, "max_length must be an int of at least 1"),
        (lambda lm: BackpromptLM("nowhere", prefix_token_id=True), ValueError, "prefix_token_id must be an int"),
        (
            lambda lm: BackpromptLM("nowhere", memory_bytes="banana"),
            ValueError,
            "memory_bytes must be a number of bytes",
        ),
    ],
)
def test_arguments_that_make_no_sense(make, error, message, models):
    with pytest.raises(error, match=message):
        make(models["gpt2"][1].lm)


def test_requests_that_cannot_be_answered_are_refused_before_anything_runs(models, monkeypatch):
    ours = models["gpt2"][1]
    before = ours.lm.stats
    for pairs, message in [
        ([*PAIRS, ("The cat", "")], "0 of continuation"),
        ([*PAIRS, ("The cat", " sat" * 200)], "at most max_length=128"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours.loglikelihood(instances(pairs), disable_tqdm=True)
    with pytest.raises(GenerationError, match="max_gen_toks"):
        ours.generate_until(instances([("The cat", {"max_gen_toks": MAX_POSITIONS})]))
    tokenizer = byte_level_bpe()
    tokenizer.bos_token = tokenizer.eos_token = None
    bare = BackpromptLM(LM(ours.lm.model, tokenizer))
    with pytest.raises(ValueError, match="prefix_token_id="):
        bare.loglikelihood(instances(PAIRS), disable_tqdm=True)
    with pytest.raises(ValueError, match="prefix_token_id="):
        bare.loglikelihood_rolling(instances([("The cat",)]), disable_tqdm=True)
    with pytest.raises(ValueError, match="prefix_token_id="):
        bare.generate_until(instances([("The cat", {"max_gen_toks": 3}), ("", {"max_gen_toks": 4})]), disable_tqdm=True)
    assert (ours.lm.stats - before).forward_passes == bare.lm.stats.forward_passes == 0
    longer = BackpromptLM(ours.lm, max_length=10 * MAX_POSITIONS)
    with pytest.raises(TextTooLongError, match="128 positions"):
        longer.loglikelihood(instances(PAIRS[-4:]), disable_tqdm=True)


def test_generated_strings_are_those_of_hf(models):
    """Several options in one call, stop strings, contexts that are too long."""
    hf, ours = models["gpt2"]
    contexts = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is it? " * 20]
    free = ours.generate_until(instances([(contexts[0], {"max_gen_toks": 20})]), disable_tqdm=True)[0]
    requests = [
        (context, options)
        for context in contexts
        for options in (
            {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False},
            {"until": free[3:5], "max_gen_toks": 20, "temperature": 0.0},
            {"until": [], "max_gen_toks": 8, "do_sample": False, "repetition_penalty": 1.5},
        )
    ]
    expected = hf.generate_until(instances(copy.deepcopy(requests)), disable_tqdm=True)
    assert ours.generate_until(instances(requests), disable_tqdm=True) == expected
    assert len(set(expected)) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_strings_that_begin_in_the_context_do_not_count_as_for_hf(family, models):
    """Each stop string spans the end of its context and the continuation, or comes later, or both."""
    hf, ours = models[family]
    contexts = ["Question: What is it?\n", "The cat sat on the", "Answer: ", "says\n\n", "naïve"]
    free = hf.generate_until(instances([(context, {"max_gen_toks": 12}) for context in contexts]), disable_tqdm=True)
    requests = []
    for context, string in zip(contexts, free, strict=True):
        ends = [context[-2:] + string[:1], context[-1:] + string[:2]]
        for until in (ends, [*ends, string[4:6]], ["\n\n", string[:1]], [" "], [" " + string[:2], string[7:9]]):
            requests.append((context, {"until": [stop for stop in until if stop], "max_gen_toks": 12}))
    one_by_one = HFLM(pretrained=hf.model, tokenizer=hf.tokenizer, batch_size=1)  # in a batch the others go on as well
    expected = one_by_one.generate_until(instances(copy.deepcopy(requests)), disable_tqdm=True)
    assert ours.generate_until(instances(requests), disable_tqdm=True) == expected
    assert free[0] in expected  # the first ones end nothing
    assert len(set(expected)) > len(contexts)


def test_a_space_that_sentencepiece_drops_is_no_part_of_a_stop_string_as_for_hf(models):
    hf, ours = models["gemma"]
    first = hf.tokenizer.convert_tokens_to_ids("▁the")
    options = {"until": [" the"], "max_gen_toks": 6, "sequence_bias": [[[first], 1e4]], "no_repeat_ngram_size": 1}
    expected = hf.generate_until(instances([("cat", copy.deepcopy(options))]), disable_tqdm=True)
    assert ours.generate_until(instances([("cat", options)]), disable_tqdm=True) == expected
    assert expected[0].startswith("the")
    assert len(expected[0]) > 3


def test_a_tokenizer_without_special_tokens_serves(tmp_path):
    """Nothing ends a generation but the number of tokens; texts without a context need a token to be chosen."""
    tokenizer = byte_level_bpe()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, clean_up_tokenization_spaces=False)
    ours = BackpromptLM(LM(build("gpt2"), plain))
    assert (ours.eot_token_id, plain.pad_token_id) == (None, None)
    options = {"max_gen_toks": 8, "until": ["\n\n\n"]}
    (found,) = ours.generate_until(instances([("The cat", options)]), disable_tqdm=True)
    assert found == plain.decode(plain_greedy(ours.lm.model, plain.encode("The cat"), 8)).split("\n\n\n")[0]
    (sampled,) = ours.generate_until(instances([("The cat", {**options, "do_sample": True})]), disable_tqdm=True)
    assert sampled
    answers = ours.loglikelihood(instances([("The cat", " sat")]), disable_tqdm=True)
    assert_same(answers, BackpromptLM(LM(build("gpt2"), tokenizer)).loglikelihood(instances([("The cat", " sat")])))
    chosen = BackpromptLM(ours.lm, prefix_token_id=0)
    assert chosen.loglikelihood_rolling(instances([("The cat",)]), disable_tqdm=True)[0] < 0
    assert chosen.generate_until(instances([("", options)]), disable_tqdm=True)


def test_stop_strings_of_a_task_that_the_tokenizer_cannot_spell_end_nothing():
    ours = BackpromptLM(LM(build("gpt2"), unigram()))
    requests = [("The cat", {"max_gen_toks": 8, "until": until}) for until in (["\u2603"], [])]
    first, second = ours.generate_until(instances(requests), disable_tqdm=True)
    assert first == second


def test_repeats_are_samples_and_sampling_fields_of_greedy_tasks_are_left_out(models):
    _, ours = models["gpt2"]
    options = {"max_gen_toks": 12, "do_sample": True}
    assert len(set(ours.generate_until(instances([("The cat", options)] * 4), disable_tqdm=True))) > 1
    greedy, plain = (
        ours.generate_until(instances([("The cat", {"max_gen_toks": 12, **more})]), disable_tqdm=True)
        for more in ({"top_p": 0.9, "until": [""]}, {})
    )
    assert greedy == plain
    assert ours.generate_until(instances([("", {"max_gen_toks": 4})]), disable_tqdm=True)


# The harness finds it


def test_the_command_line_knows_the_name(monkeypatch):
    """Beside the harness's own, also where the module runs as a program."""
    found = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: found.extend(map(get_model, ("backprompt", "hf"))))
    runpy.run_path(integration.__file__, run_name="__main__")
    assert found == [BackpromptLM, HFLM]


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    spec = importlib.util.spec_from_file_location("without_the_harness", integration.__file__)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
