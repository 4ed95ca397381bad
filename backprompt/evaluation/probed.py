"""The findings of the probe about a model, so that the same model with other weights need not be probed again."""

from __future__ import annotations

from typing import NamedTuple

from backprompt.memory.layout import Layout
from backprompt.model.cache_form import CacheForm
from backprompt.model.executor import Executor
from backprompt.model.levels import Levels, Way


class Probed(NamedTuple):
    """The findings of the probe.

    Attributes:
        layout: the layout of rows.
        token_bytes: the bytes of a token.
        placeholders: the token ids that are refused because they stand for images or sounds.
        levels: the form of the model's cache and the way of calling the model behind one, if passes go by levels.

    """

    layout: Layout
    token_bytes: int
    placeholders: frozenset[int]
    levels: tuple[CacheForm, Way] | None

    @classmethod
    def of(cls, executor: Executor) -> Probed:
        """Return the findings that the probe has left in an executor."""
        assert executor.layout is not None, "the probe runs a pass"
        levels = None if executor.levels is None else (executor.levels.form, executor.levels.way)
        return cls(executor.layout, executor.token_bytes, executor.limits.placeholders, levels)

    def hand_to(self, executor: Executor) -> None:
        """Hand the findings to the executor of a model with the same parts."""
        if self.levels is not None:
            executor.go_by_levels(Levels(executor.own_body(), *self.levels))
        executor.know_rows(self.layout, self.token_bytes)
        executor.refuse_placeholders(self.placeholders)
