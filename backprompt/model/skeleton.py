"""Private copies of the user's model, which share its weights but not its modes (training, configuration).

`copy.deepcopy` with a memo that maps every parameter to itself takes milliseconds and shares all weights. The copy
is in eval mode, unless it is trained, and has a configuration of its own. So the user's model never sees the switched
attention implementation, not even during a plain call in another thread.

Three copies are made: `body` (the decoder, attention switched to ours), `head` (the causal model around a decoder
that returns its input, so that the model's own code scales or caps logits), and, for the probe, `plain_copy` (the
model with its own attention).
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.utils.generic import ModelOutput

from backprompt.errors import UnsupportedModelError
from backprompt.model import families, spread
from backprompt.model.peft_layers import is_active
from backprompt.model.quantized import check_quantized, copied_weights

SHARED_BUFFER_BYTES = 1 << 16
"""Buffers up to this size are copied: some models rewrite their frequency tables in place while they run."""


TRAINERS = ("accelerate.utils.", "backprompt.", "torch._dynamo.", "torch.amp.", "trl.")
"""The packages whose wrappers of a model's forward method compile it, change precision, or add calls of their own."""


def unwrap(model: nn.Module) -> nn.Module:
    """Return the causal language model inside `torch.compile` and peft wrappers.

    Raises:
        UnsupportedModelError: the adapter changes the input instead of the layers (prompt or prefix tuning).

    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            adapters: Any = model.peft_config
            for name, adapter in adapters.items():
                if getattr(adapter, "is_prompt_learning", False):
                    raise UnsupportedModelError(
                        f"The adapter {name!r} ({adapter.peft_type}) puts virtual tokens before the prompt, which "
                        "packed evaluation does not model. Use an adapter that changes layers, such as LoRA."
                    )
                if "XLORA" in str(adapter.peft_type):
                    raise UnsupportedModelError(
                        f"The adapter {name!r} is an X-LoRA, which scales its LoRAs by a first run over the call, "
                        "so its texts cannot share a pass. Use an ordinary LoRA."
                    )
                if getattr(adapter, "alora_invocation_tokens", None) and is_active(model, name):
                    raise UnsupportedModelError(
                        f"The adapter {name!r} is an activated LoRA, which looks for its invocation tokens in the "
                        "whole call, so its texts cannot share a pass. Use an ordinary LoRA, or deactivate it "
                        "(model.base_model.disable_adapter_layers()) and name it for segments: with_adapter(name)."
                    )
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the reason, if the model is refused; does not run the model."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(f"{name} is not a transformers model; backprompt runs causal LMs of transformers.")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; backprompt runs decoder-only causal LMs.")
    if model.get_output_embeddings() is None or decoder_of(model) is None:  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{name} has no language-model head. Load it with AutoModelForCausalLM, or name a causal LM checkpoint."
        )
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), Tensor):  # type: ignore[operator]
        raise UnsupportedModelError(
            f"{name} does not have a single table of token embeddings (models of sounds have one for each codebook), "
            "so it takes no texts. Use a causal LM."
        )
    kinds = {type(module).__name__ for module in model.modules()}
    if "ParamWrapper" in kinds:
        raise UnsupportedModelError(
            f"{name} has a LoRA on parameters (target_parameters), which peft merges into the weights again in each "
            "call, so the weights have no fixed state. Merge it (model.merge_and_unload()), or adapt modules."
        )
    check_quantized(model)
    spread.check_spread(model, _decoder(model))
    hooked = _first_hooked_module(model)
    if hooked is not None:
        raise UnsupportedModelError(
            f"{name} has a forward hook on its module {hooked!r}, which would see packed rows of many texts. Remove "
            "the hook (handle.remove()) before wrapping the model."
        )


def why_not_packed(model: nn.Module) -> str | None:
    """Return why a model that passes `check_supported` cannot be packed, if its parts show a reason; else None."""
    name = type(model).__name__
    kinds = families.mixing_layers(_decoder(model))
    if kinds:
        state = f"keep a state of all tokens before ({', '.join(kinds)}), and so mix tokens outside attention"
        return f"{name} has layers that {state}. Its texts cannot share a pass."
    if not _uses_attention_interface(model):
        return f"{name} does not go through transformers' attention interface, so its attention cannot be packed."
    return None


def decoder_of(model: nn.Module) -> PreTrainedModel | None:
    """Return the model without its head, or None if there is no such part.

    `get_decoder` looks for attributes by name. In ModernBERT's decoder it finds the head, in Llama 4 nothing, and in
    Llama 4 with images the causal LM of texts.
    """
    candidates = (model.get_decoder(), model.base_model, getattr(model, "model", None))  # type: ignore[operator]
    found = next((c for c in candidates if isinstance(c, PreTrainedModel) and c is not model), None)
    return found if found is None or found.get_output_embeddings() is None else decoder_of(found)


def make_body(model: nn.Module, attention_name: str) -> nn.Module:
    """Return a copy of the decoder whose attention is the registered function `attention_name`."""
    return _switched(_private_copy(_decoder(model)), attention_name)


def make_own_body(model: nn.Module) -> nn.Module:
    """Return a copy of the decoder with its own attention."""
    body = _private_copy(_decoder(model))
    families.limit_single_steps(body)
    return body


def make_trained_body(model: nn.Module, attention_name: str) -> nn.Module:
    """Return a copy in the model's own modes: a model in training mode may recompute its layers in the backward."""
    body = _private_copy(_decoder(model))
    for private, own in zip(body.modules(), _decoder(model).modules(), strict=True):
        private.training = own.training
    return _switched(body, attention_name)


def make_head(model: nn.Module) -> nn.Module:
    """Return a copy of the model that takes hidden states as `inputs_embeds` and only applies its head to them."""
    part = _below_head(model)
    return _private_copy(model, {id(part): _GivenHiddenStates(part, _decoder(model))})


def _below_head(model: nn.Module) -> nn.Module:
    """Return the part whose output the head reads: the decoder, or the part that wraps it with towers for images."""
    head, decoder = model.get_output_embeddings(), _decoder(model)  # type: ignore[operator]
    part = model
    while True:
        part = next(child for child in part.children() if any(module is decoder for module in child.modules()))
        if part is decoder or all(module is not head for module in part.modules()):
            return part


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy that computes the same as the plain call in eval mode."""
    return _private_copy(model)


class _GivenHiddenStates(nn.Module):
    """Takes the place of a part of the model, and returns its input as the last hidden state.

    Other attributes that a head reads are those of the part. If the head calls the decoder within the part, the decoder
    is replaced, too.
    """

    def __init__(self, part: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self._taken = (part, decoder)  # modules in a tuple are not submodules of this one
        if hasattr(part, "config"):
            self.config = copy.deepcopy(part.config)

    def forward(self, *args: object, inputs_embeds: Tensor, **kwargs: object) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        part, decoder = self._taken
        found = getattr(part, name)
        is_around = isinstance(found, nn.Module) and any(module is decoder for module in found.modules())
        return self if is_around else found


@dataclass
class _DecoderOutput(ModelOutput):
    """A decoder's output with hidden states only; any other field that a model reads is None."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _private_copy(model: nn.Module, replacements: dict[int, nn.Module] | None = None) -> nn.Module:
    # Tensors without numbers are not shared: the hooks of a copy put numbers in their place.
    copied = copied_weights(model)
    memo: dict[int, Any] = {
        id(parameter): parameter
        for parameter in model.parameters()
        if not parameter.is_meta and id(parameter) not in copied
    }
    memo |= {
        id(buffer): buffer for buffer in model.buffers() if buffer.nbytes > SHARED_BUFFER_BYTES and not buffer.is_meta
    }
    memo |= spread.shared_with_copies(model)
    memo |= replacements or {}
    private: nn.Module = copy.deepcopy(model, memo).eval()
    for module in private.modules():
        if _has_trainers_forward(module):
            del module.forward
    spread.forget_movers(private)
    families.keep_weights(private)
    for config in configs_of(private):
        config.return_dict = True
        config.output_hidden_states = config.output_attentions = config.use_cache = False
    return private


def _has_trainers_forward(module: nn.Module) -> bool:
    """Return whether a trainer has wrapped the forward method of this module, for calls of its own.

    Such a wrapper holds the method of the user's model, so a copy with the wrapper would run the model itself.
    """
    return _leads_to_own(module, vars(module).get("forward"))


def _leads_to_own(module: nn.Module, forward: object) -> bool:
    """Return whether a callable is the module's own method within wrappers that change no number."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if function is type(module).forward:
            return True
        place = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
        if not place.startswith(TRAINERS):
            return False
        forward = getattr(function, "__wrapped__", None)
    return False


def replaced_forward(module: nn.Module) -> object | None:
    """Return the replacement of a module's forward method; None if there is none, or if it computes the same."""
    own = vars(module)
    forward: object = own.get("_old_forward" if spread.has_hook(module) else "forward")
    return None if forward is None or _leads_to_own(module, forward) else forward


def _switched(body: nn.Module, attention_name: str) -> nn.Module:
    for config in configs_of(body):
        config._attn_implementation = attention_name
    families.adapt(body)
    _fuse_gelu(body)
    return body


def configs_of(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and of its parts; in some parts `config` is another kind of object."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


def _fuse_gelu(body: nn.Module) -> None:
    """Replace GPT-2's tanh GELU, six elementwise passes, by torch's fused form of the same function."""
    for module in body.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _uses_attention_interface(model: nn.Module) -> bool:
    """Return whether the model or its decoder declares the interface, or uses it without a declaration (StableLM)."""
    return any(
        getattr(part, "_supports_attention_backend", False)
        or hasattr(sys.modules[type(part).__module__], "ALL_ATTENTION_FUNCTIONS")
        for part in (model, decoder_of(model))
        if part is not None
    )


def has_experts(model: nn.Module) -> bool:
    """Return whether a model chooses experts for each token, as the names of its modules' classes say."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any("expert" in name or "moe" in name or "router" in name for name in names)


def is_foreign(hook: object) -> bool:
    """Return whether a hook may change numbers.

    transformers' own hooks capture outputs on request. peft's and other trainers' hooks of these names let gradients
    reach a layer that is recomputed.
    """
    is_of_trainers = getattr(hook, "__name__", "") in ("make_inputs_require_grad", "make_inputs_require_grads")
    return not is_of_trainers and not str(getattr(hook, "__module__", "")).startswith("transformers.")


def _decoder(model: nn.Module) -> PreTrainedModel:
    decoder = decoder_of(model)
    assert decoder is not None, "check_supported refuses a model without one"
    return decoder


def _first_hooked_module(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if is_foreign(hook):
                return name or type(module).__name__
    return None


def is_rewritten_in_place(module: nn.Module) -> bool:
    """Return whether a module rewrites its own buffers while it runs, like a rotary table that depends on lengths."""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any(name is not None and ("dynamic" in name or name == "longrope") for name in names)


def vocab_size(model: nn.Module) -> int:
    """Return the number of tokens that the output head scores."""
    return _head_size(model)[0]


def logit_row_bytes(model: nn.Module) -> int:
    """Return the bytes of one row of logits."""
    return vocab_size(model) * head_dtype(model).itemsize


def head_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the head's results: the dtype of its weights or, if these are integers, of the model."""
    weight: object = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else computed_dtype(model)


def computed_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that a model computes in: that of its first floating-point parameter."""
    dtypes = [parameter.dtype for parameter in model.parameters()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0])


def hidden_size(model: nn.Module) -> int:
    """Return the size of the hidden states that the output head reads."""
    return _head_size(model)[1]


def _head_size(model: nn.Module) -> tuple[int, int]:
    """Return the outputs and inputs of the output head; the integers of a quantized weight may have another shape."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.shape[0], weight.shape[1]
    return head.out_features, head.in_features
