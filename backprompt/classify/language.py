"""The probability that a prompt is continued by any string of a finite language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from backprompt.arguments import as_bool
from backprompt.classify.completions import EncodedCompletions, EndOfPrompt
from backprompt.classify.prompts import Prompt
from backprompt.classify.scoring import PromptsWithCompletions
from backprompt.evaluation.behind import Behind
from backprompt.forest.fan import Shape
from backprompt.lm import LM
from backprompt.session.text_scores import scores_behind
from backprompt.tokens.constraints import Constraint, as_constraint
from backprompt.tokens.finite import strings_of


def probability_of(
    prompt: Prompt,
    language: Constraint,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    end_of_prompt: EndOfPrompt = "auto",
    with_end_token: bool = False,
) -> float:
    """Return the probability that the model continues a prompt by a string of a finite language.

    Each string is encoded by itself, and scored by these token ids, as in `log_probs`. Other token ids that spell the
    same string are not counted. All strings are scored as one trie, so common beginnings are computed once.

    Args:
        prompt: a string or a `Text`.
        language: a `Regex`, a `JsonSchema` or a `Grammar` with at most 10,000 strings of at most 1,000 bytes.
        lm: the model; may be left out if the prompt is a `Text` with a model.
        end_of_prompt: the string between the prompt and a string of the language; see `log_probs`.
        with_end_token: whether an end token of the model's `generation_config` must follow the string. Then the
            probability is that the continuation *is* a string of the language, a sum over all of its strings. Without
            an end token, the probability is that the continuation *begins* with a string of the language. Then a
            string whose token ids begin with those of another string adds nothing.

    Raises:
        TextTypeError: `language` is not a constraint.
        MissingDependencyError: llguidance is not installed.
        GenerationError: llguidance refuses the language.
        ValueError: the language is not finite, exceeds the limits above, or has no string but the empty one; has the
            empty string, with which every continuation begins, and `with_end_token` is not set; has a string both with
            and without a space before it, which are equal under "auto"; or `with_end_token` is set and the model has
            no end token.
        See `log_probs`.

    """
    as_bool(with_end_token, "with_end_token")
    strings = strings_of(as_constraint(language, "language"))
    has_empty = "" in strings
    if has_empty and not with_end_token:
        raise ValueError(
            "The language has the empty string, with which every continuation begins. Exclude the empty string, "
            "or set with_end_token=True."
        )
    others = [string for string in strings if string]
    if not others:
        raise ValueError(
            "The language has no string, or only the empty one. Give a language with at least one other string."
        )
    pairs = PromptsWithCompletions.of(prompt, others, lm, end_of_prompt)
    (encoded,), session = pairs.completions, pairs.lm.session
    if with_end_token:
        endings = _end_ids(session.causal_lm)
        whole = [*encoded.token_ids, *([()] if has_empty else [])]
        counted = [(*ids, end_id) for ids in whole for end_id in endings]
    else:
        counted = _without_continuations(encoded.token_ids)
    return _probability(pairs, encoded, counted)


def _probability(
    pairs: PromptsWithCompletions, encoded: EncodedCompletions, counted: Sequence[tuple[int, ...]]
) -> float:
    """Return the sum of the probabilities of these ids behind the one prompt."""
    shape = Shape([encoded.forwarded(ids) for ids in counted])
    found = scores_behind(pairs.lm.session, [Behind(pairs.prompt_ids[0], shape)])
    logprobs = found.scores.logprobs.cpu().double().numpy()
    starts = np.cumsum([0, *map(len, counted[:-1])])
    return float(np.exp(np.add.reduceat(logprobs, starts)).sum())


def _without_continuations(token_ids: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the ids of the strings whose ids do not begin with those of another string."""
    known = frozenset(token_ids)
    return [ids for ids in token_ids if not any(ids[:stop] in known for stop in range(1, len(ids)))]


def _end_ids(model: Any) -> list[int]:
    """Return the end tokens of a model, each once."""
    given = model.generation_config.eos_token_id
    found = [] if given is None else [given] if isinstance(given, int) else list(dict.fromkeys(given))
    if not found:
        raise ValueError(
            "The model has no end token, so a continuation never ends: leave with_end_token out, or set "
            "model.generation_config.eos_token_id."
        )
    return found
