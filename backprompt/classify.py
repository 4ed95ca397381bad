"""Classification by completion probability: which of given completions is the most probable behind a prompt.

A completion is a hard boundary: its ids are those of `end_of_prompt + completion` encoded by itself, behind those of
the prompt. All prompts and completions are one forest, so a prompt's keys and values exist once, completions share
what they begin with, and the first token of every completion is read off the prompt's last row.

Names, options and numbers are those of CAPPr (Dubey, https://github.com/kddubey/cappr), which scores completions one
after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from backprompt.errors import GroupError, MixedModelsError, TextTypeError, UnboundTextError
from backprompt.lm import LM
from backprompt.segments import Group
from backprompt.text import Text

Prompt: TypeAlias = "str | Text"
Aggregate: TypeAlias = Literal["mean", "sum"]
Floats: TypeAlias = "npt.NDArray[np.floating[Any]]"

AGGREGATES: tuple[Aggregate, ...] = ("mean", "sum")
MIN_PROMPTS_FOR_A_BAR = 5
TOKENS_AT_A_TIME = 1 << 20
"""Texts are scored in slices of about as many tokens, counted in strings: their ids take memory, too."""


@dataclass(frozen=True)
class Example:
    """A prompt with completions of its own, for `log_probs`, `predict_proba` and `predict`.

    Args:
        prompt: what the completions follow.
        completions: the candidates.
        prior: a probability for each completion; by default all are the same.
        normalize: whether probabilities shall sum to one over the completions.
        end_of_prompt: " " or "": stands between prompt and completion; see `log_probs`.

    Raises:
        TypeError, ValueError: what `predict_proba` raises for such arguments.

    """

    prompt: Prompt
    completions: Sequence[str]
    prior: Sequence[float] | None = None
    normalize: bool = True
    end_of_prompt: str = " "

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, "prompt")
        object.__setattr__(self, "completions", _checked_completions(self.completions))
        _check_end_of_prompt(self.end_of_prompt)
        object.__setattr__(self, "prior", _checked_prior(self.prior, len(self.completions)))
        _check_normalize(self.normalize, len(self.completions))


Prompts: TypeAlias = "Prompt | Example | Sequence[Prompt] | Sequence[Example]"


def log_probs(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | None = None,
    *,
    end_of_prompt: str = " ",
    show_progress_bar: bool | None = None,
) -> list[Any]:
    """Return the log-probability of each token of each completion behind each prompt, in nats.

    Args:
        prompts: a string, a `Text` or an `Example`, or a sequence of them.
        completions: the candidates, for prompts that are no examples.
        lm: may be left out where a prompt is a `Text` that has one.
        end_of_prompt: " " or "". A completion is encoded as `end_of_prompt + completion`; it is left out for tokenizers
            that put a space before a string by themselves (SentencePiece).
        show_progress_bar: by default where there are at least 5 prompts.

    Returns:
        For a single prompt a list of floats a completion, a float a token; for a sequence a list of such lists.

    Raises:
        TypeError, ValueError: arguments that make no sense, each with what to do instead; before anything is computed.
        GroupError: a prompt ends in a group, so no one token stands before the completion.
        What `LM.token_logprobs` raises, such as TextTooLongError, which names the prompt.

    """
    work = _Work.of(prompts, completions, lm, end_of_prompt)
    scored = [list(map(_as_floats, rows)) for rows in work.log_probs(show_progress_bar)]
    return scored[0] if work.is_single else scored


def predict_proba(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | None = None,
    *,
    prior: Sequence[float] | None = None,
    normalize: bool = True,
    end_of_prompt: str = " ",
    aggregate: Aggregate = "mean",
    discount_completions: float = 0.0,
    log_marg_probs_completions: Sequence[Sequence[float]] | None = None,
    neutral_prompt: Prompt | None = None,
    show_progress_bar: bool | None = None,
) -> Any:
    """Return the probability of each completion behind each prompt.

    Args:
        prompts, completions, lm, end_of_prompt, show_progress_bar: see `log_probs`.
        prior: a probability for each completion; by default all are the same.
        normalize: whether probabilities shall sum to one over the completions.
        aggregate: of a completion's token log-probabilities, the "mean" (as CAPPr does: long completions are not at a
            disadvantage) or the "sum" (the probability of the whole completion).
        discount_completions: add this times the log-probability of each of a completion's tokens given those before it
            in the completion alone; negative against completions that are probable anywhere.
        log_marg_probs_completions: these, if they are known: `token_logprobs(completions, lm, end_of_prompt=...)`.
        neutral_prompt: divide each completion's probability by the one that it has behind this prompt, such as "N/A"
            (domain-conditional normalisation, Holtzman et al. 2021, arXiv 2104.08315).

    Returns:
        A float array, `(completions,)` for a single prompt and `(prompts, completions)` for a sequence; for a sequence
        of examples a list of arrays.

    Raises:
        See `log_probs`.

    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(map(repr, AGGREGATES))}, not {aggregate!r}.")
    if log_marg_probs_completions is not None and not discount_completions:
        raise TypeError(
            "log_marg_probs_completions would not be used. Set discount_completions, too, or leave both out."
        )
    work = _Work.of(prompts, completions, lm, end_of_prompt, neutral_prompt)
    if work.are_examples and (prior is not None or not normalize or discount_completions):
        raise TypeError("Examples have priors and normalize of their own: set them there; discounting is for prompts.")
    if not work.are_examples:
        prior = _checked_prior(prior, len(work.completions[0]))
        _check_normalize(normalize, len(work.completions[0]))
    discounts = _discounts(work, discount_completions, log_marg_probs_completions)
    scored = work.log_probs(show_progress_bar)
    neutral = next(scored) if neutral_prompt is not None else None
    reduce = np.mean if aggregate == "mean" else np.sum
    found = []
    for idx, rows in enumerate(scored):
        likelihoods = np.array([reduce(row + discount) for row, discount in zip(rows, discounts, strict=False)])
        if neutral is not None:
            likelihoods -= np.array([reduce(row) for row in neutral])
        example = work.examples[idx] if work.are_examples else None
        own_prior, own_normalize = (prior, normalize) if example is None else (example.prior, example.normalize)
        found.append(_posterior(likelihoods, own_prior, own_normalize))
    if work.is_single:
        return found[0]
    return found if work.are_examples else np.stack(found)


def predict(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | None = None,
    **options: Any,
) -> Any:
    """Return the most probable completion behind each prompt: a `str` for a single prompt, else a list of them.

    Args:
        prompts, completions, lm: see `log_probs`.
        **options: those of `predict_proba`.

    Raises:
        ValueError: there is but one completion.
        See `log_probs`.

    """
    candidates = [p.completions for p in _listed(prompts)[0] if isinstance(p, Example)] or [completions or ()]
    if any(len(c) == 1 for c in candidates):
        raise ValueError(
            "With one completion there is nothing to predict. For its probability call predict_proba with "
            "normalize=False."
        )
    probabilities = predict_proba(prompts, completions, lm, **options)
    if isinstance(probabilities, np.ndarray) and probabilities.ndim == 1:
        return candidates[0][int(probabilities.argmax())]
    rows = candidates if len(candidates) == len(probabilities) else candidates * len(probabilities)
    return [row[int(row_probabilities.argmax())] for row, row_probabilities in zip(rows, probabilities, strict=True)]


def token_logprobs(texts: Prompt | Sequence[Prompt], lm: LM | None = None, *, end_of_prompt: str = " ") -> list[Any]:
    """Return the log-probability of each token of each text given those before it; None for a first token.

    Strings are encoded as completions are: without special tokens, as `end_of_prompt + text`. A `Text` is taken as it
    is.

    Returns:
        A list of floats for a single text, else a list of such lists.

    """
    _check_end_of_prompt(end_of_prompt)
    listed, is_single = _listed(texts)
    for idx, text in enumerate(listed):
        _check_prompt(text, f"texts[{idx}]")
    lm = _common_lm(listed, lm)
    strings = [text for text in listed if isinstance(text, str)]
    space = _end(lm, end_of_prompt)
    ids = dict(zip(strings, lm.completion_ids([space + string for string in strings]), strict=True))
    bound = [Text.from_tokens(ids[text], lm) if isinstance(text, str) else _bound(text, lm) for text in listed]
    found = [_as_floats(logprobs.cpu().double().numpy()) for logprobs in lm.token_logprobs(bound)]
    rows = [[None if value != value else value for value in row] for row in found]  # nan: nothing predicts it
    return rows[0] if is_single else rows


# Calibration


def calibrate(probabilities: npt.ArrayLike, neutral_probabilities: npt.ArrayLike) -> Floats:
    """Return probabilities corrected for what the prompt prefers whatever is asked (contextual calibration).

    Zhao et al. 2021, arXiv 2102.09690: divided by what `predict_proba` gave for neutral inputs ("N/A", "") in the same
    prompt, and normalized again.

    Args:
        probabilities: `(prompts, completions)` or `(completions,)`.
        neutral_probabilities: `(completions,)`, or `(neutral prompts, completions)`, whose mean is taken.

    Raises:
        ValueError: the numbers of completions differ, or a neutral probability is 0.

    """
    given, neutral = np.asarray(probabilities, dtype=float), np.asarray(neutral_probabilities, dtype=float)
    neutral = neutral.mean(axis=0) if neutral.ndim == 2 else neutral
    if neutral.ndim != 1 or given.shape[-1] != len(neutral):
        raise ValueError(
            f"probabilities have {given.shape[-1]} completions and neutral_probabilities the shape {neutral.shape}. "
            "Score the same completions in both."
        )
    if not (neutral > 0).all():
        raise ValueError("A neutral probability is 0, so nothing can be divided by it. Use other neutral prompts.")
    corrected: Floats = given / neutral
    corrected /= corrected.sum(axis=-1, keepdims=True)
    return corrected


def best_threshold(probabilities: npt.ArrayLike, is_positive: npt.ArrayLike) -> float:
    """Return the threshold t at which `probability >= t` is most often right on labelled data; the middle of a gap.

    Args:
        probabilities: of the positive class, `(examples,)`.
        is_positive: whether each example is of it, `(examples,)`.

    Raises:
        ValueError: they are empty or differ in shape.

    """
    given, labels = np.asarray(probabilities, dtype=float), np.asarray(is_positive, dtype=bool)
    if given.ndim != 1 or given.shape != labels.shape or not len(given):
        raise ValueError(
            f"probabilities and is_positive must be two lists of one length, not of shapes {given.shape} and "
            f"{labels.shape}."
        )
    order = np.unique(given)
    thresholds = np.concatenate([[order[0]], (order[1:] + order[:-1]) / 2, [np.nextafter(order[-1], np.inf)]])
    num_right = ((given[None] >= thresholds[:, None]) == labels[None]).sum(axis=1)
    return float(thresholds[int(num_right.argmax())])


# The work


@dataclass(frozen=True)
class _Work:
    """Checked prompts, each bound to the LM, and the completions of each."""

    lm: LM
    prompts: list[Text]
    completions: list[tuple[str, ...]]  # of each prompt
    ends: list[str]
    examples: list[Example]
    is_single: bool

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        completions: Sequence[str] | None,
        lm: LM | None,
        end_of_prompt: str,
        neutral_prompt: Prompt | None = None,
    ) -> _Work:
        listed, is_single = _listed(prompts)
        if not listed:
            raise ValueError("There are no prompts.")
        examples = [prompt for prompt in listed if isinstance(prompt, Example)]
        if examples and len(examples) < len(listed):
            raise TypeError("Give either examples or prompts, not both.")
        if examples and completions is not None:
            raise TypeError("Examples have completions of their own; leave `completions` out.")
        if not examples and completions is None:
            raise TypeError("predict_proba(prompts, completions, lm) needs completions, a sequence of strings.")
        _check_end_of_prompt(end_of_prompt)
        shared = () if completions is None else _checked_completions(completions)
        bare: list[Prompt] = [p.prompt if isinstance(p, Example) else p for p in listed]
        for idx, prompt in enumerate(bare):
            _check_prompt(prompt, "prompts" if is_single else f"prompts[{idx}]")
        if neutral_prompt is not None:
            if examples:
                raise TypeError("neutral_prompt is for prompts with common completions, not for examples.")
            _check_prompt(neutral_prompt, "neutral_prompt")
            bare.insert(0, neutral_prompt)
        lm = _common_lm(bare, lm)
        texts = [_bound(prompt, lm) for prompt in bare]
        for text in texts:
            if text.segments and isinstance(text.segments[-1], Group):
                raise GroupError(
                    f"{text!r} ends in a group, so no one token stands before a completion. Add a segment."
                )
        per_prompt = [tuple(example.completions) for example in examples] or [shared] * len(texts)
        ends = [example.end_of_prompt for example in examples] or [end_of_prompt] * len(texts)
        return cls(lm, texts, per_prompt, ends, examples, is_single)

    @property
    def are_examples(self) -> bool:
        """Whether each prompt has completions of its own."""
        return bool(self.examples)

    def log_probs(self, show_progress_bar: bool | None) -> Iterator[list[Floats]]:
        """Yield, for each prompt, an array of token log-probabilities a completion."""
        show = len(self.prompts) >= MIN_PROMPTS_FOR_A_BAR if show_progress_bar is None else show_progress_bar
        with tqdm(total=len(self.prompts), desc="prompts", disable=not show) as bar:
            for rows in self._scored():
                bar.update()
                yield rows

    def _scored(self) -> Iterator[list[Floats]]:
        ids_of = self.completion_ids()
        texts: list[list[Text]] = []
        num_tokens = 0
        for idx, (prompt, length) in enumerate(zip(self.prompts, self.lm.num_tokens(self.prompts), strict=True)):
            ids = [ids_of[self.ends[idx], completion] for completion in self.completions[idx]]
            texts.append([prompt + Text.from_tokens(completion, self.lm) for completion in ids])
            num_tokens += (length + max(map(len, ids))) * len(ids)
            if num_tokens >= TOKENS_AT_A_TIME or idx == len(self.prompts) - 1:
                yield from self._score(texts)
                texts, num_tokens = [], 0

    def _score(self, texts: Sequence[Sequence[Text]]) -> Iterator[list[Floats]]:
        flat = [text for row in texts for text in row]
        lengths = self.lm.num_tokens(flat)
        starts = [length - len(text.segments[-1]) for text, length in zip(flat, lengths, strict=True)]  # type: ignore[arg-type]
        logprobs = iter(self.lm.token_logprobs(flat, starts))
        for row in texts:
            yield [next(logprobs).cpu().double().numpy() for _ in row]

    def completion_ids(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """Return the ids of each completion, by its end of prompt and itself."""
        wanted = list(
            dict.fromkeys((end, c) for end, row in zip(self.ends, self.completions, strict=True) for c in row)
        )
        space = {end: _end(self.lm, end) for end in set(self.ends)}
        strings = [space[end] + completion for end, completion in wanted]
        found = dict(zip(wanted, self.lm.completion_ids(strings), strict=True))
        for (_, completion), ids in found.items():
            if not ids:
                raise ValueError(
                    f"The completion {completion!r} has no tokens, so it has no probability. Leave it out."
                )
        return found


def _discounts(work: _Work, discount: float, log_marg_probs: Sequence[Sequence[float]] | None) -> Iterable[Any]:
    """Return what to add to each completion's token log-probabilities."""
    if not discount:
        return itertools.repeat(0.0)
    shared = work.completions[0]
    given = log_marg_probs
    if given is None:
        given = token_logprobs(list(shared), work.lm, end_of_prompt=work.ends[0])
    if len(given) != len(shared):
        raise ValueError(
            f"log_marg_probs_completions has {len(given)} elements for {len(shared)} completions; give one a "
            "completion."
        )
    return [discount * np.array([0.0 if value is None else value for value in row]) for row in given]


def _posterior(log_likelihoods: Floats, prior: Sequence[float] | None, normalize: bool) -> Floats:
    """Apply Bayes' rule, without underflow where it is normalized."""
    with np.errstate(divide="ignore"):
        weights = log_likelihoods if prior is None else log_likelihoods + np.log(prior)
    if not normalize:
        return np.exp(weights)
    probabilities: Floats = np.exp(weights - weights.max())
    probabilities /= probabilities.sum()
    return probabilities


def _as_floats(logprobs: Floats) -> list[float]:
    found: list[float] = logprobs.tolist()
    return found


# Arguments


def _end(lm: LM, end_of_prompt: str) -> str:
    return end_of_prompt if lm.needs_space_between else ""


def _listed(given: Any) -> tuple[list[Any], bool]:
    """Return what was given as a list, and whether it was a single one."""
    if isinstance(given, (str, Text, Example)):
        return [given], True
    if not hasattr(given, "__reversed__") and not hasattr(given, "__getitem__"):
        raise TypeError(
            f"Prompts must be ordered, so that results can be; a {type(given).__name__} is not. Use a list."
        )
    return list(given), False


def _check_prompt(prompt: object, name: str) -> None:
    if not isinstance(prompt, (str, Text)):
        raise TextTypeError(f"{name} is a {type(prompt).__name__}, not a str or a Text.")
    if isinstance(prompt, str) and not prompt:
        raise ValueError(f"{name} is empty. A completion's first token needs something before it.")


def _checked_completions(completions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(completions, (str, Text)):
        raise TypeError(
            "completions must be a sequence of strings. Wrap a single one in a list (with normalize=False)."
        )
    if not hasattr(completions, "__reversed__") and not hasattr(completions, "__getitem__"):
        raise TypeError(f"completions must be ordered; a {type(completions).__name__} is not. Use a list.")
    listed = tuple(completions)
    if not listed:
        raise ValueError("There are no completions.")
    for idx, completion in enumerate(listed):
        if not isinstance(completion, str):
            raise TextTypeError(f"completions[{idx}] is a {type(completion).__name__}, not a str.")
        if not completion:
            raise ValueError(f"completions[{idx}] is empty, so it has no probability. Leave it out.")
    repeated = [completion for completion in dict.fromkeys(listed) if listed.count(completion) > 1]
    if repeated:
        raise ValueError(f"The completion {repeated[0]!r} is there more than once. Give each one once.")
    return listed


def _checked_prior(prior: Sequence[float] | None, num_completions: int) -> Any:
    if prior is None:
        return None
    given = np.asarray(prior, dtype=float)
    if given.shape != (num_completions,):
        raise ValueError(f"prior has the shape {given.shape} for {num_completions} completions; give a number each.")
    if not ((given >= 0) & (given <= 1)).all() or not np.isclose(given.sum(), 1):
        raise ValueError(f"prior must be probabilities that sum to 1, not {given.tolist()} (sum {given.sum():.6g}).")
    return given


def _check_end_of_prompt(end_of_prompt: str) -> None:
    if end_of_prompt not in ("", " "):
        raise ValueError(f'end_of_prompt must be " " or "", not {end_of_prompt!r}. Put more at the end of the prompt.')


def _check_normalize(normalize: bool, num_completions: int) -> None:
    if normalize and num_completions == 1:
        raise ValueError(
            "With one completion a normalized probability is 1, whatever it is. Set normalize=False, or give more "
            "completions."
        )


def _common_lm(prompts: Iterable[Prompt], lm: LM | None) -> LM:
    for prompt in prompts:
        own = prompt.lm if isinstance(prompt, Text) else None
        if own is not None and lm is not None and own is not lm:
            raise MixedModelsError(f"{prompt!r} belongs to another LM than the one to score with. Use one of them.")
        lm = own if lm is None else lm
    if lm is None:
        raise UnboundTextError("No LM to score with: pass lm=..., or build prompts with Text(string, lm).")
    return lm


def _bound(prompt: Prompt, lm: LM) -> Text:
    return Text("", lm) + prompt
