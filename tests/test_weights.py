"""P6 and P7: the user's objects stay as they were found, and the user's changes are noticed.

A plain call of the model as it is at that moment is the yardstick, for other threads too.
"""

import contextlib
import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Model

from backprompt import LM, StaleRepresentationError, Text, UnsupportedModelError, evaluate, load, to_networkx
from backprompt.model import weights
from backprompt.model.executor import Executor
from backprompt.model.weights import WeightsMonitor, content_hash, sample_hash
from backprompt.session import fingerprint as fingerprint_module
from backprompt.store import MemoryStore
from comparing import assert_close, assert_equals_plain, num_distinct_ids
from reference import ATOL, plain_greedy, plain_ids, plain_logits, plain_token_logprobs
from threads import in_threads
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe, llama3_bpe


@pytest.fixture
def tokenizer():
    return byte_level_bpe()


@pytest.fixture
def model():
    return FAMILIES["llama"]()


def forest(lm):
    root = Text("Question: 12 + 34?", lm)
    return [root, *(root + twig + leaf for twig in (" The", " cat") for leaf in (" sat", "!")), Text("One.", lm)]


def read(texts):
    """All results of each text."""
    return [(text.logits, text.token_logprobs, text.model_repr.all_logits()) for text in texts]


def plain(model, texts):
    """The same, by the plain call."""
    return [
        (
            plain_logits(model, text.tokens)[-1],
            plain_token_logprobs(model, text.tokens),
            plain_logits(model, text.tokens),
        )
        for text in texts
    ]


def assert_all_close(results, expected, atol=None):
    for result, plain_result in zip(results, expected, strict=True):
        for found, wanted in zip(result, plain_result, strict=True):
            assert_close(found, wanted, atol)


# P6: left as found


def state_of(model, tokenizer):
    """Everything of the user's, and of the process, that evaluation has no business with."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: hashlib.sha256(bytes(t.detach().numpy().tobytes())).digest() for name, t in tensors.items()},
        "identities": {name: (id(t), t._version, t.requires_grad) for name, t in tensors.items()},
        "gradients": {name: None if t.grad is None else t.grad.sum().item() for name, t in tensors.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: set(module.__dict__) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "configuration": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "tokenizer": (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, repr(tokenizer.init_kwargs)),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_left_as_found(family, tokenizer):
    model = FAMILIES[family]()
    plain_logits(model, [1, 2, 3])  # transformers sets up some things of its own on the first call
    model.train()
    next(model.children()).eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    tokenizer(["a cat", "The mat and more"], truncation=True, max_length=3)  # which the backend remembers
    before = state_of(model, tokenizer)

    lm = LM(model, tokenizer, max_tokens_per_forward=8)
    texts = forest(lm)
    read(texts)
    evaluate(texts)[0].past_key_values()
    assert len(lm.fingerprint) == 64
    lm.refresh()
    lm.clear()
    read(texts)
    after = state_of(model, tokenizer)
    for what, value in before.items():
        assert after[what] == value, what


@pytest.mark.parametrize("family", ["llama", "phi3_longrope"])
def test_plain_calls_of_another_thread_get_their_usual_numbers(family, tokenizer):
    """To the bit, while LMs are made, probe, evaluate and start over."""
    model = FAMILIES[family]()
    ids = torch.tensor([plain_ids(tokenizer, "Question: 12 + 34? The cat")])
    usual = plain_logits(model, ids[0].tolist())
    stop, calls, wrong = threading.Event(), [], []

    def call_plainly():
        while not stop.is_set():
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            calls.append(1)
            if not torch.equal(logits, usual):
                wrong.append((logits - usual).abs().max())

    thread = threading.Thread(target=call_plainly)
    thread.start()
    try:
        results = []
        for _ in range(3):
            lm = LM(model, tokenizer, max_tokens_per_forward=8)
            texts = forest(lm)
            results.append(read(texts))
            lm.clear()
            results.append(read(texts))
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert len(calls) > 10
    for result in results:
        assert_all_close(result, plain(model, texts))


def test_one_lm_from_eight_threads_gives_right_numbers_and_computes_each_token_once(model, tokenizer):
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    strings = [f"Question: {a} + {b}? The cat" for a in range(4) for b in range(6)]
    expected = {string: plain_logits(model, plain_ids(tokenizer, string)) for string in strings}

    def work(idx):
        for string in random.Random(idx).sample(strings, len(strings)):
            text = Text(string[:9], lm) + string[9:]
            assert_close(text.logits, expected[string][-1])
            assert text.token_logprobs.shape == (len(text.tokens),)
            assert_close(text.model_repr.all_logits(), expected[string])

    in_threads(8, work)
    texts = [plain_ids(tokenizer, string) for string in strings]
    assert lm.stats.tokens_computed == num_distinct_ids(texts)


def test_threads_that_clear_and_start_over_meanwhile(model, tokenizer):
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    strings = [f"Question: {a} + 34? The cat" for a in range(6)]
    expected = {string: plain_logits(model, plain_ids(tokenizer, string))[-1] for string in strings}

    def work(idx):
        for round_ in range(20):
            string = strings[(idx + round_) % len(strings)]
            assert_close(Text(string, lm).logits, expected[string])
            if idx == 0:
                lm.clear()
            if idx == 1 and round_ % 5 == 0:
                lm.refresh()

    before = lm.fingerprint
    in_threads(4, work)
    assert lm.fingerprint == before


class Changing:
    """A model whose weights go through a circle of states, a parameter at a time."""

    def __init__(self, tokenizer):
        self.model = FAMILIES["llama"]()
        other = dict(FAMILIES["llama"](seed=1).named_parameters())
        names = ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight")
        chosen = [(parameter, other[name]) for name, parameter in self.model.named_parameters() if name in names]
        there = [(parameter, new.detach()) for parameter, new in chosen]
        self.circle = there + [(parameter, parameter.detach().clone()) for parameter, _ in chosen]
        self.num_begun = self.num_done = 0
        self.strings = [f"Question: {a} + 34? The cat sat on the mat, and" for a in range(3)]
        self.ids = {string: plain_ids(tokenizer, string) for string in self.strings}
        self.logits, self.logprobs, self.generated = [], [], []
        for _ in self.circle:
            self.logits.append({string: plain_logits(self.model, ids)[-1] for string, ids in self.ids.items()})
            self.logprobs.append({s: plain_token_logprobs(self.model, ids) for s, ids in self.ids.items()})
            self.generated.append({string: plain_greedy(self.model, ids, 3) for string, ids in self.ids.items()})
            self.change()

    def change(self):
        parameter, new = self.circle[self.num_begun % len(self.circle)]
        self.num_begun += 1
        with torch.no_grad():
            parameter.copy_(new)
        self.num_done += 1

    def check(self, found, expected, num_done_before):
        """Check that `found` is the result of a state since the change of number `num_done_before`."""
        states = [number % len(self.circle) for number in range(num_done_before, self.num_begun + 1)]
        gaps = [(found - expected[state]).abs().nan_to_num().max() for state in states]
        assert min(gaps) <= ATOL[torch.float32], gaps


@pytest.mark.parametrize("options", [{}, {"store": MemoryStore}, {"pack_weights": True}])
def test_weights_that_change_while_other_threads_use_them(options, tokenizer):
    """Each call gives the numbers of a state that there was meanwhile, or says that it cannot; nothing torn is kept."""
    changing = Changing(tokenizer)
    options = {name: value() if name == "store" else value for name, value in options.items()}
    lm = LM(changing.model, tokenizer, max_tokens_per_forward=8, **options)
    until = time.monotonic() + float(os.environ.get("BACKPROMPT_TEST_SECONDS", 2))
    outcomes = Counter()

    def use(rng, string, before):
        text = Text(string, lm)
        kind = rng.choice(["logits", "logprobs", "generated", "picture", "pinned", "cleared"])
        if kind == "logits":
            changing.check(text.logits, [of[string] for of in changing.logits], before)
        elif kind == "logprobs":
            (found,) = lm.token_logprobs([text], [1])
            changing.check(found, [of[string][1:] for of in changing.logprobs], before)
        elif kind == "generated":
            found = text.generate(max_new_tokens=3).completion_tokens
            states = range(before, changing.num_begun + 1)
            assert found in [changing.generated[number % len(changing.circle)][string] for number in states]
        elif kind == "picture":
            to_networkx([text])
        elif kind == "pinned":
            text.pin().release()
        else:
            lm.clear()
        return kind

    def work(idx):
        rng = random.Random(idx)
        while time.monotonic() < until:
            if idx == 0:
                changing.change()
                time.sleep(rng.choice([0, 0.02, 0.2, 0.5]))
            else:
                try:
                    outcomes[use(rng, rng.choice(changing.strings), changing.num_done)] += 1
                except StaleRepresentationError:
                    outcomes["stale"] += 1

    in_threads(4, work)
    assert set(outcomes) - {"stale", "cleared"}, outcomes
    for _ in changing.circle:
        for used in (lm, LM(changing.model, tokenizer, **options)):
            for string in changing.strings:
                expected = changing.logits[changing.num_done % len(changing.circle)][string]
                assert_close(Text(string, used).logits, expected)
        changing.change()


@pytest.mark.parametrize("store", [None, MemoryStore])
@pytest.mark.parametrize("forward", [1, 2, 3])
def test_what_was_computed_while_weights_changed_is_not_kept(forward, store, tokenizer, monkeypatch):
    """Not even where they change back so that nothing shows it later: through `.data`."""
    model = FAMILIES["gpt2"]()
    store = store() if store is not None else None
    lm = LM(model, tokenizer, max_tokens_per_forward=16, store=store)
    text = Text("Question: What is 12 + 34? The cat sat on the mat, and sat.", lm)
    evaluate(Text("Probe.", lm))
    assert len(text.tokens) > 32
    weight, calls, original = model.transformer.h[1].mlp.c_fc.weight, [], GPT2Model.forward
    own = weight.data

    def change_meanwhile(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == forward:
            weight.data = own * 2
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPT2Model, "forward", change_meanwhile)
        with pytest.raises(StaleRepresentationError, match="while they were used"):
            evaluate(text)
    assert lm.stats.bytes_held == 0
    weight.data = own
    assert_equals_plain(model, [text])
    assert_equals_plain(model, [Text(text.string, LM(model, tokenizer, store=store))])


def test_a_token_that_was_chosen_while_weights_changed_is_none(model, tokenizer, monkeypatch):
    lm = LM(model, tokenizer)
    stream = Text("The cat", lm).stream(max_new_tokens=8)
    next(stream)
    before = stream.text.completion_tokens
    logits = Executor.logits

    def change_meanwhile(self, hidden):
        found = logits(self, hidden)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "logits", change_meanwhile)
        with pytest.raises(StaleRepresentationError, match="while they were used"):
            stream.run.step()
    assert stream.text.completion_tokens == before
    with pytest.raises(StaleRepresentationError, match="since this continuation was begun"):
        stream.run.step()
    assert lm.stats.bytes_held == 0


@pytest.mark.parametrize("use", [lambda lm: lm.fingerprint, LM.refresh])
def test_a_hash_of_weights_that_changed_meanwhile_is_none(use, model, tokenizer, monkeypatch):
    lm = LM(model, tokenizer)

    def change_meanwhile(model):
        found = content_hash(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint_module, "content_hash", change_meanwhile)
        with pytest.raises(StaleRepresentationError, match="while they were hashed"):
            use(lm)
    assert lm.fingerprint == LM(model, tokenizer).fingerprint


def test_weights_that_change_while_an_lm_is_made_are_noticed(model, tokenizer, monkeypatch):
    original = Executor.__init__

    def change_then(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "__init__", change_then)
        lm = LM(model, tokenizer, pack_weights=True)
    assert_equals_plain(model, [Text("The cat", lm)])


def test_an_equal_text_may_go_while_another_one_is_evaluated(tokenizer, monkeypatch):
    """As it does when another thread drops the text that it evaluated earlier."""
    model = FAMILIES["gpt2"]()
    lm = LM(model, tokenizer)
    earlier = [Text("The cat", lm)]
    evaluate(earlier)
    forward = GPT2Model.forward

    def forward_and_drop(self, *args, **kwargs):
        earlier.clear()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", forward_and_drop)
    texts = [Text("The cat", lm), Text("One.", lm)]
    evaluate(texts)
    assert earlier == []
    assert_equals_plain(model, texts)


# Hostile surroundings: the results are those of the plain call in eval mode, outside of all this


@contextlib.contextmanager
def set_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def configured(model, **values):
    for name, value in values.items():
        setattr(model.config, name, value)
    yield


@contextlib.contextmanager
def padding_left(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer(["a cat", "The mat and more"], padding=True, truncation=True, max_length=3)
    yield


@contextlib.contextmanager
def training(model, checkpointing=False):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    yield


HOSTILE = {
    "training mode, dropout one half": lambda model, tokenizer: training(model),
    "training mode, gradient checkpointing": lambda model, tokenizer: training(model, checkpointing=True),
    "left padding": lambda model, tokenizer: padding_left(tokenizer),
    "use_cache=False": lambda model, tokenizer: configured(model, use_cache=False),
    "return_dict=False": lambda model, tokenizer: configured(model, return_dict=False),
    "output_hidden_states=True": lambda model, tokenizer: configured(model, output_hidden_states=True),
    "eager attention": lambda model, tokenizer: configured(model, _attn_implementation="eager"),
    "autocast": lambda model, tokenizer: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": lambda model, tokenizer: torch.inference_mode(),
    "enable_grad": lambda model, tokenizer: torch.enable_grad(),
    "float64 by default": lambda model, tokenizer: set_default_dtype(torch.float64),
    "another device by default": lambda model, tokenizer: torch.device("meta"),
}


def with_dropout(family):
    """Any dropout that takes place changes the logits beyond recognition."""
    config = FAMILIES[family]().config
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(FAMILIES[family]().state_dict())
    return model.eval()


@pytest.mark.parametrize(
    ("family", "inside"), [("gpt2", "all of it"), *(("llama", step) for step in ("building", "evaluating", "reading"))]
)
@pytest.mark.parametrize("surroundings", HOSTILE)
def test_hostile_surroundings_change_nothing(family, surroundings, inside, tokenizer):
    model = with_dropout(family)
    texts = forest(LM(model, tokenizer))
    expected = plain(model, texts)

    def hostile(step):
        is_inside = inside in ("all of it", step)
        return HOSTILE[surroundings](model, tokenizer) if is_inside else contextlib.nullcontext()

    with hostile("building"):
        texts = forest(LM(model, tokenizer, max_tokens_per_forward=8))
    with hostile("evaluating"):
        evaluate(texts)
    with hostile("reading"):
        results = read(texts)
    assert_all_close(results, expected)
    assert_all_close(read(texts), expected)
    assert not any(tensor.is_inference() or tensor.requires_grad for result in read(texts) for tensor in result)


def test_rows_that_are_held_are_plain_tensors(tokenizer):
    lm = LM(FAMILIES["llama"]().eval(), tokenizer)
    evaluate(forest(lm))
    held = [tensor for block in lm.session.evaluator.memory.blocks for tensor in block.tensors.values()]
    assert held
    assert not any(tensor.is_inference() for tensor in held)


# P7: changes are noticed


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1


def through_data(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)


def data_replaced(model):
    model.model.norm.weight.data = model.model.norm.weight.data * 2


def parameter_replaced(model):
    model.model.layers[0].self_attn.v_proj.weight = nn.Parameter(-model.model.layers[0].self_attn.v_proj.weight)


def module_replaced(model):
    model.lm_head = copy.deepcopy(model.lm_head)
    model.lm_head.weight.data.neg_()


def buffer_changed(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def head_tied(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def forward_replaced(model):
    mlp = model.model.layers[0].mlp
    old = mlp.forward
    mlp.forward = lambda hidden: old(hidden) * 3


def first_layer_moved(model):
    """A `ModuleList` yields its modules in the order of their table, whatever their names."""
    layers = model.model.layers._modules
    layers["0"] = layers.pop("0")


CHANGES = {
    "a method replaced": forward_replaced,
    "a step of an optimizer": step,
    "one element, in place": in_place,
    "a matrix, through .data": through_data,
    ".data replaced": data_replaced,
    "a parameter replaced": parameter_replaced,
    "a module replaced": module_replaced,
    "a buffer": buffer_changed,
    "the head tied to the embedding": head_tied,
    "load_state_dict": lambda model: model.load_state_dict(FAMILIES["llama"](seed=1).state_dict()),
    "load_state_dict, assign": lambda model: model.load_state_dict(FAMILIES["llama"](seed=1).state_dict(), assign=True),
    "an embedding resized": lambda model: model.resize_token_embeddings(330, mean_resizing=False),
    "a layer taken away": lambda model: model.model.layers.__delitem__(1),
    "the first layer behind the others": first_layer_moved,
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change, model, tokenizer):
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    texts = forest(lm)
    old = evaluate(texts)
    read(texts)
    before, fingerprint, key = plain(model, texts), lm.fingerprint, old[0].key

    CHANGES[change](model)
    stats = lm.stats
    assert_equals_plain(model, texts)
    assert read(texts)[0][2].shape != before[0][2].shape or (read(texts)[0][2] - before[0][2]).abs().max() > 1e-3
    assert (lm.stats - stats).tokens_computed == stats.tokens_computed  # all of it again, once
    for stale in (lambda: old[0].logits, lambda: old[1].token_logprobs, lambda: old[1].past_key_values()):
        with pytest.raises(StaleRepresentationError, match=r"have changed since.*Evaluate the text again"):
            stale()
    assert old[0].num_tokens == len(texts[0].tokens)
    assert lm.fingerprint != fingerprint
    assert evaluate(texts[0]).key != key


ADDED = {
    "a child": lambda norm: norm.add_module("more", nn.Identity()),
    "a buffer": lambda norm: norm.register_buffer("more", torch.zeros(1)),
    "a second parameter": lambda norm: norm.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "a method": lambda norm: setattr(norm, "forward", lambda rows: rows),
    "a hook of accelerate": lambda norm: setattr(norm, "_hf_hook", object()),
}


@pytest.mark.parametrize("add", ADDED.values(), ids=ADDED)
def test_a_part_where_there_was_none_is_noticed(add):
    model = FAMILIES["llama"]()
    monitor = WeightsMonitor(model)
    assert not monitor.has_changed()
    add(model.model.norm)
    assert monitor.has_changed()


def unaligned() -> torch.Tensor:
    return torch.frombuffer(bytearray(4 * 40 + 1), dtype=torch.float32, offset=1)


SAMPLED = {
    **{str(dtype): partial(torch.zeros, 40, dtype=dtype) for dtype in (torch.float64, torch.bfloat16, torch.int8)},
    "complex": lambda: torch.zeros(40, dtype=torch.complex128),
    "unaligned": unaligned,
    "strided": lambda: torch.zeros(40, 3)[:, 1],
    "one element": lambda: torch.zeros(()),
}


@pytest.mark.parametrize("kind", SAMPLED)
def test_a_sample_shows_numbers_of_any_size_wherever_they_lie(kind):
    """A write through `.data` keeps the version. The last element is sampled; a sign is one byte of a number."""
    model = FAMILIES["llama"]()
    for name, make in SAMPLED.items():
        model.model.norm.register_buffer(name.replace(".", " "), make())
    monitor = WeightsMonitor(model)
    assert not monitor.has_changed()
    written = model.model.norm.get_buffer(kind.replace(".", " ")).data.view(-1)[-1]
    written.fill_(-0.0 if written.is_floating_point() else 1)
    assert monitor.has_changed()
    written.fill_(0)
    assert not monitor.has_changed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_element_of_a_model_made_in_inference_mode_is_noticed(dtype, tokenizer):
    """Its tensors have no versions, and a sample does not see every element."""
    with torch.inference_mode():
        model = FAMILIES["llama"]().to(dtype)
        model.model.norm.weight = nn.Parameter(model.model.norm.weight[:].clone(), requires_grad=False)
    assert model.model.norm.weight.is_inference()
    lm = LM(model, tokenizer)
    text = Text("The cat", lm)
    evaluate(text)
    stats = lm.stats
    assert text.logits.isfinite().all()
    assert (lm.stats - stats).tokens_computed == 0
    with torch.inference_mode():
        model.model.embed_tokens.weight[text.tokens[0], 5] += 50
    assert_equals_plain(model, [text])
    with torch.inference_mode():
        model.model.norm.weight[3] *= 50
    assert_equals_plain(model, [text])


def test_a_changed_configuration_is_noticed(tokenizer):
    model = FAMILIES["gemma2"]()
    lm = LM(model, tokenizer)
    texts = forest(lm)
    evaluate(texts)
    fingerprint = lm.fingerprint
    model.config.final_logit_softcapping = 0.5
    assert_equals_plain(model, texts)
    assert texts[0].logits.abs().max() <= 0.5
    assert lm.fingerprint != fingerprint


def times(factor, old):
    return lambda hidden: old(hidden) * factor


def test_fingerprints_tell_replaced_methods_apart_by_content(model, tokenizer):
    mlp = model.model.layers[0].mlp
    old, found = mlp.forward, []
    for factor in (2, 3, 2):
        mlp.forward = times(factor, old)
        found.append(content_hash(model))
    assert found[0] == found[2] != found[1]


def test_wrappers_of_trainers_and_compilers_are_no_change(model, tokenizer):
    """Such as those of accelerate's mixed precision."""
    lm = LM(model, tokenizer)
    texts = forest(lm)
    evaluate(texts)
    stats, fingerprint = lm.stats, lm.fingerprint
    model.forward = convert_outputs_to_fp32(model.forward)
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager")
    read(texts)
    assert (lm.stats - stats).tokens_computed == 0
    lm.refresh()
    assert lm.fingerprint == fingerprint
    assert content_hash(model) == content_hash(model)
    assert_equals_plain(model, texts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_noticed(dtype, model, tokenizer):
    """Log-probabilities are float32 from whichever dtype."""
    texts = forest(LM(model, tokenizer))
    evaluate(texts)
    model.to(dtype)
    assert_equals_plain(model, texts)
    assert texts[0].logits.dtype == texts[0].model_repr.hidden_states.dtype == dtype


def test_each_of_many_changes_is_noticed(model, tokenizer):
    texts = forest(LM(model, tokenizer))
    for idx in range(5):
        in_place(model)
        model.lm_head.weight.data[idx] *= 2
        assert_equals_plain(model, texts)


def test_a_hook_added_later_is_refused_like_one_that_was_there(model, tokenizer):
    """A steering vector, say: plain calls have changed."""
    text = Text("The cat", LM(model, tokenizer))
    before = text.logits
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(UnsupportedModelError, match=r"forward hook on its module 'model.layers.0'"):
        text.logits  # noqa: B018
    handle.remove()
    assert_close(text.logits, before)


def data_of_one_element(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 100


def setting_of_a_module(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2


@pytest.mark.parametrize("ask_before", [True, False])
@pytest.mark.parametrize("change", [data_of_one_element, setting_of_a_module])
def test_refresh_notices_what_a_quick_look_cannot_see(change, ask_before, model, tokenizer):
    lm = LM(model, tokenizer)
    texts = forest(lm)
    evaluate(texts)
    before = lm.fingerprint if ask_before else None
    change(model)
    lm.refresh()
    assert_equals_plain(model, texts)
    assert lm.fingerprint != before


def test_refresh_drops_nothing_where_nothing_has_changed(model, tokenizer):
    lm = LM(model, tokenizer)
    texts = forest(lm)
    representations = evaluate(texts)
    fingerprint, before = lm.fingerprint, lm.stats
    lm.refresh()
    assert lm.fingerprint == fingerprint
    read(texts)
    assert representations[0].logits.isfinite().all()
    assert (lm.stats - before).tokens_computed == 0


def test_refresh_drops_everything_where_it_has_nothing_to_compare_with(model, tokenizer):
    lm = LM(model, tokenizer)
    representation = evaluate(Text("The cat", lm))
    lm.refresh()
    assert lm.stats.bytes_held == 0
    with pytest.raises(StaleRepresentationError):
        representation.logits  # noqa: B018


def dynamic_rope():
    """A model that, like phi3_longrope, rewrites its frequencies in place when a call is long or short again."""
    config = FAMILIES["llama"]().config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config.max_position_embeddings = 32
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "dynamic_rope"])
def test_calls_of_the_users_own_do_not_drop_the_cache(family, tokenizer):
    model = dynamic_rope() if family == "dynamic_rope" else FAMILIES[family]()
    lm = LM(model, tokenizer)
    texts = forest(lm)
    representations = evaluate(texts)
    expected, before, fingerprint = read(texts), lm.stats, lm.fingerprint
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    model.requires_grad_(False).eval()
    plain_logits(model, [idx % 300 for idx in range(100)])

    assert_all_close(read(texts), expected, atol=0)
    assert_all_close([(representations[0].logits, expected[0][1], expected[0][2])], expected[:1], atol=0)
    assert LM(model, tokenizer).fingerprint == fingerprint
    longer = texts[0] + " sat"
    logits = longer.logits
    assert_close(logits, plain_logits(model, longer.tokens)[-1])
    assert (lm.stats - before).tokens_computed == len(longer.tokens) - len(texts[0].tokens)


def test_a_changed_tokenizer_is_noticed(model, tokenizer):
    lm = LM(model, tokenizer)
    text = Text("The cat", lm) + " sat"
    old, fingerprint = evaluate(text), lm.fingerprint
    tokenizer.add_tokens(["cat sa"])
    assert len(tokenizer) > 320
    tokenizer.add_tokens(["he c"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert text.tokens == tuple(plain_ids(tokenizer, "The cat sat"))
    assert len(text.tokens) != old.num_tokens
    assert_equals_plain(model, [text])
    assert lm.fingerprint != fingerprint
    with pytest.raises(StaleRepresentationError, match="tokenizer"):
        old.logits  # noqa: B018


# Fingerprints


def fingerprint_of(family="llama", change=None, tokenizer_of=byte_level_bpe):
    model = FAMILIES[family]()
    if change is not None:
        change(model)
    return LM(model, tokenizer_of()).fingerprint


def without_its_last_merge():
    tokenizer = byte_level_bpe()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].pop()
    backend = tokenizer.backend_tokenizer
    backend.model = type(backend).from_str(json.dumps(state)).model
    return tokenizer


def test_a_fingerprint_changes_with_what_decides_about_numbers():
    changes = [None, in_place, data_of_one_element, buffer_changed, head_tied, lambda m: m.double(), set_epsilon]
    changes += [lambda m: m.bfloat16(), lambda m: m.load_state_dict(FAMILIES["llama"](seed=1).state_dict())]
    fingerprints = [fingerprint_of(change=change) for change in changes]
    fingerprints += [
        fingerprint_of("gpt2"),
        fingerprint_of("mistral"),
        fingerprint_of(tokenizer_of=without_its_last_merge),
    ]
    fingerprints += [fingerprint_of(tokenizer_of=llama3_bpe)]
    assert len(set(fingerprints)) == len(fingerprints)


def set_epsilon(model):
    model.config.rms_norm_eps = 0.1


def test_a_fingerprint_is_content(model, tokenizer):
    """Another object, another mode, compiled or called before: the same."""
    fingerprint = LM(model, tokenizer).fingerprint
    assert LM(copy.deepcopy(model).train(), copy.deepcopy(tokenizer)).fingerprint == fingerprint
    assert LM(model.requires_grad_(False), tokenizer, joins="split").fingerprint == fingerprint
    assert LM(torch.compile(model), byte_level_bpe()).fingerprint == fingerprint
    plain_logits(model, [1, 2, 3])
    assert LM(model, tokenizer).fingerprint == fingerprint


def test_saving_a_model_does_not_change_its_fingerprint_and_what_is_loaded_has_it(model, tokenizer, tmp_path):
    lm = LM(model, tokenizer)
    fingerprint = lm.fingerprint
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    lm.refresh()
    assert lm.fingerprint == fingerprint
    assert load(tmp_path, device="cpu").fingerprint == fingerprint


class Oddities(nn.Module):
    """A part with tensors of all kinds."""

    def __init__(self, flip):
        super().__init__()
        matrix = torch.arange(24.0).reshape(4, 6)
        self.weight = nn.Parameter(matrix if not flip else matrix.t().contiguous().t())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("number", torch.tensor(2))
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.register_buffer(
            "every_other", torch.arange(20, dtype=torch.int16)[::2] if flip else torch.arange(0, 20, 2).short()
        )


def test_a_content_hash_depends_on_neither_threads_nor_strides(model):
    hashes, num_threads = [], torch.get_num_threads()
    try:
        for flip in (False, True):
            model.odd = Oddities(flip)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                hashes.append(content_hash(model))
    finally:
        torch.set_num_threads(num_threads)
    assert len(set(hashes)) == 1
    for tensor in model.odd.state_dict().values():
        if tensor.numel():
            tensor.copy_(~tensor if tensor.dtype == torch.bool else tensor + 1)
            hashes.append(content_hash(model))
    assert len(set(hashes)) == 5


def test_a_content_hash_covers_every_piece_in_its_place(model, monkeypatch):
    """Of one row each, here: each row's last element, and two rows that change places."""
    monkeypatch.setattr(weights, "PIECE_BYTES", 1)
    hashes = [content_hash(model)]
    matrix = model.lm_head.weight.data
    for row in range(0, len(matrix), 40):
        matrix[row, -1] += 1
        hashes.append(content_hash(model))
    matrix[:2] = matrix[:2].flip(0)
    hashes.append(content_hash(model))
    assert len(set(hashes)) == len(hashes)


def test_a_sample_hash_covers_all_of_a_buffer_and_some_of_a_weight(model):
    model.register_buffer("table", torch.ones(100))
    hashes = [sample_hash(model)]
    for idx in range(3):
        model.table[idx] += 1e-6
        hashes.append(sample_hash(model))
    for change in (set_epsilon, setting_of_a_module, through_data, lambda m: m.double()):
        change(model)
        hashes.append(sample_hash(model))
    assert len(set(hashes)) == len(hashes)
    data_of_one_element(model)  # a change that the sample cannot see
    assert sample_hash(model) == hashes[-1]


FINGERPRINTS = """
import json
from backprompt import LM, Text
from tiny_models import FAMILIES
from tiny_tokenizers import byte_level_bpe
lms = {family: LM(FAMILIES[family](), byte_level_bpe()) for family in ("gpt2", "gemma2", "phi3_longrope")}
print(json.dumps({family: [lm.fingerprint, Text("The cat", lm).model_repr.key] for family, lm in lms.items()}))
"""


def test_fingerprints_and_keys_are_the_same_in_another_process():
    """Whose hashes of strings, and so the orders of its sets, are others."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "PYTHONHASHSEED": "1234"}
    command = [sys.executable, "-c", FINGERPRINTS]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    expected = json.loads(printed.splitlines()[-1])
    assert len(expected) == 3
    for family, (fingerprint, key) in expected.items():
        lm = LM(FAMILIES[family](), byte_level_bpe())
        assert lm.fingerprint == fingerprint
        assert evaluate(Text("The cat", lm)).key == key


# Adapters, whose layers change what the model computes without a weight of it changing


def with_two_adapters(model):
    """LoRA adapters "first", which is active, and "second", with random weights, so that they matter."""
    for seed, name in enumerate(("first", "second")):
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if name == "first":
                adapted = peft.get_peft_model(model, config, adapter_name=name)
            else:
                adapted.add_adapter(name, config)
    return adapted.eval()


def test_adapters_are_never_mixed(model, tokenizer):
    """Switching, stacking, scaling, merging: the plain call each time, and a fingerprint of its own."""
    adapted = with_two_adapters(model)
    lm = LM(adapted, tokenizer)
    texts = forest(lm)
    fingerprints = []
    for change in (
        lambda: adapted.set_adapter("first"),
        lambda: adapted.set_adapter("second"),
        lambda: adapted.base_model.set_adapter(["first", "second"]),
        lambda: [layer.scale_layer(0.5) for layer in adapted.modules() if hasattr(layer, "scale_layer")],
        lambda: adapted.set_adapter("first"),  # still scaled
        adapted.merge_adapter,
        adapted.unmerge_adapter,  # which does not give back every last bit
    ):
        change()
        assert_equals_plain(adapted, texts)
        fingerprints.append(lm.fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_an_adapter_that_comes_back_has_its_fingerprint_back(model, tokenizer):
    adapted = with_two_adapters(model)
    lm = LM(adapted, tokenizer)
    first = lm.fingerprint
    adapted.set_adapter("second")
    second = lm.fingerprint
    adapted.set_adapter("first")
    assert lm.fingerprint == first != second


def test_an_adapter_that_is_switched_off_for_a_while_is_noticed(model, tokenizer):
    adapted = with_two_adapters(model)
    texts = forest(LM(adapted, tokenizer))
    old = evaluate(texts[0])
    with adapted.disable_adapter():
        assert_all_close(read(texts), plain(FAMILIES["llama"](), texts))
        with pytest.raises(StaleRepresentationError, match="Evaluate the text again"):
            old.logits  # noqa: B018
    assert_equals_plain(adapted, texts)


def test_an_adapter_added_to_the_wrapped_model_is_noticed(model, tokenizer):
    """In two ways: peft changes the layers of the model it is given, and transformers can do so, too."""
    texts = forest(LM(model, tokenizer))
    before = read(texts)
    with_two_adapters(model)
    assert_equals_plain(model, texts)
    assert (texts[0].logits - before[0][0]).abs().max() > 1e-2

    other = FAMILIES["llama"]()
    texts = forest(LM(other, tokenizer))
    evaluate(texts)
    other.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    assert_equals_plain(other, texts)
    other.disable_adapters()
    assert_all_close(read(texts), before)
