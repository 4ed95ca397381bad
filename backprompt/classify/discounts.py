"""Discounts: log-probabilities of completions by themselves, to be added to those behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backprompt.arguments import as_list, as_number
from backprompt.classify.completions import EncodedCompletions, EndOfPrompt, completion_ids
from backprompt.classify.options import Options
from backprompt.classify.scoring import PromptsWithCompletions, token_logprobs
from backprompt.classify.weighing import Floats


def discounts(pairs: PromptsWithCompletions, options: Options) -> dict[EncodedCompletions, list[Floats]]:
    """Return the array `(tokens,)` to add to the token log-probabilities of each of the common completions.

    Each `EncodedCompletions` has arrays of its own: a discount is scored with the token ids that stand behind the
    prompts, and these ids depend on the end of the prompts.

    Raises:
        TypeError, ValueError: `log_marg_probs_completions` do not fit the completions' tokens.

    """
    distinct = list(dict.fromkeys(pairs.completions))
    given = options.log_marg_probs_completions
    if given is None:
        scored = [token_logprobs(own.strings, pairs.lm, end_of_prompt=own.end) for own in distinct]
    else:
        _check_have_bare_ids(pairs, options.end_of_prompt)
        scored = [_as_rows(given, len(distinct[0]))] * len(distinct)
    return {
        own: [
            options.discount_completions * _marginals(row, completion, len(token_ids))
            for row, completion, token_ids in zip(rows, own.strings, own.token_ids, strict=True)
        ]
        for own, rows in zip(distinct, scored, strict=True)
    }


def _check_have_bare_ids(pairs: PromptsWithCompletions, end_of_prompt: EndOfPrompt) -> None:
    """Raise ValueError if a completion has other ids behind a prompt than in `token_logprobs` of bare completions."""
    bare = completion_ids(pairs.lm, [(end_of_prompt, completion) for completion in pairs.completions[0].strings])
    for own in dict.fromkeys(pairs.completions):
        for completion, token_ids in zip(own.strings, own.token_ids, strict=True):
            if token_ids != bare[end_of_prompt, completion]:
                idx = pairs.completions.index(own)
                raise ValueError(
                    "log_marg_probs_completions belong to completions with a space before them, but no space "
                    f"stands before {completion!r} behind prompts[{idx}], {pairs.prompts[idx]!r}. Leave them out, "
                    'or give end_of_prompt="" or " " in both calls.'
                )


def _as_rows(given: Sequence[Sequence[float]], num_completions: int) -> list[Any]:
    rows = as_list(given, "log_marg_probs_completions must be a sequence of numbers for each completion")
    if len(rows) != num_completions:
        raise ValueError(
            f"log_marg_probs_completions has {len(rows)} elements for {num_completions} completions; give one for "
            "each completion."
        )
    return rows


def _marginals(row: Any, completion: str, num_tokens: int) -> Floats:
    """Return the log-probabilities of a completion's tokens by itself, `(tokens,)`; 0 for an unpredicted token."""
    name = f"log_marg_probs_completions of {completion!r}"
    values = as_list(row.tolist() if hasattr(row, "tolist") else row, f"{name} must be a sequence of numbers")
    if len(values) != num_tokens:
        raise ValueError(
            f"log_marg_probs_completions has {len(values)} numbers for {completion!r}, which has {num_tokens} tokens; "
            "give what token_logprobs(completions, lm) returns."
        )
    is_unpredicted = [value is None or (idx == 0 and value != value) for idx, value in enumerate(values)]
    return np.array([0.0 if is_ else _logprob(v, name) for is_, v in zip(is_unpredicted, values, strict=True)])


def _logprob(given: Any, name: str) -> float:
    """Return a number, or -inf for a token that the model excludes."""
    return -np.inf if given == -np.inf else as_number(given, name)
