"""Models that accelerate has offloaded, or spread over devices, give the numbers of the model as it was.

Offloaded to host memory and to disk with the CPU as the device; and with a layer on the device of other_device.py.
"""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, LayerwiseCastingHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM

from backprompt import LM, NonFiniteError, Text, UnsupportedModelError, evaluate, generate, verify
from backprompt.attention.by_device import AttentionByDevice
from backprompt.memory.blocks import KeysValues
from backprompt.memory.location import Location
from backprompt.model import skeleton
from backprompt.model.pass_size import TOKENS
from backprompt.model.spread import offloaded
from backprompt.store import MemoryStore
from comparing import assert_close, assert_equals_plain, num_distinct
from devices import DEVICE, known_to_torch
from other_device import DEVICE as OTHER
from other_device import OtherDevice
from tiny_models import build

pytestmark = known_to_torch

FAMILIES = ["gpt2", "llama", "mistral_sliding", "gpt_oss", "phi3_longrope"]


def decoder_of(model):
    return skeleton.decoder_of(model)


def layers_of(model):
    decoder = decoder_of(model)
    return decoder.h if hasattr(decoder, "h") else decoder.layers


def device_map(model, last="disk"):
    """Everything on the device of the tests, but for the last layer."""
    prefix = model.base_model_prefix
    names = [f"{prefix}.{name}" for name, child in decoder_of(model).named_children() if child is not layers_of(model)]
    layers = next(name for name, child in decoder_of(model).named_children() if child is layers_of(model))
    on_layers = {f"{prefix}.{layers}.{idx}": str(DEVICE) for idx in range(len(layers_of(model)))}
    on_layers[f"{prefix}.{layers}.{len(on_layers) - 1}"] = last
    return {**dict.fromkeys([*names, "lm_head"], str(DEVICE)), **on_layers}


def loaded(model, folder):
    """As `from_pretrained` loads it."""
    model.save_pretrained(folder / "saved")
    options = {"device_map": device_map(model), "offload_folder": folder / "offload", "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder / "saved", **options)


WAYS = {
    "host memory": lambda model, folder: cpu_offload(model, DEVICE),
    "disk": lambda model, folder: disk_offload(model, folder, DEVICE),
    "the last layer on disk": lambda model, folder: dispatch_model(model, device_map(model), offload_dir=folder),
    "loaded": loaded,
}


def forest(lm):
    base = Text("The cat sat on the mat. ", lm)
    both = base + "It slept"
    return [both, both + " all day.", base + "The dog ran away, and the rat.", Text("Hello", lm)]


@pytest.mark.parametrize("max_tokens", [None, 16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_equals_the_model_as_it_was(family, way, max_tokens, tokenizer, tmp_path):
    plain, model = build(family), WAYS[way](build(family), tmp_path)
    assert offloaded(model)
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens)
    texts = forest(lm)
    evaluate(texts)
    assert_equals_plain(plain, texts)
    assert lm.stats.tokens_computed == num_distinct(texts)


@pytest.mark.parametrize("way", WAYS)
def test_generation_from_an_offloaded_model(way, tokenizer, tmp_path):
    plain = LM(build("llama"), tokenizer)
    lm = LM(WAYS[way](build("llama"), tmp_path), tokenizer)
    found, expected = (
        [text.string for text in generate(forest(each), max_new_tokens=6, show_progress_bar=False)]
        for each in (lm, plain)
    )
    assert found == expected
    assert verify(forest(lm)).passed


@pytest.mark.parametrize("way", ["host memory", "the last layer on disk"])
def test_the_users_model_stays_offloaded_and_copies_share_what_lies_in_host_memory(way, tokenizer, tmp_path):
    model = WAYS[way](build("llama"), tmp_path)
    before = [id(parameter) for parameter in model.parameters()]
    sources = {place_of(weight) for weight in offloaded(model)}
    lm = LM(model, tokenizer)
    evaluate(forest(lm))
    assert [id(parameter) for parameter in model.parameters()] == before
    assert any(parameter.is_meta for parameter in model.parameters())
    private = skeleton.plain_copy(model)
    assert {place_of(weight) for weight in offloaded(private)} == sources
    assert not {id(weight.like) for weight in offloaded(private)} & set(before)  # hooks of a copy write to its places
    assert "to" not in vars(private)  # which would move the user's model


def place_of(weight):
    source = weight.source()
    return source.data_ptr() if isinstance(source, torch.Tensor) else source


# Weights that change


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_call_of_the_user_is_no_change(way, tokenizer, tmp_path):
    """It puts other tensors in the places of offloaded weights."""
    model = WAYS[way](build("gpt2"), tmp_path)
    lm = LM(model, tokenizer)
    text = forest(lm)[0]
    evaluate(text)
    assert lm.fingerprint
    computed = lm.stats.tokens_computed
    with torch.no_grad():
        model(input_ids=torch.tensor([text.tokens], device=DEVICE))
    evaluate(text)
    lm.refresh()
    evaluate(text)
    assert lm.stats.tokens_computed == computed


def test_changed_weights_in_host_memory_are_noticed(tokenizer):
    model = cpu_offload(build("llama"), DEVICE)
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    before, fingerprint = text.logits, lm.fingerprint
    (source,) = [weight.source() for weight in offloaded(model) if weight.module is model.lm_head]
    with torch.no_grad():
        source.mul_(2)
    assert_close(text.logits, before * 2, atol=1e-4)
    assert lm.fingerprint != fingerprint


def test_another_tensor_in_host_memory_is_noticed(tokenizer):
    model = cpu_offload(build("llama"), DEVICE)
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    before = text.logits
    weights = model.lm_head._hf_hook.weights_map.dataset
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    assert_close(text.logits, before * 2, atol=1e-4)


def test_changed_files_are_noticed_and_hashed(tokenizer, tmp_path):
    model = disk_offload(build("llama"), tmp_path, DEVICE)
    lm = LM(model, tokenizer)
    text = Text("The cat sat", lm)
    before, fingerprint = text.logits, lm.fingerprint
    other = disk_offload(build("llama"), tmp_path / "other", DEVICE)
    with torch.no_grad():
        file = tmp_path / "lm_head.weight.dat"
        numbers = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32) * 2
    file.write_bytes(numbers.numpy().tobytes())
    assert_close(text.logits, before * 2, atol=1e-4)
    assert lm.fingerprint != fingerprint
    assert LM(other, tokenizer).fingerprint == fingerprint


def test_hooks_that_are_taken_away_are_noticed(tokenizer):
    model = cpu_offload(build("llama"), DEVICE)
    lm = LM(model, tokenizer)
    text = Text("The cat", lm)
    evaluate(text)
    remove_hook_from_submodules(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert_equals_plain(model, [text])


@pytest.mark.parametrize("way", WAYS)
def test_stored_rows_serve_the_model_wherever_its_weights_lie(way, tokenizer, tmp_path):
    store = MemoryStore()
    plain = LM(build("llama"), tokenizer, store=store)
    text = Text("The cat sat on the mat.", plain)
    text.save()
    lm = LM(WAYS[way](build("llama"), tmp_path), tokenizer, store=store)
    assert lm.fingerprint == plain.fingerprint
    found = Text("The cat sat on the mat.", lm)
    assert_close(found.logits, text.logits)
    assert lm.stats.tokens_loaded == len(text.tokens)
    assert lm.stats.tokens_computed == 0


def test_a_weight_that_is_not_finite_is_named_where_it_is_offloaded(tokenizer):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"Its weight 'model\.layers\.1\.mlp\.up_proj\.weight' has NaN"):
        evaluate(Text("The cat", LM(cpu_offload(model, DEVICE), tokenizer)))


# Refusals


def casting(model):
    add_hook_to_module(model.lm_head, LayerwiseCastingHook(torch.float16, torch.float32, non_blocking=False))
    return model


def with_other_maps(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(DEVICE, offload=True, weights_map=Numbers(model.lm_head)))
    return model


class Numbers(dict):
    """A map of weights that somebody else made."""

    def __init__(self, module):
        super().__init__({name: tensor.detach() for name, tensor in module.state_dict().items()})


class Elsewhere:
    """A map that is neither accelerate's nor a dict."""

    def __init__(self, module):
        self._weights = Numbers(module)

    def __getitem__(self, name):
        return self._weights[name]


def unknown_map(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(DEVICE, offload=True, weights_map=Elsewhere(model.lm_head)))
    return model


def at_once(model):
    return cpu_offload(model, DEVICE, preload_module_classes=[type(model).__name__])


@pytest.mark.parametrize(
    ("spread", "reason"),
    [
        (lambda model: cpu_offload_with_hook(model, DEVICE)[0], "hook CpuOffload .* on its module 'itself', which cha"),
        (casting, "hook LayerwiseCastingHook of accelerate on its module 'lm_head'"),
        (unknown_map, "lie in a Elsewhere, where a change would not be noticed"),
        (at_once, "brings the weights of all modules below at once"),
    ],
)
def test_hooks_that_are_not_served_are_refused_by_name(spread, reason, tokenizer):
    with pytest.raises(UnsupportedModelError, match=reason):
        LM(spread(build("llama")), tokenizer)


def test_a_dict_is_a_map_that_is_watched(tokenizer):
    plain, model = build("llama"), with_other_maps(build("llama"))
    texts = forest(LM(model, tokenizer))
    evaluate(texts)
    assert_equals_plain(plain, texts)


# Several devices


@pytest.fixture
def other(monkeypatch):
    if DEVICE.type != "cpu":
        pytest.skip("the emulated device stands beside the CPU")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 4 << 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    with OtherDevice() as device:
        yield device


def spread(model, device, moved):
    """The model with some modules on the other device, and the hooks of `dispatch_model`: none on the decoder."""
    for module in moved:
        device.moved(module)
    there = {part for module in moved for part in module.modules()}
    for module in model.modules():
        if module.state_dict() and module not in (decoder_of(model), layers_of(model)):
            hook = AlignDevicesHook(
                OTHER if module in there else "cpu", io_same_device=module is model, skip_keys="past_key_values"
            )
            add_hook_to_module(module, hook)
    return model


def first_layer(model):
    return [layers_of(model)[0]]


def head(model):
    return [model.lm_head]


def last_layer(model):
    return [layers_of(model)[-1]]


def all_but_the_embeddings(model):
    norm = getattr(decoder_of(model), "ln_f", None) or decoder_of(model).norm
    return [*layers_of(model), norm, model.lm_head]


PLACES = {
    "head": head,
    "first layer": first_layer,
    "last layer": last_layer,
    "all but the embeddings": all_but_the_embeddings,
}


@pytest.mark.parametrize("max_tokens", [None, 16])
@pytest.mark.parametrize("moved", PLACES)
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt_oss", "gemma2"])
def test_keys_stay_on_the_device_of_their_layer(family, moved, max_tokens, other, tokenizer):
    plain, model = build(family), build(family)
    is_at_the_head = moved in ("head", "all but the embeddings")
    if is_at_the_head:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # of its own, not the embeddings'
    model = spread(model, other, PLACES[moved](model))
    lm = LM(model, tokenizer, max_tokens_per_forward=max_tokens, memory_bytes="1 GB")
    texts = forest(lm)
    evaluate(texts)
    assert_equals_plain(plain, texts)
    assert lm.stats.tokens_computed == num_distinct(texts)
    layers = {"head": set(), "first layer": {0}, "last layer": {len(layers_of(model)) - 1}}
    assert_rows_lie_there(lm, layers.get(moved, set(range(len(layers_of(model))))))
    if max_tokens is None:
        assert lm.session.evaluator.max_tokens_per_forward == TOKENS["cpu"]
    states = {span.states.block.hidden.device.type for span in lm.session.evaluator.forest.held_spans()}
    assert states == {OTHER.type if is_at_the_head else "cpu"}


@pytest.mark.parametrize("moved", ["first layer", "last layer"])
def test_layers_on_both_devices_know_their_masks(moved, other, tokenizer):
    """Two masks, of which the first layer uses one and the second the other."""

    config = build("gemma2").config
    config.sliding_window = 4

    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    model = made()
    texts = forest(LM(spread(model, other, PLACES[moved](model)), tokenizer, memory_bytes="1 GB"))
    evaluate(texts)
    assert_equals_plain(made(), texts)


def assert_rows_lie_there(lm, layers):
    """The rows of these layers lie on the other device, and those of the others on the CPU."""
    spans = [span for span in lm.session.evaluator.forest.held_spans() if span.keys_values is not None]
    assert spans
    for span in spans:
        for name, tensor in span.keys_values.block.tensors.items():
            assert tensor.device.type == (OTHER.type if int(name.partition(".")[2]) in layers else "cpu"), name


def test_rows_are_copied_where_they_lie(other):
    tensor = torch.zeros(1, 3, 2)
    block = KeysValues.of([tensor, tensor.to(OTHER)], [tensor, tensor.to(OTHER)])
    on_cpu, there = torch.device("cpu"), {"keys.1": OTHER, "values.1": OTHER}
    for location, expected in [
        (None, ["cpu", "cpu", OTHER.type, OTHER.type]),
        (Location(on_cpu), ["cpu"] * 4),
        (Location(on_cpu, device_of=there), ["cpu", "cpu", OTHER.type, OTHER.type]),
    ]:
        copy = block.copied([slice(0, 2)], location)
        assert [held.device.type for held in copy.in_order()] == expected


def on_two_devices(other, tokenizer, **options):
    model = build("llama")
    return LM(spread(model, other, last_layer(model)), tokenizer, **options)


def test_generation_over_devices(other, tokenizer):
    plain, lm = LM(build("llama"), tokenizer), on_two_devices(other, tokenizer)
    options = {"max_new_tokens": 12, "show_progress_bar": False}
    found, expected = ([text.string for text in generate(forest(each), **options)] for each in (lm, plain))
    assert found == expected
    assert lm.session.evaluator.executor.steps is None
    assert_rows_lie_there(lm, {1})


@pytest.mark.parametrize("is_changed", [False, True])
def test_evicted_rows_come_back_to_their_layers(is_changed, other, tokenizer):
    """Also where weights have changed, and the model is not probed again."""
    first = Text("The cat sat on the mat.", on_two_devices(other, tokenizer))
    evaluate(first)
    token_bytes = first.lm.session.evaluator.executor.token_bytes
    budget = (len(first.tokens) + 2) * token_bytes
    lm = on_two_devices(other, tokenizer, max_tokens_per_forward=16, host_memory_bytes="1 GB", memory_bytes=budget)
    plain, text = build("llama"), Text(first.string, lm)
    if is_changed:
        evaluate(Text("Hello", lm))
        with torch.no_grad():
            for model in (lm.model, plain):
                model.lm_head.weight.mul_(1.5)
    evaluate([text, Text("It slept all day, and the dog ran.", lm)])
    assert lm.stats.host_bytes_held
    continued = text + "!"
    evaluate(continued)
    assert lm.stats.tokens_fetched >= len(text.tokens)
    assert lm.stats.tokens_recomputed == 0
    assert_rows_lie_there(lm, {1})
    assert_equals_plain(plain, [continued, text])


def test_stored_rows_come_to_the_device_of_their_layer(other, tokenizer):
    store = MemoryStore()
    Text("The cat sat on the mat.", LM(build("llama"), tokenizer, store=store)).save()
    lm = on_two_devices(other, tokenizer, store=store)
    text = Text("The cat sat on the mat. It", lm)
    evaluate(text)
    assert lm.stats.tokens_loaded
    assert_equals_plain(build("llama"), [text])


def test_several_devices_without_hooks_are_refused(other, tokenizer):
    model = build("llama")
    other.moved(layers_of(model)[-1])
    with pytest.raises(UnsupportedModelError, match=r"lies on several devices \(cpu, mps\), but no hook moves"):
        LM(model, tokenizer, memory_bytes="1 GB")


# On GPUs


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_in_host_memory_beside_a_gpu(family, tokenizer):
    plain, model = build(family), build(family).to("cpu")
    places = dict.fromkeys(device_map(model), "cuda:0")
    *_, last = [name for name in places if name.rpartition(".")[2].isdigit()]
    model = dispatch_model(model, {**places, last: "cpu"})
    lm = LM(model, tokenizer, max_tokens_per_forward=16)
    texts = forest(lm)
    evaluate(texts)
    assert_equals_plain(plain.to("cuda"), texts)
    assert {device.type for device in lm.session.evaluator.executor.device_of.values()} == {"cuda", "cpu"}
    assert {row.type for name, row in lm.session.evaluator.executor.device_of.items() if "keys" in name} == {"cuda"}


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_gpus(family, tokenizer):
    plain, model = build(family), build(family).to("cpu")
    places = device_map(model, "cuda:1")
    places = {name: place if place == "cuda:1" else "cuda:0" for name, place in places.items()}
    lm = LM(dispatch_model(model, places), tokenizer, max_tokens_per_forward=16)
    texts = forest(lm)
    evaluate(texts)
    assert_equals_plain(plain.to("cuda"), texts)
    last = len(layers_of(model)) - 1
    assert str(lm.session.evaluator.executor.device_of[f"keys.{last}"]) == "cuda:1"
    assert lm.stats.kernel == "triton on cuda:0, triton on cuda:1"


def test_the_files_of_a_model_are_named_by_their_paths(tmp_path):
    model = disk_offload(build("llama"), tmp_path, DEVICE)
    paths = {Path(weight.source().path).name for weight in offloaded(model)}
    assert "lm_head.weight.dat" in paths


class Noted:
    """An attention that notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def prepare(self, pass_, num_steps):
        self.asked.append((pass_, num_steps))
        return self

    def advance(self, rows=None):
        self.asked.append(rows)

    def attend(self, layer_idx, *tensors):
        self.asked.append(layer_idx)


def test_an_attention_that_is_prepared_late_is_at_the_same_step(monkeypatch):
    early, late = Noted(), Noted()
    attention = AttentionByDevice()
    monkeypatch.setattr(attention, "attention_on", lambda device: early if device.type == "cpu" else late)
    prepared = attention.prepare("a pass", 3)
    prepared.attend(0, torch.zeros(1), None, None, None)
    prepared.advance()
    prepared.advance([0, 2])
    prepared.attend(0, torch.zeros(1), None, None, None)
    prepared.attend(1, torch.zeros(1, device="meta"), None, None, None)
    assert early.asked == [("a pass", 3), 0, None, [0, 2], 0]
    assert late.asked == [("a pass", 3), None, [0, 2], 1]
