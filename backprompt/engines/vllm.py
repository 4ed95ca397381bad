"""VllmLM: texts whose log-probabilities and continuations vLLM computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from backprompt.engines.crew_lm import CrewLM
from backprompt.engines.run import RemoteRun
from backprompt.engines.vllm_requests import imported_vllm
from backprompt.engines.vllm_run import sampling_params
from backprompt.engines.vllm_worker import VllmCrew, VllmWorker
from backprompt.engines.worker import Description
from backprompt.generation.decoding import Decoding
from backprompt.model.limits import limits_of
from backprompt.model.skeleton import vocab_size
from backprompt.session.options import Options, check_options
from backprompt.text.node import Text
from backprompt.tokens.joins import Joins

CPU_BLOCK_SIZE = 32
"""Tokens in a block of the prefix cache on the CPU, where vLLM's default is 128: only whole blocks are shared."""


class VllmLM(CrewLM):
    """A causal language model that vLLM computes; takes texts as an `LM` does.

        lm = VllmLM("Qwen/Qwen3-0.6B", dtype="bfloat16")
        classify.predict(prompts, labels, lm)

    Texts are encoded by backprompt, not by vLLM, so texts, joins and special tokens are those of an `LM`. The requests
    of a call go to the engine in forest order, so that shared beginnings come from its prefix cache, also where the
    tokens behind them are scored; see `engines/vllm_scores.py`.

    vLLM gives log-probabilities (`token_logprobs`, `token_scores`, `next_token_logprobs`, `top_logprobs`, and all of
    `classify`, the harness and the estimator), and continuations (`generate`, `stream`, `select`). Greedy continuations
    are those of an `LM` up to rounding. Samples are reproducible by `seed`, but differ from those of an `LM`.
    `completion_logprobs` are the model's own, without temperature. `evaluate` fills the prefix cache.

    Results that vLLM does not give raise `UnsupportedModelError`: logits, hidden states, keys and values, entropies,
    groups and frozen segments, adapters of segments, pins, stores, `explain`, pictures, training. Options of `generate`
    that vLLM lacks, such as beams, raise `GenerationError`.

    `stats` counts only `tokens_requested`, `tokens_computed`, `tokens_reused` and `seconds`; all other counts are 0.

    Args:
        model_or_llm: a name or path of a model, or a `vllm.LLM`, which no other code may use during a call or a stream.
        tokenizer: the model's tokenizer, of transformers; by default loaded by the name of the model.
        joins, add_special_tokens: see `LM`.
        **engine_options: options of `vllm.LLM`. By default `enable_prefix_caching` and `skip_tokenizer_init` are True,
            and `block_size` is 32 on the CPU. vLLM computes models stored in float32 in half precision, unless
            `dtype="float32"` is given.

    Attributes:
        llm: the `vllm.LLM`.

    Raises:
        MissingDependencyError: vLLM is not installed.
        TypeError: `engine_options` are given with an existing `vllm.LLM`.
        All errors of `vllm.LLM`.

    """

    def __init__(
        self,
        model_or_llm: Any,
        tokenizer: Any = None,
        *,
        joins: Joins = "exact",
        add_special_tokens: bool = True,
        **engine_options: Any,
    ) -> None:
        check_options(joins=joins, add_special_tokens=add_special_tokens)
        options = Options(joins=joins, add_special_tokens=add_special_tokens)
        vllm = imported_vllm()
        is_ours = isinstance(model_or_llm, (str, os.PathLike))
        if is_ours:
            llm = vllm.LLM(model=str(model_or_llm), **{**_default_options(), **engine_options})
        elif not isinstance(model_or_llm, vllm.LLM):
            raise TypeError(f"model_or_llm must be a name or path of a model, or a vllm.LLM, not {model_or_llm!r}.")
        elif engine_options:
            raise TypeError(f"This vllm.LLM is made already: give {', '.join(engine_options)} to vllm.LLM, not here.")
        else:
            llm = model_or_llm
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(llm.model_config.tokenizer)
        description = _describe(llm, tokenizer, options)
        self.llm = llm
        self._worker = VllmWorker(llm, description)
        super().__init__(
            VllmCrew(self._worker, llm.llm_engine.engine_core.shutdown if is_ours else _leave), description
        )

    def __repr__(self) -> str:
        return f"VllmLM({type(self._remote.causal_lm).__name__})"

    def running(self, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool) -> RemoteRun:
        """Return texts that vLLM continues; for `generate` and `stream`."""
        own = self._worker.decoding(decoding.recipe)
        sampling_params(own, own.rules(torch.zeros((1, 1), dtype=torch.long)).processors, 1)  # errors show now
        return super().running(texts, decoding, is_stream=is_stream)


def _default_options() -> dict[str, Any]:
    from vllm.platforms import current_platform

    options: dict[str, Any] = {"enable_prefix_caching": True, "skip_tokenizer_init": True}
    return {**options, "block_size": CPU_BLOCK_SIZE} if current_platform.is_cpu() else options


def _describe(llm: Any, tokenizer: Any, options: Options) -> Description:
    """Return a description of vLLM's model."""
    found = llm.model_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found.hf_config, dtype=torch.float32)  # the dtype of log-probabilities
    config = found.try_get_generation_config()
    max_tokens = found.max_model_len - 1
    return Description(
        maker=str(found.model),
        tokenizer=tokenizer,
        model_class=type(model),
        config=model.config,
        generation_config=GenerationConfig(**config) if config else model.generation_config,
        dtype=torch.float32,
        limits=replace(
            limits_of(model),
            max_tokens=max_tokens,
            why_hard="vLLM keeps one of its max_model_len positions for a next token",
        ),
        vocab_size=vocab_size(model),
        options=options,
    )


def _leave() -> None:
    """Do nothing: the engine belongs to the caller."""
