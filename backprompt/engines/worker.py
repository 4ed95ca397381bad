"""Worker: an `LM` in a process of its own, which answers questions about texts, given as packed token ids.

A worker keeps its `LM`, and the streams and pins of drivers. The `LM` is made on the first question, so that an error
in making it reaches the driver. The public methods are the questions that a `RayLM` asks. Each may be asked twice: if
a worker dies, its question goes to its successor, which has none of the dead worker's state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from backprompt.engines.continuing import Continuing
from backprompt.engines.travel import Answer, PackedIds, PackedTensor, text_of
from backprompt.evaluation.behind import Behind
from backprompt.evaluation.distributions import Asked
from backprompt.evaluation.lookup import Piece
from backprompt.evaluation.reading import Wanted
from backprompt.forest.fan import Shape
from backprompt.forest.partition import Ints
from backprompt.generation.decoding import Recipe
from backprompt.generation.generate import refused_ids
from backprompt.generation.run import Run
from backprompt.inspection.explain import explain
from backprompt.inspection.explanation import Explanation
from backprompt.lm import LM
from backprompt.loading import load
from backprompt.memory.budget import default_max_bytes
from backprompt.model.limits import Limits
from backprompt.model.skeleton import head_dtype
from backprompt.session.distributions import distributions_of_ids
from backprompt.session.options import Options
from backprompt.session.representation import Pin
from backprompt.session.stats import Stats
from backprompt.session.text_scores import scores_behind, scores_of_wanted
from backprompt.text.node import Text

Source: TypeAlias = "str | Path | Callable[[], LM | tuple[Any, Any]]"
"""A name for `backprompt.load`, or a function that returns an `LM`, or a model and its tokenizer."""


@dataclass(frozen=True)
class Maker:
    """Makes the `LM` of a worker.

    Attributes:
        source: a name or a loader.
        options: the options of `load`, or those of `LM` for a loader that returns a model and its tokenizer.
        memory_share: the part of the default `memory_bytes` that the worker takes on the CPU.

    """

    source: Source
    options: Mapping[str, Any]
    memory_share: float

    def __str__(self) -> str:
        source = getattr(self.source, "__qualname__", None) or str(self.source)
        return f"{source}, {dict(sorted(self.options.items()))}"

    def lm(self) -> LM:
        """Return a new `LM`."""
        options = dict(self.options)
        if isinstance(self.source, (str, Path)):
            if "memory_bytes" not in options and not torch.cuda.is_available():
                options["memory_bytes"] = self._memory_bytes()
            return load(self.source, **{"show_progress_bar": False, **options})
        made = self.source()
        if isinstance(made, tuple) and len(made) == 2:
            if "memory_bytes" not in options and next(made[0].parameters()).device.type == "cpu":
                options["memory_bytes"] = self._memory_bytes()
            return LM(*made, **options)
        if not isinstance(made, LM):
            raise TypeError(f"A loader must return an LM or a (model, tokenizer) tuple, not {type(made).__name__}.")
        if options:
            raise TypeError(
                f"The loader returns an LM, so options come too late: {', '.join(options)}. Give them to the LM "
                "in the loader."
            )
        return made

    def _memory_bytes(self) -> int:
        return int(self.memory_share * default_max_bytes(torch.device("cpu")))


@dataclass(frozen=True)
class Description:
    """The facts about a worker's `LM` that a driver needs to encode texts and to check options.

    Attributes:
        maker: how the `LM` was made, in words.
        tokenizer: the tokenizer of the `LM`.
        model_class, config, generation_config, dtype: those of the model. `skeleton` makes a model without weights from
            them.
        limits, vocab_size, options: see `Session`.

    """

    maker: str
    tokenizer: Any
    model_class: type
    config: Any
    generation_config: Any
    dtype: torch.dtype
    limits: Limits
    vocab_size: int
    options: Options

    def skeleton(self) -> Any:
        """Return a model like that of the worker, on the meta device: without weights."""
        with torch.device("meta"):
            model = self.model_class(self.config).to(self.dtype)
        model.generation_config = self.generation_config
        return model.eval()


class Worker(Continuing):
    """Answers for texts; see the module.

    Args:
        maker: makes the `LM`.

    """

    def __init__(self, maker: Maker) -> None:
        super().__init__()
        self._maker = maker
        self._pins: dict[str, Pin] = {}

    @cached_property
    def lm(self) -> LM:
        """The `LM`."""
        return self._maker.lm()

    def pid(self) -> int:
        """Return the number of the process."""
        return os.getpid()

    def description(self) -> Description:
        """Return the facts that a driver needs."""
        session = self.lm.session
        model = session.causal_lm
        with session.exclusive():
            session.current()
            return Description(
                maker=str(self._maker),
                tokenizer=self.lm.tokenizer,
                model_class=type(model),
                config=model.config,
                generation_config=model.generation_config,
                dtype=head_dtype(model),
                limits=session.limits.model,
                vocab_size=session.vocab_size,
                options=Options(
                    joins=session.options.joins,
                    add_special_tokens=session.options.add_special_tokens,
                    beyond_trained_length=session.options.beyond_trained_length,
                ),
            )

    # Scores

    def behind(self, prompts: PackedIds, shapes: Sequence[PackedIds], shape_of: Ints, nums_own: Ints) -> Answer:
        """Score completions behind prompts; `shape_of`: the index of each prompt's shape. See `Behind`."""
        behind = behind_of(prompts, shapes, shape_of, nums_own)
        return Answer.of_scores(scores_behind(self.lm.session, behind))

    def scored(self, texts: PackedIds, starts: Ints, candidates: PackedIds) -> Answer:
        """Score tokens of texts, and tokens that may follow the texts."""
        return Answer.of_scores(scores_of_wanted(self.lm.session, wanted_of(texts, starts, candidates)))

    def distributions(self, texts: PackedIds, starts: Ints, candidates: PackedIds, asked: Asked) -> Answer:
        """Read the distributions that predict tokens."""
        wanted = wanted_of(texts, starts, candidates)
        session = self.lm.session
        with session.exclusive():
            found = distributions_of_ids(session, wanted, asked)
        lengths = [len(text.token_ids) - text.start + len(text.candidates) for text in wanted]
        return Answer.of(lengths, **vars(found))

    # Representations

    def evaluate(self, texts: PackedIds) -> Answer:
        """Compute the missing parts of texts."""
        reprs = self.lm.evaluate(self._texts(texts), show_progress_bar=False)
        return Answer.of([0] * len(reprs))

    def read(self, texts: PackedIds, name: str) -> Answer:
        """Read a tensor of each text: "logits", or a tensor with one row for each token."""
        found = [getattr(found, name) for found in self.lm.evaluate(self._texts(texts), show_progress_bar=False)]
        if name == "logits":
            return Answer.of([1] * len(found), logits=torch.stack(found))
        return Answer.of(list(map(len, found)), **{name: torch.cat(found)})

    def all_logits(self, text: PackedIds, start: int, stop: int) -> PackedTensor:
        """Return the logits after tokens of a text."""
        return PackedTensor.of(self.lm.representation(*self._texts(text)).all_logits(start, stop))

    def past_key_values(self, text: PackedIds) -> Any:
        """Return a cache of transformers, on the CPU."""
        cache: Any = self.lm.representation(*self._texts(text)).past_key_values()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
        return cache

    def property_of(self, text: PackedIds, name: str) -> Any:
        """Return an attribute of a text's representation: a number or a string."""
        return getattr(self.lm.representation(*self._texts(text)), name)

    def pin(self, text: PackedIds, name: str) -> int:
        """Pin a text under a name; return the bytes that the pin takes."""
        if name not in self._pins:
            self._pins[name] = self.lm.pin(*self._texts(text))
        return self._pins[name].num_bytes

    def release(self, name: str) -> None:
        """Release the text that is pinned under a name."""
        if (pin := self._pins.pop(name, None)) is not None:
            pin.release()

    def save(self, text: PackedIds) -> None:
        """Write a text's representation to the store."""
        self.lm.save(*self._texts(text))

    def look_up(self, texts: PackedIds) -> list[list[Piece]]:
        """Return where the tokens of texts are held."""
        return self.lm.look_up(self._texts(texts))

    def explain(self, texts: PackedIds, analyze: bool) -> Explanation:
        """Return the cost of evaluating texts here."""
        return explain(self._texts(texts), analyze=analyze)

    # The LM as a whole

    def stats(self) -> Stats:
        """Return the work done and the bytes held."""
        return self.lm.stats

    def fingerprint(self) -> str:
        """Return the hash of weights and tokenizer."""
        return self.lm.fingerprint

    def clear(self) -> None:
        """Drop all results."""
        self.lm.clear()

    def _texts(self, packed: PackedIds) -> list[Text]:
        return [text_of(ids, self.lm) for ids in packed.unpacked()]

    def _run(self, prompts: PackedIds, recipe: Recipe) -> Run:
        session = self.lm.session
        ids = prompts.unpacked()
        session.counters.tokens_requested += sum(map(len, ids))
        decoding = recipe.decoding(
            session.causal_lm, self.lm.tokenizer, refused_ids(self.lm), session.private_tokenizer
        )
        return Run(self.lm, (), decoding, ids)


def behind_of(prompts: PackedIds, shapes: Sequence[PackedIds], shape_of: Ints, nums_own: Ints) -> list[Behind]:
    """Unpack prompts and the completions behind them."""
    made = [Shape([tuple(ids) for ids in packed.unpacked()]) for packed in shapes]  # type: ignore[arg-type]
    return [
        Behind(prompt, made[shape], num_own)
        for prompt, shape, num_own in zip(prompts.unpacked(), shape_of.tolist(), nums_own.tolist(), strict=True)
    ]


def wanted_of(texts: PackedIds, starts: Ints, candidates: PackedIds) -> list[Wanted]:
    """Unpack wanted scores."""
    return [
        Wanted(ids, start, own)  # type: ignore[arg-type]  # candidates have no groups
        for ids, start, own in zip(texts.unpacked(), starts.tolist(), candidates.unpacked(), strict=True)
    ]
