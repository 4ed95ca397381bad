"""Fingerprint: the identity of a model's weights and tokenizer, from which all keys derive.

A fingerprint keeps the monitor that notices changed weights, the content hash of the weights once it is known, and the
checkpoint that remembers that hash between processes. Each state of the weights has a fingerprint of its own.
"""

from __future__ import annotations

from torch import Tensor, nn

from backprompt.errors import StaleRepresentationError
from backprompt.evaluation.span_keys import Root
from backprompt.forest.keys import EXACT, root_key
from backprompt.model.checkpoint import Checkpoint
from backprompt.model.skeleton import computed_dtype, unwrap
from backprompt.model.weights import WeightsMonitor, content_hash
from backprompt.store import Store
from backprompt.tokens.tokenizer import PrivateTokenizer

_CHANGED_WHILE_HASHED = (
    "The model's weights have changed while they were hashed, so the hash would mix two states of them. Call "
    "again, and let other threads change weights only between calls."
)


class Fingerprint:
    """Names one state of a model's weights and of its tokenizer.

    Args:
        model: the user's model.
        tokenizer: the private copy.
        store: the store that representations may come from.
        monitor: a monitor from before the first use of the weights; by default a new one.
        content: the content hash of the weights, if it is known.

    Attributes:
        checkpoint: the files that the weights were loaded from, if these decide every weight.

    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PrivateTokenizer,
        store: Store | None,
        monitor: WeightsMonitor | None = None,
        content: str | None = None,
    ) -> None:
        self._model = model
        self._store = store
        self._monitor = WeightsMonitor(model) if monitor is None else monitor
        self._content = content
        self._is_handed_out = False
        self.tokenizer = tokenizer
        self.checkpoint: Checkpoint | None = None

    def hand_out(self) -> None:
        """Note that the model is handed to code that can write its weights unnoticed."""
        self._is_handed_out = True

    def has_changed(self) -> bool:
        """Return whether a quick look sees changed weights."""
        return self._monitor.has_changed()

    def has_other_parts(self) -> bool:
        """Return whether the model has other parts now, not only other numbers or adapters in the same parts."""
        return self._monitor.parts.have_changed()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters of each layer that are active or merged, and their scales."""
        return self._monitor.adapters

    def has_moved(self) -> bool:
        """Return whether weights have changed, without reading their numbers, which would wait for a device."""
        return self._monitor.has_moved()

    def look(self) -> Tensor | None:
        """Return whether sampled numbers of the weights are the same, `()`, bool; see `WeightsMonitor.look`."""
        return self._monitor.look()

    def root(self, *, in_store: bool = False) -> Root:
        """Return the root of all keys; with `in_store`, the root for results that the store may have made inexact.

        The first use hashes every weight.

        Raises:
            StaleRepresentationError: the weights change meanwhile.

        """
        if self._content is None:
            weights = self._hash_weights()
            if self._monitor.has_changed():
                raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
            self._content = weights
        dtype = str(computed_dtype(unwrap(self._model)))
        tokenizer = self.tokenizer.fingerprint()
        stored_dtype = self._store.dtype if in_store and self._store is not None else None
        exactness = EXACT if stored_dtype is None else stored_dtype
        key = root_key(model=self._content, dtype=dtype, tokenizer=tokenizer, exactness=exactness)
        return Root(key, self._content, tokenizer, dtype, exactness)

    def renewed(self, tokenizer: PrivateTokenizer) -> Fingerprint | None:
        """Hash every weight and the tokenizer again; return the new fingerprint if either changed, else None.

        Raises:
            StaleRepresentationError: the weights change meanwhile.

        """
        monitor = WeightsMonitor(self._model)
        weights = content_hash(self._model)
        if monitor.has_changed():
            raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
        if self.checkpoint is not None:
            self.checkpoint.forget_unless(weights)  # the remembered hash may be wrong, or the weights have changed
        if (weights, tokenizer.fingerprint()) == (self._content, self.tokenizer.fingerprint()):
            return None
        return Fingerprint(self._model, tokenizer, self._store, monitor, weights)

    def _hash_weights(self) -> str:
        """Return the content hash: that remembered for the files if no other code got the model, else a new one."""
        checkpoint = None if self._is_handed_out else self.checkpoint
        remembered = None if checkpoint is None else checkpoint.recall(self._model)
        if remembered is not None:
            return remembered
        weights = content_hash(self._model)
        if checkpoint is not None and not self._is_handed_out:  # another thread may have handed it out meanwhile
            checkpoint.remember(self._model, weights)
        return weights
