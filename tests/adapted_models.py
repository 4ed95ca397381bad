"""Tiny models with LoRAs of several kinds, and the plain call with adapters by token.

model = with_adapters("llama")            # a PeftModel with the LoRAs of NAMES, all of them inactive
model = with_adapters("llama", "mixin")   # transformers' own, `model.load_adapter`
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import peft
import torch
from torch import nn

from reference import adapters_by_row
from tiny_models import FAMILIES

TARGETS = {
    "gpt2": (["c_attn", "c_fc"], ["c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_h_to_4h"]),
}
LLAMA_LIKE = ["q_proj", "v_proj", "down_proj"], ["k_proj", "o_proj", "up_proj", "v_proj"]

NAMES = ("a", "b", "dora", "twin")
"""An ordinary LoRA; a rank-stabilised one of other layers; a DoRA; and another of the same content as "a"."""

CONTENT = {"a": "a", "b": "b", "dora": "dora", "twin": "a"}

UNMARKED = "unmarked"
"""In place of an adapter's name: the tokens have none of their own."""


def configs(family: str) -> dict[str, peft.LoraConfig]:
    first, second = TARGETS.get(family, LLAMA_LIKE)
    common = {"fan_in_fan_out": family == "gpt2", "task_type": "CAUSAL_LM", "lora_dropout": 0.5}
    return {
        "a": peft.LoraConfig(r=2, lora_alpha=3, target_modules=first, **common),
        "b": peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=second, bias="none", **common),
        "dora": peft.LoraConfig(r=3, use_dora=True, target_modules=first[:1] + second[:1], **common),
        "twin": peft.LoraConfig(r=2, lora_alpha=3, target_modules=first, **common),
    }


def with_adapters(family: str, kind: Literal["peft", "mixin"] = "peft") -> nn.Module:
    model: Any = FAMILIES[family]()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        warnings.simplefilter("ignore")  # short names of adapters
        if kind == "mixin":
            for name, config in configs(family).items():
                model.add_adapter(config, name)
        else:
            (first, config), *others = configs(family).items()
            model = peft.get_peft_model(model, config, first)
            for name, config in others:
                model.add_adapter(name, config)
    move(model)
    deactivate(model)
    return model.eval()


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Move adapters far from what they are made as, and "twin" to where "a" is."""
    for path, parameter in model.named_parameters():
        if "lora_" in path and ".twin" not in path:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
            parameter.add_(0.3 * drawn.to(parameter))
    parameters = dict(model.named_parameters())
    for path, parameter in parameters.items():
        if ".twin." in path:
            parameter.copy_(parameters[path.replace(".twin.", ".a.")])


def deactivate(model: Any) -> None:
    if isinstance(model, peft.PeftModel):
        model.base_model.disable_adapter_layers()
    else:
        model.disable_adapters()


def activate(model: Any, names: Sequence[str]) -> None:
    """Let these adapters be the active ones of the whole model; none: no adapter."""
    inner = model.base_model if isinstance(model, peft.PeftModel) else model
    if not names:
        deactivate(model)
    elif isinstance(model, peft.PeftModel):
        inner.enable_adapter_layers()
        inner.set_adapter(list(names))
    else:
        inner.enable_adapters()
        inner.set_adapter(list(names))


@contextmanager
def under(model: nn.Module, marks: Sequence[str | None]) -> Iterator[Any]:
    """The plain model whose next calls, of one text each, have each token under the adapter that its mark names."""
    names = [None if mark == UNMARKED else () if mark is None else (mark,) for mark in marks]
    with adapters_by_row(model, names):
        yield model.get_base_model() if isinstance(model, peft.PeftModel) else model


def content_of(mark: str | None, active: Sequence[str]) -> tuple[str, ...]:
    """What a token's adapters compute, by name of their content."""
    names = active if mark == UNMARKED else () if mark is None else (mark,)
    return tuple(sorted(CONTENT[name] for name in names))
