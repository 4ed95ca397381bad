"""Private copies whose modules are read and called in less time compute the same, with the same operations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.pytorch_utils import Conv1D

from backprompt import LM, Text
from backprompt.model.lean import make_lean
from backprompt.model.skeleton import plain_copy
from tiny_models import FAMILIES, OTHERS, build
from tiny_tokenizers import byte_level_bpe

IDS = torch.tensor([[5, 3, 9, 9, 1, 7]])


def lean_copy(model):
    private = plain_copy(model)
    make_lean(private)
    return private


@pytest.fixture
def looks(monkeypatch):
    """The names that torch looks up in the tables of modules, and the calls in which torch looks for hooks."""
    names = []
    look_up, call = nn.Module.__getattr__, nn.Module._call_impl
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: (names.append(name), look_up(self, name))[1])
    monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *a, **k: (names.append("call"), call(self, *a, **k))[1])
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FAMILIES | OTHERS))
def test_every_bit_is_the_same(name, dtype):
    if name == "t5":
        pytest.skip("an encoder-decoder is refused")
    private = plain_copy(build(name).to(dtype))
    with torch.inference_mode():
        expected = private(input_ids=IDS).logits
        make_lean(private)
        assert torch.equal(private(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_oss"])
def test_no_call_looks_for_hooks_or_for_children_and_weights(name, looks):
    model = build(name)
    private = lean_copy(model)
    parts = {"call"} | {name for module in private.modules() for name in (*module._modules, *module._parameters)}
    looks.clear()
    private(input_ids=IDS)
    assert parts.isdisjoint(looks[1:])  # the first is the call of the copy itself
    plain_copy(model)(input_ids=IDS)
    assert len(parts & set(looks)) > 9


def test_the_users_model_keeps_its_classes_and_tables():
    model = build("gpt2")
    kinds, tables = list(map(type, model.modules())), [list(vars(module)) for module in model.modules()]
    Text("The cat", LM(model, byte_level_bpe())).logits  # noqa: B018
    assert list(map(type, model.modules())) == kinds
    assert [list(vars(module)) for module in model.modules()] == tables


def test_a_module_that_is_replaced_later_is_used():
    private = lean_copy(build("gpt2"))
    expected = private(input_ids=IDS).logits
    private.transformer.h[1].mlp = nn.Identity()
    assert not torch.equal(private(input_ids=IDS).logits, expected)


def test_a_forward_that_a_class_gets_later_is_used(monkeypatch):
    private = lean_copy(build("gpt2"))
    expected = private(input_ids=IDS).logits
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, rows: rows)
    assert not torch.equal(private(input_ids=IDS).logits, expected)


def test_hooks_and_methods_of_a_module_are_kept():
    model = build("gpt2")
    called = []
    model.transformer.h[0].ln_1.register_forward_hook(lambda *given: called.append("hook"))
    other = copy.deepcopy(model.transformer.h[0].ln_2)
    model.transformer.h[0].ln_2.forward = lambda rows: (called.append("forward"), other(rows))[1]
    lean_copy(model)(input_ids=IDS)
    assert called == ["hook", "forward"]


def test_layers_read_the_configuration_of_the_copy():
    private = lean_copy(build("gpt2"))
    of_layer, of_model = private.transformer.h[0].attn.config, private.transformer.config
    assert vars(of_model).items() <= vars(of_layer).items()
    for name in ("_attn_implementation", "hidden_size", "n_embd", "vocab_size", "is_heterogeneous"):
        assert getattr(of_layer, name) == getattr(of_model, name)
    assert of_layer.get_text_config() is of_model
    assert copy.deepcopy(of_layer).hidden_size == of_model.hidden_size
    with pytest.raises(AttributeError, match="no_such_name"):
        of_layer.no_such_name  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 70])
def test_linear_layers_of_gpt2_multiply_in_the_same_order(num_rows, dtype):
    private = nn.Sequential(Conv1D(768, 768).to(dtype))
    rows = torch.randn((1, 768, num_rows)).to(dtype).transpose(1, 2)
    given = [rows, rows.contiguous(), rows[0].contiguous()]
    with torch.inference_mode():
        expected = list(map(private, given))
        make_lean(private)
        assert all(map(torch.equal, map(private, given), expected))


def test_a_copy_with_other_code_stays_as_it_is():
    """Such code may do something when its class gets a subclass, or compare classes."""

    class Own(nn.Linear):
        def __init_subclass__(cls, *, reason):
            raise AssertionError(reason)

    private = nn.Sequential(Own(3, 2), nn.LayerNorm(2))
    make_lean(private)
    assert list(map(type, private)) == [Own, nn.LayerNorm]


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Dropout, Conv1D])
def test_a_forward_that_a_replaced_call_would_miss_is_used(kind, monkeypatch):
    private = lean_copy(build("gpt2").eval())
    expected = private(input_ids=IDS).logits
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *given, **named: 2 * forward(self, *given, **named))
    assert not torch.equal(private(input_ids=IDS).logits, expected)


def test_a_hook_for_all_modules_is_called():
    private, called = lean_copy(build("gpt2")), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *given: called.append(type(module).__name__))
    try:
        private(input_ids=IDS)
    finally:
        handle.remove()
    assert {"GPT2MLP", "LayerNorm", "Conv1D", "Dropout"} <= set(called)


def test_calls_take_the_names_of_arguments():
    private = nn.Sequential(nn.Dropout(0.5), nn.LayerNorm(4), Conv1D(2, 4)).eval()
    rows = torch.ones((1, 3, 4))
    expected = [private[0](input=rows), private[1](input=rows), private[2](x=rows)]
    make_lean(private)
    assert all(map(torch.equal, [private[0](input=rows), private[1](input=rows), private[2](x=rows)], expected))


def test_dropout_drops_in_training():
    private = nn.Sequential(nn.Dropout(0.5))
    make_lean(private)
    rows = torch.ones(1000)
    assert (private(rows) == 0).any()
    assert private.eval()(rows) is rows


class Computations(TorchDispatchMode):
    """Counts operations that compute: neither views nor tensors without numbers."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += not (func.is_view or func.overloadpacket.__name__.startswith("empty"))
        return func(*args, **(kwargs or {}))


def test_one_text_takes_no_more_operations_than_the_plain_call():
    """Copies and checks take a few for each layer, and fused activations spare more."""
    model = build("gpt2", n_layer=12)
    lm = LM(model, byte_level_bpe())
    texts = [Text(string, lm) for string in ("The probe.", "One text, and no other.")]
    lm.token_logprobs(texts[:1])
    with Computations() as ours:
        lm.token_logprobs(texts[1:])
    ids = torch.tensor([texts[1].tokens])
    with Computations() as plain, torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(dim=-1)
        logprobs.gather(1, ids[0, 1:, None])
    assert ours.num <= plain.num
