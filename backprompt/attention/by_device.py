"""Attention of models whose layers lie on several devices: each device has an attention of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backprompt.attention.base import ForestAttention, PreparedAttention, Scoring
from backprompt.attention.choice import attention_for, copies_for
from backprompt.attention.copies import Copies
from backprompt.forest.plan import Pass


class AttentionByDevice:
    """A `ForestAttention` that attends on the device of a layer's queries, in the way that is chosen for the device."""

    def __init__(self) -> None:
        self._attentions: dict[torch.device, ForestAttention] = {}

    @property
    def name(self) -> str:
        """The kernels in use, with their devices."""
        return ", ".join(f"{each.name} on {device}" for device, each in self._attentions.items()) or "none yet"

    def attention_on(self, device: torch.device) -> ForestAttention:
        """Return the attention of a device."""
        if device not in self._attentions:
            self._attentions[device] = attention_for(device)
        return self._attentions[device]

    def prepare(self, pass_: Pass, num_steps: int = 1) -> PreparedByDevice:
        """Return the attention of a pass, for one or several steps; see `ForestAttention.prepare`."""
        return PreparedByDevice(self, pass_, num_steps)

    def standing(self, num_rows: int) -> None:
        """Return None: graphs of several devices are not recorded."""


class PreparedByDevice:
    """The attention of a pass on each device, prepared at the first layer there."""

    def __init__(self, attention: AttentionByDevice, pass_: Pass, num_steps: int) -> None:
        self._attention = attention
        self._pass = pass_
        self._num_steps = num_steps
        self._prepared: dict[torch.device, PreparedAttention] = {}
        self._steps: list[list[int] | None] = []

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return attention over the forest; see `PreparedAttention.attend`."""
        prepared = self._prepared.get(query.device)
        if prepared is None:
            prepared = self._attention.attention_on(query.device).prepare(self._pass, self._num_steps)
            for rows in self._steps:
                prepared.advance(rows)
            self._prepared[query.device] = prepared
        return prepared.attend(layer_idx, query, key, value, scoring)

    def advance(self, rows: Sequence[int] | None = None) -> None:
        """Advance to the next step; see `PreparedAttention.advance`."""
        self._steps.append(None if rows is None else list(rows))
        for prepared in self._prepared.values():
            prepared.advance(rows)


class CopiesByDevice:
    """Copies that stay on the device of their layer."""

    def __init__(self) -> None:
        self._copies: dict[torch.device, Copies] = {}

    def of(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """See `Copies`."""
        return self._on(key.device).of(query, key, value)

    def check(self, hidden: Tensor) -> None:
        """See `Copies`."""
        self._on(hidden.device).check(hidden)

    def are_finite(self) -> Tensor:
        """See `Copies`; the answer lies on the device of the first layer."""
        found = [copies.are_finite() for copies in self._copies.values()]
        return torch.stack([one.to(found[0].device) for one in found]).all()

    def _on(self, device: torch.device) -> Copies:
        copies = self._copies.get(device)
        if copies is None:
            copies = self._copies[device] = copies_for(device)()
        return copies
