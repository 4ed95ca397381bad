"""Continuations by vLLM: vLLM chooses tokens, and backprompt decides where texts end.

Each sample is a request of its own. backprompt decodes the tokens, and ends the request where a stop string occurs.
Options are read from the logits processors that transformers makes of them. So defaults of the model's
`generation_config` count, and an option that vLLM lacks is noticed, whatever its name is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import logits_process as processors

from backprompt.engines.vllm_requests import Request, Requests, imported_vllm
from backprompt.errors import GenerationError
from backprompt.generation.decoding import Decoding, TextDecoding
from backprompt.generation.found import Choice, Found
from backprompt.generation.options import num_tokens_of

_CPU = torch.device("cpu")
_TAKEN: dict[type, tuple[str, str]] = {
    processors.TemperatureLogitsWarper: ("temperature", "temperature"),
    processors.TopKLogitsWarper: ("top_k", "top_k"),
    processors.TopPLogitsWarper: ("top_p", "top_p"),
    processors.MinPLogitsWarper: ("min_p", "min_p"),
    processors.RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
}
"""Processors that vLLM has, too: vLLM's name of the option, and the processor's attribute with the value."""
_NAMES = {"do_sample", "eos_token_id", "min_new_tokens", *(name for name, _ in _TAKEN.values())}


class VllmRun:
    """Texts that vLLM continues, from the first step to the last.

    Args:
        requests: the requests to the engine.
        decoding: the options.
        prompts: the ids of the texts. A text that is listed several times is sampled several times.

    """

    def __init__(self, requests: Requests, decoding: Decoding, prompts: Sequence[tuple[int, ...]]) -> None:
        self._requests = requests
        self.decoding = decoding
        self._texts: list[TextDecoding] = []
        self._live: dict[Request, TextDecoding] = {}
        num_samples: Counter[tuple[int, ...]] = Counter()
        for ids in prompts:
            text = TextDecoding(decoding, ids, num_samples[ids])
            text.begin(_CPU)
            seed = decoding.generator(ids, num_samples[ids], _CPU).initial_seed() if decoding.is_sampling else None
            num_samples[ids] += 1
            self._texts.append(text)
            self._live[requests.add(ids, sampling_params(decoding, text.rules.processors, len(ids), seed))] = text

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the one continuation of each text so far."""
        return [text.found(num_each) for text in self._texts]

    def step(self) -> bool:
        """Let vLLM compute one batch; return whether any text is unfinished."""
        self._requests.step()
        for request, text in list(self._live.items()):
            if request.output is not None:
                _add(text, request.output.outputs[0])
            if text.is_finished:
                del self._live[request]
                self._requests.drop([request])
        return bool(self._live)

    def close(self) -> None:
        """Stop the unfinished texts."""
        self._requests.drop(self._live)
        self._live.clear()


def _add(text: TextDecoding, output: Any) -> None:
    """Add the tokens that are new, up to the end of the text."""
    new = slice(text.num_new, None)
    for token_id, row in zip(output.token_ids[new], output.logprobs[new], strict=True):
        if not text.is_finished:
            logprob = row[token_id].logprob
            text.add(Choice(token_id, logprob, row[token_id].rank == 1, logprob))


def sampling_params(decoding: Decoding, rules: Any, num_before: int, seed: int | None = None) -> Any:
    """Return options as vLLM takes them.

    Args:
        decoding: the options.
        rules: the processors of logits that transformers makes of them.
        num_before: the number of tokens of the prompt.
        seed: the seed of the random numbers.

    Raises:
        GenerationError: vLLM lacks an option, or refuses its value.

    """
    _check_kind(decoding)
    vllm = imported_vllm()
    given: dict[str, Any] = {} if decoding.is_sampling else {"temperature": 0}
    refused: set[int] = set()
    for processor in rules:
        if isinstance(processor, processors.SuppressTokensLogitsProcessor):
            refused.update(processor.suppress_tokens.tolist())
            every = range(num_tokens_of(decoding.model))
            given["allowed_token_ids"] = [idx for idx in every if idx not in refused]
        elif isinstance(processor, processors.MinLengthLogitsProcessor):
            given["min_tokens"] = max(given.get("min_tokens", 0), processor.min_length - num_before)
        elif isinstance(processor, processors.MinNewTokensLengthLogitsProcessor):
            given["min_tokens"] = max(given.get("min_tokens", 0), processor.min_new_tokens)
        elif type(processor) in _TAKEN:
            name, attribute = _TAKEN[type(processor)]
            given[name] = getattr(processor, attribute)
        else:
            own = [name for name, value in decoding.recipe.given.items() if value is not None and name not in _NAMES]
            raise GenerationError(
                f"vLLM has no {type(processor).__name__}, which {', '.join(own) or 'the model'} needs. Leave the "
                "option out, or use an LM: backprompt.load(name)."
            )
    try:
        return vllm.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            logprobs=0,
            ignore_eos=True,  # vLLM's own end tokens; those of the options are in stop_token_ids
            stop_token_ids=sorted(decoding.end_ids),
            detokenize=False,
            seed=seed,
            **given,
        )
    except vllm.exceptions.VLLMValidationError as error:
        raise GenerationError(f"vLLM refuses these options: {error}") from error


def _check_kind(decoding: Decoding) -> None:
    if decoding.recipe.constraints:
        raise GenerationError("A VllmLM supports no constraints. Use an LM: backprompt.load(name).")
    if decoding.num_beams > 1:
        raise GenerationError(
            "A VllmLM supports no beam search. Leave num_beams out, or use an LM: backprompt.load(name)."
        )
    if decoding.num_lookup_tokens:
        raise GenerationError(
            "With vLLM, prompt_lookup_num_tokens is an option of the engine and not of a call: VllmLM(..., "
            "speculative_config={'method': 'ngram', ...})."
        )
