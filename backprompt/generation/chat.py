"""Conversations: the model's chat template as a text whose segments are the messages.

A prefix-stable template only appends when messages are added. So the spans of the first turns are reused for all
conversations that begin with these turns. A generated reply is inserted as the token ids that the model generated, and
a text or group in a message keeps its segments.

Turns and texts are located in the rendered messages. The messages up to a turn, rendered without later ones, show the
end of the turn. A placeholder, rendered in place of a text, shows the place of the text.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from backprompt.arguments import as_bool, as_list
from backprompt.bound import as_lm
from backprompt.errors import TextTypeError, TokenizerError
from backprompt.generation.continued import ContinuedText, under_the_adapter_of
from backprompt.lm import LM
from backprompt.text.node import Text
from backprompt.text.segments import are_adapted
from backprompt.tokens.tokenizer import Speller
from backprompt.visible import shortened, visible
from backprompt.warn import warn_caller

Rendered: TypeAlias = "str | tuple[int, ...]"
"""Messages as rendered by a template: a string, or ids if the tokenizer renders only ids."""

Message: TypeAlias = Mapping[str, Any]

_DECIDED_HERE = frozenset(
    {
        "conversation",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""Arguments of `apply_chat_template` that `chat` refuses: they are no options of the template."""

_MEDIA = ("image", "video", "audio")


def chat(
    lm: LM | tuple[Any, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **template_options: Any,
) -> Text:
    """Return a conversation as a text, each message a segment; if the model's turn is next, `generate` continues it.

        reply = chat(lm, messages).generate(max_new_tokens=100)
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And then?"}]

    The text's tokens are those of `tokenizer.apply_chat_template(messages, tokenize=True)` with the same options: the
    template alone writes special tokens, and the tokenizer adds none.

    Args:
        lm: an `LM` or a `(model, tokenizer)` tuple; the tokenizer has the chat template.
        messages: dicts with "role" and "content", as for `tokenizer.apply_chat_template`. A content may also be a
            `Text`, with groups, frozen segments and token ids in it; a list of strings and texts, side by side; or a
            list of text parts, `{"type": "text", "text": ...}`, for templates that take such a list. Each text keeps
            its segments. A `GeneratedText` stands for its completion, with the ids that were generated.
        add_generation_prompt: whether to add the beginning of the model's turn; by default unless the last message is
            the assistant's or is continued.
        continue_final_message: whether the last message is left open, for the model to continue. A string names
            the field to continue, as for `apply_chat_template`.
        **template_options: other options of the template, such as `tools`.

    Raises:
        TokenizerError: the tokenizer has no chat template; the template refuses the messages, or changes a content with
            groups or ids in it; an option decides the form of the result of `apply_chat_template`.
        TextTypeError: a message is not such a dict, or its content holds something other than text.
        MixedModelsError: a content is a text of another `LM`.
        ValueError: `add_generation_prompt` is neither True nor False, or `continue_final_message` is neither a bool nor
            a string.

    Warns:
        UserWarning: the template writes an earlier turn differently when other turns follow. So this turn and all later
            ones are computed again with each new turn; the message names the turn.

    """
    lm = as_lm(lm)
    if add_generation_prompt is not None:
        as_bool(add_generation_prompt, "add_generation_prompt")
    if not isinstance(continue_final_message, str):
        as_bool(continue_final_message, "continue_final_message")
    messages = as_list(messages, "chat takes messages in order")
    for idx, message in enumerate(messages):
        _check_message(message, idx)
    if not messages:
        raise TextTypeError("There are no messages. Give at least one: [{'role': 'user', 'content': 'Hello.'}].")
    if add_generation_prompt and continue_final_message:
        raise TokenizerError(
            "add_generation_prompt begins a new turn of the model and continue_final_message continues the last one. "
            "Ask for only one of the two."
        )
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant" and not continue_final_message
    ending = {"add_generation_prompt": add_generation_prompt}
    if continue_final_message:
        ending["continue_final_message"] = continue_final_message
    conversation = _Conversation(_Template(lm, template_options), messages, ending)
    return conversation.text()


class _Template:
    """A tokenizer's chat template, with the options that were given for it."""

    def __init__(self, lm: LM, options: Mapping[str, Any]) -> None:
        self.lm = lm
        self._options = options
        decided = sorted(_DECIDED_HERE & options.keys())
        if decided:
            raise TokenizerError(
                f"chat() always returns a text, so it takes no {decided[0]}, which is for results of "
                "apply_chat_template. Leave it out: chat(lm, messages).tokens are the ids."
            )
        tokenizer = lm.tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None) or options.get("chat_template"))
        own = getattr(type(tokenizer), "apply_chat_template", PreTrainedTokenizerBase.apply_chat_template)
        # Such as MistralCommonBackend, which has no template and renders ids that no string has.
        self.renders_ids = not has_template and own is not PreTrainedTokenizerBase.apply_chat_template
        if not has_template and not self.renders_ids:
            raise TokenizerError("The tokenizer has no chat template. Write the conversation with + instead.")

    def render(self, messages: Sequence[Message], **ending: Any) -> Rendered:
        """Return messages, whose contents are strings, as rendered.

        Raises:
            TokenizerError: the template refuses the messages.

        """
        options = {**self._options, **ending}
        try:
            if self.renders_ids:
                ids = self.lm.tokenizer.apply_chat_template(list(messages), return_dict=False, **options)
                return tuple(map(int, ids))
            rendered: str = self.lm.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except _refusals() as error:
            in_parts = any(isinstance(message.get("content"), list) for message in messages)
            hint = ". Only some templates take content in parts; give a str" if in_parts else ""
            raise TokenizerError(f"The chat template refuses these messages: {error}{hint}") from error
        return rendered

    def beginning(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered | None:
        """Return the first messages as rendered; None if the template refuses them without later ones."""
        try:
            return self.render(messages, add_generation_prompt=add_generation_prompt)
        except TokenizerError:
            return None

    def written(self, string: str) -> Rendered:
        """Return a string in the form of rendered messages."""
        return self.lm.session.completion_ids([string])[0] if self.renders_ids else string

    def written_token(self, token_id: int) -> Rendered:
        """Return a token in the form of rendered messages."""
        if self.renders_ids:
            return (token_id,)
        return Speller(self.lm.tokenizer).decode([token_id])

    def text(self, rendered: Rendered) -> Text:
        """Return a part of rendered messages as a text."""
        return Text(rendered, self.lm) if isinstance(rendered, str) else Text.from_tokens(rendered, self.lm)


def _refusals() -> tuple[type[Exception], ...]:
    """Return the errors that a template raises: jinja's, those of code in the template, and transformers' own."""
    from jinja2 import TemplateError  # transformers renders templates with jinja2

    refusals: tuple[type[Exception], ...] = (TemplateError, ValueError, TypeError)
    mistral = sys.modules.get("mistral_common.exceptions")  # MistralCommonBackend has loaded it
    return refusals if mistral is None else (*refusals, mistral.MistralCommonException)


@dataclass(frozen=True)
class _Place:
    """A text in rendered messages, in place of the part from `start` to `stop`."""

    start: int
    stop: int
    text: Text


class _Conversation:
    """Messages, their rendered form, and the places of their texts in it."""

    def __init__(self, template: _Template, messages: Sequence[Message], ending: Mapping[str, Any]) -> None:
        self._template = template
        self._lm = template.lm
        self._messages = messages
        self._ending = ending
        self._texts = [list(_texts_in(message.get("content"))) for message in messages]
        self._strings = [[_string(self._lm, text) for text in texts] for texts in self._texts]
        self._plain = [_filled(m, strings) for m, strings in zip(messages, self._strings, strict=True)]
        self._whole = template.render(self._plain, **ending)
        for idx, message in enumerate(self._plain):
            self._check_is_no_list(message, idx)

    def text(self) -> Text:
        text, stop = Text("", self._lm, add_special_tokens=False), 0
        ends = sorted(self._ends_of_turns())
        for place in sorted(self._places(), key=lambda place: place.start):
            if place.start < stop:
                raise TokenizerError(
                    "The chat template writes two contents in one place. Write the conversation with +."
                )
            text = self._with_turns(text, stop, place.start, ends) + place.text
            stop = place.stop
        return self._with_turns(text, stop, len(self._whole), ends)

    def _with_turns(self, text: Text, start: int, stop: int, ends: Sequence[int]) -> Text:
        """Return a text and the rendered part from `start` to `stop` behind it, each turn a segment."""
        cuts = [start, *(end for end in ends if start < end < stop), stop]
        for first, last in itertools.pairwise(cuts):
            text += self._template.text(self._whole[first:last])
        return text

    def _ends_of_turns(self) -> Iterator[int]:
        """Yield the ends of turns. A turn that is written differently without later ones is joined with the next."""
        for idx, message in enumerate(self._messages):
            beginning = self._template.beginning(self._plain[: idx + 1], add_generation_prompt=False)
            if beginning is None:
                continue  # the template takes such messages only with later ones
            if _begins(self._whole, beginning):
                yield len(beginning)
            elif idx + 1 < len(self._messages) or "continue_final_message" not in self._ending:
                role = visible(str(message["role"]))
                warn_caller(
                    f"The chat template is not prefix-stable: messages up to messages[{idx}] ({role}) are written "
                    "differently when others follow, so all from there on are computed again in each turn."
                )

    def _places(self) -> Iterator[_Place]:
        for idx, message in enumerate(self._messages):
            if isinstance(content := message.get("content"), ContinuedText):
                places = list(self._place_of_reply(idx, content))
                if not places and are_adapted(content.completion_text.segments):
                    warn_caller(
                        f"The chat template writes messages[{idx}] differently from the generated text, so the "
                        "message is encoded again, without its adapter. Name one for all: chat(...).with_adapter(name)."
                    )
                yield from places
            elif self._texts[idx]:
                yield from self._places_in(idx)

    def _place_of_reply(self, idx: int, reply: ContinuedText) -> Iterator[_Place]:
        """Yield the place of generated ids if the template writes them behind the beginning of the model's turn.

        Otherwise the turn keeps its string.
        """
        before = self._template.beginning(self._plain[:idx], add_generation_prompt=True)
        token_ids = reply.completion_tokens
        if before is None or not token_ids or not _begins(self._whole, before):
            return
        behind = self._whole[len(before) :]
        for string in filter(None, (reply.completion, reply.completion.strip())):
            written = self._template.written(string)
            if _begins(behind, written):
                break
        else:
            return
        stop, text = len(before) + len(written), reply.completion_text
        num_said = _num_before_end_tokens(self._lm, reply)
        if num_said < len(token_ids):  # end tokens, which are not in the string; the template may write its own
            end = self._template.written_token(token_ids[num_said])
            is_written = _begins(self._whole[stop:], end)
            stop += len(end) if is_written else 0
            text = under_the_adapter_of(reply, Text.from_tokens(token_ids[: num_said + is_written], self._lm))
        yield _Place(len(before), stop, text)

    def _places_in(self, idx: int) -> list[_Place]:
        """Return the places of the texts in a content; a text of strings only may be left out, as its string is there.

        Raises:
            TokenizerError: the template does not write the other texts unchanged.

        """
        everything = range(len(self._texts[idx]))
        not_strings = [number for number in everything if not _is_of_strings(self._texts[idx][number])]
        for numbers in (everything, not_strings):
            places = self._found(idx, numbers)
            if places is not None:
                return places
        content = f"the content of messages[{idx}], which has a text with groups, token ids or adapters in it"
        if self._template.renders_ids:
            raise TokenizerError(
                f"{type(self._lm.tokenizer).__name__} renders a conversation as token ids, not as a string, so "
                f"{content}, cannot be placed in it. Give strings, or write the conversation with + instead."
            )
        raise TokenizerError(
            f"The chat template does not write {content}, once and unchanged: templates may strip white space or "
            "rewrite contents. Leave out white space at both ends, or write the conversation with +."
        )

    def _found(self, idx: int, numbers: Sequence[int]) -> list[_Place] | None:
        """Return the places of some texts of a content, or None if the template does not write them unchanged.

        A placeholder is rendered for each text. The other parts must be the same as with the texts' strings.
        """
        if not numbers:
            return []
        if not isinstance(self._whole, str):
            return None
        placeholders = _placeholders(len(numbers), self._whole)
        strings = list(self._strings[idx])
        for number, placeholder in zip(numbers, placeholders, strict=True):
            strings[number] = placeholder
        messages = [*self._plain[:idx], _filled(self._messages[idx], strings), *self._plain[idx + 1 :]]
        try:
            rest = self._template.render(messages, **self._ending)
        except TokenizerError:
            return None
        places: list[_Place] = []
        stop, written = 0, ""
        for number, placeholder in zip(numbers, placeholders, strict=True):
            before, _, rest = str(rest).partition(placeholder)
            start, string = stop + len(before), self._strings[idx][number]
            stop = start + len(string)
            written += before + string
            places.append(_Place(start, stop, _own(self._lm, self._texts[idx][number])))
        return places if written + str(rest) == self._whole else None

    def _check_is_no_list(self, message: Message, idx: int) -> None:
        content = message.get("content")
        if isinstance(content, list) and isinstance(self._whole, str) and content and str(content) in self._whole:
            raise TokenizerError(
                f"The chat template takes strings and writes the list of messages[{idx}] as Python shows it: "
                f"{shortened(str(content), 60)}. Give its content as a str, or as a list of strings and texts."
            )


def _begins(whole: Rendered, beginning: Rendered) -> bool:
    return whole[: len(beginning)] == beginning


def _placeholders(count: int, whole: str) -> list[str]:
    """Return `count` different words; none occurs in `whole` or in another word."""
    salt = 0
    while f"Placeholder{salt}x" in whole:
        salt += 1
    return [f"Placeholder{salt}x{number}y" for number in range(count)]


# Contents


def _check_message(message: object, idx: int) -> None:
    """Raise TextTypeError for a wrong type of message or content; a message that calls tools may have no content."""
    if not isinstance(message, Mapping) or "role" not in message or len(message) < 2:
        raise TextTypeError(f"messages[{idx}] must be a dict with 'role' and 'content', not {message!r}.")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        for part_idx, part in enumerate(content):
            _check_part(part, f"messages[{idx}]['content'][{part_idx}]")
    elif content is not None and not isinstance(content, (str, Text)):
        raise TextTypeError(
            f"messages[{idx}] has a content of type {type(content).__name__}; give a str, a Text, or a list of them."
        )


def _check_part(part: object, name: str) -> None:
    if isinstance(part, (str, Text)):
        return
    if not isinstance(part, Mapping) or "type" not in part:
        raise TextTypeError(
            f"{name} must be a str, a Text or a dict such as {{'type': 'text', 'text': ...}}: {part!r}."
        )
    if any(kind in str(part["type"]) for kind in _MEDIA):
        raise TextTypeError(f"{name} is of type {part['type']!r}, and a text cannot hold that. Give text only.")


def _texts_in(content: object) -> Iterator[Text]:
    """Yield the texts in a content, from left to right."""
    parts = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, Text):
            yield text


def _filled(message: Message, strings: Sequence[str]) -> Message:
    """Return a message as templates take it, with strings in place of its texts.

    A list of strings and texts becomes one string. In a list with dicts, each of its elements becomes a dict.
    """
    content, left = message.get("content"), iter(strings)
    if isinstance(content, Text):
        return {**message, "content": next(left)}
    if not isinstance(content, (list, tuple)):
        return message
    if any(isinstance(part, Mapping) for part in content):
        return {**message, "content": [_filled_part(part, left) for part in content]}
    return {**message, "content": "".join(next(left) if isinstance(part, Text) else part for part in content)}


def _filled_part(part: Any, left: Iterator[str]) -> Mapping[str, Any]:
    if isinstance(part, Mapping):
        return {**part, "text": next(left)} if isinstance(part.get("text"), Text) else part
    return {"type": "text", "text": next(left) if isinstance(part, Text) else part}


def _own(lm: LM, text: Text) -> Text:
    """Return the text to put into a message: for a continued text, the ids and the string of `completion`.

    Special tokens are left out: an end token would end the message that quotes the completion.
    """
    if not isinstance(text, ContinuedText):
        return text
    special = lm.tokenizer.all_special_ids
    said = Text.from_tokens([token_id for token_id in text.completion_tokens if token_id not in special], lm)
    return under_the_adapter_of(text, said + text.completion_rest)


def _num_before_end_tokens(lm: LM, reply: ContinuedText) -> int:
    """Return the number of a reply's ids before its final end tokens; of all ids if a string ends the reply."""
    token_ids, special = reply.completion_tokens, lm.tokenizer.all_special_ids
    num_said = len(token_ids)
    while num_said and not reply.completion_rest and token_ids[num_said - 1] in special:
        num_said -= 1
    return num_said


def _string(lm: LM, text: Text) -> str:
    """Return the string of a text in a message; the text belongs to this LM or to none."""
    bound = Text("", lm) + text
    return text.completion if isinstance(text, ContinuedText) else bound.string


def _is_of_strings(text: Text) -> bool:
    """Return whether a text's string can replace the text; the ids of a continued text may be encoded again."""
    if isinstance(text, ContinuedText):
        return not are_adapted(text.completion_text.segments)
    return all(isinstance(segment, str) for segment in text.segments)
