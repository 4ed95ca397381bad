"""RemoteRepr: the representation of one text, whose tensors lie with a worker.

A `RemoteRepr` keeps the token ids and the results that were read. The first read fetches the result of one text. Each
further read fetches twice as many, of texts that were evaluated together, so reading all of them takes few questions.
An `LM` reads ahead in the same way.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from backprompt.engines.remote import RemoteSession
from backprompt.engines.travel import PackedIds
from backprompt.errors import GroupError, UnsupportedModelError
from backprompt.session.limits import check_has_last_token
from backprompt.session.representation import ModelRepr, Pin
from backprompt.tokens.graph import TokenGraph, TokenIds, flat

if TYPE_CHECKING:
    from transformers import DynamicCache

MAX_AHEAD = {"logits": 64, "hidden_states": 64, "token_logprobs": 1 << 16}
"""The largest number of texts that one read asks for."""


class RemoteBatch:
    """The texts of one `evaluate`; does not keep their representations alive."""

    def __init__(self, session: RemoteSession, encoded: Sequence[TokenIds]) -> None:
        self.session = session
        self._num_asked: dict[str, int] = {}
        self._alive: WeakValueDictionary[int, RemoteRepr] = WeakValueDictionary()
        self._num_texts = len(encoded)

    def add(self, idx: int, token_ids: TokenIds) -> RemoteRepr:
        """Return the representation of a text of the batch."""
        found = self._alive[idx] = RemoteRepr(self, idx, token_ids)
        return found

    def read(self, idx: int, name: str) -> None:
        """Read a result of a text, and of some texts that follow it in the batch."""
        num_asked = self._num_asked.get(name, 0)
        self._num_asked[name] = num_asked + 1
        indices = itertools.chain(range(idx, self._num_texts), range(idx))
        alive = (found for i in indices if (found := self._alive.get(i)) is not None and name not in found.results)
        ahead = list(itertools.islice(alive, min(1 << min(num_asked, 20), MAX_AHEAD[name])))
        if name == "logits":
            ahead = [found for found in ahead if found.has_last_token]
        joined = self.session.ask("read", [of.token_ids for of in ahead], lambda _: (name,))
        for of, result in zip(ahead, joined.split(name), strict=True):
            of.results[name] = result.clone()


class RemoteRepr(ModelRepr):
    """The representation of one text by a model that lies with workers; see `ModelRepr`. Tensors lie on the CPU."""

    def __init__(self, batch: RemoteBatch, idx: int, token_ids: TokenIds) -> None:
        self._batch = batch
        self._idx = idx
        self.token_ids = token_ids
        self.results: dict[str, Tensor] = {}

    @property
    def has_last_token(self) -> bool:
        """Whether the text ends in a single token, and not in a group."""
        try:
            check_has_last_token("", self.token_ids)
        except GroupError:
            return False
        return True

    @property
    def num_tokens(self) -> int:
        """The number of the text's tokens, special tokens included."""
        return len(self.token_ids)

    @property
    def input_ids(self) -> Tensor:
        """Token ids in written order, `(tokens,)`, int64."""
        return torch.tensor(flat(self.token_ids))

    @property
    def key(self) -> str:
        """The SHA-256, as hex, that names this representation by content."""
        return str(self._ask("property_of", "key"))

    @property
    def stored_error(self) -> float:
        """The largest relative error from storage at reduced precision."""
        return float(self._ask("property_of", "stored_error"))

    @property
    def num_bytes(self) -> int:
        """Bytes that the whole representation takes with its worker."""
        return int(self._ask("property_of", "num_bytes"))

    @property
    def logits(self) -> Tensor:
        """Next-token logits, `(vocab,)`, in the model's dtype."""
        check_has_last_token(f"This text of {self.num_tokens} tokens", self.token_ids)
        return self._read("logits")[0]

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probability of each token given the tokens that it sees, `(tokens,)`, nats."""
        return self._read("token_logprobs")

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states, `(tokens, hidden)`, in the model's dtype."""
        return self._read("hidden_states")

    def all_logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits after each of the tokens `start..stop`, `(tokens, vocab)`."""
        start, stop, _ = slice(start, stop).indices(self.num_tokens)
        found: Tensor = self._ask("all_logits", start, stop).unpacked()
        return found

    def attention(self, *chosen: Any, **options: Any) -> Tensor:
        """Raise UnsupportedModelError: attention needs the model in this process."""
        raise UnsupportedModelError(
            "attention() is not supported for texts whose model lies with workers. Load the model in this "
            "process: backprompt.load(name)."
        )

    def past_key_values(self) -> DynamicCache:
        """Return a copy of all keys and values, on the CPU."""
        if isinstance(self.token_ids, TokenGraph):
            raise GroupError(
                "past_key_values() does not work for texts with groups or frozen segments. Read "
                "logits and log-probabilities instead."
            )
        found: DynamicCache = self._ask("past_key_values")
        return found

    def _read(self, name: str) -> Tensor:
        with self._batch.session.exclusive():
            if name not in self.results:
                self._batch.read(self._idx, name)
            return self.results[name].clone()

    def _ask(self, method: str, *arguments: Any) -> Any:
        with self._batch.session.exclusive():
            return self._batch.session.ask_one(method, self.token_ids, *arguments)


class RemotePin(Pin):
    """Holds all of a text's representation with its worker, until the pin is released or the worker dies."""

    def __init__(self, session: RemoteSession, token_ids: TokenIds) -> None:
        self._remote = session
        self._name = uuid.uuid4().hex
        with session.exclusive():
            self._worker = session.worker_of(token_ids)
            self._num_bytes = session.ask_worker(self._worker, "pin", PackedIds.of([token_ids]), self._name)

    def __repr__(self) -> str:
        return f"RemotePin({self.num_bytes} bytes, worker {self._worker})"

    @property
    def num_bytes(self) -> int:
        """Bytes of the budget that the pin takes alone."""
        return int(self._num_bytes)

    def release(self) -> None:
        """Release the text; a second call does nothing."""
        if self._num_bytes:
            self._remote.ask_worker(self._worker, "release", self._name)
        self._num_bytes = 0
