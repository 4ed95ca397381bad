"""Evaluated texts: their ends in the forest, and the texts that were evaluated together with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import ref

from backprompt.evaluation.evaluator import Evaluator
from backprompt.forest.span import Inserted, Span
from backprompt.tokens.graph import TokenIds


@dataclass(eq=False)
class Batch:
    """The texts that one `evaluate` computed together, and the number to read ahead.

    The batch holds none of the texts, so that keeping one of a thousand does not keep the others. (A text that has gone
    leaves a weak reference of 88 bytes.)

    A product with the output head reads all of the head's weights, so one row of logits costs as much as a dozen
    together. The first read computes only the rows of its own text. Each further read covers twice as many texts: its
    own and the texts after it. So reading one text costs one text, and reading all texts costs few products.
    """

    evaluator: Evaluator
    num_asked: dict[str, int] = field(default_factory=dict)
    _texts: list[ref[Evaluated]] = field(default_factory=list)

    def add(self, end: Span, token_ids: TokenIds) -> Evaluated:
        """Add a text to the batch and return it."""
        evaluated = Evaluated(self, len(self._texts), end, token_ids)
        self._texts.append(ref(evaluated))
        return evaluated

    def ahead_of(self, idx: int, what: str) -> list[Inserted]:
        """Return the texts, from `idx` on, for which the result `what` is computed together."""
        num_asked = self.num_asked.get(what, 0)
        self.num_asked[what] = num_asked + 1
        indices = itertools.chain(range(idx, len(self._texts)), range(idx))
        alive = (found for i in indices if (found := self._texts[i]()) is not None)
        ahead = itertools.islice(alive, 1 << min(num_asked, 20))
        return [evaluated.inserted for evaluated in ahead if evaluated.is_computed]


@dataclass(eq=False)
class Evaluated:
    """An evaluated text: its place in its batch, its end and its token ids."""

    batch: Batch
    batch_idx: int
    end: Span
    token_ids: TokenIds

    @property
    def evaluator(self) -> Evaluator:
        """The evaluator that computed the text."""
        return self.batch.evaluator

    @property
    def inserted(self) -> Inserted:
        """The text with its end in the forest."""
        return Inserted(self.end, self.token_ids)

    @property
    def is_computed(self) -> bool:
        """Whether the states that results are read from are still in memory."""
        return self.end.is_held()

    @property
    def has_keys_values(self) -> bool:
        """Whether the text's keys and values are still in memory, too."""
        return self.end.is_held(with_keys_values=True)

    @contextmanager
    def held(self, *, with_keys_values: bool = False) -> Iterator[Inserted]:
        """Keep the states that results are read from in memory; dropped ones are recomputed. See `Evaluator.held`."""
        with self.evaluator.held(self.token_ids, self.end, with_keys_values=with_keys_values) as end:
            self.end = end
            yield self.inserted
