"""CrewLM: an `LM` whose results are computed by a crew of workers; `RayLM` brings the crew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor

from backprompt.engines.explanation import PlacedExplanation
from backprompt.engines.remote import Crew, RemoteSession
from backprompt.engines.representation import RemoteBatch, RemotePin, RemoteRepr
from backprompt.engines.run import RemoteRun
from backprompt.engines.travel import PackedIds
from backprompt.engines.worker import Description
from backprompt.errors import UnsupportedModelError
from backprompt.evaluation.lookup import Piece
from backprompt.generation.decoding import Decoding
from backprompt.lm import LM
from backprompt.progress import showing
from backprompt.session.stats import Stats
from backprompt.text.engine import Result
from backprompt.text.node import Text


class CrewLM(LM):
    """A causal language model on several workers; takes texts as an `LM` does.

    Args:
        crew: the workers.
        description: a description of the model that each worker holds.

    """

    def __init__(self, crew: Crew, description: Description) -> None:
        self._remote = RemoteSession(crew, description)
        # An LM needs only the methods of `TextSession` from its session; this class replaces all others.
        self._session = cast(Any, self._remote)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._remote.causal_lm).__name__}, num_workers={self.num_workers})"

    def __enter__(self) -> CrewLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, named ones as well; a second call does nothing."""
        self._remote.crew.close()

    @property
    def num_workers(self) -> int:
        """The number of workers."""
        return self._remote.num_workers

    @property
    def model(self) -> Any:
        """Raise an error, because the model lies with the workers.

        Raises:
            UnsupportedModelError: always.

        """
        return self._remote.model

    @property
    def stats(self) -> Stats:
        """Counts of the work of all workers and of the results that they hold; see `worker_stats`."""
        with self._remote.exclusive():
            return self._remote.stats()

    @property
    def worker_stats(self) -> list[Stats]:
        """Counts of the work of each worker since its start and of the results that it holds."""
        with self._remote.exclusive():
            return self._remote.ask_all("stats")

    @property
    def worker_pids(self) -> list[int]:
        """The number of each worker's process, on its machine."""
        with self._remote.exclusive():
            return self._remote.ask_all("pid")

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the model and the tokenizer; see `LM.fingerprint`.

        Raises:
            UnsupportedModelError: the workers have different models.

        """
        with self._remote.exclusive():
            found = set(self._remote.ask_all("fingerprint"))
        if len(found) > 1:
            raise UnsupportedModelError(
                "The workers have different weights, so a text would have several results. A loader must return "
                "the same weights each time: load trained weights, or set torch's seed before making random weights."
            )
        return str(found.pop())

    def evaluate(self, texts: Iterable[Text], *, show_progress_bar: bool | None = None) -> list[Any]:
        """Compute the missing parts of the texts, with all workers; see `LM.evaluate`."""
        texts = self._remote.own_texts(texts)
        with self._remote.exclusive(), showing(show_progress_bar):
            encoded = self._remote.checked_ids(texts)
            self._remote.ask("evaluate", encoded)
            batch = RemoteBatch(self._remote, encoded)
            return [batch.add(idx, token_ids) for idx, token_ids in enumerate(encoded)]

    def representation(self, text: Text) -> RemoteRepr:
        """Return the representation of a text, as `evaluate` does."""
        (found,) = self.evaluate([text])
        return cast(RemoteRepr, found)

    def result(self, text: Text, name: Result) -> Tensor:
        """Return a result of the representation of a text."""
        found: Tensor = getattr(self.representation(text), name)
        return found

    def save(self, text: Text) -> None:
        """Write a text's representation to the store of its worker; see `Text.save`."""
        with self._remote.exclusive():
            self._remote.ask_one("save", *self._ids_of(text))

    def pin(self, text: Text) -> RemotePin:
        """Evaluate a text and hold all of it with its worker until it is released; see `Text.pin`."""
        return RemotePin(self._remote, *self._ids_of(text))

    def look_up(self, texts: Iterable[Text]) -> list[list[Piece]]:
        """Return where the tokens of texts are held, each with the worker that it belongs to; see `LM.look_up`."""
        texts = self._remote.own_texts(texts)
        with self._remote.exclusive():
            self._remote.current()
            encoded = self._remote.encoder.encode(texts)
            found: dict[int, list[Piece]] = {}
            for indices, pieces in zip(*self._remote.ask_parts("look_up", encoded, remember=False), strict=True):
                found.update(zip(indices.tolist(), pieces, strict=True))
            return [found[idx] for idx in range(len(texts))]

    def clear(self) -> None:
        """Drop all computed results of all workers."""
        with self._remote.exclusive():
            self._remote.ask_all("clear")

    def refresh(self, *, compare: bool = True) -> None:
        """Raise an error, because the workers' weights never change.

        Raises:
            UnsupportedModelError: always.

        """
        raise UnsupportedModelError(
            f"The model lies {self._remote.crew.where}, where its weights do not change. For other weights make "
            "another LM."
        )

    def running(self, texts: Sequence[Text], decoding: Decoding, *, is_stream: bool) -> RemoteRun:
        """Return texts that the workers continue; for `generate` and `stream`."""
        return RemoteRun(self, self._remote, texts, decoding, is_stream=is_stream)

    def explained(self, texts: Sequence[Text], *, analyze: bool) -> PlacedExplanation:
        """Return the worker of each text, and the costs; for `explain`."""
        with self._remote.exclusive():
            encoded = self._remote.checked_ids(texts)
            parts = self._remote.layout.place(encoded, remember=analyze)
            packed = [PackedIds.of([encoded[idx] for idx in part.indices.tolist()]) for part in parts]
            found = self._remote.ask_placed("explain", parts, [(own, analyze) for own in packed])
            return PlacedExplanation.of(parts, found)

    def _ids_of(self, text: Text) -> list[Any]:
        (text,) = self._remote.own_texts([text])
        with self._remote.exclusive():
            return list(self._remote.checked_ids([text]))
