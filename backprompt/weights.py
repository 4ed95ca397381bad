"""Noticing that a model's weights have changed, and saying by content which weights they are.

Before each evaluation a quick look compares, for every parameter and buffer, identity, `data_ptr`, `_version` and a
strided sample of the content, and the module tree with the state of its adapters. `.data` writes bump no version; the
sample sees those that touch many elements, as merging an adapter does. What the quick look cannot see, a `.data` write
to a few elements, `LM.refresh()` finds by hashing everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.skeleton import is_rewritten_in_place, unwrap

SAMPLES_PER_TENSOR = 16

_ADAPTER_STATE = ("_active_adapter", "merged_adapters", "_disable_adapters", "scaling")
_UNIMPORTANT_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict", "output_attentions"}
)


class WeightsMonitor:
    """The state of a model's weights at one moment, and whether they still are in it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state = _quick_state(model)
        self._sample = _sample(model)

    def has_changed(self) -> bool:
        """Return whether a quick look sees a difference to the state at construction."""
        if _quick_state(self._model) != self._state:
            return True
        sample = _sample(self._model)
        return len(sample) != len(self._sample) or not all(
            torch.equal(now, before) for now, before in zip(sample, self._sample, strict=True)
        )


def content_hash(model: nn.Module) -> str:
    """Return the SHA-256, as hex, of everything that decides what a model computes: reads every weight once."""
    model_hash = hashlib.sha256()
    config: Any = unwrap(model).config
    described = sorted((key, repr(value)) for key, value in config.to_dict().items() if key not in _UNIMPORTANT_CONFIG)
    model_hash.update(repr((type(unwrap(model)).__qualname__, described, _adapter_states(model))).encode())
    for name, tensor in _named_tensors(model):
        model_hash.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        model_hash.update(memoryview(data))
    return model_hash.hexdigest()


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer, except tables that the model itself rewrites while it runs."""
    for prefix, module in model.named_modules():
        yield from ((f"{prefix}.{name}", p) for name, p in module._parameters.items() if p is not None)
        if not is_rewritten_in_place(module):
            yield from ((f"{prefix}.{name}", b) for name, b in module._buffers.items() if b is not None)


def _quick_state(model: nn.Module) -> tuple[object, ...]:
    tensors = tuple(
        (id(tensor), tensor.data_ptr(), tensor._version if not tensor.is_inference() else 0, tensor.dtype)
        for _, tensor in _named_tensors(model)
    )
    return tensors, tuple(map(id, model.modules())), _adapter_states(model)


def _adapter_states(model: nn.Module) -> tuple[str, ...]:
    """Return, for each layer with adapters, which of them are active or merged, and how they are scaled."""
    return tuple(
        repr([(name, module.__dict__.get(name)) for name in _ADAPTER_STATE])
        for module in model.modules()
        if "merged_adapters" in module.__dict__
    )


def _sample(model: nn.Module) -> list[Tensor]:
    """Return a strided sample of every tensor's content, as bytes, in one tensor a dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for _, tensor in _named_tensors(model):
        flat = tensor.detach().flatten()  # a view for contiguous tensors
        if flat.numel():
            stride = -(-flat.numel() // SAMPLES_PER_TENSOR)
            groups.setdefault((tensor.dtype, tensor.device), []).append(flat[::stride])
    return [torch.cat(samples).view(torch.uint8) for samples in groups.values()]
