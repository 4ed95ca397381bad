"""The models on a GPU, and clocks for a device that works behind the caller's back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from backprompt import LM
from benchmarks.suites.gpu.works import Work
from benchmarks.workloads import SEED


@dataclass(frozen=True)
class Shape:
    """A model with random weights; `vocabulary`: ids below this number are drawn."""

    name: str
    config: Callable[[], PreTrainedConfig]
    dtype: torch.dtype
    vocabulary: int = 50_000


def _gpt2(**sizes: int) -> PreTrainedConfig:
    return GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)


def _llama(hidden: int, inner: int, layers: int, heads: int = 32, groups: int = 8, vocabulary: int = 128_256) -> Any:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )


LLAMA_1B = Shape("Llama 1B bf16", partial(_llama, 2048, 8192, 16), torch.bfloat16)
LLAMA_8B = Shape("Llama 8B bf16", partial(_llama, 4096, 14336, 32), torch.bfloat16)
GPT2 = Shape("GPT-2 bf16", _gpt2, torch.bfloat16)
GPT2_FLOAT32 = Shape("GPT-2 fp32", _gpt2, torch.float32)

TINY_GPT2 = Shape(
    "tiny GPT-2", partial(_gpt2, n_layer=1, n_embd=32, n_head=2, vocab_size=500), torch.float32, vocabulary=400
)
TINY_LLAMA = Shape("tiny Llama", partial(_llama, 32, 64, 2, 4, 2, 500), torch.float32, vocabulary=400)


class Rig:
    """A model on a device, its `LM`, and a clock.

    Args:
        shape: of the model.
        device: to measure on.
        scale: the factor of the number of prompts in every work.

    """

    def __init__(self, shape: Shape, device: torch.device, scale: float) -> None:
        self.shape, self.device, self.scale = shape, device, scale
        self.model = _make_model(shape, device)
        self.lm = LM(self.model, _make_tokenizer(shape.vocabulary), beyond_trained_length=True)

    def drawn(self, work: Work, mark: str, part: float = 1.0) -> Any:
        """Draw a work's prompts, or a part of them."""
        return work.drawn(mark, self.scale * part, self.shape.vocabulary)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds_of(self, run: Callable[[], object]) -> float:
        """The seconds until the device has done all of it."""
        self.synchronise()
        started = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - started


def best_of(seconds: Callable[[int], float], rounds: int = 3, at_most: float = 5.0) -> float:
    """The lowest of so many rounds, which are numbered; of fewer where they have taken so many seconds together."""
    found: list[float] = []
    while len(found) < rounds and sum(found) <= at_most:
        found.append(seconds(len(found)))
    return min(found)


def _make_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=shape.dtype, attn_implementation="sdpa")
    model.config.eos_token_id = model.generation_config.eos_token_id = None  # every continuation has its full length
    return model.eval().to(device)


def _make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each id: the works are ids, so the tokenizer has nothing to do."""
    words = {f"w{idx}": idx for idx in range(vocabulary)} | {"<unk>": vocabulary}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), unk_token="<unk>")
