"""The behaviour of a model besides its tensors: its configurations, `forward` methods that were replaced, and hooks.

Trainers wrap `forward` for precision and for calls of their own, and accelerate wraps it for its hooks. Such wrappers
change no number, so they do not count as changes. Hooks of accelerate do.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backprompt.model.attributes import AttributeMonitor
from backprompt.model.skeleton import configs_of, replaced_forward
from backprompt.model.spread import HOOK

UNIMPORTANT_CONFIG = frozenset(
    {
        "_name_or_path",
        "architectures",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))
_ATTRIBUTES = ("forward", HOOK)
_MAX_DEPTH = 4


class BehaviourMonitor:
    """The configurations, replaced methods and hooks of accelerate of a model at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._tables = [vars(module) for module in self._modules]
        self._configs = [vars(config) for config in configs_of(model)]
        self._seen = list(map(_copied, self._configs))  # compared as a whole in each look, unimportant values included
        self._values = [_values_of(config) for config in self._seen]
        self._attributes = AttributeMonitor(self._tables, _ATTRIBUTES)
        self._replacements = self._read_replacements()

    def has_changed(self) -> bool:
        """Return whether a configuration has another value, or a module another method or hook."""
        if self._configs != self._seen:
            if list(map(_values_of, self._configs)) != self._values:
                return True
            self._seen = list(map(_copied, self._configs))
        if not self._attributes.have_changed():
            return False
        attributes = AttributeMonitor(self._tables, _ATTRIBUTES)
        if not all(map(operator.is_, self._read_replacements(), self._replacements)):
            return True
        self._attributes = attributes
        return False

    def _read_replacements(self) -> list[object]:
        """Return the replaced method of each module, and its hook; None for each that it lacks."""
        return [*map(replaced_forward, self._modules), *(table.get(HOOK) for table in self._tables)]


def _copied(config: Mapping[str, object]) -> dict[str, object]:
    """Return a deep copy: a change within a value of the original does not reach it."""
    return {name: copy.deepcopy(value) if isinstance(value, _PLAIN) else value for name, value in config.items()}


def _values_of(config: Mapping[str, object]) -> dict[str, object]:
    """Return the values that the model's code may read, without parts that have configurations of their own."""
    return {
        name: value
        for name, value in config.items()
        if name[0] != "_" and name not in UNIMPORTANT_CONFIG and isinstance(value, _PLAIN)
    }


def describe_forwards(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of modules whose `forward` was replaced, each with a description of the replacement.

    The descriptions are the same in all processes.
    """
    replaced = ((name, replaced_forward(module)) for name, module in model.named_modules())
    return [(name, _described(forward)) for name, forward in replaced if forward is not None]


def _described(value: Any, depth: int = 0) -> str:
    if depth > _MAX_DEPTH or isinstance(value, (bool, int, float, str, bytes, type(None))):
        return repr(value) if depth <= _MAX_DEPTH else ""

    def all_of(values: Any) -> str:
        return repr([_described(each, depth + 1) for each in values])

    if isinstance(value, types.FunctionType):
        return all_of((value.__module__, value.__qualname__, value.__code__, value.__defaults__, *_cells_of(value)))
    if isinstance(value, types.MethodType):
        return all_of((value.__func__, type(value.__self__).__qualname__))
    if isinstance(value, types.CodeType):
        return all_of((value.co_code, value.co_names, *value.co_consts))
    if isinstance(value, functools.partial):
        return all_of((value.func, value.args, *sorted(value.keywords.items())))
    if isinstance(value, (list, tuple)):
        return all_of(value)
    if isinstance(value, Tensor) and not value.is_meta:
        numbers = value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        return hashlib.sha256(numbers.tobytes()).hexdigest()
    return type(value).__qualname__


def _cells_of(function: Callable[..., object]) -> list[object]:
    """Return the objects that a function refers to from the function around it; a cell may still be empty."""
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if cell != types.CellType()]
