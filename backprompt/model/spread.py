"""Models that accelerate has spread over devices or offloaded: the only file that knows its hooks.

A hook of accelerate moves the inputs of a module to the module's device. A weight that is offloaded is a tensor without
numbers (on the `meta` device) in its module. Before the module's forward, the hook puts the numbers there, from a map
in host memory or on disk, and takes them away afterwards. accelerate itself is not imported.

Hooks run in private copies as they do in the model itself. Maps of offloaded weights are shared with the copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backprompt.errors import UnsupportedModelError
from backprompt.model.quantized import numbers_of

HOOK = "_hf_hook"
"""The attribute under which a module has its hook of accelerate."""
_ALIGN, _SEQUENCE = "AlignDevicesHook", "SequentialHook"
_PREFIXED, _LOADER = "PrefixedDataset", "OffloadedWeightsLoader"
_MOVERS = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate replaces by functions of the user's model: called on a copy, they would move that model."""


class FileState(NamedTuple):
    """The properties of a file that change with a write."""

    path: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, eq=False)
class Offloaded:
    """A weight whose numbers lie elsewhere than in its module.

    Attributes:
        module: the module.
        name: the weight's name in the module.
        like: the tensor in the module, without numbers.

    """

    module: nn.Module
    name: str
    like: Tensor
    _weights: Mapping[str, Tensor]
    _key: str

    def load(self) -> Tensor:
        """Return the numbers as the module computes with them."""
        return self._weights[self._key].to(self.like.dtype)

    def source(self) -> Tensor | FileState | None:
        """Return the object to compare: the tensor in host memory, or the file's state; None for a missing file."""
        weights, key = _unwrapped(self._weights, self._key)
        held: Mapping[str, Tensor] = weights if isinstance(weights, dict) else weights.state_dict
        if key in held:
            return held[key]
        info = weights.index.get(key) if weights is not held else None
        if info is None:
            return None
        return _state_of(info.get("safetensors_file") or Path(weights.save_folder, f"{key}.dat"))


def is_spread(model: nn.Module) -> bool:
    """Return whether modules have hooks of accelerate."""
    return any(map(has_hook, model.modules()))


def check_spread(model: nn.Module, decoder: nn.Module) -> None:
    """Raise UnsupportedModelError if the model's weights or hooks are not served; `decoder`: the part that is run."""
    model_name = type(model).__name__
    for where, module in model.named_modules():
        for hook in _hooks_of(module):
            named = f"{model_name} has the hook {type(hook).__name__} of accelerate on its module {where or 'itself'!r}"
            if type(hook).__name__ != _ALIGN:
                raise UnsupportedModelError(
                    f"{named}, which changes weights in place. Load the model without this hook: device_map= spreads "
                    "and offloads it in a way that works."
                )
            if not hook.offload:
                continue
            if hook.place_submodules and module is not decoder and decoder in module.modules():
                raise UnsupportedModelError(
                    f"{named}, which brings the weights of all modules below at once. Offload the model without "
                    "preload_module_classes."
                )
            weights, _ = _unwrapped(hook.weights_map, "")
            if not isinstance(weights, dict) and type(weights).__name__ != _LOADER:
                raise UnsupportedModelError(
                    f"{named}, whose weights lie in a {type(weights).__name__}, where a change would not be noticed. "
                    "Offload the model with device_map=, cpu_offload or disk_offload."
                )
    served = {id(weight.like) for weight in offloaded(model)}
    if any(tensor.is_meta and id(tensor) not in served for tensor in (*model.parameters(), *model.buffers())):
        raise UnsupportedModelError(
            f"{model_name} has parameters on the meta device, which hold no numbers. Load its weights, or .to_empty() "
            "and initialise it, before wrapping it."
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 and not is_spread(model):
        raise UnsupportedModelError(
            f"{model_name} lies on several devices ({', '.join(sorted(map(str, devices)))}), but no hook moves its "
            "hidden states between them. Load the model with device_map=, or onto one device."
        )


def offloaded(model: nn.Module) -> list[Offloaded]:
    """Return the weights and buffers whose numbers lie elsewhere than in their modules."""
    found: list[Offloaded] = []
    known: set[tuple[int, str]] = set()
    for module in model.modules():
        for hook in _hooks_of(module):
            if not getattr(hook, "offload", False):
                continue
            below = module.named_modules() if hook.place_submodules else [("", module)]
            for where, owner in below:
                for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                    if tensor is not None and tensor.is_meta and (id(owner), name) not in known:
                        known.add((id(owner), name))
                        key = f"{where}.{name}" if where else name
                        found.append(Offloaded(owner, name, tensor, hook.weights_map, key))
    return found


def named_numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the numbers of each parameter, wherever they lie; for quantized ones the scales."""
    elsewhere = {id(weight.like): weight for weight in offloaded(model)}
    for name, parameter in model.named_parameters():
        held = (elsewhere[id(parameter)].load(),) if id(parameter) in elsewhere else numbers_of(parameter)
        yield from ((name, number.detach()) for number in held if number.is_floating_point())


def has_hook(module: nn.Module) -> bool:
    """Return whether a module has a hook of accelerate, which wraps its forward method."""
    return HOOK in vars(module)


def head_device(model: nn.Module) -> torch.device:
    """Return the device on which the output head computes."""
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if is_spread(model) and get_head is not None else None
    return next(model.parameters()).device if head is None else _device_of(head, model)


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which the model computes embeddings, and expects token ids and positions."""
    if not is_spread(model):
        return head_device(model)
    return _device_of(model.get_input_embeddings(), model)  # type: ignore[operator]


def devices_of(model: nn.Module) -> set[torch.device]:
    """Return the devices on which the model computes."""
    if not is_spread(model):
        return {head_device(model)}
    named = [hook.execution_device for module in model.modules() for hook in _hooks_of(module)]
    held = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    return held | {_as_device(device) for device in named if device is not None}


def shared_with_copies(model: nn.Module) -> dict[int, Any]:
    """Return a memo for `copy.deepcopy`: the objects of hooks that copies share."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in _hooks_of(module):
            if hook.weights_map is not None:
                memo[id(hook.weights_map)] = hook.weights_map
            for by_device in (hook.tied_params_map or {}).values():
                memo |= {id(tensor): tensor for tensor in by_device.values()}
    return memo


def forget_movers(private: nn.Module) -> None:
    """Restore the methods that move a model, so that they move this copy and not the user's model."""
    for name in _MOVERS:
        vars(private).pop(name, None)


def _hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks of a module; a sequence of hooks counts as its single hooks."""
    flat, waiting = [], [vars(module).get(HOOK)]
    while waiting:
        hook = waiting.pop(0)
        if type(hook).__name__ == _SEQUENCE:
            waiting = [*hook.hooks, *waiting]  # type: ignore[union-attr]
        elif hook is not None:
            flat.append(hook)
    return flat


def _device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """Return the device on which a module computes."""
    devices = [hook.execution_device for hook in _hooks_of(module) if hook.execution_device is not None]
    if devices:
        return _as_device(devices[-1])
    weight: Tensor = module.weight  # type: ignore[assignment]
    if not weight.is_meta:
        return weight.device
    raise UnsupportedModelError(
        f"{type(model).__name__} is offloaded, and its hooks do not name the device on which it computes. Name it: "
        "execution_device=..."
    )


def _as_device(given: str | int | torch.device) -> torch.device:
    device = torch.device(given)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _unwrapped(weights: Any, key: str) -> tuple[Any, str]:
    """Return the map behind maps with prefixes, and the key there."""
    while type(weights).__name__ == _PREFIXED:
        weights, key = weights.dataset, f"{weights.prefix}{key}"
    return weights, key


def _state_of(path: str | Path) -> FileState | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileState(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
