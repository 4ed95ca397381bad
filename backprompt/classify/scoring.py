"""Prompts with completions, and the log-probabilities of their tokens.

All prompts and completions form one forest. So a prompt's keys and values exist once, and completions share their
common beginnings. The log-probability of each completion's first token is read from the row of the prompt's last token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from backprompt.classify.completions import (
    EncodedCompletions,
    EndOfPrompt,
    check_end_of_prompt,
    checked_completions,
    completion_ids,
    encoded,
    ends_behind,
)
from backprompt.classify.prompts import Example, Prompt, Prompts, as_prompts, bound, check_prompts, common_lm
from backprompt.classify.weighing import Floats
from backprompt.errors import EmptyTextError
from backprompt.evaluation.behind import Behind
from backprompt.lm import LM
from backprompt.progress import Bar, check_show, is_wanted, showing
from backprompt.session.text_scores import scores_behind
from backprompt.text.node import Text
from backprompt.tokens.adapted import number_of
from backprompt.tokens.graph import TokenIds, flat, num_positions

MIN_PROMPTS_FOR_A_BAR = 5
TOKENS_AT_A_TIME = 1 << 20
"""Prompts are scored in slices of about this many tokens, because token ids take memory, too. A token that several
texts share counts once for each text."""


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
        lm: an `LM` or a `(model, tokenizer)` tuple; may be left out if a prompt is a `Text` with a model.
        end_of_prompt: the string between a prompt and a completion. A completion is encoded by itself, together with
            this string. " ": always a space, as in CAPPr. "": no space. "auto": a space, except before a completion
            that begins with white space, and behind a prompt that ends in white space, in a special token (as a chat
            template's header does), in another added token that does not end in a letter or digit (`<think>`), or in
            token ids.
        show_progress_bar: whether to show a bar; by default only on a terminal, for at least 5 prompts.

    Returns:
        For a single prompt, a list for each completion, with a float for each token. For a sequence of prompts, a list
        of such results. A token of probability 0 has -inf.

    Raises:
        TypeError, ValueError: invalid arguments; the message says what to do instead. Raised before anything is
            computed.
        GroupError: a prompt ends in a group, so no single token stands before the completion.
        All errors of `LM.token_logprobs`, such as TextTooLongError, which names the prompt.

    """
    check_show(show_progress_bar)
    pairs = PromptsWithCompletions.of(prompts, completions, lm, end_of_prompt)
    scored = [[logprobs.tolist() for logprobs in rows] for rows in pairs.log_probs(show_progress_bar)]
    return scored[0] if pairs.is_single else scored


def token_logprobs(
    texts: Prompt | Sequence[Prompt],
    lm: LM | tuple[Any, Any] | None = None,
    *,
    end_of_prompt: EndOfPrompt = "auto",
    show_progress_bar: bool | None = None,
) -> list[Any]:
    """Return the log-probability of each token of each text, given the earlier tokens; None for a first token.

    Strings are encoded like completions, without special tokens. With "auto", strings are encoded as behind a prompt
    that ends in a word. A `Text` is scored unchanged. By default a bar shows if scoring takes several passes and over
    two seconds.

    Returns:
        A list of floats for a single text, else a list of such lists.

    Raises:
        See `log_probs`.

    """
    check_end_of_prompt(end_of_prompt)
    check_show(show_progress_bar)
    listed, is_single = as_prompts(texts, "texts")
    check_prompts(listed, "texts", is_single=is_single)
    lm = common_lm(listed, lm)
    ids = completion_ids(lm, [(end_of_prompt, text) for text in listed if isinstance(text, str)])
    as_texts = [
        Text.from_tokens(ids[end_of_prompt, text], lm) if isinstance(text, str) else bound(text, lm) for text in listed
    ]
    logprobs = lm.token_logprobs(as_texts, show_progress_bar=show_progress_bar)
    found = [of_text.cpu().double().tolist() for of_text in logprobs]
    rows = [[None if value != value else value for value in row] for row in found]  # nan: nothing predicts it
    return rows[0] if is_single else rows


@dataclass(frozen=True)
class PromptsWithCompletions:
    """Prompts bound to an `LM`, and the completions of each: checked and encoded, not yet computed.

    Attributes:
        lm: the `LM` of all prompts.
        prompts: the prompts as texts.
        prompt_ids: the ids of each prompt, without the tokens that a tokenizer appends at an end.
        completions: the completions of each prompt; prompts with common completions share one object.
        examples: the given examples, if each prompt has completions of its own; else empty.
        is_single: whether a single prompt was given, not a sequence.

    """

    lm: LM
    prompts: list[Text]
    prompt_ids: list[TokenIds]
    completions: list[EncodedCompletions]
    examples: list[Example]
    is_single: bool

    @classmethod
    def of(
        cls,
        prompts: Prompts,
        completions: Sequence[str] | None,
        lm: LM | tuple[Any, Any] | None,
        end_of_prompt: EndOfPrompt,
    ) -> PromptsWithCompletions:
        """Check and encode the arguments of `log_probs`, with its errors."""
        listed, is_single = as_prompts(prompts, "prompts")
        examples = _examples_among(listed, completions, end_of_prompt)
        check_end_of_prompt(end_of_prompt)
        shared = () if completions is None else checked_completions(completions)
        bare: list[Prompt] = [example.prompt for example in examples] or listed
        check_prompts(bare, "prompts", is_single=is_single)
        lm = common_lm(bare, lm)
        texts = [bound(prompt, lm) for prompt in bare]
        per_prompt = [tuple(example.completions) for example in examples] or [shared] * len(texts)
        given_ends = [example.end_of_prompt for example in examples] or [end_of_prompt] * len(texts)
        ends = ends_behind(lm, list(zip(texts, given_ends, strict=True)))
        prompt_ids = lm.session.prompt_ids(texts)  # refuses a prompt that ends in a group
        adapters = [number_of(flat(ids)[-1]) if ids else 0 for ids in prompt_ids]
        behind = encoded(lm, list(zip(ends, per_prompt, adapters, strict=True)))
        pairs = cls(lm, texts, prompt_ids, behind, examples, is_single)
        pairs._check_lengths()
        return pairs

    @property
    def are_examples(self) -> bool:
        """Whether each prompt has completions of its own."""
        return bool(self.examples)

    def log_probs(self, show_progress_bar: bool | None) -> Iterator[list[Floats]]:
        """Yield, for each prompt, a list with the token log-probabilities of each completion, `(tokens,)`."""
        for block in self.scored(show_progress_bar):
            stops = np.cumsum(block.completions.lengths)[:-1]
            yield from (np.split(row, stops) for row in block.logprobs)

    def scored(self, show_progress_bar: bool | None) -> Iterator[ScoredBlock]:
        """Score the prompts, and yield them in order; neighbours with common completions form one block."""
        with self.bar(show_progress_bar) as bar:
            for prompt_idxs in self._slices():
                for block in self._score(prompt_idxs):
                    bar.update(len(block.prompt_idxs))
                    yield block

    def bar(self, show: bool | None) -> Any:
        """Return a progress bar over the prompts; by default it shows on long work only."""
        is_shown = is_wanted(show, is_long=len(self.prompts) >= MIN_PROMPTS_FOR_A_BAR)
        return Bar(total=len(self.prompts), desc="prompts", disable=not is_shown)

    def _check_lengths(self) -> None:
        """Raise for ids that the model lacks, a prompt without tokens, or a prompt too long with its completions."""
        distinct = dict.fromkeys(self.completions)
        all_ids = dict.fromkeys(ids for own in distinct for ids in own.token_ids)
        lengths = [
            num_positions(ids) + len(own.longest) for ids, own in zip(self.prompt_ids, self.completions, strict=True)
        ]
        if self.lm.session.limits.are_fine([*self.prompt_ids, *all_ids], lengths):
            return
        self.lm.check([Text.from_tokens(ids, self.lm) for ids in all_ids])
        longest = {own: Text.from_tokens(own.longest, self.lm) for own in distinct}
        self.lm.check([prompt + longest[own] for prompt, own in zip(self.prompts, self.completions, strict=True)])
        for idx, token_ids in enumerate(self.prompt_ids):
            if not token_ids:
                raise EmptyTextError(
                    f"prompts[{idx}], {self.prompts[idx]!r}, has no tokens. A completion's first token needs something "
                    "before it."
                )

    def _slices(self) -> Iterator[range]:
        """Yield slices of prompts, as ranges of their indices; the prompts of a slice are scored together."""
        first, num_tokens = 0, 0
        at_a_time = TOKENS_AT_A_TIME * self.lm.session.num_workers
        for idx, (prompt_ids, completions) in enumerate(zip(self.prompt_ids, self.completions, strict=True)):
            num_tokens += (len(prompt_ids) + len(completions.longest)) * len(completions)
            if num_tokens >= at_a_time or idx == len(self.prompts) - 1:
                yield range(first, idx + 1)
                first, num_tokens = idx + 1, 0

    def _score(self, prompt_idxs: range) -> Iterator[ScoredBlock]:
        """Score some prompts' completions together."""
        with showing(False):  # there is a bar over the prompts
            found = scores_behind(
                self.lm.session, [Behind(self.prompt_ids[idx], self.completions[idx].shape) for idx in prompt_idxs]
            )
        together = found.scores.logprobs.cpu().double().numpy()  # one transfer
        start = 0
        for completions, group in itertools.groupby(prompt_idxs, key=self.completions.__getitem__):
            idxs = list(group)
            stop = start + len(idxs) * completions.shape.num_scores
            yield ScoredBlock(idxs, completions, together[start:stop].reshape(len(idxs), -1))
            start = stop


@dataclass(frozen=True)
class ScoredBlock:
    """Neighbouring prompts with common completions, scored.

    Attributes:
        prompt_idxs: the idx of each prompt.
        completions: the common completions.
        logprobs: the log-probabilities of the tokens of all completions behind each prompt, `(prompts, tokens)`.

    """

    prompt_idxs: Sequence[int]
    completions: EncodedCompletions
    logprobs: Floats


def _examples_among(listed: Sequence[Any], completions: object, end_of_prompt: EndOfPrompt) -> list[Example]:
    """Return the examples if all prompts are examples, and an empty result if no prompt is one.

    Raises:
        TypeError: only some are examples, or completions are given in two places or in none.
        ValueError: there are no prompts.

    """
    if not listed:
        raise ValueError("There are no prompts. Give at least one.")
    examples = [prompt for prompt in listed if isinstance(prompt, Example)]
    if examples and len(examples) < len(listed):
        raise TypeError("Give either examples or prompts, not both.")
    if examples and completions is not None:
        raise TypeError("Each Example has its own completions; leave `completions` out.")
    if examples and end_of_prompt != "auto":
        raise TypeError("Each Example has its own end_of_prompt; set it in the Example.")
    if not examples and completions is None:
        raise TypeError("predict_proba(prompts, completions, lm) needs completions, a sequence of strings.")
    return examples
