"""What stands between a prompt and a completion, and which ids a completion has there.

A completion is a hard boundary: its ids are those of its string encoded by itself, with a space before it or without.

    end_of_prompt   behind "Answer:"   behind "Answer: ", "<|assistant|>", token ids
    "auto"          " yes"             "yes"
    " "             " yes"             " yes"
    ""              "yes"              "yes"

A completion that begins with white space gets no more of it by "auto". Some tokenizers put a space before every string
by themselves, such as those of SentencePiece: there a string with a space before it is what they make of the string,
and one without is encoded as a continuation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from backprompt.lm import LM
from backprompt.segments import Group
from backprompt.text import Text

EndOfPrompt: TypeAlias = Literal["auto", " ", ""]
ENDS_OF_PROMPT: tuple[EndOfPrompt, ...] = ("auto", " ", "")


def check_end_of_prompt(given: object) -> None:
    """Raise ValueError for what is no `EndOfPrompt`."""
    if given not in ENDS_OF_PROMPT:
        raise ValueError(
            f"end_of_prompt must be one of {', '.join(map(repr, ENDS_OF_PROMPT))}, not {given!r}. Put more at the end "
            "of the prompt."
        )


def ends_behind(lm: LM, prompts: Sequence[tuple[Text, EndOfPrompt]]) -> list[EndOfPrompt]:
    """Return what an `end_of_prompt` means behind each prompt; "auto" stays where a space may stand between."""
    added_tokens = lm.session.added_tokens
    return [end if end != "auto" or _takes_a_space(prompt, added_tokens) else "" for prompt, end in prompts]


def _takes_a_space(prompt: Text, added_tokens: tuple[str, ...]) -> bool:
    """Return whether a prompt ends in a string that ends neither in white space nor in one of the tokens."""
    segments = prompt.segments
    while segments and isinstance(segments[-1], Group):  # a frozen text alone is that text; others are refused
        segments = segments[-1].branches[-1].segments
    if not segments:
        return True
    strings = itertools.takewhile(lambda segment: isinstance(segment, str), reversed(segments))
    run = "".join(reversed([str(string) for string in strings]))
    return bool(run) and not run[-1].isspace() and not run.endswith(added_tokens)


def space_before(completion: str, end: EndOfPrompt) -> str:
    """Return what stands before a completion behind a prompt with this end: a space or nothing."""
    if end != "auto":
        return end
    return "" if completion[:1].isspace() else " "


def completion_ids(
    lm: LM, completions: Iterable[tuple[EndOfPrompt, str]]
) -> dict[tuple[EndOfPrompt, str], tuple[int, ...]]:
    """Return the ids of completions behind prompts with these ends, without special tokens.

    Raises:
        TokenizerError: the tokenizer cannot encode a completion, or not without a space.

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
