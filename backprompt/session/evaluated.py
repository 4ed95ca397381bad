"""Evaluated texts: their ends in the forest, and which texts were evaluated together with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from backprompt.evaluation.evaluator import Evaluator
from backprompt.forest.span import Inserted, Span
from backprompt.tokens.graph import TokenIds


@dataclass(eq=False)
class Batch:
    """The texts that one `evaluate` computed together, and how far to read ahead in them.

    It holds none of them: what one of a thousand texts is kept for must not keep the others.

    The head's weights are read once a call, so a row of logits alone costs as much as a dozen in company. The first
    text asked for gets its own rows only, each further one twice as many of those that follow it as the one before:
    whoever reads one text pays for one, and whoever reads all of them pays for few calls.
    """

    evaluator: Evaluator
    num_asked: dict[str, int] = field(default_factory=dict)
    _num_texts: int = 0
    _texts: WeakValueDictionary[int, Evaluated] = field(default_factory=WeakValueDictionary)

    def add(self, inserted: Inserted) -> Evaluated:
        """Return the next text of the batch."""
        evaluated = self._texts[self._num_texts] = Evaluated(self, self._num_texts, inserted)
        self._num_texts += 1
        return evaluated

    def ahead_of(self, idx: int, what: str) -> list[Inserted]:
        """Return the texts whose `what` to compute along with that of the text at `idx`."""
        num_asked = self.num_asked.get(what, 0)
        self.num_asked[what] = num_asked + 1
        indices = itertools.chain(range(idx, self._num_texts), range(idx))
        alive = (found for i in indices if (found := self._texts.get(i)) is not None)
        ahead = itertools.islice(alive, 1 << min(num_asked, 20))
        return [evaluated.inserted for evaluated in ahead if evaluated.is_computed]


@dataclass(eq=False)
class Evaluated:
    """A text that was evaluated, and its place in the batch that it was computed in."""

    batch: Batch
    batch_idx: int
    inserted: Inserted

    @property
    def evaluator(self) -> Evaluator:
        """What computed it."""
        return self.batch.evaluator

    @property
    def token_ids(self) -> TokenIds:
        """The text's token ids."""
        return self.inserted.token_ids

    @property
    def end(self) -> Span:
        """The text's end."""
        return self.inserted.end

    @property
    def is_computed(self) -> bool:
        """Whether what results are read off is still there."""
        return self.end.is_held()

    @property
    def has_keys_values(self) -> bool:
        """Whether its keys and values are still there, too."""
        return self.end.is_held(with_keys_values=True)

    @contextmanager
    def held(self, *, with_keys_values: bool = False) -> Iterator[Inserted]:
        """Keep what results are read off, computed again if it was dropped; see `Evaluator.held`."""
        with self.evaluator.held(self.token_ids, self.end, with_keys_values=with_keys_values) as end:
            self.inserted = Inserted(end, self.token_ids)
            yield self.inserted
