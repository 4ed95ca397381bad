"""The byte budgets of an `LM`: the given ones, or defaults that suit the devices of its model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backprompt.memory.budget import default_host_bytes, default_max_bytes, parse_bytes
from backprompt.model.spread import devices_of, head_device
from backprompt.session.options import Options


@dataclass(frozen=True)
class Budgets:
    """The numbers of bytes that computed results may take on the model's device and in host memory."""

    device: int
    host: int

    @classmethod
    def of(cls, options: Options, model: nn.Module) -> Budgets:
        """Return the budgets of an `LM` with these options."""
        device, host = options.memory_bytes, options.host_memory_bytes
        return cls(
            default_bytes(model) if device is None else parse_bytes(device),
            default_host_bytes(head_device(model)) if host is None else parse_bytes(host, "host_memory_bytes"),
        )


def default_bytes(model: nn.Module) -> int:
    """Return the default budget; for layers on several devices, the budget of the device with the least free memory."""
    return min(map(default_max_bytes, devices_of(model)))
