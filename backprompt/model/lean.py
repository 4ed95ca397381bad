"""Modules of a private copy that the host reads and calls in less time; their operations stay the same.

torch looks a child or a weight up in two tables before it is found, and looks for hooks at each call. With many small
layers that takes as long as the operations. In a private copy nobody registers hooks, so a module's call runs its
`forward` at once, and children and weights are found among the module's own attributes. Dropout, norms and GPT-2's
linear layers make at most one call of torch, and a part of a list of layers is a plain list. The measurements are in
`docs/design/model.md`, "The body".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backprompt.model.linear import is_plain

OUTPUTS_FIRST = "backprompt_outputs_first"
"""The name under which GPT-2's linear layers keep a view of their weights, `(outputs, inputs)`."""


def make_lean(private: nn.Module) -> None:
    """Let the modules within a private copy be read and called in less time; modules with hooks keep their calls."""
    settings: dict[int, _Settings] = {}
    for module in list(private.modules()):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        kind: Any = type(module)
        own = vars(module)
        for table in (module._modules, module._parameters):
            own.update({name: value for name, value in table.items() if not hasattr(kind, name)})
        config = own.get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in settings:
                settings[id(config)] = _Settings(config)
            own["config"] = settings[id(config)]
        if module is private or kind.__call__ is not nn.Module.__call__ or _has_hooks(module) or "forward" in own:
            continue
        if isinstance(module, Conv1D) and is_plain(module.weight, (module.weight.device.type,)):
            own[OUTPUTS_FIRST] = module.weight.detach().t()
        module.__class__ = _called_directly(kind)


class _Settings:
    """A configuration as layers read it: its own values are plain attributes, and all else is asked of it.

    transformers looks each name up in a few calls, and layers ask for the name of their attention in each call.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        vars(self).update(vars(config), _attn_implementation=config._attn_implementation)
        self._original = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)
        return getattr(self._original, name)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


@lru_cache(maxsize=1024)
def _called_directly(kind: Any) -> Any:
    """Return a subclass whose instances look for no hooks when they are called; the class itself if it has none."""
    names: dict[str, Any] = {"__call__": _CALLS.get(kind.forward, _call), "__module__": kind.__module__}
    if kind is nn.ModuleList:
        names["__getitem__"] = _children_at
    try:
        lean: Any = type(kind.__name__, (kind,), names)
    except TypeError:  # some classes refuse subclasses, or ask them for more
        return kind
    if "forward" in vars(lean):
        del lean.forward  # transformers wraps the forward of each subclass of a layer
    return lean


def _call(self: nn.Module, *args: Any, **keywords: Any) -> Any:
    return self.forward(*args, **keywords)


def _children_at(self: nn.ModuleList, place: int | slice) -> nn.Module | list[nn.Module]:
    """Return a child, or a list of children; torch makes a new module of several children."""
    return [*self][place] if isinstance(place, slice) else nn.ModuleList.__getitem__(self, place)


def _return_input(self: nn.Dropout, rows: Tensor) -> Tensor:
    return self.forward(rows) if self.training else rows


def _normalize(self: nn.LayerNorm, rows: Tensor) -> Tensor:
    return torch.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps)


def _multiply(self: Conv1D, rows: Tensor) -> Tensor:
    weight = vars(self).get(OUTPUTS_FIRST)
    if weight is None or rows.dim() != 3 or not rows.is_contiguous():  # `linear` may multiply in another order
        found: Tensor = self.forward(rows)
        return found
    return nn.functional.linear(rows, weight, self.bias)


_CALLS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    nn.Dropout.forward: _return_input,
    nn.LayerNorm.forward: _normalize,
    Conv1D.forward: _multiply,
}
"""By `forward`, a call with the same operation."""
