"""The device that the tests' tiny models lie on: BACKPROMPT_TEST_DEVICE, by default the CPU.

BACKPROMPT_TEST_DEVICE=cuda     what `make test` runs a second time where CUDA is
BACKPROMPT_TEST_DEVICE=other    a device that is none, for a machine without one: `other_device.py`
"""

import os

import pytest
import torch

from other_device import DEVICE as OTHER
from other_device import OtherDevice, OtherEvent, OtherGenerator

NAME = os.environ.get("BACKPROMPT_TEST_DEVICE", "cpu")
DEVICE = OTHER if NAME == "other" else torch.device(NAME)
_other = None
if NAME == "other":
    _other = OtherDevice().__enter__()
    torch.Event, torch.Generator = OtherEvent, OtherGenerator
    torch.mps.recommended_max_memory = lambda: 4 << 30
    torch.mps.current_allocated_memory = lambda: 0

known_to_torch = pytest.mark.skipif(NAME == "other", reason="torch must know the device")


def on_test_device(model):
    """The model, on the device of the tests."""
    return model.to(DEVICE) if _other is None else _other.moved(model)
