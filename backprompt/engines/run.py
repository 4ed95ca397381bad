"""RemoteRun: texts that workers continue, each prompt with all its samples on one worker.

A part of a generation is one question: the worker continues its texts to their ends. A stream is a series of questions,
each for a few tokens. Each question names the number of tokens that the driver has. So a worker that replaces a dead
one computes these tokens again, and continues the stream.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from backprompt.engines.remote import RemoteSession
from backprompt.engines.travel import PackedIds
from backprompt.generation.continued import GeneratedText
from backprompt.generation.decoding import Decoding
from backprompt.generation.found import Choice, Found
from backprompt.generation.run import as_texts
from backprompt.lm import LM
from backprompt.text.node import Text
from backprompt.tokens.graph import TokenIds


class RemoteRun:
    """Texts that are being continued by workers; see `Run`.

    Args:
        lm: the engine of all texts.
        session: the session of the engine.
        texts: the texts to continue. A text that is listed several times is sampled several times.
        decoding: the options.
        is_stream: whether a step adds few tokens, rather than all.

    """

    def __init__(
        self, lm: LM, session: RemoteSession, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool
    ) -> None:
        self._lm, self._session, self._texts = lm, session, texts
        self.decoding = decoding
        self.prompts: Sequence[TokenIds] = session.ids_to_continue(texts, decoding.max_new_tokens)
        self._stream = uuid.uuid4().hex if is_stream else None
        self._worker = 0  # of a stream that has begun
        self._found: list[list[Found]] = [[Found((), "interrupted")] for _ in texts]
        self._is_going_on = True

    @property
    def num_tokens_done(self) -> int:
        """The number of chosen tokens, for progress; at the end, `max_new_tokens` for each text."""
        if not self._is_going_on:
            return len(self.prompts) * self.decoding.max_new_tokens
        return sum(len(found[0].choices) for found in self._found)

    def found(self, num_each: int = 1) -> list[list[Found]]:
        """Return the best continuations of each text so far; with beams, up to `num_each`."""
        return [found[:num_each] for found in self._found]

    def results(self, num_each: int = 1) -> list[list[GeneratedText]]:
        """Return the continuations of `found` as texts."""
        return as_texts(self._lm, self._texts, self.found(num_each), self.decoding)

    def step(self) -> bool:
        """Continue all texts to their ends, or a stream by a few tokens; return whether any text is unfinished."""
        if self._is_going_on:
            with self._session.exclusive():
                self._is_going_on = self._streamed() if self._stream else self._generated()
        return self._is_going_on

    def close(self) -> None:
        """Stop a stream."""
        if self._stream and self._is_going_on:
            self._session.ask_worker(self._worker, "end_stream", self._stream)
        self._is_going_on = False

    def _generated(self) -> bool:
        recipe, num_new = self.decoding.recipe, self.decoding.max_new_tokens
        more = [num_new] * len(self.prompts)
        parts, answers = self._session.ask_parts("generate", self.prompts, lambda part: (recipe.part(part),), more)
        for indices, answer in zip(parts, answers, strict=True):
            for idx, found in zip(indices.tolist(), answer.unpacked(), strict=True):
                self._found[idx] = found
        return False

    def _streamed(self) -> bool:
        ((known,),) = self._found
        if not known.choices:
            self._worker = self._session.worker_of(self.prompts[0])
        prompt = PackedIds.of(self.prompts)
        grown = self._session.ask_worker(
            self._worker, "grow", prompt, self._stream, self.decoding.recipe, len(known.choices)
        )
        choices: tuple[Choice, ...] = (*known.choices, *grown.found.choices)
        self._found = [[Found(choices, grown.found.finish_reason, grown.found.cut)]]
        return bool(grown.is_going_on)
