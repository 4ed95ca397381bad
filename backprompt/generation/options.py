"""Fields of transformers' `GenerationConfig` that `generate` takes, and their valid values.

transformers checks many of the fields only where they are used, or not at all. So a string as a seed, a probability of
2, an unknown token id or an option of an unsupported decoding method would change results without an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from backprompt.arguments import as_bool, as_int, as_number
from backprompt.errors import GenerationError

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")

_CACHE = "keys and values are kept by the LM"
_OURS = {  # fields that only `generate` of transformers takes, and what to do instead
    "num_return_sequences": "use n=...",
    "max_length": "use max_new_tokens=..., which does not count the prompt",
    "return_dict_in_generate": "a Text is returned, with completion_tokens and completion_logprobs",
    "output_scores": "completion_logprobs are always there",
    "output_logits": "text.logits and text.model_repr.all_logits() are always there",
    "output_attentions": "text.model_repr.attention() reads them",
    "output_hidden_states": "text.model_repr.hidden_states are always there",
    "use_cache": "keys and values are always kept",
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "low_memory": _CACHE,
    "num_beam_groups": "beams are searched as one group",
    "diversity_penalty": "beams are searched as one group",
    "penalty_alpha": "it is for contrastive search, which is not supported",
    "dola_layers": "it is for DoLa decoding, which is not supported",
    "is_assistant": "it is for assisted decoding by a second model, which is not supported",
    "compile_config": "nothing is compiled",
    "disable_compile": "nothing is compiled",
    "transformers_version": "it has no effect on decoding",
}

_PROBABILITY = (0.0, 1.0)
_NOT_NEGATIVE = (0.0, math.inf)
_ANY = (-math.inf, math.inf)


def checked(given: Mapping[str, Any], num_tokens: int) -> dict[str, Any]:
    """Return the checked fields of `GenerationConfig`, with numbers of Python; None stays, and counts as not given.

    Args:
        given: the fields by name.
        num_tokens: the size of the model's vocabulary.

    Raises:
        GenerationError: a field does not exist or is not supported, or its value is invalid.

    """
    for name, instead in _OURS.items():
        if name in given:
            raise GenerationError(f"generate takes no {name}: {instead}.")
    known = GenerationConfig().to_dict().keys()
    unknown = [name for name in given if name not in known]
    if unknown:
        raise GenerationError(
            f"generate has no option {unknown[0]!r}. It has max_new_tokens, stop, include_stop, seed, constraint and "
            "the fields of transformers' GenerationConfig."
        )
    as_token_ids: Callable[..., Any] = partial(_as_token_ids, num_tokens=num_tokens)
    checks = {**_CHECKS, **dict.fromkeys(_TOKEN_IDS, as_token_ids)}
    return {
        name: value if value is None or name not in checks else checks[name](value, name=name)
        for name, value in given.items()
    }


def config_of(model: Any, given: Mapping[str, Any]) -> GenerationConfig:
    """Return all options: the given ones, else those of the model's own configuration, but greedy by default.

    Raises:
        GenerationError: options contradict each other or are not supported.

    """
    options = checked(given, num_tokens_of(model))
    asked = [name for name in SAMPLING_FIELDS if options.get(name) is not None]
    if asked and options.get("do_sample") is False:
        raise GenerationError(f"{asked[0]} is for sampling, but do_sample is False. Leave out one of the two.")
    options["do_sample"] = bool(asked) if options.get("do_sample") is None else options["do_sample"]
    try:
        config: GenerationConfig = model._prepare_generation_config(None, **options)[0]
        mode = config.get_generation_mode()
    except (TypeError, ValueError) as error:
        raise GenerationError(f"transformers refuses these options: {error}") from error
    is_lookup = mode == GenerationMode.ASSISTED_GENERATION and config.prompt_lookup_num_tokens is not None
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH) and not is_lookup:
        raise GenerationError(
            "generate does greedy decoding, sampling, beam search (num_beams=...) and look-ahead by n-grams "
            f"(prompt_lookup_num_tokens=...), not {mode.value.replace('_', ' ')}."
        )
    if config.prompt_lookup_num_tokens is not None and mode == GenerationMode.BEAM_SEARCH:
        raise GenerationError(
            "prompt_lookup_num_tokens looks ahead for one continuation, so it cannot be "
            "combined with num_beams. Leave out one of the two."
        )
    if config.token_healing:
        raise GenerationError(
            "generate does not support token healing, which changes the end of the prompt. Leave out token_healing."
        )
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise GenerationError(
            "generate does not support classifier-free guidance, which runs the model a second "
            "time. Leave out guidance_scale."
        )
    return config


def num_tokens_of(model: Any) -> int:
    """Return the size of a model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def _as_early_stopping(given: Any, name: str) -> bool | str:
    if given == "never":
        return "never"
    if not isinstance(given, bool):
        raise GenerationError(f'{name} must be True, False or "never", not {given!r}.')
    return given


def _as_token_ids(given: Any, name: str, num_tokens: int) -> int | list[int]:
    ids = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not ids:
        raise GenerationError(f"{name} must be token ids, not {given!r}. Leave it out.")
    numbers = [as_int(token_id, f"an id of {name}", at_least=0, error=GenerationError) for token_id in ids]
    if max(numbers) >= num_tokens:
        raise GenerationError(f"{name} has the id {max(numbers)}, but the model's ids are 0 to {num_tokens - 1}.")
    return numbers if isinstance(given, Iterable) else numbers[0]


def _int(at_least: int) -> Callable[..., Any]:
    return partial(as_int, at_least=at_least, error=GenerationError)


def _number(bounds: tuple[float, float]) -> Callable[..., Any]:
    return partial(as_number, bounds=bounds, error=GenerationError)


_TOKEN_IDS = ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_CHECKS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("num_beams", "prompt_lookup_num_tokens", "max_matching_ngram_size"), _int(1)),
    **dict.fromkeys(
        ("top_k", "min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _int(0)
    ),
    **dict.fromkeys(
        ("temperature", "repetition_penalty", "encoder_repetition_penalty", "max_time"), _number(_NOT_NEGATIVE)
    ),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), _number(_PROBABILITY)),
    **dict.fromkeys(("length_penalty", "guidance_scale"), _number(_ANY)),
    **dict.fromkeys(
        ("do_sample", "renormalize_logits", "remove_invalid_values", "token_healing"),
        partial(as_bool, error=GenerationError),
    ),
    "early_stopping": _as_early_stopping,
}
