"""Conversations: the model's chat template as a text whose segments are the messages.

A template that only ever appends (prefix-stable) lets a conversation go on where it stopped: what was computed for its
first turns serves all that begin with them. What the model generated goes in as the token ids that it generated.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from backprompt._generate import GeneratedText
from backprompt.arguments import as_list, as_lm
from backprompt.errors import TextTypeError, TokenizerError
from backprompt.lm import LM
from backprompt.text import Text


def chat(
    lm: LM | tuple[Any, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    **template_options: Any,
) -> Text:
    """Return a conversation as a text, each message a segment, ready for `generate` where the model's turn is next.

        reply = chat(lm, messages).generate(max_new_tokens=100)
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}]

    Args:
        lm: its tokenizer has the chat template; an `LM` or a `(model, tokenizer)` tuple.
        messages: dicts with "role" and "content", as for `tokenizer.apply_chat_template`. A content may be a
            `GeneratedText`: then its ids stand there as they were generated, and are not encoded again.
        add_generation_prompt: whether to add what begins the model's turn; by default unless the last message is the
            assistant's.
        **template_options: what the template takes besides, such as `tools`.

    Raises:
        TokenizerError: the tokenizer has no chat template, or the template refuses the messages.
        TextTypeError: a message is not such a dict.

    Warns:
        UserWarning: the template writes earlier turns in another way when others follow, so that turn and all after it
            are computed again as the conversation goes on; names the turn.

    """
    lm = as_lm(lm)
    messages = as_list(messages, "chat takes messages in order")
    strings = [_string(message, idx) for idx, message in enumerate(messages)]
    if not strings:
        raise TextTypeError("There are no messages. Give at least one: [{'role': 'user', 'content': 'Hello.'}].")
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant"
    plain = [
        message if string is None else {**message, "content": string}
        for message, string in zip(messages, strings, strict=True)
    ]
    whole = _rendered(lm, plain, template_options, add_generation_prompt)
    text, num_done = Text("", lm), 0
    for idx, message in enumerate(messages):
        stop = _end_of_turn(lm, plain, idx, whole, template_options)
        if stop < num_done:
            continue  # this turn is not a beginning of the whole; the next that is covers it
        content, turn = message.get("content"), whole[num_done:stop]
        if isinstance(content, GeneratedText):
            before = _beginning(lm, plain[:idx], template_options, add_generation_prompt=True)
            is_there = before is not None and whole.startswith(before)
            text += _turn(lm, turn, content, len(before or "") - num_done if is_there else -1)
        else:
            text += turn
        num_done = stop
    return text + whole[num_done:]


def _end_of_turn(
    lm: LM, messages: Sequence[Mapping[str, Any]], idx: int, whole: str, template_options: Mapping[str, Any]
) -> int:
    """Return where in the whole string a turn ends, or -1 where the template writes it differently there."""
    beginning = _beginning(lm, messages[: idx + 1], template_options, add_generation_prompt=False)
    if beginning is None:
        return -1  # the template takes such messages only with what follows
    if whole.startswith(beginning):
        return len(beginning)
    warnings.warn(
        f"The chat template is not prefix-stable: messages up to messages[{idx}] ({messages[idx]['role']}) are written "
        "differently when others follow, so from there on they are computed again in each turn.",
        stacklevel=3,
    )
    return -1


def _turn(lm: LM, string: str, content: GeneratedText, start: int) -> Text:
    """Return a turn as a text in which the ids that were generated stand as they are, from `start` on.

    Where the template does not write them there, the turn is its string.
    """
    written = next(
        (c for c in (content.completion, content.completion.strip()) if c and string.startswith(c, start)), ""
    )
    if start < 0 or not written:
        return Text(string, lm)
    token_ids, behind = content.completion_tokens, string[start + len(written) :]
    if token_ids and behind.startswith(end := lm.tokenizer.decode([token_ids[-1]])) and end:
        behind = behind[len(end) :]  # the end token is among the ids
    return Text(string[:start], lm) + content._completion + behind


def _beginning(
    lm: LM, messages: Sequence[Mapping[str, Any]], template_options: Mapping[str, Any], *, add_generation_prompt: bool
) -> str | None:
    """Return what the template makes of the first messages; None where it does not take them alone."""
    try:
        return _rendered(lm, messages, template_options, add_generation_prompt)
    except TokenizerError:
        return None


def _rendered(
    lm: LM, messages: Sequence[Mapping[str, Any]], template_options: Mapping[str, Any], add_generation_prompt: bool
) -> str:
    if getattr(lm.tokenizer, "chat_template", None) is None:
        raise TokenizerError("The tokenizer has no chat template. Write the conversation with + instead.")
    from jinja2 import TemplateError  # what transformers renders templates with

    try:
        rendered: str = lm.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **template_options
        )
    except TemplateError as error:
        raise TokenizerError(f"The chat template refuses these messages: {error}") from error
    return rendered


def _string(message: object, idx: int) -> str | None:
    """Return a message's content as a string; None where it has none, as one that calls tools."""
    if not isinstance(message, Mapping) or "role" not in message or len(message) < 2:
        raise TextTypeError(f"messages[{idx}] must be a dict with 'role' and 'content', not {message!r}.")
    content = message.get("content")
    if isinstance(content, GeneratedText):
        return content.completion
    if content is not None and not isinstance(content, str):
        raise TextTypeError(f"messages[{idx}] has a content of type {type(content).__name__}; give a str.")
    return content
