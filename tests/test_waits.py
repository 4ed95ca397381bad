"""The host waits for the device once a pass and once a scoring; many texts launch as much as few.


Counted on a device that is none: `other_device.py`.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backprompt import LM, NonFiniteError, Text, evaluate
from backprompt.generation.decoding import Decoding
from backprompt.generation.run import Run
from backprompt.generation.stops import StopStrings
from backprompt.transfers import index_on
from comparing import assert_close
from other_device import DEVICE, OtherDevice
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TOKENIZER = byte_level_bpe()


def lm_on(device, name="gpt2", **options):
    model = build(name)
    lm = LM(model if device is None else device.moved(model), TOKENIZER, memory_bytes="1 GB", **options)
    evaluate(Text("The probe.", lm))
    return lm


def many(lm, num_texts):
    prompts = [Text.from_tokens((idx % 250, 3, 5, 8), lm) for idx in range(num_texts // 4)]
    return [prompt + Text.from_tokens((ending, ending + 1), lm) for prompt in prompts for ending in (10, 20, 30, 40)]


def waits_of(device, work):
    """Those beside the look at the weights, by file."""
    device.waits.clear()
    work()
    files = {}
    for line, num in device.waits.items():
        name = line.partition(":")[0]
        files[name] = files.get(name, 0) + num
    return files


WEIGHTS = "backprompt/model/weights.py"
PASS = "backprompt/model/forwarded.py"
CHOICE = "backprompt/generation/choosing.py"
SCORING = "backprompt/evaluation/rating.py"


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral_sliding", "gpt_oss"])
def test_scoring_waits_once_a_pass_and_once_for_the_scores(name):
    expected = lm_on(None, name, max_tokens_per_forward=70)
    with OtherDevice() as device:
        lm = lm_on(device, name, max_tokens_per_forward=70)
        passes = lm.stats.forward_passes
        found = []
        waits = waits_of(device, lambda: found.extend(lm.token_logprobs(many(lm, 100))))
        assert lm.stats.forward_passes - passes == 3
        assert waits == {WEIGHTS: 2, PASS: 3, SCORING: 1}
        for logprobs, other in zip(found, expected.token_logprobs(many(expected, 100)), strict=True):
            assert logprobs.device == DEVICE
            assert_close(logprobs.cpu(), other)


def test_evaluation_waits_once_a_pass():
    with OtherDevice() as device:
        lm = lm_on(device)
        assert waits_of(device, lambda: lm.evaluate(many(lm, 100))) == {WEIGHTS: 2, PASS: 1}
        assert waits_of(device, lambda: lm.evaluate(many(lm, 100))) == {WEIGHTS: 1}


def test_weights_of_several_dtypes_wait_once_a_look():
    with OtherDevice() as device:
        lm = lm_on(device, "llama")
        for norm in (lm.model.model.norm, lm.model.model.layers[0].input_layernorm):
            norm.register_buffer("unused", device.moved(nn.Linear(3, 3, dtype=torch.float64)).weight.data)
        lm.refresh()
        lm.evaluate(many(lm, 10))
        assert waits_of(device, lambda: lm.evaluate(many(lm, 10))) == {WEIGHTS: 1}


def test_a_thousand_texts_wait_and_launch_no_more_than_a_hundred():
    launches = []
    for num_texts in (100, 1000):
        with OtherDevice() as device:
            lm = lm_on(device, max_tokens_per_forward=10_000)
            executor, forward = lm.session.evaluator.executor, lm.session.evaluator.executor.forward

            def uncounted(pass_, device=device, forward=forward):
                before = device.launches
                forwarded = forward(pass_)
                device.launches = before
                return forwarded

            executor.forward = uncounted
            device.launches = 0
            waits = waits_of(device, lambda lm=lm, num_texts=num_texts: lm.token_logprobs(many(lm, num_texts)))
            assert waits == {WEIGHTS: 2, PASS: 1, SCORING: 1}
            launches.append(device.launches)
    assert launches[1] <= min(100, launches[0] + 8), launches


def test_a_step_of_a_generation_waits_and_launches_the_same_for_many_texts():
    """It waits for the pass, whether the logits are distributions, whether weights have changed, and the tokens."""
    launches = []
    for num_texts in (4, 40):
        with OtherDevice() as device:
            lm = lm_on(device)
            texts = [Text.from_tokens((idx, 3, 5, 8), lm) for idx in range(num_texts)]
            stops = StopStrings(None, lm.tokenizer)
            model = lm.session.causal_lm
            decoding = Decoding(model, lm.tokenizer, max_new_tokens=20, stops=stops, seed=1, given={})
            run = Run(lm, texts, decoding)
            for _ in range(4):
                run.step()
            device.launches = 0
            waits = waits_of(device, run.step)
            launches.append(device.launches)
            assert waits == {WEIGHTS: 1, PASS: 1, "backprompt/evaluation/scoring.py": 1, CHOICE: 1}
            run.close()
    assert launches[0] == launches[1]


def test_rows_that_are_no_distribution_are_named_and_the_others_scored():
    """Found in the one copy at the end, over several slices; the logits of one row are computed again."""
    with OtherDevice() as device:
        lm = lm_on(device)
        executor = lm.session.evaluator.executor
        plain = executor.logits

        def spoiled(hidden):
            logits = plain(hidden)
            logits[:, 7] = torch.where(logits[:, 3] > 0, torch.nan, logits[:, 7])
            return logits

        texts = many(lm, 40)
        expected = lm.token_logprobs(texts)
        lm.clear()
        executor.logits = spoiled
        with pytest.raises(NonFiniteError, match="NaN logits"):
            lm.token_logprobs(texts)
        del executor.logits
        for logprobs, other in zip(lm.token_logprobs(texts), expected, strict=True):
            assert_close(logprobs.cpu(), other.cpu())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_text_moves_few_arrays_to_the_device(name, monkeypatch):
    """Its inputs, the tokens to be rated, and the scores that the host reads: consecutive rows need no index."""
    with OtherDevice() as device:
        lm = lm_on(device, name)
        moved = []
        from_numpy = torch.from_numpy
        monkeypatch.setattr(torch, "from_numpy", lambda array: (moved.append(array), from_numpy(array))[1])
        lm.token_logprobs([Text("One text, and no other.", lm)])
        assert len(moved) == 4


@given(st.lists(st.integers(0, 9), max_size=6) | st.builds(lambda a, b: list(range(a, b)), *[st.integers(0, 9)] * 2))
def test_an_index_takes_the_rows(rows):
    rows = np.array(rows, dtype=np.int64)
    tensor = torch.arange(20).view(10, 2)
    found = index_on(rows, torch.device("cpu"))
    assert torch.equal(tensor[found], tensor[torch.from_numpy(rows)])
    assert isinstance(found, slice) == (len(rows) > 0 and rows.tolist() == list(range(rows[0], rows[0] + len(rows))))
