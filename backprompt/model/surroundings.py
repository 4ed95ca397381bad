"""The caller's settings of torch: gradients, autocast, inference mode and the default device.

All code that makes or changes tensors runs without them, so that results are plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch

set_gradients: Callable[[bool], None] = torch._C._set_grad_enabled
"""Sets whether operations are recorded for gradients; `torch.no_grad` takes longer than everything else here."""

out_of_inference_mode: Callable[[], AbstractContextManager[None]] = partial(torch._C._InferenceMode, False)
"""Returns a context outside of inference mode, with gradients; `torch.inference_mode(False)` takes twice as long."""

_num_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
"""The number of modes of torch functions that the caller is in. A default device is one; a query of it is slow."""

_NOTHING = nullcontext()


@contextmanager
def plain_surroundings(device: torch.device) -> Iterator[None]:
    """Shut out all of the caller's settings."""
    had_gradients = torch.is_grad_enabled()
    try:
        with without_modes(device):
            set_gradients(False)
            yield
    finally:
        set_gradients(had_gradients)


def without_modes(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that shuts out the caller's settings, except gradients; most callers have none."""
    return _without_modes(device) if _has_modes() else _NOTHING


def _has_modes() -> bool:
    """Whether the caller is in inference mode or autocast, or has another default device."""
    return (
        torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or (_num_modes() > 0 and torch.get_default_device().type != "cpu")
    )


@contextmanager
def _without_modes(device: torch.device) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
