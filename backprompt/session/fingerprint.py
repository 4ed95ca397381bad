"""Fingerprint: what the weights and the tokenizer of a model are, as the root of all keys names them.

It keeps the monitor that notices changed weights, the content hash of the weights once it is known, and the checkpoint
that remembers that hash between processes. A fingerprint is of one state of the weights: after a change there is a new
one.
"""

from __future__ import annotations

from torch import nn

from backprompt.errors import StaleRepresentationError
from backprompt.evaluation.span_keys import Root
from backprompt.forest.keys import EXACT, root_key
from backprompt.model.checkpoint import Checkpoint
from backprompt.model.skeleton import unwrap
from backprompt.model.weights import WeightsMonitor, content_hash
from backprompt.store import Store
from backprompt.tokens.tokenizer import PrivateTokenizer

_CHANGED_WHILE_HASHED = (
    "The model's weights have changed while they were hashed, so the hash is of no one state of them. Call again, and "
    "let other threads change weights between calls."
)


class Fingerprint:
    """Names one state of a model's weights and of its tokenizer.

    Args:
        model: as it was given.
        tokenizer: the private copy.
        store: where representations may come from.
        monitor: saw the weights before anything was made of them; by default one is made now.
        content: the content hash of the weights, if it is known.

    Attributes:
        checkpoint: the files that the weights were loaded from, if these decide about all of them.

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
        """Note that the model is handed to where its weights can be written without anything showing it."""
        self._is_handed_out = True

    def has_changed(self) -> bool:
        """Whether the weights are others than they were; a quick look."""
        return self._monitor.has_changed()

    def root(self, *, in_store: bool = False) -> Root:
        """Return what all keys are built on, or those of what the store may have made inexact.

        The first use hashes every weight.

        Raises:
            StaleRepresentationError: the weights change meanwhile.

        """
        if self._content is None:
            weights = self._hash_weights()
            if self._monitor.has_changed():
                raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
            self._content = weights
        dtype = str(next(unwrap(self._model).parameters()).dtype)
        tokenizer = self.tokenizer.fingerprint()
        stored_dtype = self._store.dtype if in_store and self._store is not None else None
        exactness = EXACT if stored_dtype is None else stored_dtype
        key = root_key(model=self._content, dtype=dtype, tokenizer=tokenizer, exactness=exactness)
        return Root(key, self._content, tokenizer, dtype, exactness)

    def renewed(self, tokenizer: PrivateTokenizer) -> Fingerprint | None:
        """Hash every weight and the tokenizer again; return their fingerprint if it is another one, and else None.

        Raises:
            StaleRepresentationError: the weights change meanwhile.

        """
        monitor = WeightsMonitor(self._model)
        weights = content_hash(self._model)
        if monitor.has_changed():
            raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
        if self.checkpoint is not None:
            self.checkpoint.forget_unless(weights)  # whether memory or weights are to blame
        if (weights, tokenizer.fingerprint()) == (self._content, self.tokenizer.fingerprint()):
            return None
        return Fingerprint(self._model, tokenizer, self._store, monitor, weights)

    def _hash_weights(self) -> str:
        """Return the content hash: what is remembered for the files of the weights, if nobody else has held them."""
        checkpoint = None if self._is_handed_out else self.checkpoint
        remembered = None if checkpoint is None else checkpoint.recall(self._model)
        if remembered is not None:
            return remembered
        weights = content_hash(self._model)
        if checkpoint is not None and not self._is_handed_out:  # by another thread, meanwhile
            checkpoint.remember(self._model, weights)
        return weights
