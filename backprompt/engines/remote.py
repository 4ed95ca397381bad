"""RemoteSession: the texts of an engine whose results are computed by workers.

    texts --Encoder--> token ids --Layout--> parts --workers--> flat arrays, in the order of the texts

A `RemoteSession` keeps the tokenizer, the limits of the model, a model without weights, which checks options of
generation, and the layout. The workers are a `Crew`, started in any way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from backprompt.engines.layout import Layout, Part
from backprompt.engines.travel import Joined, PackedIds
from backprompt.engines.worker import Description
from backprompt.errors import UnsupportedModelError
from backprompt.evaluation.behind import Behind
from backprompt.evaluation.counters import Counters
from backprompt.evaluation.distributions import Asked, Distributions
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import ScoredTexts, to_score
from backprompt.forest.fan import Shape
from backprompt.forest.partition import Ints, Rates
from backprompt.forest.span import Span
from backprompt.session.limits import TextLimits
from backprompt.session.stats import Stats
from backprompt.session.texts import TextSession
from backprompt.text.node import Text
from backprompt.tokens.encoder import Encoder
from backprompt.tokens.graph import TokenIds
from backprompt.tokens.tokenizer import PrivateTokenizer


@dataclass(frozen=True)
class Question:
    """A question to a worker: a method of `Worker`, and its arguments."""

    worker: int
    method: str
    arguments: tuple[Any, ...] = ()


class Crew(Protocol):
    """Workers that are asked by number."""

    num_workers: int
    where: str
    """Where the models lie, in words."""

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Ask all questions at once, and return the answers in order."""

    def close(self) -> None:
        """End the workers."""


class _Elsewhere:
    """Stands for an evaluator. Each use of it raises the error."""

    def __init__(self, error: UnsupportedModelError) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # read by Python, not by code that needs results
            raise AttributeError(name)
        raise self._error


class RemoteSession(TextSession):
    """Texts of a model that lies with workers.

    Args:
        crew: the workers.
        description: a description of the model that each worker holds.

    """

    def __init__(self, crew: Crew, description: Description) -> None:
        self.crew = crew
        self.num_workers = crew.num_workers
        self.tokenizer = description.tokenizer
        self.options = description.options
        self.counters = Counters()
        self.layout = Layout(self.num_workers, _rates(description.config))
        self._skeleton = description.skeleton()
        self._description = description
        self._lock = threading.RLock()
        self._begin_with(PrivateTokenizer(self.tokenizer))

    def _begin_with(self, tokenizer: PrivateTokenizer) -> None:
        self._private = tokenizer
        self.encoder = Encoder(tokenizer, self.options.joins, self.options.add_special_tokens, self._no_adapter)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Shut out other threads."""
        with self._lock:
            yield

    def current(self, *, with_weights: bool = True, with_numbers: bool = True) -> Any:
        """Notice a changed tokenizer; weights lie with the workers."""
        if self._private.has_changed():
            self._begin_with(PrivateTokenizer(self.tokenizer))
        return self.evaluator

    @property
    def private_tokenizer(self) -> PrivateTokenizer:
        """The copy of the tokenizer that encodes and decodes."""
        return self._private

    @property
    def causal_lm(self) -> Any:
        """A model like the workers', without weights."""
        return self._skeleton

    @property
    def model(self) -> Any:
        """Raise UnsupportedModelError: the model lies elsewhere."""
        raise self._elsewhere()

    @property
    def evaluator(self) -> Any:
        """An object that refuses each use, because results lie elsewhere."""
        return _Elsewhere(self._elsewhere())

    @property
    def limits(self) -> TextLimits:
        """The limits for texts that can be evaluated."""
        return TextLimits(self._description.limits, self.options.beyond_trained_length)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the output head predicts."""
        return self._description.vocab_size

    @property
    def scoring(self) -> RemoteScoring:
        """Scores texts."""
        return RemoteScoring(self)

    def distributions(self, wanted: Sequence[Wanted], asked: Asked) -> Distributions:
        """Return the requested results of the distributions that predict tokens.

        Raises:
            UnsupportedModelError: other tokens are to be scored at the positions of the wanted ones (`asked.given`), as
                trainers request.

        """
        if asked.given is not None:
            raise self._elsewhere()
        found = self.ask("distributions", [text.token_ids for text in wanted], _wanted(wanted, asked))
        tensors: dict[str, Tensor | None] = {
            field.name: found.tensors.get(field.name) for field in fields(Distributions)
        }
        return Distributions(**tensors)  # type: ignore[arg-type]

    def computed_ends(self, texts: Sequence[Text]) -> list[Span | None]:
        """Return None for each text: nothing is held here."""
        return [None] * len(texts)

    def ask(
        self,
        method: str,
        texts: Sequence[TokenIds],
        arguments: Callable[[list[int]], tuple[Any, ...]] | None = None,
        more: Sequence[int] | None = None,
    ) -> Joined:
        """Ask each worker about its part of the texts, and return the results in the order of the texts.

        Args:
            method: a method of `Worker` whose first argument is packed texts.
            texts: token ids.
            arguments: returns the other arguments for the texts with these indices.
            more: the number of tokens that are computed behind each text.

        """
        parts, answers = self.ask_parts(method, texts, arguments, more)
        return Joined.of(parts, answers)

    def ask_parts(
        self,
        method: str,
        texts: Sequence[TokenIds],
        arguments: Callable[[list[int]], tuple[Any, ...]] | None = None,
        more: Sequence[int] | None = None,
        *,
        remember: bool = True,
    ) -> tuple[list[Ints], list[Any]]:
        """Return the indices of each part's texts, and its answer; see `ask` and `Layout.place`."""
        parts = self.layout.place(texts, more, remember=remember)
        given: list[tuple[Any, ...]] = []
        for part in parts:
            indices = part.indices.tolist()
            packed = PackedIds.of([texts[idx] for idx in indices])
            given.append((packed, *(arguments(indices) if arguments else ())))
        return [part.indices for part in parts], self.ask_placed(method, parts, given)

    def ask_placed(self, method: str, parts: Sequence[Part], given: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Ask the worker of each part, and return the answers."""
        return self.crew.ask([Question(part.worker, method, own) for part, own in zip(parts, given, strict=True)])

    def worker_of(self, token_ids: TokenIds) -> int:
        """Return the worker of a text."""
        (part,) = self.layout.place([token_ids])
        return part.worker

    def ask_one(self, method: str, token_ids: TokenIds, *arguments: Any) -> Any:
        """Ask the worker of a text."""
        return self.ask_worker(self.worker_of(token_ids), method, PackedIds.of([token_ids]), *arguments)

    def ask_worker(self, worker: int, method: str, *arguments: Any) -> Any:
        """Ask one worker."""
        (answer,) = self.crew.ask([Question(worker, method, arguments)])
        return answer

    def ask_all(self, method: str) -> list[Any]:
        """Ask every worker."""
        return self.crew.ask([Question(worker, method) for worker in range(self.num_workers)])

    def stats(self) -> Stats:
        """Return the work of all workers together, and the bytes that they hold."""
        return total_of(self.ask_all("stats"))

    def _elsewhere(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            "This call needs the model and its results in this process, but those of this LM lie "
            f"{self.crew.where}. Load the model here: backprompt.load(name), or LM(model, tokenizer)."
        )

    def _no_adapter(self, name: str | None) -> int:
        raise UnsupportedModelError(
            f"Segments under adapters of their own, here {name!r}, are not supported for a model that lies "
            f"{self.crew.where}. Use an LM in this process, or load the model with one adapter for all texts."
        )


class RemoteScoring:
    """Scores texts with the workers of a session; see `Scoring`."""

    def __init__(self, session: RemoteSession) -> None:
        self._session = session

    def token_scores(
        self, texts: Iterable[TokenIds], starts: Iterable[int], ends: Sequence[Span | None]
    ) -> ScoredTexts:
        """Return the scores of the tokens of texts, from a token of each on."""
        return self.scored([to_score(ids, start, False) for ids, start in zip(texts, starts, strict=True)])

    def scored(self, wanted: Sequence[Wanted]) -> ScoredTexts:
        """Return the scores of the wanted tokens of texts, and of tokens that may follow them."""
        return self._session.ask("scored", [text.token_ids for text in wanted], _wanted(wanted)).scores()

    def behind(self, prompts: Sequence[Behind]) -> ScoredTexts:
        """Return the scores of completions behind prompts."""

        def arguments(indices: list[int]) -> tuple[Any, ...]:
            own = [prompts[idx] for idx in indices]
            number_of: dict[Shape, int] = {}
            shape_of = [number_of.setdefault(behind.shape, len(number_of)) for behind in own]
            shapes = [PackedIds.of(shape.completions) for shape in number_of]
            return shapes, _ints(shape_of), _ints([behind.num_own for behind in own])

        more = [behind.shape.num_rows for behind in prompts]
        return self._session.ask("behind", [behind.prompt for behind in prompts], arguments, more).scores()


def _rates(config: Any) -> Rates:
    """Return the cost of tokens: a layer of size h takes 12 h² products a token, and 2 h for each token before."""
    return Rates(attention=1 / (6 * config.get_text_config().hidden_size))


def total_of(stats: Sequence[Stats]) -> Stats:
    """Return the sums of the numbers of several `Stats`; strings are those of the first."""

    def added(one: Stats, other: Stats) -> Stats:
        values = {field.name: getattr(one, field.name) for field in fields(Stats)}
        for name, value in values.items():
            if not isinstance(value, str):
                values[name] = value + getattr(other, name)
        return Stats(**values)

    return reduce(added, stats)


def _wanted(wanted: Sequence[Wanted], *more: Any) -> Callable[[list[int]], tuple[Any, ...]]:
    def arguments(indices: list[int]) -> tuple[Any, ...]:
        own = [wanted[idx] for idx in indices]
        starts = _ints([text.start for text in own])
        return starts, PackedIds.of([tuple(text.candidates) for text in own]), *more

    return arguments


def _ints(numbers: Sequence[int]) -> Ints:
    return np.array(numbers, dtype=np.int64)
