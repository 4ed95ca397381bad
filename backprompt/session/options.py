"""The options of an `LM`: their values, and checks of the values."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

import torch

from backprompt.arguments import as_bool, as_choice, as_int, did_you_mean
from backprompt.memory.budget import parse_bytes
from backprompt.store import Store
from backprompt.tokens.joins import JOINS, Joins


@dataclass(frozen=True)
class Options:
    """The options of an `LM`, described in the docstring of `LM`."""

    joins: Joins = "exact"
    add_special_tokens: bool = True
    memory_bytes: int | str | None = None
    host_memory_bytes: int | str | None = None
    pin_memory: bool = False
    max_tokens_per_forward: int | None = None
    store: Store | str | os.PathLike[str] | None = None
    beyond_trained_length: bool = False
    pack_weights: bool = False


def check_options(**given: Any) -> None:
    """Raise for unknown options of an `LM`, and for invalid values.

    Raises:
        TypeError: an unknown option, or a store that is neither a `Store` nor a path.
        ValueError: another invalid value.

    """
    for name, value in given.items():
        match name:
            case "joins":
                as_choice(value, name, JOINS)
            case "add_special_tokens" | "pin_memory" | "beyond_trained_length" | "pack_weights":
                as_bool(value, name)
            case "memory_bytes" | "host_memory_bytes":
                if value is not None:
                    parse_bytes(value, name)
            case "max_tokens_per_forward":
                if value is not None:
                    as_int(value, name, at_least=1)
            case "store":
                if not (value is None or isinstance(value, (Store, os.PathLike)) or (isinstance(value, str) and value)):
                    raise TypeError(f"store must be a path or a backprompt.Store, not {value!r}.")
            case _:
                options = [field.name for field in fields(Options)]
                raise TypeError(
                    f"An LM has no option {name!r}.{did_you_mean(name, options)} It has {', '.join(options)}."
                )


def check_can_pin(device: torch.device) -> None:
    """Raise ValueError unless page-locked memory makes transfers to this device faster."""
    if device.type != "cuda":
        raise ValueError(
            "pin_memory=True is for models on CUDA, where page-locked memory makes transfers faster; this model "
            "lies on "
            f"{str(device)!r}. Leave it out."
        )
