"""The counts of the work done, which `LM.stats` shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from backprompt.model.forwarded import Way, Work


@dataclass
class Counters:
    """Work done so far; `LM.stats` is a frozen copy."""

    tokens_requested: int = 0
    tokens_computed: int = 0
    tokens_recomputed: int = 0
    tokens_dropped: int = 0
    tokens_fetched: int = 0
    tokens_loaded: int = 0
    forward_passes: int = 0
    model_calls: int = 0
    logit_rows: int = 0
    steps: Counter[Way] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def work(self) -> tuple[int, int]:
        """The counts of work done with the model's weights."""
        return self.forward_passes, self.logit_rows

    def note_pass(self, work: Work) -> None:
        """Count a pass and the tokens that it computed again; the caller counts the tokens of its spans."""
        self.forward_passes += 1
        self.model_calls += work.num_calls
        self.tokens_computed += work.num_again
        self.tokens_recomputed += work.num_again
