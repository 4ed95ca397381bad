"""Loading a model and its tokenizer: devices, dtypes, and whether the files determine all weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from backprompt.arguments import did_you_mean
from backprompt.lm import LM
from backprompt.model.checkpoint import Checkpoint
from backprompt.model.int8 import PACKAGE, WAYS, Way, quantize, version
from backprompt.model.pretrained import MODEL_OPTIONS, Pretrained, pretrained_options
from backprompt.progress import check_show
from backprompt.session.options import Options, check_can_pin, check_options
from backprompt.store.paths import check_folder

logger = logging.getLogger(__name__)

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The values of `device_map` that let accelerate choose the devices."""

_OWN_OPTIONS = ("device", "dtype", "torch_dtype", "weights", "show_progress_bar", "model_kwargs")
_LM_OPTIONS = tuple(field.name for field in fields(Options))
_SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    weights: Way | None = None,
    show_progress_bar: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LM:
    """Return an `LM`: a causal language model with its tokenizer, loaded by hub id or local path.

    If the hub does not answer, no second request is sent; then only earlier downloads are searched.

    Args:
        name: a name or path for `from_pretrained` of transformers.
        device: "cuda", "mps", "cpu" ...; by default the first of these that is available.
        dtype: the dtype of the weights; by default float32 on the CPU and the checkpoint's own elsewhere. The old name
            of transformers, `torch_dtype`, is the same.
        weights: how the linear layers, except the output head, are quantized after loading. This needs torchao. "int8"
            quantizes their weights to 8 bits. "int8-dynamic" quantizes their inputs as well: faster on the CPU, but
            less exact, as packed passes and plain calls differ by the rounding of inputs. All other weights have
            `dtype`.
        show_progress_bar: False hides the bars of transformers; by default the setting of transformers decides.
        model_kwargs: any arguments for `from_pretrained` of the model.
        **options: options of `LM`, and these arguments of `from_pretrained`: `device_map` in place of `device`,
            `quantization_config` in place of `weights`, `attn_implementation`, `config`, `key_mapping`, `max_memory`,
            `offload_buffers`, `offload_folder`, `use_safetensors`, `variant`; and these for model and tokenizer:
            `trust_remote_code`, `revision`, `code_revision`, `token`, `cache_dir`, `local_files_only`,
            `force_download`, `subfolder`, `gguf_file`.

    Raises:
        ImportError: a missing package: torchao for `weights`, accelerate for `device_map` and `quantization_config`.
        ValueError, TypeError: the device is not available, weights cannot have the dtype, an option is unknown or has
            an invalid value; raised before anything is loaded.
        ModelLoadError: the model or the tokenizer cannot be found or downloaded.
        OSError: the store's path cannot be the folder of a store; see `DiskStore`.
        UnsupportedModelError: see `LM`; or the model cannot be quantized.

    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise TypeError(f"name must be a hub id or the path of a model's folder, not {name!r}.")
    dtype = _one_dtype(dtype, options)
    lm_options = {key: value for key, value in options.items() if key not in MODEL_OPTIONS}
    _check_names(lm_options)
    given = pretrained_options(options, model_kwargs, taken=(*_OWN_OPTIONS, *_LM_OPTIONS, "output_loading_info"))
    _check_weights(weights, given)
    chosen = _chosen_device(device, given)
    dtype = _dtype_of_weights(dtype, chosen)
    check_show(show_progress_bar)
    check_options(**lm_options)
    if lm_options.get("pin_memory"):
        check_can_pin(chosen)
    if isinstance(store := lm_options.get("store"), (str, os.PathLike)):
        check_folder(store)
    as_held = dtype if weights is None else f"{dtype}, {weights} of torchao {version()} on {chosen.type}"
    pretrained = Pretrained.found(name, given)
    checkpoint = Checkpoint.find(name, as_held) if pretrained.is_plain else None
    logger.info("Loading %s on %s, dtype %s.", name, given.get("device_map", chosen), dtype)
    with pretrained.errors_explained():
        tokenizer = AutoTokenizer.from_pretrained(name, **pretrained.for_tokenizer)
        with _bars_of_transformers(show_progress_bar):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, **pretrained.for_model(chosen)
            )
    model, loading_info = loaded
    is_decided = checkpoint is not None and checkpoint.decides(model, loading_info)
    if "device_map" not in pretrained.for_model(chosen):
        model = model.to(chosen)
    if weights is not None:
        quantize(model, weights)
    lm = LM(model, tokenizer, **lm_options)
    if is_decided and checkpoint == Checkpoint.find(name, as_held):
        lm.session.fingerprint.checkpoint = checkpoint
    return lm


def _check_names(lm_options: Mapping[str, Any]) -> None:
    known = (*_OWN_OPTIONS, *_LM_OPTIONS, *MODEL_OPTIONS)
    for name in lm_options:
        if name not in known:
            raise TypeError(
                f"load has no option {name!r}.{did_you_mean(name, known)} It has {', '.join(known)}. Other arguments "
                "of transformers' from_pretrained go into model_kwargs={...}."
            )


def _one_dtype(dtype: torch.dtype | str | None, options: dict[str, Any]) -> torch.dtype | str | None:
    """Return the dtype, given under its new or its old name; the old name is removed from the options."""
    old: torch.dtype | str | None = options.pop("torch_dtype", None)
    if dtype is not None and old is not None:
        raise TypeError("torch_dtype is the old name of dtype, and both were given: leave out torch_dtype.")
    return old if dtype is None else dtype


def _check_weights(weights: object, given: Mapping[str, Any]) -> None:
    if weights is None:
        return
    if weights not in WAYS:
        raise ValueError(
            f'weights must be "int8", "int8-dynamic" or None, not {weights!r}. For float16 and the like use dtype=.'
        )
    if find_spec(PACKAGE) is None:
        raise ImportError(f"weights={weights!r} needs torchao, which is not installed: pip install torchao.")
    for name in ("device_map", "quantization_config"):
        if name in given:
            raise ValueError(f"weights={weights!r} quantizes a model on one device, after loading: leave out {name}=.")


def _chosen_device(device: str | torch.device | None, given: Mapping[str, Any]) -> torch.device:
    """Return the device of the weights; for a model on several devices, the first one that is not the CPU, if any.

    Raises:
        TypeError, ValueError: a device is not available, or both `device` and `device_map` are given.

    """
    device_map = given.get("device_map")
    if device_map is None:
        return _default_device() if device is None else available_device(device)
    if device is not None:
        raise ValueError(
            "device= puts the model on one device, and device_map= spreads it over several: give only one of the two."
        )
    if device_map in _SPREADS:
        return _default_device()
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    found = [available_device(place, f"device_map={place!r}") for place in places if place != "disk"]
    return next((place for place in found if place.type != "cpu"), torch.device("cpu"))


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
        raise TypeError(f'device must be the name of a device, such as "cpu", or a torch.device, not {device!r}.')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # An AssertionError: torch is built without CUDA. An ImportError: the device comes from another package.
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(
            f"{named} cannot be used: {reason}. Leave it out to use {str(_default_device())!r}."
        ) from error
    if found.type == "meta":
        raise ValueError(f"{named} holds no weights. Leave it out, or name another device.")
    return found


def _dtype_of_weights(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Return the dtype that weights are loaded in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        long = _SHORT_DTYPES.get(str(dtype))
        raise ValueError(
            f'dtype must be "auto" or a floating dtype of torch, such as "float32" or torch.bfloat16, not {dtype!r}.'
            + (f' Did you mean "{long}"?' if long else "")
        )
    return found


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
