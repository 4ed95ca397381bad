"""Modules of a private copy that the host reads and calls in less time; their operations stay the same.

torch looks a child or a weight up in two tables before it is found, and looks for hooks at each call. With many small
layers that takes as long as the operations. In a private copy nobody registers hooks, so a module's call runs its
`forward` at once, and children and weights are found among the module's own attributes. Dropout, norms and GPT-2's
linear layers make at most one call of torch, and a part of a list of layers is a plain list. The measurements are in
`docs/design/model.md`, "The body".

Only copies whose modules are all of torch and transformers are changed. Other code may compare classes, write to the
tables of modules, or do something when its class gets a subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from backprompt.model.linear import is_plain

LIBRARIES = frozenset({"backprompt", "torch", "transformers"})
"""The packages whose modules are changed."""

OUTPUTS_FIRST = "backprompt_outputs_first"
"""The name under which GPT-2's linear layers keep a view of their weights, `(outputs, inputs)`."""


def make_lean(private: nn.Module) -> None:
    """Let the modules within a private copy be read and called in less time; modules with hooks keep their calls.

    A copy with a module of other code stays as it is.
    """
    modules = list(private.modules())
    if not all(map(_is_of_library, modules)):
        return
    settings: dict[int, _Settings] = {}
    for module in modules:
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


def _is_of_library(module: nn.Module) -> bool:
    library = type(module).__module__.partition(".")[0]
    return library in LIBRARIES and not isinstance(module, torch.jit.ScriptModule)


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
    if all_modules._global_forward_pre_hooks or all_modules._global_forward_hooks:
        return nn.Module.__call__(self, *args, **keywords)
    return self.forward(*args, **keywords)


def _children_at(self: nn.ModuleList, place: int | slice) -> nn.Module | list[nn.Module]:
    """Return a child, or a list of children; torch makes a new module of several children."""
    return [*self][place] if isinstance(place, slice) else nn.ModuleList.__getitem__(self, place)


def _is_changed(kind: type[nn.Module]) -> bool:
    """Return whether a class has got another `forward` since, or all modules have got hooks."""
    has_hooks = all_modules._global_forward_pre_hooks or all_modules._global_forward_hooks
    return bool(has_hooks) or kind.forward is not _FORWARDS[kind]


def _return_input(self: nn.Dropout, input: Tensor) -> Tensor:
    if self.training or _is_changed(nn.Dropout):
        return cast(Tensor, _call(self, input))
    return input


def _normalize(self: nn.LayerNorm, input: Tensor) -> Tensor:
    if _is_changed(nn.LayerNorm):
        return cast(Tensor, _call(self, input))
    return torch.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _multiply(self: Conv1D, x: Tensor) -> Tensor:
    weight = vars(self).get(OUTPUTS_FIRST)
    # `linear` may multiply rows of another form in another order.
    if weight is None or x.dim() != 3 or not x.is_contiguous() or _is_changed(Conv1D):
        return cast(Tensor, _call(self, x))
    return nn.functional.linear(x, weight, self.bias)


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    kind: kind.forward for kind in (nn.Dropout, nn.LayerNorm, Conv1D)
}
"""The `forward` of each class whose calls are replaced, when this file was read."""

_CALLS: dict[Callable[..., Tensor], Callable[..., Tensor]] = {
    _FORWARDS[nn.Dropout]: _return_input,
    _FORWARDS[nn.LayerNorm]: _normalize,
    _FORWARDS[Conv1D]: _multiply,
}
"""By `forward`, a call with the same operation."""
