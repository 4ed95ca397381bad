"""Quantized models: the numbers of their own plain call, a changed scale is a changed weight, and refusals by name."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import backprompt
from backprompt import LM, ModelLoadError, Text, UnsupportedModelError, verify
from backprompt.model import int8, skeleton
from backprompt.model.checkpoint import CACHE_HOME_VARIABLE
from backprompt.model.quantized import compared_as, numbers_of, special_weights, weight_bytes
from backprompt.model.weights import WeightsMonitor, content_hash
from backprompt.store import MemoryStore
from comparing import assert_close
from devices import known_to_torch
from reference import plain_logits
from tiny_cached_models import build as build_cached
from tiny_models import FAMILIES

SHOTS = "The quick brown fox jumps over the lazy dog. "
ENDS = ("Again?", "And then it sleeps.", "No.")


def torchao():
    return pytest.importorskip("torchao.quantization", reason="needs torchao")


def texts_of(lm):
    return [Text(SHOTS, lm) + end for end in ENDS]


def llama():
    """Wide enough for groups of 32 and for bitsandbytes, which wants multiples of 32 outputs and 64 inputs."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    return model


def by_torchao(name, **options):
    def quantize(model):
        ao = torchao()
        ao.quantize_(model, getattr(ao, name)(**options))
        return model

    return quantize


def by_bitsandbytes(kind):
    def quantize(model):
        bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        for parent in list(model.model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    made = bnb.nn.Linear4bit(child.in_features, child.out_features, bias=False, quant_type=kind)
                    made.weight = bnb.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type=kind, module=made
                    )
                    setattr(parent, name, made.to("cpu"))
        return model

    return quantize


EXACT = {
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao 4 bits": by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}
ROUNDED = {
    "torchao int8 inputs": by_torchao("Int8DynamicActivationInt8WeightConfig", set_inductor_config=False),
    "torchao int8 inputs, 4 bits": by_torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4),
    "bitsandbytes nf4": by_bitsandbytes("nf4"),
    "bitsandbytes fp4": by_bitsandbytes("fp4"),
}
WAYS = EXACT | ROUNDED


def quantized(way):
    return WAYS[way](llama())


@pytest.mark.parametrize("way", WAYS)
def test_a_quantized_model_gives_the_numbers_of_its_own_plain_call(way, tokenizer):
    model, full = quantized(way), llama()
    lm = LM(model, tokenizer)
    evaluated = lm.evaluate(texts_of(lm))
    for ids, ours in [(representation.input_ids, representation.all_logits()) for representation in evaluated]:
        theirs = plain_logits(model, ids)  # the first of these may put the weights into another order
        if way in EXACT:
            assert_close(ours, theirs)
        else:
            assert float((ours - theirs).abs().max()) < 0.15 * float(theirs.abs().max())
        assert float((theirs - plain_logits(full, ids)).abs().max()) > 1e-3  # it is quantized
    assert verify(texts_of(lm)).is_coarse == (way in ROUNDED)


@pytest.mark.parametrize("way", WAYS)
def test_the_plain_call_is_as_it_was_after_an_evaluation(way, tokenizer):
    """The 4-bit layers of bitsandbytes put their weights into another order in the first call: in private copies."""
    model = quantized(way)
    watch = WeightsMonitor(model)
    hashed = content_hash(model)
    lm = LM(model, tokenizer)
    lm.evaluate(texts_of(lm))
    assert not watch.has_changed()
    assert content_hash(model) == hashed


@pytest.mark.parametrize("way", WAYS)
def test_private_copies_share_quantized_weights(way):
    model = quantized(way)
    if not way.startswith("torchao"):
        plain_logits(model, [1, 2, 3])  # now the weights have their order
    shared = {number.data_ptr() for weight in special_weights(model) for number in numbers_of(weight)}
    assert shared
    body = skeleton.make_body(model, "eager")
    assert {number.data_ptr() for weight in special_weights(body) for number in numbers_of(weight)} <= shared


def test_weights_that_cannot_be_shared_yet_are_counted(tokenizer):
    model = quantized("bitsandbytes nf4")
    if not getattr(model.model.layers[0].mlp.up_proj, "support_avx512bf16_for_cpu", False):
        pytest.skip("this processor reads 4-bit weights in the order in which they are stored")
    before = LM(model, tokenizer).stats.packed_weight_bytes
    plain_logits(model, [1, 2, 3])
    assert before > 0
    assert LM(model, tokenizer).stats.packed_weight_bytes == 0


def changed_scale(weight):
    state = getattr(weight, "quant_state", None)
    return weight.scale if state is None else state.absmax


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["integers", "scales"])
def test_a_changed_quantized_weight_is_noticed(way, what, tokenizer):
    model = quantized(way)
    if not way.startswith("torchao"):
        plain_logits(model, [1, 2, 3])
    lm = LM(model, tokenizer)
    before = lm.evaluate(texts_of(lm))[0].all_logits().clone()
    key = lm.fingerprint
    weight = model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        if what == "scales":
            changed_scale(weight).mul_(2)
        elif way.startswith("torchao"):
            weight.qdata.zero_()
        else:
            weight.data.zero_()
    after = lm.evaluate(texts_of(lm))[0].all_logits()
    assert float((after - before).abs().max()) > 1e-2
    assert lm.fingerprint != key
    expected = plain_logits(model, texts_of(lm)[0].tokens)
    assert float((after - expected).abs().max()) < 0.15 * float(expected.abs().max())


def test_a_replaced_scale_is_noticed(tokenizer):
    """The parameter stays the same object, and so do its integers."""
    model = quantized("torchao int8")
    monitor = WeightsMonitor(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    assert not monitor.has_changed()
    weight.scale = weight.scale.clone()
    assert monitor.has_changed()


def test_every_way_has_a_key_of_its_own(tokenizer):
    torchao()
    ways = [way for way in WAYS if way.startswith("torchao")]
    hashes = {content_hash(llama()), *(content_hash(quantized(way)) for way in ways)}
    assert len(hashes) == len(ways) + 1
    assert content_hash(quantized(ways[0])) == content_hash(quantized(ways[0]))


def test_the_same_integers_with_other_settings_have_another_key():
    """Layers with and without quantized inputs may hold the same numbers."""
    weights_alone, with_inputs = quantized("torchao int8"), quantized("torchao int8 inputs")
    for one, other in zip(special_weights(weights_alone), special_weights(with_inputs), strict=True):
        assert torch.equal(one.qdata, other.qdata)
        assert torch.equal(one.scale, other.scale)
    assert content_hash(weights_alone) != content_hash(with_inputs)


def test_a_store_keeps_quantized_and_full_weights_apart(tokenizer):
    store = MemoryStore()
    full = LM(llama(), tokenizer, store=store)
    for text in texts_of(full):
        full.evaluate([text])
        full.save(text)
    lm = LM(quantized("torchao int8"), tokenizer, store=store)
    lm.evaluate(texts_of(lm))
    assert lm.stats.tokens_loaded == 0
    again = LM(llama(), tokenizer, store=store)
    again.evaluate(texts_of(again))
    assert again.stats.tokens_loaded > 0


def test_weight_bytes_are_those_of_integers_and_scales(tokenizer):
    model = quantized("torchao int8")
    full = LM(llama(), tokenizer).stats.weight_bytes
    held = 4 * 320 * 128 + 4 * 5 * 128 + 320 * 128 + 4 * 320  # the embedding, norms, and the head in int8
    held += 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)  # integers of two layers
    held += 2 * 4 * (2 * 128 + 2 * 64 + 2 * 256 + 128)  # a scale each output
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    zeros = sum(weight.zero_point.nbytes for weight in special_weights(model) if weight.zero_point is not None)
    assert LM(model, tokenizer).stats.weight_bytes == weight_bytes(model) == held + zeros + buffers
    assert full == 4 * sum(parameter.numel() for parameter in llama().parameters()) + buffers


# Refusals


def test_dynamic_quantization_of_torch_is_refused_by_name(tokenizer):
    """Its scale is that of the whole call: a token behind a text changes the text's numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will drop these functions
        model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        gap = float((model(ids).logits[:, :10] - model(ids[:, :10]).logits).abs().max())
    assert gap > 1e-2  # it is no causal model
    with pytest.raises(UnsupportedModelError, match=r"quantize_dynamic. It scales its inputs by .* weights=\"int8\""):
        LM(model, tokenizer)


def test_inputs_with_one_scale_a_call_are_refused_by_name(tokenizer):
    ao = torchao()
    model = llama()
    options = {"granularity": ao.PerTensor(), "set_inductor_config": False}
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig(**options))
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*PerTensor.*granularity=PerRow"):
        LM(model, tokenizer)


@known_to_torch
def test_a_model_that_cannot_compute_with_its_quantized_weights_is_refused_with_this_reason(tokenizer):
    """The layers of Mamba multiply by a weight themselves, which torchao's tensors do not take."""
    torchao()
    model = build_cached("mamba")
    int8.quantize(model, "int8")
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM cannot be called with its quantized weights: "):
        Text("The cat", LM(model, tokenizer)).logits  # noqa: B018


def test_quantized_weights_without_numbers_are_refused(tokenizer):
    torchao()
    model = quantized("torchao int8")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"up_proj.*cannot be offloaded"):
        LM(model, tokenizer)


class HQQLinear(nn.Linear):
    """Takes the place of hqq's layer, whose scales lie in a dict."""


def test_scales_that_nobody_can_watch_are_refused(tokenizer):
    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = HQQLinear
    with pytest.raises(UnsupportedModelError, match=r"HQQLinear at 'model.layers.0.mlp.up_proj'.*not parameters"):
        LM(model, tokenizer)


class Unpacking(nn.Module):
    """A layer as those of GPTQ and AWQ: integers and scales are buffers, and there is no `weight`."""

    def __init__(self, like):
        super().__init__()
        scale = like.weight.detach().abs().amax(dim=1, keepdim=True) / 7
        self.register_buffer("qweight", (like.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, rows):
        return rows @ (self.qweight * self.scales).T


def test_layers_whose_weights_are_buffers_work(tokenizer):
    """Small buffers are copied and large ones shared; the head has no weight."""
    model = llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Unpacking(child))
    lm = LM(model, tokenizer)
    for representation in lm.evaluate(texts_of(lm)):
        assert_close(representation.all_logits(), plain_logits(model, representation.input_ids))
    key = lm.fingerprint
    model.model.layers[0].mlp.up_proj.scales.mul_(2)
    assert lm.fingerprint != key


def gguf_layer(gguf, like):
    """A layer of transformers whose weight stays as blocks of a GGUF file: 32 int8 behind a scale in float16."""
    blocks = like.weight.detach().reshape(like.out_features, -1, 32)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 127).half()
    integers = (blocks / scale.float()).round().clamp(-127, 127).to(torch.int8)
    made = gguf.GgufLinear(like.in_features, like.out_features, ggml_type=8)
    packed = torch.cat([scale.view(torch.uint8), integers.view(torch.uint8)], dim=-1)
    made.weight = nn.Parameter(packed.flatten(1), requires_grad=False)
    return made


def test_layers_of_gguf_blocks_work(tokenizer, monkeypatch):
    """Their weights are bytes of another shape, that of the head included; the kernel for few rows is written out."""
    gguf = pytest.importorskip("transformers.integrations.gguf.utils")

    def few_rows(weight, rows, ggml_type, num_outputs):
        return rows @ gguf.dequantize_blocks(weight, ggml_type, num_outputs, rows.shape[1], rows.dtype).T

    monkeypatch.setattr(gguf, "mul_mat_vec", few_rows)
    monkeypatch.setattr("transformers.integrations.gguf.kernels._gguf_kernel", False)
    model = llama()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, gguf_layer(gguf, child))
    lm = LM(model, tokenizer)
    for representation in lm.evaluate(texts_of(lm)):
        assert_close(representation.all_logits(), plain_logits(model, representation.input_ids))
    assert verify(texts_of(lm)).passed
    key = lm.fingerprint
    model.lm_head.weight[0, 2] += 1
    assert lm.fingerprint != key


# From transformers


def from_transformers(kind):
    if kind == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return TorchAoConfig(torchao().Int8WeightOnlyConfig(set_inductor_config=False))


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_models_that_transformers_quantizes_on_loading_work(kind, tmp_path, monkeypatch, tokenizer):
    """By `load`, too, for a folder that was saved quantized: the files of such a model decide no hash."""
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(tmp_path / "cache"))
    llama().save_pretrained(tmp_path / "full")
    config = from_transformers(kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config, device_map="cpu")
    assert special_weights(model)
    lm = LM(model, tokenizer)
    found = verify(texts_of(lm))
    assert found.passed, str(found)
    assert found.is_coarse == (kind == "bitsandbytes")
    model.save_pretrained(tmp_path / "quantized")
    tokenizer.save_pretrained(tmp_path / "quantized")
    loaded = backprompt.load(tmp_path / "quantized", device="cpu")
    assert special_weights(loaded.model)
    assert loaded.session.fingerprint.checkpoint is None
    assert verify(texts_of(loaded)).passed
    torchao()
    with pytest.raises(UnsupportedModelError, match=r"quantized already\. Leave weights='int8'"):
        backprompt.load(tmp_path / "quantized", device="cpu", weights="int8")


# load(weights=...)


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv(CACHE_HOME_VARIABLE, str(tmp_path / "cache"))
    FAMILIES[request.param]().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("way", int8.WAYS)
def test_load_quantizes_all_layers_but_the_head(folder, way):
    torchao()
    lm, full = backprompt.load(folder, weights=way, device="cpu"), backprompt.load(folder, device="cpu")
    kinds = [type(module.weight).__name__ for module in lm.model.modules() if isinstance(module, nn.Linear)]
    assert kinds.count("Int8Tensor") == len(kinds) - 1
    assert type(lm.model.get_output_embeddings().weight) is nn.Parameter
    found = verify(texts_of(lm), against=full)
    assert found.passed, str(found)
    assert 0 < found.cost.mean_gap < found.cost.largest_gap
    assert lm.stats.weight_bytes < full.stats.weight_bytes
    assert lm.fingerprint != full.fingerprint
    assert backprompt.load(folder, weights=way, device="cpu").fingerprint == lm.fingerprint


def test_the_remembered_hash_of_full_weights_is_not_that_of_fewer_bits(folder, monkeypatch):
    torchao()
    monkeypatch.setattr("backprompt.model.checkpoint.RACY_SECONDS", -1e9)
    full = backprompt.load(folder, device="cpu").fingerprint
    ways = {way: backprompt.load(folder, weights=way, device="cpu").fingerprint for way in int8.WAYS}
    assert len({full, *ways.values()}) == 3
    monkeypatch.setattr("backprompt.session.fingerprint.content_hash", lambda model: pytest.fail("hashed again"))
    assert backprompt.load(folder, device="cpu").fingerprint == full
    assert {way: backprompt.load(folder, weights=way, device="cpu").fingerprint for way in ways} == ways


@pytest.mark.parametrize("way", int8.WAYS)
def test_our_products_are_those_of_torchao(way, monkeypatch):
    """Bit by bit the same integers; sums differ by the rounding of float32. One row is as large as numbers get."""
    torchao()
    if way == "int8-dynamic" and not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        pytest.skip("the processor may add products in 16 bits")
    monkeypatch.setattr(int8, "failure_of_int8", lambda: None)
    monkeypatch.setattr(int8, "failure_of", lambda dtype: None)
    monkeypatch.setattr(int8, "is_faster", lambda: True)
    model = llama()
    int8.quantize(model, way)
    rows = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(0))
    rows[0, 0] *= 1e30
    rows[0, 1] = 0.0
    rows[0, 2] *= 1e-6  # below the least scale
    rows[1] = (rows[1] * 40).round() / 127.5  # ties
    rows[1, :, 0] = 1.0
    for bias in (None, nn.Parameter(torch.randn(128), requires_grad=False)):
        layer = model.model.layers[0].mlp.down_proj
        layer.bias = bias
        holder = nn.Sequential(copy.copy(layer))
        linears = int8.speed_up_int8([holder], int8.Linears("onednn"))
        assert type(holder[0]) is not nn.Linear
        assert linears.name == "onednn, int8"
        assert linears.packed_bytes == (128 * 256 if way == "int8-dynamic" else 0)
        expected = layer(rows)
        scale = expected.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        assert float(((holder[0](rows) - expected) / scale).abs().max()) < 2e-6


def test_wrong_kernels_are_not_used(monkeypatch):
    monkeypatch.setattr(int8, "dynamic_product", lambda rows, packed: rows @ torch.ones(256, 40))
    int8.failure_of_int8.cache_clear()
    try:
        assert "off by" in int8.failure_of_int8()
    finally:
        int8.failure_of_int8.cache_clear()


def test_load_refuses_before_it_loads(folder, monkeypatch):
    with pytest.raises(ValueError, match=r'"int8", "int8-dynamic" or None, not \'int3\''):
        backprompt.load(folder, weights="int3")
    monkeypatch.setattr("backprompt.loading.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        backprompt.load("no such model", weights="int8")
    with pytest.raises(ModelLoadError):
        backprompt.load("no such model")


def test_what_is_quantized_is_not_quantized_again():
    torchao()
    model = llama()
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match=r"quantized already\. Leave weights='int8'"):
        int8.quantize(model, "int8")
    model = llama()
    model.model.layers = nn.ModuleList()
    with pytest.raises(UnsupportedModelError, match="no linear layers besides its head"):
        int8.quantize(model, "int8")


# verify(against=...)


def test_the_cost_is_that_of_a_comparison_written_out(tokenizer):
    """Against the same model with another layer, which needs no torchao."""
    full, model = llama(), llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(4)
    lm, full_lm = LM(model, tokenizer), LM(full, tokenizer, pack_weights=False)
    texts = texts_of(lm)
    cost = verify(texts, against=full_lm).cost
    gaps, flips = [], 0
    for text in texts:
        ours, theirs = plain_logits(model, text.tokens).double(), plain_logits(full, text.tokens).double()
        gaps.append((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs())
        flips += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
    together = torch.cat(gaps)
    assert cost.largest_gap == pytest.approx(float(together.max()), rel=1e-3)
    assert cost.mean_gap == pytest.approx(float(together.mean()), rel=1e-3)
    assert cost.num_tokens == len(together)
    assert cost.argmax_flips == flips > 0
    assert (cost.weight_bytes, cost.full_weight_bytes) == (weight_bytes(model), weight_bytes(full))
    assert min(cost.seconds, cost.full_seconds) > 0
    assert "Against the full weights: 100% of the bytes" in str(verify(texts, against=full_lm))
    assert verify(texts).cost is None
    assert dataclasses.asdict(cost).keys() == verify(texts, against=full_lm).to_dict()["cost"].keys()


def test_only_a_model_of_the_same_vocabulary_is_compared(tokenizer):
    lm = LM(llama(), tokenizer)
    with pytest.raises(TypeError, match="against must be an LM"):
        verify(texts_of(lm), against=llama())
    with pytest.raises(ValueError, match="same tokenizer and vocabulary"):
        verify(texts_of(lm), against=LM(FAMILIES["llama"](vocab_size=330), tokenizer))


def test_models_that_round_are_compared_as_bfloat16():
    torchao()
    assert compared_as(llama(), torch.float32) == torch.float32
    assert compared_as(quantized("torchao int8"), torch.float32) == torch.float32
    assert compared_as(quantized("torchao int8 inputs"), torch.float32) == torch.bfloat16
    assert compared_as(quantized("torchao int8 inputs"), torch.float16) == torch.float16
