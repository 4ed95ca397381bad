"""Classification by completion probability: which of given completions is the most probable behind a prompt.

A completion is a hard boundary: its ids are those of its string encoded by itself, behind those of the prompt; see
completions.py. All prompts and completions are one forest, so a prompt's keys and values exist once, completions share
what they begin with, and the first token of every completion is read off the prompt's last row.

Names and options are those of CAPPr (Dubey, https://github.com/kddubey/cappr), which scores completions one after the
other; with `end_of_prompt=" "`, its default, so are the numbers.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from backprompt.arguments import as_bool, as_floats, as_list, as_lm, as_number, check_encodable
from backprompt.calibration import Floats
from backprompt.calibration import best_threshold as best_threshold
from backprompt.calibration import calibrate as calibrate
from backprompt.completions import EndOfPrompt, check_end_of_prompt, completion_ids, ends_behind
from backprompt.errors import EmptyTextError, MixedModelsError, NonFiniteError, TextTypeError, UnboundTextError
from backprompt.lm import LM
from backprompt.progress import Bar, check_show, is_wanted
from backprompt.search import Candidate, Search, make_trie
from backprompt.text import Text
from backprompt.token_graph import TokenIds

Prompt: TypeAlias = "str | Text"
Aggregate: TypeAlias = Literal["mean", "sum"]
Strategy: TypeAlias = Literal["exhaustive", "best-first"]
AGGREGATES: tuple[Aggregate, ...] = ("mean", "sum")
STRATEGIES: tuple[Strategy, ...] = ("exhaustive", "best-first")
MIN_PROMPTS_FOR_A_BAR = 5
NODES_AT_A_TIME = 32
"""Best-first search expands about as many nodes in one pass, where they may still lead to the best completion: on two
cores of a CPU a pass of 32 tokens takes hardly longer than one of a single token."""
MAX_LIVE_SEARCHES = 32
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
        end_of_prompt: "auto", " " or "": stands between prompt and completion; see `log_probs`.

    Raises:
        TypeError, ValueError: what `predict_proba` raises for such arguments.

    """

    prompt: Prompt
    completions: Sequence[str]
    prior: Sequence[float] | None = None
    normalize: bool = True
    end_of_prompt: EndOfPrompt = "auto"

    def __post_init__(self) -> None:
        _check_prompt(self.prompt, "prompt")
        object.__setattr__(self, "completions", _checked_completions(self.completions))
        check_end_of_prompt(self.end_of_prompt)
        object.__setattr__(self, "prior", _checked_prior(self.prior, len(self.completions)))
        _check_normalize(as_bool(self.normalize, "normalize"), len(self.completions))


Prompts: TypeAlias = "Prompt | Example | Sequence[Prompt] | Sequence[Example]"


def log_probs(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    end_of_prompt: EndOfPrompt = "auto",
    show_progress_bar: bool | None = None,
) -> list[Any]:
    """Return the log-probability of each token of each completion behind each prompt, in nats.

    Args:
        prompts: a string, a `Text` or an `Example`, or a sequence of them.
        completions: the candidates, for prompts that are no examples.
        lm: an `LM` or a `(model, tokenizer)` tuple; may be left out where a prompt is a `Text` that has one.
        end_of_prompt: what stands between a prompt and a completion. "auto": a space, but nothing where the prompt ends
            in white space, in a special token (as a chat template's header does), in another added token that does
            not end in a letter or digit (`<think>`), or in token ids, or the completion begins with white space. " ": a
            space, always, as in CAPPr. "": nothing. A completion is encoded by itself with the space before
            it, if there is one.
        show_progress_bar: by default on a terminal where there are at least 5 prompts.

    Returns:
        For a single prompt a list of floats a completion, a float a token; for a sequence a list of such lists. -inf
        for a token of probability 0.

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
    lm: LM | tuple[Any, Any] | None = None,
    *,
    prior: Sequence[float] | None = None,
    normalize: bool = True,
    end_of_prompt: EndOfPrompt = "auto",
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
        log_marg_probs_completions: these, if they are known: `token_logprobs(completions, lm, end_of_prompt=...)`, with
            the same `end_of_prompt`.
        neutral_prompt: divide each completion's probability by the one that it has behind this prompt, such as "N/A"
            (domain-conditional normalisation, Holtzman et al. 2021, arXiv 2104.08315). By "auto" a space stands behind
            it as it may, whatever the prompts end in.

    Returns:
        A float array, `(completions,)` for a single prompt and `(prompts, completions)` for a sequence; for a sequence
        of examples a list of arrays. 0 for a completion that the model or the prior excludes.

    Raises:
        NonFiniteError: every completion behind a prompt has probability 0 and they shall be normalized; or one is
            possible behind a prompt, and has probability 0 where it is to be divided by that.
        See `log_probs`.

    """
    task = _Task.of(
        prompts,
        completions,
        lm,
        prior=prior,
        normalize=normalize,
        end_of_prompt=end_of_prompt,
        aggregate=aggregate,
        discount_completions=discount_completions,
        log_marg_probs_completions=log_marg_probs_completions,
        neutral_prompt=neutral_prompt,
        show_progress_bar=show_progress_bar,
    )
    are_normalized = [example.normalize for example in task.work.examples] or itertools.repeat(normalize)
    found = []
    for idx, (weights, is_normalized) in enumerate(zip(task.weights(), are_normalized, strict=False)):
        if is_normalized:
            task.check_possible(idx, weights.max())
        found.append(_posterior(weights, is_normalized))
    if task.work.is_single:
        return found[0]
    return found if task.work.are_examples else np.stack(found)


def predict(
    prompts: Prompts,
    completions: Sequence[str] | None = None,
    lm: LM | tuple[Any, Any] | None = None,
    *,
    search: Strategy = "exhaustive",
    **options: Any,
) -> Any:
    """Return the most probable completion behind each prompt: a `str` for a single prompt, else a list of them.

    Args:
        prompts, completions, lm: see `log_probs`.
        search: "exhaustive" scores every completion. "best-first" finds the same one and scores only those that may
            still be it: for hundreds of completions and more, many of which begin alike.
        **options: those of `predict_proba`.

    Raises:
        ValueError: there is but one completion.
        NonFiniteError: every completion behind a prompt has probability 0; see `predict_proba`.
        See `log_probs`.

    """
    if search not in STRATEGIES:
        raise ValueError(f"search must be one of {', '.join(map(repr, STRATEGIES))}, not {search!r}.")
    unknown = options.keys() - inspect.signature(predict_proba).parameters.keys()
    if unknown:
        raise TypeError(f"predict has no option {min(unknown)!r}; its options are those of predict_proba, and search.")
    listed, is_single = _listed(prompts, "prompts")
    shared = None if completions is None else _checked_completions(completions)
    candidates = [prompt.completions for prompt in listed if isinstance(prompt, Example)] or [shared or ()]
    if any(len(row) == 1 for row in candidates):
        raise ValueError(
            "With one completion there is nothing to predict. For its probability call predict_proba with "
            "normalize=False."
        )
    task = _Task.of(prompts if is_single else listed, shared, lm, **options)
    best = task.best_first() if search == "best-first" else task.exhaustive()
    found = [row[idx] for row, idx in zip(task.work.completions, best, strict=True)]
    return found[0] if task.work.is_single else found


def token_logprobs(
    texts: Prompt | Sequence[Prompt],
    lm: LM | tuple[Any, Any] | None = None,
    *,
    end_of_prompt: EndOfPrompt = "auto",
    show_progress_bar: bool | None = None,
) -> list[Any]:
    """Return the log-probability of each token of each text given those before it; None for a first token.

    Strings are encoded as completions are, without special tokens, by "auto" as behind a prompt that a space may
    follow. A `Text` is taken as it is. A bar shows by default where it takes several passes and longer than two
    seconds.

    Returns:
        A list of floats for a single text, else a list of such lists.

    Raises:
        See `log_probs`.

    """
    check_end_of_prompt(end_of_prompt)
    listed, is_single = _listed(texts, "texts")
    for idx, text in enumerate(listed):
        _check_prompt(text, "texts" if is_single else f"texts[{idx}]")
    lm = _common_lm(listed, lm)
    ids = completion_ids(lm, [(end_of_prompt, text) for text in listed if isinstance(text, str)])
    bound = [
        Text.from_tokens(ids[end_of_prompt, text], lm) if isinstance(text, str) else _bound(text, lm) for text in listed
    ]
    logprobs = lm.token_logprobs(bound, show_progress_bar=show_progress_bar)
    found = [_as_floats(of_text.cpu().double().numpy()) for of_text in logprobs]
    rows = [[None if value != value else value for value in row] for row in found]  # nan: nothing predicts it
    return rows[0] if is_single else rows


# The work


@dataclass(frozen=True)
class _Work:
    """Checked prompts, each bound to the LM, and the completions of each."""

    lm: LM
    prompts: list[Text]
    completions: list[tuple[str, ...]]  # of each prompt
    ends: list[EndOfPrompt]  # what stands behind each
    examples: list[Example]
    is_single: bool

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        completions: Sequence[str] | None,
        lm: LM | tuple[Any, Any] | None,
        end_of_prompt: EndOfPrompt,
    ) -> _Work:
        listed, is_single = _listed(prompts, "prompts")
        if not listed:
            raise ValueError("There are no prompts.")
        examples = [prompt for prompt in listed if isinstance(prompt, Example)]
        if examples and len(examples) < len(listed):
            raise TypeError("Give either examples or prompts, not both.")
        if examples and completions is not None:
            raise TypeError("Examples have completions of their own; leave `completions` out.")
        if examples and end_of_prompt != "auto":
            raise TypeError("Examples have an end_of_prompt of their own; set it there.")
        if not examples and completions is None:
            raise TypeError("predict_proba(prompts, completions, lm) needs completions, a sequence of strings.")
        check_end_of_prompt(end_of_prompt)
        shared = () if completions is None else _checked_completions(completions)
        bare: list[Prompt] = [p.prompt if isinstance(p, Example) else p for p in listed]
        for idx, prompt in enumerate(bare):
            _check_prompt(prompt, "prompts" if is_single else f"prompts[{idx}]")
        lm = _common_lm(bare, lm)
        texts = [_bound(prompt, lm) for prompt in bare]
        per_prompt = [tuple(example.completions) for example in examples] or [shared] * len(texts)
        given = [example.end_of_prompt for example in examples] or [end_of_prompt] * len(texts)
        ends = ends_behind(lm, list(zip(texts, given, strict=True)))
        work = cls(lm, texts, per_prompt, ends, examples, is_single)
        work._check()
        return work

    @property
    def are_examples(self) -> bool:
        """Whether each prompt has completions of its own."""
        return bool(self.examples)

    def log_probs(self, show_progress_bar: bool | None) -> Iterator[list[Floats]]:
        """Yield, for each prompt, an array of token log-probabilities a completion."""
        with self.bar(show_progress_bar) as bar:
            for rows in self._scored():
                bar.update()
                yield rows

    def bar(self, show: bool | None) -> Any:
        """Return a progress bar over the prompts, which shows on long work where it is not said whether to."""
        is_shown = is_wanted(show, is_long=len(self.prompts) >= MIN_PROMPTS_FOR_A_BAR)
        return Bar(total=len(self.prompts), desc="prompts", disable=not is_shown)

    def _check(self) -> None:
        """Raise for what cannot be scored."""
        _ = self.prompt_ids  # refuses a prompt that ends in a group
        longest: dict[tuple[EndOfPrompt, int], Text] = {}
        for idx, place in enumerate(self._rows):
            if place not in longest:
                ids = self._ids_behind(idx)
                _check_different(list(zip(self.completions[idx], ids, strict=True)))
                most = max(ids, key=len)
                longest[place] = Text.from_tokens(most, self.lm)
        self.lm.check([prompt + longest[place] for prompt, place in zip(self.prompts, self._rows, strict=True)])
        for idx, token_ids in enumerate(self.prompt_ids):
            if not token_ids:
                raise EmptyTextError(
                    f"prompts[{idx}], {self.prompts[idx]!r}, has no tokens. A completion's first token needs something "
                    "before it."
                )

    def _scored(self) -> Iterator[list[Floats]]:
        first, num_tokens = 0, 0
        for idx, prompt_ids in enumerate(self.prompt_ids):
            ids = self._ids_behind(idx)
            num_tokens += (len(prompt_ids) + max(map(len, ids))) * len(ids)
            if num_tokens >= TOKENS_AT_A_TIME or idx == len(self.prompts) - 1:
                yield from self._score(range(first, idx + 1))
                first, num_tokens = idx + 1, 0

    def _score(self, prompt_idxs: Sequence[int]) -> Iterator[list[Floats]]:
        """Score some prompts' completions together."""
        pairs = [(idx, token_ids) for idx in prompt_idxs for token_ids in self._ids_behind(idx)]
        starts = [len(self.prompt_ids[idx]) for idx, _ in pairs]
        texts = [self.behind(*pair) for pair in pairs]
        found = self.lm.token_logprobs(texts, starts, show_progress_bar=False)  # there is a bar over the prompts
        together = torch.cat(found).cpu().double().numpy()  # one transfer
        ends = np.cumsum([len(token_ids) for _, token_ids in pairs])
        rows = iter(np.split(together, ends[:-1]))
        for idx in prompt_idxs:
            yield [next(rows) for _ in self.completions[idx]]

    def behind(self, prompt_idx: int, token_ids: tuple[int, ...]) -> Text:
        """Return a prompt with ids behind it."""
        prompt_ids = self.prompt_ids[prompt_idx]
        if isinstance(prompt_ids, tuple):
            return Text.from_tokens(prompt_ids + token_ids, self.lm)  # the prompt is not encoded again
        return self.prompts[prompt_idx] + Text.from_tokens(token_ids, self.lm)

    def _ids_behind(self, prompt_idx: int) -> list[tuple[int, ...]]:
        """Return the ids of each completion of a prompt."""
        end = self.ends[prompt_idx]
        return [self.completion_ids[end, completion] for completion in self.completions[prompt_idx]]

    @property
    def _rows(self) -> list[tuple[EndOfPrompt, int]]:
        """What says which ids stand behind each prompt, compared without reading all of its completions."""
        return [(end, id(row)) for end, row in zip(self.ends, self.completions, strict=True)]

    @cached_property
    def prompt_ids(self) -> list[TokenIds]:
        """The ids of each prompt as they are where something follows."""
        return self.lm.prompt_ids(self.prompts)

    @cached_property
    def completion_ids(self) -> dict[tuple[EndOfPrompt, str], tuple[int, ...]]:
        """The ids of each completion, by its end of prompt and itself."""
        one_each = dict(zip(self._rows, itertools.count(), strict=False)).values()
        wanted = [(self.ends[idx], completion) for idx in one_each for completion in self.completions[idx]]
        found = completion_ids(self.lm, wanted)
        for (_, completion), ids in found.items():
            if not ids:
                raise ValueError(
                    f"The completion {completion!r} has no tokens, so it has no probability. Leave it out."
                )
        return found


@dataclass(frozen=True)
class _Scheme:
    """How the log-probabilities of a completion's tokens become its weight: the logarithm of its probability, up to a
    constant that all completions of the prompt share.
    """

    aggregate: Aggregate
    discounts: Sequence[Floats] | None = None  # for each completion what is added to its tokens'
    neutral: Sequence[float] | None = None  # each completion's weight behind the neutral prompt
    log_prior: Sequence[float] | None = None

    def weight(self, completion_idx: int, logprobs: Floats) -> float:
        """Return the weight of a completion whose tokens have these log-probabilities.

        Of a completion with probability 0 it is -inf, whatever that is divided by; where a probability is divided by 0,
        it is inf.
        """
        log_prior = 0.0 if self.log_prior is None else self.log_prior[completion_idx]
        if -np.inf in (log_prior, logprobs.min()):
            return -np.inf
        discounted = logprobs if self.discounts is None else logprobs + self.discounts[completion_idx]
        weight = float(discounted.mean() if self.aggregate == "mean" else discounted.sum())
        if self.neutral is not None and weight > -np.inf:
            weight -= self.neutral[completion_idx]
        return float(weight + log_prior)

    def candidate(self, completion_idx: int, token_ids: tuple[int, ...]) -> Candidate:
        """Return what a search needs to know of a completion."""
        offset = self.weight(completion_idx, np.zeros(len(token_ids)))
        return Candidate(token_ids, offset, len(token_ids) if self.aggregate == "mean" else 1)


@dataclass(frozen=True)
class _Task:
    """The work, how completions are weighed behind each prompt, and whether to show a bar."""

    work: _Work
    schemes: Sequence[_Scheme]
    show_progress_bar: bool | None

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        completions: Sequence[str] | None,
        lm: LM | tuple[Any, Any] | None,
        *,
        prior: Sequence[float] | None = None,
        normalize: bool = True,
        end_of_prompt: EndOfPrompt = "auto",
        aggregate: Aggregate = "mean",
        discount_completions: float = 0.0,
        log_marg_probs_completions: Sequence[Sequence[float]] | None = None,
        neutral_prompt: Prompt | None = None,
        show_progress_bar: bool | None = None,
    ) -> _Task:
        """Check everything, and score what the weights need besides the prompts."""
        discount = as_number(discount_completions, "discount_completions")
        check_aggregate(aggregate)
        check_show(show_progress_bar)
        as_bool(normalize, "normalize")
        if log_marg_probs_completions is not None and not discount:
            raise TypeError(
                "log_marg_probs_completions would not be used. Set discount_completions, too, or leave both out."
            )
        work = _Work.of(prompts, completions, lm, end_of_prompt)
        if work.are_examples:
            if prior is not None or not normalize or discount or neutral_prompt is not None:
                raise TypeError(
                    "Examples have priors and normalize of their own: set them there. discount_completions and "
                    "neutral_prompt are for prompts with common completions, not for examples."
                )
            schemes = [_Scheme(aggregate, log_prior=_log(example.prior)) for example in work.examples]
            return cls(work, schemes, show_progress_bar)
        shared = work.completions[0]
        log_prior = _log(_checked_prior(prior, len(shared)))
        _check_normalize(normalize, len(shared))
        behind_nothing = None
        if neutral_prompt is not None:
            _check_prompt(neutral_prompt, "neutral_prompt")
            behind_nothing = _Work.of(neutral_prompt, shared, work.lm, end_of_prompt)
        discounts = _discounts(work, discount, log_marg_probs_completions, end_of_prompt) if discount else {}
        neutral = None
        if behind_nothing is not None:
            (rows,) = behind_nothing.log_probs(show_progress_bar=False)
            neutral = [_Scheme(aggregate).weight(idx, row) for idx, row in enumerate(rows)]
        scheme_of = {end: _Scheme(aggregate, discounts.get(end), neutral, log_prior) for end in set(work.ends)}
        return cls(work, [scheme_of[end] for end in work.ends], show_progress_bar)

    def weights(self) -> Iterator[Floats]:
        """Yield, for each prompt, the weight of each completion."""
        scored = self.work.log_probs(self.show_progress_bar)
        for scheme, shared, rows in zip(self.schemes, self.work.completions, scored, strict=True):
            yield np.array([_finite(scheme.weight(idx, row), shared[idx]) for idx, row in enumerate(rows)])

    def check_possible(self, prompt_idx: int, best_weight: float) -> None:
        """Raise if the best completion behind a prompt has probability 0.

        Raises:
            NonFiniteError: names the prompt.

        """
        if best_weight == -np.inf:
            raise NonFiniteError(
                f"Each of the {len(self.work.completions[prompt_idx])} completions has probability 0 behind "
                f"prompts[{prompt_idx}], {self.work.prompts[prompt_idx]!r}, so none of them is the most probable one, "
                "and their sum is 0. Give completions that the model can produce and the prior does not exclude; "
                "log_probs tells which of their tokens the model cannot."
            )

    def exhaustive(self) -> list[int]:
        """Return, for each prompt, the completion with the highest weight, the first of equals, scoring all."""
        best = []
        for idx, weights in enumerate(self.weights()):
            self.check_possible(idx, weights.max())
            best.append(int(weights.argmax()))
        return best

    def best_first(self) -> list[int]:
        """Return, for each prompt, the completion with the highest weight, the first of equals."""
        work, best = self.work, [0] * len(self.work.prompts)
        searches = self._searches()
        live: dict[int, Search] = {}
        with work.bar(self.show_progress_bar) as bar:
            while True:
                live.update(itertools.islice(searches, MAX_LIVE_SEARCHES - len(live)))
                if not live:
                    return best
                expanded = []
                for idx, search in list(live.items()):
                    nodes = search.expand(max(1, NODES_AT_A_TIME // len(live)))
                    expanded += [(idx, search, node) for node in nodes]
                    if not nodes:
                        self.check_possible(idx, search.best_score)
                        best[idx] = search.best_idx
                        del live[idx]
                        bar.update()
                if not expanded:
                    continue
                following = work.lm.next_token_logprobs(
                    [work.behind(idx, node.token_ids) for idx, _, node in expanded],
                    [list(node.children) for _, _, node in expanded],
                    show_progress_bar=False,
                )
                logprobs = iter(torch.cat(following).tolist())
                for _, search, node in expanded:
                    search.tell(node, {token_id: next(logprobs) for token_id in node.children})

    def _searches(self) -> Iterator[tuple[int, Search]]:
        """Yield a search for each prompt; those of prompts with the same completions and scheme share a trie."""
        ids_of = self.work.completion_ids
        made_for, root = None, None
        for idx, (scheme, end, row) in enumerate(zip(self.schemes, self.work.ends, self.work.completions, strict=True)):
            if root is None or made_for != (id(scheme), end, row):
                root = make_trie([scheme.candidate(i, ids_of[end, completion]) for i, completion in enumerate(row)])
                made_for = (id(scheme), end, row)

            def score(
                completion_idx: int, logprobs: list[float], scheme: _Scheme = scheme, row: Sequence[str] = row
            ) -> float:
                return _finite(scheme.weight(completion_idx, np.array(logprobs)), row[completion_idx])

            yield idx, Search(root, score)


def _discounts(
    work: _Work, discount: float, given: Sequence[Sequence[float]] | None, end_of_prompt: EndOfPrompt
) -> dict[EndOfPrompt, list[Floats]]:
    """Return, by what stands behind a prompt, what to add to each completion's token log-probabilities.

    The same ids are scored as behind such a prompt.
    """
    shared = work.completions[0]
    if given is None:
        scored = {end: token_logprobs(list(shared), work.lm, end_of_prompt=end) for end in set(work.ends)}
    else:
        _check_are_of(work, end_of_prompt)
        listed = as_list(given, "log_marg_probs_completions must be a sequence of numbers for each completion")
        if len(listed) != len(shared):
            raise ValueError(
                f"log_marg_probs_completions has {len(listed)} elements for {len(shared)} completions; give one a "
                "completion."
            )
        scored = dict.fromkeys(work.ends, listed)
    return {
        end: [
            discount * _marginals(row, completion, len(work.completion_ids[end, completion]))
            for completion, row in zip(shared, rows, strict=True)
        ]
        for end, rows in scored.items()
    }


def _check_are_of(work: _Work, end_of_prompt: EndOfPrompt) -> None:
    """Raise ValueError where other ids are scored behind a prompt than by `token_logprobs` of the bare completions."""
    shared = work.completions[0]
    bare = completion_ids(work.lm, [(end_of_prompt, completion) for completion in shared])
    for end in dict.fromkeys(work.ends):
        for completion in shared:
            if work.completion_ids[end, completion] != bare[end_of_prompt, completion]:
                idx = work.ends.index(end)
                raise ValueError(
                    "log_marg_probs_completions are those of completions with a space before them, but none stands "
                    f"before {completion!r} behind prompts[{idx}], {work.prompts[idx]!r}. Leave them out, or say "
                    'end_of_prompt="" or " " in both calls.'
                )


def _marginals(row: Any, completion: str, num_tokens: int) -> Floats:
    """Return the log-probabilities of a completion's tokens by itself, `(tokens,)`; 0 for what nothing predicts."""
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


def _finite(weight: float, completion: str) -> float:
    """Return the weight of a completion.

    Raises:
        NonFiniteError: it is inf.

    """
    if weight == np.inf:
        raise NonFiniteError(
            f"The completion {completion!r} is possible behind a prompt, but has probability 0 by itself or behind the "
            "neutral prompt, so nothing can be divided by that. Leave it out, use another neutral prompt, or a "
            "discount_completions of at least 0."
        )
    return weight


def _log(prior: Any) -> Any:
    with np.errstate(divide="ignore"):
        return None if prior is None else np.log(prior)


def _posterior(weights: Floats, normalize: bool) -> Floats:
    """Return probabilities, by Bayes' rule without underflow where they are normalized."""
    if not normalize:
        return np.exp(weights)
    probabilities: Floats = np.exp(weights - weights.max())
    probabilities /= probabilities.sum()
    return probabilities


def _as_floats(logprobs: Floats) -> list[float]:
    found: list[float] = logprobs.tolist()
    return found


# Arguments


def _listed(given: Any, name: str) -> tuple[list[Any], bool]:
    """Return what was given as a list, and whether it was a single one."""
    if isinstance(given, (str, Text, Example)):
        return [given], True
    return as_list(given, f"{name} must be a string, a Text, or a sequence of them"), False


def _check_prompt(prompt: object, name: str) -> None:
    if not isinstance(prompt, (str, Text)):
        raise TextTypeError(f"{name} is a {type(prompt).__name__}, not a str or a Text.")
    if isinstance(prompt, str):
        check_encodable(prompt, name)
        if not prompt:
            raise ValueError(f"{name} is empty. A completion's first token needs something before it.")


def _checked_completions(completions: Iterable[str]) -> tuple[str, ...]:
    listed = tuple(as_list(completions, "completions must be a sequence of strings"))
    if not listed:
        raise ValueError("There are no completions.")
    for idx, completion in enumerate(listed):
        if not isinstance(completion, str):
            raise TextTypeError(f"completions[{idx}] is a {type(completion).__name__}, not a str.")
        if not completion:
            raise ValueError(f"completions[{idx}] is empty, so it has no probability. Leave it out.")
        check_encodable(completion, f"completions[{idx}]")
    repeated = [completion for completion, num_times in Counter(listed).items() if num_times > 1]
    if repeated:
        raise ValueError(f"The completion {repeated[0]!r} is there more than once. Give each one once.")
    return listed


def _check_different(completions: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Raise ValueError for two completions that are one to the model; each comes with its ids."""
    with_ids: dict[tuple[int, ...], str] = {}
    for completion, token_ids in completions:
        other = with_ids.setdefault(token_ids, completion)
        if other != completion:
            raise ValueError(
                f"The completions {other!a} and {completion!a} have the same token ids, {list(token_ids)}, so the "
                "model cannot tell them apart: the tokenizer writes both in one form, or has no tokens for their "
                "characters. Leave one out."
            )


def _checked_prior(prior: Sequence[float] | None, num_completions: int) -> Any:
    if prior is None:
        return None
    given = as_floats(prior, "prior")
    if given.shape != (num_completions,):
        raise ValueError(f"prior has the shape {given.shape} for {num_completions} completions; give a number each.")
    if not ((given >= 0) & (given <= 1)).all() or not np.isclose(given.sum(), 1):
        raise ValueError(f"prior must be probabilities that sum to 1, not {given.tolist()} (sum {given.sum():.6g}).")
    return given


def check_aggregate(aggregate: object) -> None:
    """Raise ValueError for what is no `Aggregate`."""
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {', '.join(map(repr, AGGREGATES))}, not {aggregate!r}.")


def _check_normalize(normalize: bool, num_completions: int) -> None:
    if normalize and num_completions == 1:
        raise ValueError(
            "With one completion a normalized probability is 1, whatever it is. Set normalize=False, or give more "
            "completions."
        )


def _common_lm(prompts: Iterable[Prompt], given: LM | tuple[Any, Any] | None) -> LM:
    lm = None if given is None else as_lm(given)
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
