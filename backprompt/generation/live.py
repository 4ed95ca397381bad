"""A live text: a text that is being continued, with the spans of its continuations.

Keeps the tokens added to the text (its decoding), and the ends of its continuations that the evaluator holds in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backprompt.forest.span import Span
from backprompt.generation.beams import BeamDecoding
from backprompt.generation.decoding import TextDecoding
from backprompt.generation.found import Choice, Completion
from backprompt.tokens.adapted import base_of
from backprompt.tokens.graph import TokenIds, flat

NOWHERE = Span((), 0, None)
"""The end of a continuation that must be looked up, or computed again, by its ids: a span without rows."""


class Live:
    """A growing text.

    Attributes:
        prompt_ids: the ids of its prompt; added tokens are under the adapter of the prompt's last token.
        base_id: the id of token 0 under this adapter.
        decoding: the tokens that were added, and the rules for the next ones.
        tip: the end of its only held continuation; None if it has several.

    """

    def __init__(self, prompt_ids: TokenIds, decoding: TextDecoding | BeamDecoding, end: Span) -> None:
        self.prompt_ids = prompt_ids
        self.base_id = base_of(flat(prompt_ids)[-1])
        self.decoding = decoding
        self.tip: Span | None = end
        self._stop = end.stop  # of the tip, when it was noted
        self._num_held = 0  # the number of tokens of the one held continuation
        self._ends: dict[Completion, Span] = {(): end}  # of several

    @property
    def ends(self) -> Mapping[Completion, Span]:
        """The ends of the held continuations."""
        if self.tip is None or isinstance(self.decoding, BeamDecoding):
            return self._ends
        return {self.decoding.completion[: self._num_held]: self.tip}

    def hold(self, ends: dict[Completion, Span]) -> None:
        """Hold these continuations and no others."""
        self._ends = ends
        self.tip = None
        if len(ends) == 1 and isinstance(self.decoding, TextDecoding):
            ((completion, end),) = ends.items()
            self.tip, self._num_held, self._stop = end, len(completion), end.stop

    @property
    def next_token(self) -> Choice | None:
        """The only token to forward next, behind the only held continuation; None if there is not one of each."""
        decoding = self.decoding
        return None if self.tip is None or isinstance(decoding, BeamDecoding) else decoding.only_next(self._num_held)

    def forwarded(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return ids of the continuation under its adapter."""
        return tuple(self.base_id + token_id for token_id in token_ids)

    def go_on(self, end: Span, stop: int) -> None:
        """Note that the held continuation has grown by `next_token`, and now ends at `end`.

        Args:
            end: the end of the continuation.
            stop: the position behind the end when the token was added; other tokens may have been added since.

        """
        self.tip, self._stop = (end, stop) if end.stop == stop else (NOWHERE, NOWHERE.stop)
        self._num_held += 1

    def forget_grown(self) -> None:
        """Forget the end of the held continuation if tokens were added behind it: by an interrupted or another step."""
        if self.tip is not None and self.tip.stop != self._stop:
            self.tip, self._stop = NOWHERE, NOWHERE.stop

    def let_go(self) -> None:
        """Hold no continuations in memory: the next step looks them up, or computes them again, by their ids."""
        self._ends = dict.fromkeys(self._ends, NOWHERE)
        if self.tip is not None:
            self.tip, self._stop = NOWHERE, NOWHERE.stop

    def beginning_of(self, completion: Completion) -> tuple[Span, Completion]:
        """Return the end of a continuation's longest held beginning, and the ids to forward behind this end."""
        ends = self.ends
        num_held = next(num for num in range(len(completion) - 1, -1, -1) if completion[:num] in ends)
        return ends[completion[:num_held]], self.forwarded(completion[num_held:])
