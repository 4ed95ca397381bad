"""Probes: the findings of the probe about a model, so that new numbers in the same parts are not probed again.

The probe compares a small tree with plain calls, which takes too long for each step of a training. Its verdict is about
the model's code. Numbers of weights change from step to step, and adapters are switched on and off; each state of the
adapters is probed once. All findings are forgotten when the model gets other parts.
"""

from __future__ import annotations

from backprompt.evaluation.computation import Computation
from backprompt.evaluation.probed import Probed
from backprompt.session.fingerprint import Fingerprint


class Probes:
    """The findings, by the state of the adapters."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Probed] = {}

    def pass_on(self, before: Fingerprint, old: Computation, after: Fingerprint, new: Computation) -> None:
        """Let a new computation skip the probe if the same parts were probed in the same state of the adapters.

        Args:
            before, old: the fingerprint and the computation of the state that ends.
            after, new: the fingerprint and the computation of the state that begins.

        """
        if old.probed is not None:
            self._found[before.adapters] = old.probed
        if before.has_other_parts():
            self.forget()
        elif after.adapters in self._found:
            new.probe_once(self._found[after.adapters])

    def forget(self) -> None:
        """Forget all findings, so that the next state is probed."""
        self._found.clear()
