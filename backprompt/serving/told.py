"""The log-probabilities of a stream's tokens, each sent once, with the piece that completes the token's string."""

from __future__ import annotations

from typing import Any

from backprompt.generation.continued import GeneratedText
from backprompt.lm import LM
from backprompt.serving.answers import token_logprobs
from backprompt.serving.spelling import Offsets
from backprompt.text.node import Text
from backprompt.tokens.decoded import Decoder


class ToldTokens:
    """The tokens of one stream whose log-probabilities were sent.

    A stream holds back a string that may belong to a stop string, and tokens of this string may still be cut off. So
    the log-probabilities of a token wait until its whole string was sent.

    Args:
        lm: the model.
        prompt: the prompt of the stream.
        num_top: the number of most probable tokens to send for each position.
        is_echoed: whether the prompt was sent before, so that offsets begin behind it.

    """

    def __init__(self, lm: LM, prompt: Text, num_top: int, *, is_echoed: bool) -> None:
        self._lm, self._num_top = lm, num_top
        self._num_prompt = len(prompt.tokens)
        self._decoder = Decoder(lm.tokenizer, lm.tokenizer.all_special_ids)
        self._decoded = self._decoder.begin(prompt.tokens)  # the string of the told tokens
        self._string = ""
        self._num_told = 0
        self._offsets = Offsets(lm.tokenizer, () if is_echoed else prompt.tokens)
        if is_echoed:
            self._offsets.of(prompt.tokens)

    def given(self, text: GeneratedText, piece: str) -> dict[str, Any] | None:
        """Return the log-probabilities to send with a piece of the string; None if the piece completes no token.

        Args:
            text: the text so far.
            piece: the string that is sent behind all earlier pieces.

        """
        self._string += piece
        before, decoded = self._num_told, self._decoded
        for num, token_id in enumerate(text.completion_tokens[before:], before + 1):
            decoded = self._decoder.with_token(decoded, token_id)
            if len(decoded.string) > len(self._decoded.string) and self._string.startswith(decoded.string):
                self._num_told, self._decoded = num, decoded
        return self._told(text, before, self._num_told - before)

    def rest(self, text: GeneratedText) -> dict[str, Any] | None:
        """Return the log-probabilities to send at the end of a text, of all tokens that are left; None without any."""
        return self._told(text, self._num_told, len(text.tokens) - self._num_prompt - self._num_told)

    def _told(self, text: GeneratedText, start: int, num: int) -> dict[str, Any] | None:
        if num == 0:
            return None
        found = token_logprobs(self._lm, text, self._num_prompt + start, self._num_top)
        told = {name: values and values[:num] for name, values in found.items()}
        told["text_offset"] = self._offsets.of(text.tokens[self._num_prompt + start :][:num])
        return told
