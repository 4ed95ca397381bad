"""Modules of a private copy that the host reads and calls in less time; their operations stay the same.

torch looks a child or a weight up in two tables before it is found, and looks for hooks at each call. With many small
layers that takes as long as the operations. In a private copy nobody registers hooks, so a module's call runs its
`forward` at once, and children and weights are found among the module's own attributes. Dropout returns its input, as
torch's does outside of training. The measurements are in `docs/design/model.md`, "The body".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def make_lean(private: nn.Module) -> None:
    """Let the modules of a private copy be read and called in less time; modules with hooks stay as they are."""
    for module in list(private.modules()):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        kind = type(module)
        own = vars(module)
        for table in (module._modules, module._parameters):
            own.update({name: value for name, value in table.items() if not hasattr(kind, name)})
        if kind.__call__ is nn.Module.__call__ and not _has_hooks(module):
            module.__class__ = _called_directly(kind)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


@lru_cache(maxsize=1024)
def _called_directly(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose instances look for no hooks when they are called."""
    call = _return_input if kind is nn.Dropout else _call
    lean = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    if "forward" in vars(lean):
        del lean.forward  # type: ignore[attr-defined] # transformers wraps the forward of each subclass of a layer
    return lean


def _call(self: nn.Module, *args: Any, **keywords: Any) -> Any:
    return self.forward(*args, **keywords)


def _return_input(self: nn.Module, rows: Tensor) -> Tensor:
    return self.forward(rows) if self.training else rows
