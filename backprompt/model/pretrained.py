"""The arguments that `load` hands to `from_pretrained` of transformers, and the place that its files come from.

If a hub cannot be reached, transformers asks it five more times for each file, with pauses, even for optional files.
That takes a minute for a missing model, and three minutes for a model that was downloaded before. So the hub is asked
once here. If it does not answer, transformers searches only earlier downloads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers.utils.quantization_config import QuantizationConfigMixin

from backprompt.errors import ModelLoadError

_TOKENIZER_OPTIONS = (
    *("trust_remote_code", "code_revision", "revision", "subfolder", "token", "cache_dir", "local_files_only"),
    *("force_download", "gguf_file"),
)
MODEL_OPTIONS = (
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "quantization_config", "attn_implementation"),
    *("config", "key_mapping", "use_safetensors", "variant"),
    *_TOKENIZER_OPTIONS,
)
"""The arguments of `from_pretrained` that `load` has by name."""

_SAME_FILES = frozenset({"token", "local_files_only", "trust_remote_code"})
"""Arguments that do not change which files are read, or how."""

_SECONDS = 10
_CONFIG = "config.json"
_NO_ANSWER: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base class of errors in httpx. In newer versions of the hub's client the package is called httpx2."""


def pretrained_options(
    given: Mapping[str, Any], model_kwargs: Mapping[str, Any] | None, taken: Sequence[str]
) -> dict[str, Any]:
    """Return the arguments for `from_pretrained` among given ones, and those in `model_kwargs`.

    Args:
        given: all arguments by name.
        model_kwargs: arguments that are taken as they are.
        taken: names that `model_kwargs` must not have.

    Raises:
        TypeError: `model_kwargs` is not a mapping of names, or has an argument that is given otherwise; or
            `quantization_config` is not a configuration.
        ValueError: a value is not of the kind that transformers needs.

    """
    if model_kwargs is not None and not (
        isinstance(model_kwargs, Mapping) and all(isinstance(name, str) for name in model_kwargs)
    ):
        raise TypeError(f"model_kwargs must be a mapping of names to values, not {model_kwargs!r}.")
    named = {name: value for name, value in given.items() if name in MODEL_OPTIONS and value is not None}
    for name in model_kwargs or {}:
        if name in named or name in taken:
            raise TypeError(
                f"model_kwargs has {name!r}, which is an argument of load itself. Give it once, as {name}=."
            )
    options = {**named, **(model_kwargs or {})}
    for name in ("trust_remote_code", "local_files_only", "force_download"):
        if name in options and not isinstance(options[name], bool):
            raise ValueError(f"{name} must be True or False, not {options[name]!r}.")
    for name in ("revision", "code_revision", "subfolder"):
        if name in options and not (isinstance(options[name], str) and options[name]):
            raise ValueError(f"{name} must be a string that is not empty, not {options[name]!r}.")
    config = options.get("quantization_config")
    if config is not None and not isinstance(config, (dict, QuantizationConfigMixin)):
        raise TypeError(
            "quantization_config must be a configuration of transformers, such as TorchAoConfig(...), or its dict, "
            f"not {config!r}."
        )
    needing = next((name for name in ("device_map", "quantization_config") if name in options), None)
    if needing is not None and find_spec("accelerate") is None:
        raise ImportError(f"{needing}= needs accelerate, which is not installed: pip install accelerate.")
    return options


@dataclass(frozen=True)
class Pretrained:
    """A model's name, with the arguments that it is loaded with.

    Attributes:
        name: a hub id or a folder.
        options: arguments of `from_pretrained`.
        why_local: the reason why only earlier downloads are searched; None for a folder, or if the hub answers.

    """

    name: str
    options: Mapping[str, Any]
    why_local: str | None

    @classmethod
    def found(cls, name: str | Path, options: Mapping[str, Any]) -> Pretrained:
        """Look for a model.

        Raises:
            ModelLoadError: the name is that of a file, of a folder without a model, or of a missing path.

        """
        name, path = str(name), Path(name)
        if path.is_dir():
            _check_folder(path, options)
        elif path.exists():
            raise ModelLoadError(f"{name!r} is a file. Give the folder that has the model's {_CONFIG} and its weights.")
        elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ModelLoadError(
                f"Could not load {name!r}: there is no such folder. Give the path of a model's folder, or a hub id."
            )
        why_local = None if path.is_dir() or options.get("local_files_only") else _why_no_hub(name, options)
        return cls(name, options, why_local)

    @property
    def is_plain(self) -> bool:
        """Whether the weights are the same as those loaded by the name alone."""
        return self.options.keys() <= _SAME_FILES

    @property
    def for_tokenizer(self) -> dict[str, Any]:
        """The arguments for the tokenizer."""
        return {name: value for name, value in self._here.items() if name in _TOKENIZER_OPTIONS}

    def for_model(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments for the model; transformers puts a model that it quantizes on its device."""
        options = self._here
        if "quantization_config" in options:
            options.setdefault("device_map", str(device))
        if self.why_local is not None:  # transformers asks the hub for an adapter even so
            options["adapter_kwargs"] = {"local_files_only": True, **options.get("adapter_kwargs", {})}
        return options

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Turn errors of transformers while it loads into ModelLoadError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if self.why_local is None:
                raise ModelLoadError(f"Could not load {self.name!r}: {error}") from error
            raise ModelLoadError(
                f"Could not load {self.name!r}: the hub cannot be asked ({self.why_local}), and earlier "
                "downloads do not have all of the model. Download it elsewhere and pass the path of its folder: "
                "backprompt.load('path/to/model')."
            ) from error

    @property
    def _here(self) -> dict[str, Any]:
        return dict(self.options) if self.why_local is None else {**self.options, "local_files_only": True}


def _check_folder(path: Path, options: Mapping[str, Any]) -> None:
    if options.keys() & {"config", "gguf_file"}:
        return
    folder = path / options.get("subfolder", "")
    if any((folder / name).exists() for name in (_CONFIG, "adapter_config.json", "params.json")):
        return
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    has = f"has no {_CONFIG}, but {', '.join(map(repr, found[:5]))}{' ...' * (len(found) > 5)}" if found else "is empty"
    raise ModelLoadError(
        f"The folder {str(folder)!r} {has if folder.is_dir() else 'does not exist'}. Give the folder that "
        "model.save_pretrained(folder) and tokenizer.save_pretrained(folder) wrote."
    )


def _why_no_hub(name: str, options: Mapping[str, Any]) -> str | None:
    """Return why the hub does not answer; None if it answers, even if it does not have the model."""
    try:
        url = hf_hub_url(name, _CONFIG, revision=options.get("revision"))
        get_hf_file_metadata(url, token=options.get("token"), timeout=_SECONDS)
    except HFValidationError:
        return "the name does not have the form of a hub id"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except _NO_ANSWER as error:
        response = getattr(error, "response", None)
        is_answer = response is not None and response.status_code < 500
        return None if is_answer else " ".join(str(error).split())
    return None
