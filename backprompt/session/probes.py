"""Probes: the findings of the probe about a model, so that new numbers in the same parts are not probed again.

The probe compares a small tree with plain calls, which takes longer than a step of training may wait. Its verdict is
about the model's code. Numbers of weights change from step to step, and adapters are switched on and off; each state
of the adapters is probed once. All is forgotten when the model gets other parts.
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
        """Spare a new computation the probe, if a model of the same parts, in the same state of adapters, had it.

        Args:
            before, old: the state that ends, and its computation.
            after, new: the state that begins, and its computation.

        """
        if old.probed is not None:
            self._found[before.adapters] = old.probed
        if before.has_other_parts():
            self.forget()
        elif after.adapters in self._found:
            new.probe_once(self._found[after.adapters])

    def forget(self) -> None:
        """Let the next state be probed."""
        self._found.clear()
