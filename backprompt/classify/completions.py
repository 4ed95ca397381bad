"""Completions: the space between a prompt and a completion, if there is one, and the ids of the completion.

The start of a completion is a hard boundary: its string is encoded by itself, with or without a space before it.

    end_of_prompt   behind "Answer:"   behind "Answer: ", "<|assistant|>", token ids
    "auto"          " yes"             "yes"
    " "             " yes"             " yes"
    ""              "yes"              "yes"

With "auto", a completion that begins with white space gets no space before it. Some tokenizers, such as those of
SentencePiece, add a space before every string. With such a tokenizer, a completion with a space before it is encoded
as the bare string, and a completion without a space is encoded as a continuation.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from backprompt.arguments import as_choice, as_list, check_encodable
from backprompt.errors import TextTypeError
from backprompt.forest.fan import Shape
from backprompt.lm import LM
from backprompt.text.node import Text
from backprompt.text.segments import Group, leaves
from backprompt.tokens.adapted import under

EndOfPrompt: TypeAlias = Literal["auto", " ", ""]
ENDS_OF_PROMPT: tuple[EndOfPrompt, ...] = ("auto", " ", "")


@dataclass(frozen=True, eq=False)
class EncodedCompletions:
    """The completions of a prompt, or of many prompts with the same end.

    Attributes:
        strings: the completions as they were given.
        end: the end of the prompts, which decides whether a space stands before each completion.
        token_ids: the ids of each completion behind such a prompt; no two are the same, and none is empty.
        adapter: the number of the adapter at the end of the prompts, which is also the adapter of the completions.

    """

    strings: tuple[str, ...]
    end: EndOfPrompt
    token_ids: tuple[tuple[int, ...], ...]
    adapter: int = 0

    def __len__(self) -> int:
        return len(self.strings)

    @cached_property
    def shape(self) -> Shape:
        """The trie of the ids."""
        return Shape([self.forwarded(ids) for ids in self.token_ids])

    def forwarded(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return ids under the adapter."""
        return under(self.adapter, token_ids)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each completion."""
        return np.array(list(map(len, self.token_ids)), dtype=np.int64)

    @cached_property
    def longest(self) -> tuple[int, ...]:
        """The ids of the completion with the most tokens; of equally long completions, the first."""
        return max(self.token_ids, key=len)


def check_end_of_prompt(given: object) -> None:
    """Raise ValueError for a value that is not an `EndOfPrompt`."""
    as_choice(given, "end_of_prompt", ENDS_OF_PROMPT, advice=" Write other separators at the end of the prompt.")


def ends_behind(lm: LM | None, prompts: Sequence[tuple[Text, EndOfPrompt]]) -> list[EndOfPrompt]:
    """Return the effective `end_of_prompt` of each prompt: "auto" becomes "" if no space may follow the prompt."""
    added_tokens = () if lm is None else lm.session.added_tokens
    return [end if end != "auto" or _takes_a_space(prompt, added_tokens) else "" for prompt, end in prompts]


def _takes_a_space(prompt: Text, added_tokens: tuple[str, ...]) -> bool:
    """Return whether a prompt ends in a string that ends neither in white space nor in an added token."""
    segments = prompt.segments
    while segments and isinstance(segments[-1], Group):  # a frozen text alone is that text; other groups are refused
        segments = segments[-1].branches[-1].segments
    if not segments:
        return True
    last = list(leaves(itertools.takewhile(lambda segment: not isinstance(segment, Group), reversed(segments))))
    run = "".join(reversed([str(leaf) for leaf in itertools.takewhile(lambda leaf: isinstance(leaf, str), last)]))
    return bool(run) and not run[-1].isspace() and not run.endswith(added_tokens)


def space_before(completion: str, end: EndOfPrompt) -> str:
    """Return the space before a completion behind a prompt with this end, or an empty string."""
    if end != "auto":
        return end
    return "" if completion[:1].isspace() else " "


def completion_ids(
    lm: LM, completions: Iterable[tuple[EndOfPrompt, str]]
) -> dict[tuple[EndOfPrompt, str], tuple[int, ...]]:
    """Return the ids of completions behind prompts with these ends, without special tokens.

    Raises:
        TokenizerError: the tokenizer cannot encode a completion, or can encode it only with a space before it.

    """
    wanted = list(dict.fromkeys(completions))
    spaces = [space_before(completion, end) for end, completion in wanted]
    if lm.session.needs_space_between:
        strings = [space + completion for space, (_, completion) in zip(spaces, wanted, strict=True)]
        return dict(zip(wanted, lm.session.completion_ids(strings), strict=True))
    found: dict[tuple[EndOfPrompt, str], tuple[int, ...]] = {}
    for kind in (" ", ""):
        own = [key for key, space in zip(wanted, spaces, strict=True) if space == kind]
        strings = [completion for _, completion in own]
        found.update(zip(own, lm.session.completion_ids(strings, is_continuation=not kind), strict=True))
    return found


def encoded(lm: LM, behind: Sequence[tuple[EndOfPrompt, tuple[str, ...], int]]) -> list[EncodedCompletions]:
    """Return the encoded completions behind each prompt; prompts with the same tuple, end and adapter share an object.

    Raises:
        TokenizerError: see `completion_ids`.
        ValueError: a completion has no tokens, or two completions of a prompt have the same tokens, such as " a" and
            "a" with "auto".

    """
    distinct = {(end, id(strings), adapter): (end, strings) for end, strings, adapter in behind}
    ids = completion_ids(lm, [(end, completion) for end, strings in distinct.values() for completion in strings])
    for (_, completion), token_ids in ids.items():
        if not token_ids:
            raise ValueError(f"The completion {completion!r} has no tokens, so it has no probability. Leave it out.")
    made = {
        key: EncodedCompletions(strings, end, tuple(ids[end, completion] for completion in strings), key[2])
        for key, (end, strings) in distinct.items()
    }
    for completions in made.values():
        _check_different(completions)
    return [made[end, id(strings), adapter] for end, strings, adapter in behind]


def checked_completions(given: Iterable[str]) -> tuple[str, ...]:
    """Return completions as a tuple.

    Raises:
        TextTypeError, TokenizerError: a completion is not a string, or cannot be encoded.
        ValueError: there are no completions, a completion is empty, or two are equal.

    """
    listed = tuple(as_list(given, "completions must be a sequence of strings"))
    if not listed:
        raise ValueError("There are no completions. Give at least one string.")
    for idx, completion in enumerate(listed):
        if not isinstance(completion, str):
            raise TextTypeError(f"completions[{idx}] is a {type(completion).__name__}, not a str.")
        if not completion:
            raise ValueError(f"completions[{idx}] is empty, so it has no probability. Leave it out.")
        check_encodable(completion, f"completions[{idx}]")
    repeated = [completion for completion, num_times in Counter(listed).items() if num_times > 1]
    if repeated:
        raise ValueError(f"The completion {repeated[0]!r} is given more than once. Give each completion once.")
    return listed


def _check_different(completions: EncodedCompletions) -> None:
    """Raise ValueError for two completions with the same ids."""
    with_ids: dict[tuple[int, ...], str] = {}
    for completion, token_ids in zip(completions.strings, completions.token_ids, strict=True):
        other = with_ids.setdefault(token_ids, completion)
        if other != completion:
            if len({space_before(string, completions.end) + string for string in (completion, other)}) == 1:
                raise ValueError(
                    f"The completions {other!r} and {completion!r} have the same token ids, {list(token_ids)}: "
                    "end_of_prompt='auto' puts a space before a completion that has none. With end_of_prompt='' "
                    "completions count as they are written; or leave one out, such as the ' ?' of a Regex."
                )
            raise ValueError(
                f"The completions {other!a} and {completion!a} have the same token ids, {list(token_ids)}, so the "
                "model cannot tell them apart: the tokenizer writes both in one form, or has no tokens for their "
                "characters. Leave one out."
            )
