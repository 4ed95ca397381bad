"""Continued texts: texts that also have their prompt and their continuation as attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from backprompt.bound import bound_lm
from backprompt.generation.found import FinishReason, Found
from backprompt.text.engine import Engine
from backprompt.text.node import Text, lazily
from backprompt.text.segments import Adapted, last_leaf, leaves
from backprompt.tokens.tokenizer import added
from backprompt.visible import shortened

_REPR_CHARACTERS = 120

Continued = TypeVar("Continued", bound="ContinuedText")


class ContinuedText(Text):
    """A prompt and its continuation, a segment of token ids. Joining it with `+` gives a plain `Text`."""

    # Behind the ids there may be a string: see `stops.Cut`.

    __slots__ = ("_completion", "_prompt")

    _prompt: Text
    _completion: Text

    @property
    def prompt(self) -> Text:
        """The text that was continued."""
        return self._prompt

    @property
    def completion_text(self) -> Text:
        """The continuation as its own text: the ids, and the string behind them if a stop string cut a token."""
        return self._completion

    @property
    def completion_tokens(self) -> tuple[int, ...]:
        """The ids that were added, including an end token.

        If a stop string ended the text, these are only the whole tokens before the cut.
        """
        ids = [leaf for leaf in leaves(self._completion.segments) if isinstance(leaf, tuple)]
        return ids[0] if ids else ()

    @property
    def completion(self) -> str:
        """The continuation as a string, without special tokens such as an end token."""
        lm = bound_lm(self, "the string of token ids")
        special = set(lm.tokenizer.all_special_ids)
        kept = [token_id for token_id in self.completion_tokens if token_id not in special]
        with lazily():
            whole, before = (self._prompt + Text.from_tokens(kept, lm)).string, self._prompt.string
        return added(before, whole) + self.completion_rest  # a prompt may end within a character

    @property
    def completion_rest(self) -> str:
        """The string behind `completion_tokens` if a stop string cut a token, else an empty string."""
        strings = [leaf for leaf in leaves(self._completion.segments) if isinstance(leaf, str)]
        return strings[-1] if strings else ""

    def _plain(self) -> Text:
        with lazily():
            return self._prompt + self._completion


def continue_as(
    kind: type[Continued], prompt: Text, token_ids: Sequence[int], lm: Engine[Text], rest: str = ""
) -> Continued:
    """Return a text of the class `kind`: a prompt, the ids that continue it, and behind the ids the string `rest`.

    The continuation is under the adapter of the prompt's last segment.
    """
    with lazily():
        completion = under_the_adapter_of(prompt, Text.from_tokens(token_ids, lm) + rest)
        plain = prompt + completion
    text = kind.__new__(kind)
    for name in (
        "_segment",
        "_add_special_tokens",
        "_left",
        "_right",
        "_lm",
        "_num_segments",
        "_hash",
        "_noted",
        "_noted_by",
        "_whole_hash",
    ):
        setattr(text, name, getattr(plain, name))
    text._prompt, text._completion = prompt, completion
    return text


def under_the_adapter_of(before: Text, text: Text) -> Text:
    """Return a text under the adapter of another text's last segment, or unchanged if that segment has none."""
    last = last_leaf(before.segments)
    return text.with_adapter(last.adapter) if isinstance(last, Adapted) else text


class GeneratedText(ContinuedText):
    """The result of `generate`: a prompt and the model's continuation, a segment of token ids.

    A stop string and the string behind it are cut off (with `include_stop=True`, only the string behind it). If the cut
    is within a token, the tokens before that token stay as generated. The kept part of the token stands behind them as
    a string, encoded like any string: `text.tokens` has ids for this part, but `completion_tokens` and
    `completion_logprobs` do not.
    """

    __slots__ = ("_constrained_logprobs", "_finish_reason", "_logprob_dtype", "_logprobs")

    _logprobs: tuple[float, ...]
    _constrained_logprobs: tuple[float, ...]
    _logprob_dtype: torch.dtype
    _finish_reason: FinishReason

    def __repr__(self) -> str:
        completion = shortened(repr(self.completion), _REPR_CHARACTERS, gap="...")
        return f"<GeneratedText: {completion} behind {self.prompt!r}, finish_reason={self.finish_reason!r}>"

    @property
    def completion_logprobs(self) -> Tensor:
        """Log-probability of each of `completion_tokens` in the model's own distribution, `(tokens,)`, nats.

        The dtype is float64 for a model in float64, else float32. Temperature, penalties, constraints and other options
        that change the choice have no effect here.
        """
        return torch.tensor(self._logprobs, dtype=self._logprob_dtype)

    @property
    def constrained_logprobs(self) -> Tensor:
        """Log-probability of each of `completion_tokens` among the tokens that the constraint allowed, `(tokens,)`.

        In nats. The probability in the model's own distribution is divided by the probability of all allowed tokens. A
        token without an alternative has 0. Without a constraint, the values are those of `completion_logprobs`.
        """
        return torch.tensor(self._constrained_logprobs, dtype=self._logprob_dtype)

    @property
    def finish_reason(self) -> FinishReason:
        """The reason why the continuation ended.

        "eos": an end token. "stop": a stop string. "constraint": no token may follow under the constraint, and the
        model has no end token. "length": `max_new_tokens`; a constrained text may then be only the beginning of an
        allowed string. "criteria": another criterion of the options, such as `max_time`. "interrupted": the caller
        stopped the generation.
        """
        return self._finish_reason


def generated_text(lm: Engine[Text], prompt: Text, found: Found, dtype: torch.dtype) -> GeneratedText:
    """Return a prompt with the continuation that was found; `dtype`: that of its log-probabilities."""
    kept = found.choices if found.cut is None else found.choices[: found.cut.num_tokens]
    rest = "" if found.cut is None else found.cut.rest
    text = continue_as(GeneratedText, prompt, [choice.token_id for choice in kept], lm, rest)
    text._logprobs, text._logprob_dtype = tuple(choice.logprob for choice in kept), dtype
    text._constrained_logprobs = tuple(choice.constrained_logprob for choice in kept)
    text._finish_reason = found.finish_reason
    return text
