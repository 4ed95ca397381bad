"""Attention of many texts, whose chosen rows are forwarded together; see evaluation/attention_maps.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from backprompt.session.representation import ModelRepr, attention_of
from backprompt.session.session import Session
from backprompt.session.spans import Bounds
from backprompt.text.node import Text


class _HasSession(Protocol):
    @property
    def session(self) -> Session: ...

    def evaluate(self, texts: Iterable[Text], /) -> list[ModelRepr]: ...


class ReadsAttention:
    """The call of an `LM` that reads attention of many texts."""

    def attention(
        self: _HasSession,
        texts: Iterable[Text],
        layers: int | slice | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        rows: int | slice | Iterable[int] | None = None,
        *,
        over: Iterable[Iterable[Bounds]] | None = None,
    ) -> list[Tensor]:
        """Evaluate texts and return their attention weights, as `ModelRepr.attention` does for one text.

            lm.attention(texts, -1, rows=-1, over=lm.extents(texts))  # of each last token, by segment

        The chosen rows of many texts are forwarded in one pass. The texts of a pass have together at most as many
        tokens as a pass may have, and fit the budget together. Equal texts are read once.

        Args:
            texts: texts of this `LM`.
            layers, heads, rows: see `ModelRepr.attention`; the same for all texts.
            over: for each text, spans of its tokens.

        Returns:
            A tensor for each text, `(layers, heads, rows, keys)` or `(layers, heads, rows, spans)`.

        Raises:
            ValueError: `over` has another length than `texts`; a layer, head, row or span does not exist.
            The errors of `evaluate` and of `ModelRepr.attention`.

        """
        texts = self.session.own_texts(texts)
        spans = [None] * len(texts) if over is None else list(over)
        if len(spans) != len(texts):
            raise ValueError(
                f"over has spans for {len(spans)} texts, but there are {len(texts)}. Give spans for each text, such as "
                "lm.extents(texts)."
            )
        return attention_of(self.session, self.evaluate(texts), layers, heads, rows, spans) if texts else []
