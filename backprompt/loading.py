"""Loading a model and its tokenizer: devices, dtypes, and whether the files determine all weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from backprompt.errors import ModelLoadError
from backprompt.lm import LM
from backprompt.model.checkpoint import Checkpoint
from backprompt.model.int8 import PACKAGE, WAYS, Way, quantize, version
from backprompt.progress import check_show
from backprompt.session.options import check_can_pin, check_options
from backprompt.store.paths import check_folder

logger = logging.getLogger(__name__)


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    weights: Way | None = None,
    show_progress_bar: bool | None = None,
    **lm_options: Any,
) -> LM:
    """Load a causal LM and its tokenizer by hub id or local path.

    Args:
        name: a name or path for `from_pretrained` of transformers.
        device: "cuda", "mps", "cpu" ...; by default the first of these that is available.
        dtype: the dtype of the weights; by default float32 on the CPU and the checkpoint's own elsewhere.
        weights: quantizes the linear layers after loading, the output head aside, with torchao (`pip install torchao`):
            "int8" their weights to 8 bits, "int8-dynamic" their inputs as well, which is faster on the CPU and less
            exact: packed passes and plain calls differ by the rounding of inputs. The dtype is that of all else.
        show_progress_bar: False hides the bars of transformers; by default the setting of transformers decides.
        **lm_options: options of `LM`.

    Raises:
        ImportError: `weights` needs torchao, which is missing.
        ValueError, TypeError: the device is not available, weights cannot have the dtype, `LM` does not have an option,
            or an option has an invalid value; raised before anything is loaded.
        ModelLoadError: the model or the tokenizer cannot be found or downloaded.
        OSError: the store's path cannot be the folder of a store; see `DiskStore`.
        UnsupportedModelError: see `LM`; or the model cannot be quantized.

    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise TypeError(f"name must be a hub id or the path of a model's folder, not {name!r}.")
    chosen = _default_device() if device is None else available_device(device)
    dtype = _dtype_of_weights(dtype, chosen)
    _check_weights(weights)
    check_show(show_progress_bar)
    check_options(**lm_options)
    if lm_options.get("pin_memory"):
        check_can_pin(chosen)
    if isinstance(store := lm_options.get("store"), (str, os.PathLike)):
        check_folder(store)
    as_held = dtype if weights is None else f"{dtype}, {weights} of torchao {version()} on {chosen.type}"
    checkpoint = Checkpoint.find(name, as_held)
    logger.info("Loading %s on %s, dtype %s.", name, chosen, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _bars_of_transformers(show_progress_bar):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"Could not load {str(name)!r}: {error}\nIf the model hub cannot be reached, download the model elsewhere "
            "and pass the path of its folder: backprompt.load('path/to/model')."
        ) from error
    model, loading_info = loaded
    is_decided = checkpoint is not None and checkpoint.decides(model, loading_info)
    model = model.to(chosen)
    if weights is not None:
        quantize(model, weights)
    lm = LM(model, tokenizer, **lm_options)
    if is_decided and checkpoint == Checkpoint.find(name, as_held):
        lm.session.fingerprint.checkpoint = checkpoint
    return lm


def _check_weights(weights: object) -> None:
    if weights is None:
        return
    if weights not in WAYS:
        raise ValueError(
            f'weights must be "int8", "int8-dynamic" or None, not {weights!r}. dtype= sets the dtype of other weights.'
        )
    if find_spec(PACKAGE) is None:
        raise ImportError(f"weights={weights!r} needs torchao, which is not installed: pip install torchao.")


@contextmanager
def _bars_of_transformers(show: bool | None) -> Iterator[None]:
    """Show or hide the progress bars of transformers while a model loads; the setting is global to the process."""
    before = transformers_logging.is_progress_bar_enabled()
    _show_bars_of_transformers(before if show is None else show)
    try:
        yield
    finally:
        _show_bars_of_transformers(before)


def _show_bars_of_transformers(show: bool) -> None:
    if show:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def available_device(device: str | int | torch.device, named: str | None = None) -> torch.device:
    """Return a device, checked to be available.

    Args:
        device: the requested device.
        named: the device's name in errors; by default written as an argument, `device='cuda'`.

    Raises:
        TypeError: the value is not a device.
        ValueError: the device is not available, or holds no weights.

    """
    named = f"device={str(device)!r}" if named is None else named
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f'device must be the name of one, such as "cpu", or a torch.device, not {device!r}.')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # An AssertionError: torch is built without CUDA. An ImportError: the device comes from another package.
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(f"{named} cannot be used: {reason}. Leave it out for {str(_default_device())!r}.") from error
    if found.type == "meta":
        raise ValueError(f"{named} holds no weights. Leave it out, or name one that does.")
    return found


def _dtype_of_weights(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Return the dtype that weights are loaded in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f'dtype must be "auto" or a floating-point dtype of torch, as "float32" or torch.bfloat16, not {dtype!r}.'
        )
    return found


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
