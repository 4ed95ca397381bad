"""LM: a model and its tokenizer, and all that was computed with them.

    texts --Encoder--> token ids --Forest, plan--> passes --Executor--> blocks of rows --> ModelRepr

One lock guards all of it, so one `LM` may be used from many threads; the model itself is never touched, so it may be
called by others meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from backprompt.archive import Archive, Root
from backprompt.cache import Location
from backprompt.checkpoint import Checkpoint
from backprompt.decoding import Decoding
from backprompt.errors import (
    EmptyTextError,
    GroupError,
    ModelLoadError,
    NoStoreError,
    NotPicklableError,
    StaleRepresentationError,
    TextTooLongError,
    TextTypeError,
    TokenIdError,
    UnboundTextError,
    UnsupportedModelError,
)
from backprompt.evaluator import Counters, Evaluator, PinnedText, TokenScores, Wanted, split_to_score
from backprompt.executor import plain_surroundings
from backprompt.host import HostMemory
from backprompt.identity import EXACT, root_key
from backprompt.lookup import Piece
from backprompt.memory import default_host_bytes, default_max_bytes, parse_bytes
from backprompt.progress import showing
from backprompt.radix import Place
from backprompt.representation import Batch, Evaluated, ModelRepr, Pin
from backprompt.skeleton import model_device, unwrap
from backprompt.store import DiskStore, Store
from backprompt.text import Text, lazily
from backprompt.token_graph import TokenGraph, TokenIds, flat, num_positions, without_last
from backprompt.tokenizer import PrivateTokenizer
from backprompt.tokens import JOINS, Encoder, Extent, Join, Joins
from backprompt.weights import WeightsMonitor, content_hash

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 256 << 20
"""Bound of the pool of logit rows, which are large (200 kB in GPT-2) and cheap to compute again."""


_NAMES = ("kernel", "linears")  # fields of `Stats` that are not numbers


@dataclass(frozen=True)
class Stats:
    """What an `LM` has done so far and what it holds; `after - before` is what happened in between.

    Attributes:
        tokens_requested: sum of the texts' tokens over all evaluations.
        tokens_computed: tokens forwarded through the model.
        tokens_recomputed: of those, how many were forwarded before and dropped over the budget.
        tokens_fetched: tokens whose states, or keys and values, moved back from the second pool to the device.
        tokens_loaded: tokens whose states came from the store.
        tokens_reused: requested less forwarded: what was cached or shared, or scored without being forwarded.
        forward_passes: packed forward passes.
        logit_rows: rows of logits computed by the output head.
        seconds: time in forward passes and in the output head.
        bytes_held: keys, values, hidden states and log-probabilities held now on the device.
        host_bytes_held: those held now in the second pool, in host memory.
        result_bytes_held: rows of logits, and log-probabilities of tokens that were scored and not forwarded, held now
            in bounded pools of their own.
        packed_weight_bytes: the copies of weights that `pack_weights` makes.
        kernel: the attention kernel that serves.
        linears: what multiplies linear layers: "torch", "onednn" (see `backprompt/linear.py`) or "onednn, packed".

    """

    tokens_requested: int
    tokens_computed: int
    tokens_recomputed: int
    tokens_fetched: int
    tokens_loaded: int
    tokens_reused: int
    forward_passes: int
    logit_rows: int
    seconds: float
    bytes_held: int
    host_bytes_held: int
    result_bytes_held: int
    packed_weight_bytes: int
    kernel: str
    linears: str

    def __sub__(self, before: Stats) -> Stats:
        differences = {
            f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self) if f.name not in _NAMES
        }
        return replace(self, **differences)


class LM:
    """A causal language model of transformers with its tokenizer; starts with an empty cache.

    The model is left as found: evaluation runs on a private copy that shares its weights, in eval mode, without
    gradients. Copying an `LM` returns the same object.

    Args:
        model: any causal LM of transformers whose attention goes through transformers' attention interface.
        tokenizer: its tokenizer.
        joins: what happens where two strings of a text meet. "exact" encodes the whole string; "split" encodes every
            segment on its own; "error" raises where the two differ.
        add_special_tokens: whether to add what the tokenizer adds to a whole string, once a text.
        memory_bytes: how much to hold between calls: keys, values, hidden states and log-probabilities. A number of
            bytes or text such as "2 GB"; by default half of what is free on the device. What goes beyond is dropped,
            and computed again when it is asked for.
        host_memory_bytes: a second budget, in host memory: what goes beyond the first moves there instead, and back
            when it is asked for. By default a quarter of the host memory that is free, and 0 for a model that lies in
            host memory itself.
        pin_memory: take page-locked host memory for it, which moves faster; for models on CUDA.
        max_tokens_per_forward: how many tokens one packed pass forwards at most; by default chosen by device.
        store: a store of representations, or the path of its folder, made if it is not there. What it has is not
            computed again; what is computed goes into it, as the store's `persist` says ("always" for a path).
        beyond_trained_length: let texts through that are longer than a rotary model was trained for.
        pack_weights: on the CPU, hold a second copy of the weights of all linear layers, in the order in which they are
            multiplied. It takes as many bytes as they do (`lm.stats.packed_weight_bytes`; 494 MB for GPT-2) and makes
            passes faster, most of all those of few tokens: generation. For weights in float32 or bfloat16.

    Raises:
        UnsupportedModelError: the model cannot be evaluated exactly, or its weights not be packed; names the reason.
            Some reasons show only on the first evaluation.
        TokenizerError: `tokenizer` is not one.

    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        joins: Joins = "exact",
        add_special_tokens: bool = True,
        memory_bytes: int | str | None = None,
        host_memory_bytes: int | str | None = None,
        pin_memory: bool = False,
        max_tokens_per_forward: int | None = None,
        store: Store | str | os.PathLike[str] | None = None,
        beyond_trained_length: bool = False,
        pack_weights: bool = False,
    ) -> None:
        if joins not in JOINS:
            raise ValueError(f"joins must be one of {', '.join(map(repr, JOINS))}, not {joins!r}.")
        if max_tokens_per_forward is not None and not (
            isinstance(max_tokens_per_forward, int) and max_tokens_per_forward >= 1
        ):
            raise ValueError(f"max_tokens_per_forward must be an int of at least 1, not {max_tokens_per_forward!r}.")
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"An LM wraps a model of transformers, not {type(model).__name__}. "
                "To load one by its name or path use backprompt.load(name)."
            )
        self._model = model
        self._is_handed_out = False
        self._checkpoint: Checkpoint | None = None  # `load` knows
        device = model_device(unwrap(model))
        if pin_memory:
            _check_can_pin(device)
        self._memory_bytes = default_max_bytes(device) if memory_bytes is None else parse_bytes(memory_bytes)
        if host_memory_bytes is None:
            self._host_memory_bytes = default_host_bytes(device)
        else:
            self._host_memory_bytes = parse_bytes(host_memory_bytes, "host_memory_bytes")
        self._pin_memory = pin_memory
        self.tokenizer = tokenizer
        self._joins = joins
        self._add_special_tokens = add_special_tokens
        self._max_tokens_per_forward = max_tokens_per_forward
        self._beyond_trained_length = beyond_trained_length
        self._pack_weights = pack_weights
        self._lock = threading.RLock()
        self._has_failed = False  # since the evaluator last recovered
        self._counters = Counters()
        self._content_hash: str | None = None
        self._tokenizer_copy = PrivateTokenizer(tokenizer)
        self._encoder = Encoder(self._tokenizer_copy, joins, add_special_tokens)
        if not isinstance(store, (str, os.PathLike, Store, type(None))):
            raise TypeError(f"store must be a path or a backprompt.Store, not {type(store).__name__}.")
        self._store = DiskStore(store) if isinstance(store, (str, os.PathLike)) else store
        if self._store is not None and self._store is not store:
            weakref.finalize(self, self._store.close)  # nobody else can close it
        self._evaluator = self._make_evaluator(self._tokenizer_copy)
        self._monitor = WeightsMonitor(model)
        self._evaluated: WeakKeyDictionary[Text, Evaluated] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"LM({type(self._model).__name__}, {type(self.tokenizer).__name__}, joins={self._joins!r})"

    def __copy__(self) -> LM:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotPicklableError(
            "An LM cannot be pickled: it holds a model, a lock and a cache. Pickle texts without a model or their "
            "strings, and build the LM again where they are loaded (backprompt.load(name))."
        )

    @property
    def model(self) -> nn.Module:
        """The model, as it was given.

        Whoever reads this may write weights, so a fingerprint first used thereafter is not a remembered one.
        """
        self._is_handed_out = True  # to where weights can be written without anything showing it
        return self._model

    @property
    def stats(self) -> Stats:
        """What was done so far and what is held now."""
        with self._exclusive():
            counters = self._counters
            return Stats(
                tokens_requested=counters.tokens_requested,
                tokens_computed=counters.tokens_computed,
                tokens_recomputed=counters.tokens_recomputed,
                tokens_fetched=counters.tokens_fetched,
                tokens_loaded=counters.tokens_loaded,
                tokens_reused=counters.tokens_requested - counters.tokens_computed,
                forward_passes=counters.forward_passes,
                logit_rows=counters.logit_rows,
                seconds=counters.seconds,
                bytes_held=self._evaluator.memory.num_bytes,
                host_bytes_held=self._evaluator.host.num_bytes,
                result_bytes_held=self._evaluator.result_bytes_held,
                packed_weight_bytes=self._evaluator.executor.linears.packed_bytes,
                kernel=self._evaluator.executor.kernel_name,
                linears=self._evaluator.executor.linears.name,
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the model's weights, configuration, adapters and dtype, and of the tokenizer.

        The root of all keys. The first use, and the first after a change, hashes every weight; that of what `load` read
        is remembered between processes, in `$BACKPROMPT_CACHE_HOME` or `backprompt` in the user's cache directory.
        """
        with self._exclusive():
            self._current()
            return self._root().key.hex()

    def evaluate(self, texts: Iterable[Text], *, show_progress_bar: bool | None = None) -> list[ModelRepr]:
        """Compute what is missing of the texts, in as few packed passes as possible; one `ModelRepr` a text.

        Args:
            texts: of this `LM`.
            show_progress_bar: by default on a terminal where it takes several passes and longer than two seconds.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            EmptyTextError, TextTooLongError, TokenIdError, JoinError, TokenizerError: a text that cannot be
                evaluated, named in the message; raised before anything is computed.
            NonFiniteError: the model returned NaN.
            StaleRepresentationError, UnsupportedModelError: see the class.

        """
        texts = self._own_texts(texts)
        with self._exclusive(), showing(show_progress_bar):
            self._current().count_evaluation()
            return [ModelRepr(self, evaluated) for evaluated in self._evaluate(texts)]

    def representation(self, text: Text) -> ModelRepr:
        """Return what `evaluate` returns of a text; of one that is held this is no evaluation, only a look."""
        with self._exclusive():
            return ModelRepr(self, *self._evaluate([text]))

    def token_logprobs(
        self, texts: Iterable[Text], starts: Sequence[int] | None = None, *, show_progress_bar: bool | None = None
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of their tokens, from `starts[i]` on in text i.

        Rows of the output head that predict only tokens before the start are not computed, and a text's last token is
        not forwarded for this (if it is scored, and one token stands before it), since no row of its own is needed. To
        score what follows a prompt, let the prompt's number of tokens be the start, where its tokens are a beginning of
        the whole text's. A text may have one token more than the model has positions. `show_progress_bar` is that of
        `evaluate`.

        Returns:
            A tensor a text, `(tokens - start,)`, float32, nats; nan for a first token, which nothing predicts.

        Raises:
            ValueError: `starts` has another length than `texts`, or a start is negative or beyond its text's end.
            What `evaluate` raises.

        """
        return [s.logprobs for s in self.token_scores(texts, starts, show_progress_bar=show_progress_bar)]

    def token_scores(
        self, texts: Iterable[Text], starts: Sequence[int] | None = None, *, show_progress_bar: bool | None = None
    ) -> list[TokenScores]:
        """Return what `token_logprobs` returns and, beside it, whether each token is the most probable one.

        Both are read off the same rows of the output head.

        Returns:
            Scores a text, `.logprobs` and `.is_argmax`, each `(tokens - start,)`; see `TokenScores`.

        Raises:
            What `token_logprobs` raises.

        """
        texts = self._own_texts(texts)
        starts = [0] * len(texts) if starts is None else list(starts)
        if len(starts) != len(texts):
            raise ValueError(f"starts has {len(starts)} elements for {len(texts)} texts; give one start a text.")
        with self._exclusive(), showing(show_progress_bar):
            encoded = self._checked_ids(texts, starts, is_scoring=True)
            return self._evaluator.token_scores_of(list(zip(encoded, starts, strict=True))) if texts else []

    def next_token_logprobs(
        self, texts: Iterable[Text], token_ids: Sequence[Sequence[int]], *, show_progress_bar: bool | None = None
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of given tokens as the next one of each.

        Args:
            texts: any texts that do not end in a group.
            token_ids: for each text the ids to score; they are not forwarded.
            show_progress_bar: see `evaluate`.

        Returns:
            A tensor a text, `(ids,)`, float32, nats, on the model's device.

        Raises:
            ValueError: `token_ids` has another length than `texts`.
            GroupError: a text ends in a group, so it has no last token.
            TokenIdError: an id is not one of the model's.
            What `evaluate` raises.

        """
        texts = self._own_texts(texts)
        if len(token_ids) != len(texts):
            raise ValueError(
                f"token_ids has {len(token_ids)} elements for {len(texts)} texts; give a sequence of ids a text."
            )
        with self._exclusive(), showing(show_progress_bar):
            self._current()
            for text, ids in zip(texts, self._encoder.encode(texts), strict=True):
                if isinstance(ids, TokenGraph) and ids.ends_in_group:
                    raise GroupError(f"{text!r} ends in a group, so it has no last token. Add a segment behind it.")
            candidates = [tuple(map(self._known_id, ids)) for ids in token_ids]
            wanted = [Wanted(ids, len(ids), own) for ids, own in zip(self._checked_ids(texts), candidates, strict=True)]
            found = self._evaluator.scored(wanted) if wanted else []
            logprobs = [
                scored.candidates[i].logprob for scored, own in zip(found, candidates, strict=True) for i in own
            ]
            together = torch.tensor(logprobs, dtype=torch.float32, device=self._evaluator.executor.device)
            return list(torch.split(together, [len(own) for own in candidates]))

    def decoding(
        self, *, max_new_tokens: int, stop: str | Sequence[str] | None, seed: int | None, given: Mapping[str, Any]
    ) -> Decoding:
        """Return checked options of `generate`; see `backprompt.generate`."""
        return Decoding(
            unwrap(self._model),
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            stop=stop,
            seed=seed,
            given=given,
        )

    def ids_to_continue(self, texts: Sequence[Text], max_new_tokens: int) -> list[TokenIds]:
        """Return the ids of texts that are to be continued, and count them.

        Raises:
            TextTooLongError: there is no room for `max_new_tokens`.
            GroupError, and what `evaluate` raises for texts that cannot be evaluated.

        """
        texts = self._own_texts(texts)
        with self._exclusive():
            prompts = self.prompt_ids(texts)
            for text, token_ids in zip(texts, prompts, strict=True):
                self._check_can_be_evaluated(self._evaluator, text, token_ids)
                self._check_room(self._evaluator, text, token_ids, max_new_tokens)
            self._counters.tokens_requested += sum(map(len, prompts))
            return prompts

    @contextmanager
    def growing(self, expected: Evaluator | None) -> Iterator[Evaluator]:
        """Hold the lock and yield the evaluator for a step of a generation that was begun with `expected`.

        Raises:
            StaleRepresentationError: it was begun with other weights.

        """
        with self._exclusive():
            evaluator = self._current()
            if expected is not None and evaluator is not expected:
                raise StaleRepresentationError(
                    "The model's weights (or its tokenizer) have changed since this continuation was begun. Begin "
                    "again: text.generate(...)."
                )
            yield evaluator

    def save(self, text: Text) -> None:
        """Write a text's representation to the store; see `Text.save`."""
        if self._store is None:
            raise NoStoreError(
                "This LM has no store to save to. Give it one: load(name, store='prompts.bp') or LM(..., store=...)."
            )
        if self._store.persist == "never":
            raise NoStoreError(f'{self._store!r} was opened with persist="never". Open it with "explicit" or "always".')
        (text,) = self._own_texts([text])
        with self._exclusive():
            (token_ids,) = self._checked_ids([text])
            self._evaluator.save(token_ids)

    def pin(self, text: Text) -> Pin:
        """Evaluate a text and hold all of it until it is released; see `Text.pin`."""
        (text,) = self._own_texts([text])
        pinned = PinnedText()
        try:
            with self._exclusive():
                (pinned.token_ids,) = self._checked_ids([text])
                self._evaluator.pin(pinned)
                pin = Pin(self, self._evaluator, pinned)
            return pin
        except BaseException:  # whoever does not get the pin cannot release it
            with self._exclusive():
                self._evaluator.unpin(pinned)
            raise

    def check(self, texts: Iterable[Text]) -> None:
        """Raise what `evaluate` raises for texts that cannot be evaluated; computes nothing."""
        texts = self._own_texts(texts)
        with self._exclusive():
            evaluator = self._current()
            for text, token_ids in zip(texts, self._encoder.encode(texts), strict=True):
                self._check_can_be_evaluated(evaluator, text, token_ids)

    def look_up(self, texts: Iterable[Text]) -> list[list[Piece]]:
        """Return where the tokens of texts lie, as pieces of each text in written order.

        Nothing is computed, loaded or inserted, and what is evicted next stays the same. With a store only its index is
        asked, and the first such question hashes the model's weights, as `fingerprint` does.

        Returns:
            For each text pieces that cover `text.tokens` without gaps.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            JoinError, TokenizerError: a text that cannot be encoded.

        """
        texts = self._own_texts(texts)
        with self._exclusive():
            evaluator = self._current()
            sketch = evaluator.sketch(self._encoder.encode(texts))
            return [sketch.pieces(place) for place in sketch.places]

    def extents(self, texts: Iterable[Text]) -> list[list[Extent]]:
        """Return which tokens of each text its strings and runs of token ids became, in written order.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            JoinError, TokenizerError: a text that cannot be encoded.

        """
        texts = self._own_texts(texts)
        with self._exclusive():
            self._current()
            return self._encoder.extents(texts)

    def tokens(self, text: Text) -> tuple[int, ...]:
        """Return the token ids of a text; see `Text.tokens`."""
        with self._exclusive():
            self._current()
            return flat(self._encoder.encode([text])[0])

    def prompt_ids(self, texts: Iterable[Text]) -> list[TokenIds]:
        """Return the ids of texts as they are where something follows: without what a tokenizer appends at an end.

        Raises:
            GroupError: a text ends in a group, so no one token stands before what follows.

        """
        texts = self._own_texts(texts)
        with lazily():
            marker = Text.from_tokens([0], self)
            followed = [text + marker for text in texts]
        with self._exclusive():
            self._current()
            found: list[TokenIds] = []
            for text, encoded in zip(texts, self._encoder.encode(followed), strict=True):
                split = without_last(encoded)
                if split is None and len(encoded) > 1:
                    raise GroupError(f"{text!r} ends in a group, so it has no last token. Add a segment behind it.")
                found.append(() if split is None else split[0])
            return found

    def completion_ids(self, strings: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the ids of each string encoded by itself, without special tokens; see classify.py."""
        with self._exclusive():
            self._current()
            return self._tokenizer_copy.encode(strings, is_continuation=False)

    @property
    def needs_space_between(self) -> bool:
        """Whether "a b" is encoded as "a" and " b" are, and not as "a" and "b" are, as SentencePiece does."""
        both, first, second = self.completion_ids(["a b", "a", "b"])
        return both != first + second

    def joins(self, text: Text) -> list[Join]:
        """Return the joins of a text that change tokens; see `Text.joins`."""
        with self._exclusive():
            self._current()
            return self._encoder.joins(text)

    def string(self, text: Text) -> str:
        """Return the string of a text with segments of token ids; see `Text.string`."""
        with self._exclusive():
            self._current()
            return self._encoder.string(text)

    def clear(self) -> None:
        """Drop everything that was computed, pinned texts too.

        Texts and representations stay valid and are recomputed when asked.
        """
        with self._exclusive():
            self._evaluator.end_abandoned()
            self._evaluator.clear()

    def refresh(self) -> None:
        """Hash every weight and the tokenizer again, and drop what was computed if they have changed.

        Needed only after changes that the quick look before each evaluation cannot see: writes through `.data` to a
        few elements, settings of modules that are neither parameters nor buffers, or single merges replaced within
        the tokenizer, or files rewritten in place from which weights are mapped into memory. Refresh after them and
        before evaluating: with a store, what is computed in between is stored as that of the old weights. Without an
        earlier use of `fingerprint` there is nothing to compare with, and everything is dropped.
        """
        with self._exclusive():
            weights = content_hash(self._model)
            if self._checkpoint is not None:
                self._checkpoint.forget_unless(weights)  # whether memory or weights are to blame
            tokenizer = PrivateTokenizer(self.tokenizer).fingerprint()
            if (weights, tokenizer) != (self._content_hash, self._tokenizer_copy.fingerprint()):
                self._start_over(PrivateTokenizer(self.tokenizer))
                self._content_hash = weights

    def _own_texts(self, texts: Iterable[Text]) -> list[Text]:
        texts = list(texts)
        for idx, text in enumerate(texts):
            if lm_of(text, idx) is not self:
                raise UnboundTextError(
                    f"texts[{idx}], {text!r}, belongs to another LM: use backprompt.evaluate(texts)."
                )
        return texts

    def _checked_ids(
        self, texts: Sequence[Text], starts: Sequence[int] = (), *, is_scoring: bool = False
    ) -> list[TokenIds]:
        """Return the token ids of texts that can be evaluated, and count them; the lock must be held.

        `is_scoring`: they are only scored, from `starts` on.
        """
        evaluator = self._current()
        encoded = self._encoder.encode(texts)
        for text, token_ids, start in zip(texts, encoded, starts, strict=False):
            if not 0 <= start <= len(token_ids):
                raise ValueError(
                    f"{text!r} has {len(token_ids)} tokens, so its start must be between 0 and that, not {start}."
                )
        lengths: dict[Text, int] = {}
        for idx, (text, token_ids) in enumerate(zip(texts, encoded, strict=True)):
            split = split_to_score(token_ids, starts[idx]) if is_scoring else None
            lengths[text] = max(lengths.get(text, 0), num_positions(token_ids if split is None else split[0]))
        for text, token_ids in dict(zip(texts, encoded, strict=True)).items():
            if text not in self._evaluated:
                self._check_can_be_evaluated(evaluator, text, token_ids, lengths[text])
        self._counters.tokens_requested += sum(map(len, encoded))
        return encoded

    def _evaluate(self, texts: Sequence[Text]) -> list[Evaluated]:
        """Compute what is missing of the texts; the lock must be held."""
        encoded = self._checked_ids(texts)
        evaluator = self._evaluator
        known = {text: found for text in texts if (found := self._evaluated.get(text)) and found.is_computed}
        evaluator.memory.touch(found.end for found in known.values())
        missing = {text: ids for text, ids in zip(texts, encoded, strict=True) if text not in known}
        if missing:
            ends = evaluator.evaluate(list(missing.values()))
            batch = Batch(evaluator, list(map(Place, ends, missing.values())))
            new = {text: Evaluated(batch, idx) for idx, text in enumerate(missing)}
            self._evaluated.update(new)
            known |= new
        return [known[text] for text in texts]

    def _known_id(self, token_id: int) -> int:
        num_embeddings = self._evaluator.executor.limits.num_embeddings
        if not 0 <= token_id < num_embeddings:
            raise TokenIdError(f"Token id {token_id} is not one of the model's, which are 0 to {num_embeddings - 1}.")
        return token_id

    def _check_can_be_evaluated(
        self, evaluator: Evaluator, text: Text, token_ids: TokenIds, length: int | None = None
    ) -> None:
        """Raise if a text cannot be evaluated; `length`: how many positions that takes, if not all of its own."""
        limits = evaluator.executor.limits
        if not token_ids:
            raise EmptyTextError(
                f"{text!r} has no tokens, so there is nothing to evaluate. Add a string to it, or start it with a "
                "token such as the tokenizer's BOS: Text.from_tokens([tokenizer.bos_token_id], lm)."
            )
        ids = flat(token_ids)
        if min(ids) < 0 or max(ids) >= limits.num_embeddings:
            position, token_id = next((p, t) for p, t in enumerate(ids) if not 0 <= t < limits.num_embeddings)
            raise TokenIdError(
                f"{text!r} has token id {token_id} at position {position}, but the model's embedding has ids 0 to "
                f"{limits.num_embeddings - 1}. Use the model's own tokenizer, or model.resize_token_embeddings(...)."
            )
        length = num_positions(token_ids) if length is None else length
        if limits.max_tokens is None or length <= limits.max_tokens:
            return
        what = "tokens" if isinstance(token_ids, tuple) else "positions"
        too_long = f"{text!r} has {num_positions(token_ids)} {what}, but the model has {limits.max_tokens} positions"
        if limits.why_hard is not None:
            raise TextTooLongError(f"{too_long}: {limits.why_hard}. Shorten the text by {length - limits.max_tokens}.")
        if not self._beyond_trained_length:
            raise TextTooLongError(
                f"{too_long} that it was trained for. Shorten the text by {length - limits.max_tokens}, or let "
                "it through at your own risk with LM(..., beyond_trained_length=True)."
            )

    def _check_room(self, evaluator: Evaluator, text: Text, token_ids: TokenIds, max_new_tokens: int) -> None:
        limits = evaluator.executor.limits
        if limits.max_tokens is None or (limits.why_hard is None and self._beyond_trained_length):
            return
        room = limits.max_tokens - num_positions(token_ids)
        if max_new_tokens > room:
            raise TextTooLongError(
                f"{text!r} has {num_positions(token_ids)} tokens and the model {limits.max_tokens} positions, so there "
                f"is no room for max_new_tokens={max_new_tokens}. Ask for at most {room}, or shorten the text."
            )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other threads out, and the caller's torch settings too.

        An error within, whatever it is and wherever it comes, has the evaluator recover before anything else is done.
        """
        with self._lock, plain_surroundings(self._evaluator.executor.device):
            if self._has_failed:
                self._evaluator.recover()
                self._has_failed = False
            try:
                yield
            except BaseException:
                self._has_failed = True
                raise

    def _current(self) -> Evaluator:
        """Return the evaluator of the weights as they are now; the lock must be held."""
        if self._tokenizer_copy.has_changed():
            logger.info("The tokenizer has changed.")
            self._start_over(PrivateTokenizer(self.tokenizer))
        elif self._monitor.has_changed() or self._evaluator.is_closed:
            self._start_over(self._tokenizer_copy)
        self._evaluator.end_abandoned()
        self._evaluator.hold_pins()
        return self._evaluator

    def _make_evaluator(self, tokenizer: PrivateTokenizer) -> Evaluator:
        model, archive = unwrap(self._model), None
        device = model_device(model)
        host = HostMemory(self._host_memory_bytes, Location(torch.device("cpu"), self._pin_memory), Location(device))
        if self._store is not None:
            reference = weakref.ref(self)  # a cycle would keep tensors alive for longer than the LM

            def root() -> Root:
                lm = reference()
                assert lm is not None
                return lm._root(in_store=True)

            archive = Archive(self._store, root, tokenizer.decode, device)
        return Evaluator(
            model,
            self._counters,
            self._max_tokens_per_forward,
            self._memory_bytes,
            host,
            MAX_RESULT_BYTES,
            archive,
            pack_weights=self._pack_weights,
        )

    def _root(self, *, in_store: bool = False) -> Root:
        """Return what all keys are built on, or those of what the store may have made inexact.

        The first use hashes every weight.
        """
        if self._content_hash is None:
            self._content_hash = self._hash_weights()
        dtype = str(next(unwrap(self._model).parameters()).dtype)
        tokenizer = self._tokenizer_copy.fingerprint()
        stored_dtype = self._store.dtype if in_store and self._store is not None else None
        exactness = EXACT if stored_dtype is None else stored_dtype
        key = root_key(model=self._content_hash, dtype=dtype, tokenizer=tokenizer, exactness=exactness)
        return Root(key, self._content_hash, tokenizer, dtype, exactness)

    def _hash_weights(self) -> str:
        """Return the content hash: what is remembered for the files of the weights, if only this `LM` has held them."""
        checkpoint = None if self._is_handed_out else self._checkpoint
        remembered = None if checkpoint is None else checkpoint.recall(self._model)
        if remembered is not None:
            return remembered
        weights = content_hash(self._model)
        if checkpoint is not None and not self._is_handed_out:  # by another thread, meanwhile
            checkpoint.remember(self._model, weights)
        return weights

    def _start_over(self, tokenizer: PrivateTokenizer) -> None:
        """Start over with the model as it is now, and a tokenizer; nothing changes if it can no longer be evaluated.

        An error on the way leaves the old evaluator, closed: `_current` sees that, and starts over once more.
        """
        logger.info("Weights or tokenizer have changed: dropping what was computed with the old ones.")
        evaluator = self._make_evaluator(tokenizer)
        monitor = WeightsMonitor(self._model)
        encoder = Encoder(tokenizer, self._joins, self._add_special_tokens)
        self._content_hash = self._checkpoint = None
        self._evaluator.close()
        self._evaluated = WeakKeyDictionary()
        self._encoder = encoder
        self._tokenizer_copy = tokenizer
        self._monitor = monitor
        self._evaluator = evaluator


_SHARED: WeakValueDictionary[tuple[int, int], LM] = WeakValueDictionary()
_SHARED_LOCK = threading.Lock()


def shared_lm(model: nn.Module, tokenizer: Any) -> LM:
    """Return the one `LM` of this pair of objects, for as long as anything refers to it."""
    with _SHARED_LOCK:
        lm = _SHARED.get((id(model), id(tokenizer)))  # ids stay taken while the LM holds both objects
        if lm is None:
            lm = _SHARED[id(model), id(tokenizer)] = LM(model, tokenizer)
        return lm


@overload
def evaluate(texts: Text, *, show_progress_bar: bool | None = None) -> ModelRepr: ...


@overload
def evaluate(texts: Iterable[Text], *, show_progress_bar: bool | None = None) -> list[ModelRepr]: ...


def evaluate(texts: Text | Iterable[Text], *, show_progress_bar: bool | None = None) -> ModelRepr | list[ModelRepr]:
    """Evaluate a text, or many texts with one plan for all of them.

    Each distinct token that is not cached is forwarded exactly once. Texts of several `LM` objects are evaluated
    an `LM` at a time.

    Args:
        texts: a text, or many.
        show_progress_bar: by default on a terminal where it takes several passes and longer than two seconds.

    Returns:
        A `ModelRepr` for a text, or a list of them in the order of `texts`.

    Raises:
        See `LM.evaluate`.

    """
    if isinstance(texts, Text):
        return texts._require_lm("a representation").evaluate([texts], show_progress_bar=show_progress_bar)[0]
    if isinstance(texts, str):
        raise TextTypeError(f"evaluate takes texts, not the str {texts[:40]!r}. Wrap it: Text(string, lm).")
    listed = list(texts)
    by_lm: dict[LM, list[int]] = {}
    for idx, text in enumerate(listed):
        by_lm.setdefault(lm_of(text, idx), []).append(idx)
    reprs: dict[int, ModelRepr] = {}
    for lm, indices in by_lm.items():
        own = [listed[idx] for idx in indices]
        reprs.update(zip(indices, lm.evaluate(own, show_progress_bar=show_progress_bar), strict=True))
    return [reprs[idx] for idx in range(len(listed))]


def lm_of(text: object, idx: int) -> LM:
    """Return the `LM` of an element of `texts`."""
    if not isinstance(text, Text):
        raise TextTypeError(f"texts[{idx}] is a {type(text).__name__}, not a Text. Wrap strings: Text(string, lm).")
    if text.lm is None:
        raise UnboundTextError(
            f"texts[{idx}], {text!r}, has no model. Build it with Text(string, lm), or join it with a text that "
            "has one."
        )
    return text.lm


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    show_progress_bar: bool | None = None,
    **lm_options: Any,
) -> LM:
    """Load a causal LM and its tokenizer by hub id or local path.

    Args:
        name: what `from_pretrained` of transformers takes.
        device: "cuda", "mps", "cpu" ...; by default the first of these that there is.
        dtype: of the weights; by default float32 on the CPU and the checkpoint's own elsewhere.
        show_progress_bar: False hides the bars of transformers; by default they show as transformers is set to.
        **lm_options: what `LM` takes.

    Raises:
        ModelLoadError: the model or the tokenizer cannot be found or downloaded.
        UnsupportedModelError: see `LM`.

    """
    chosen = torch.device(device) if device is not None else _default_device()
    if lm_options.get("pin_memory"):
        _check_can_pin(chosen)  # before a model is loaded for it
    if dtype is None:
        dtype = torch.float32 if chosen.type == "cpu" else "auto"
    checkpoint = Checkpoint.find(name, dtype)
    logger.info("Loading %s on %s, dtype %s.", name, chosen, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with _bars_of_transformers(show_progress_bar):
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"Could not load {str(name)!r}: {error}\nIf the model hub cannot be reached, download the model elsewhere "
            "and pass the path of its folder: backprompt.load('path/to/model')."
        ) from error
    model, loading_info = loaded
    lm = LM(model.to(chosen), tokenizer, **lm_options)
    is_unchanged = checkpoint == Checkpoint.find(name, dtype)
    if checkpoint is not None and is_unchanged and checkpoint.decides(model, loading_info):
        lm._checkpoint = checkpoint
    return lm


@contextmanager
def _bars_of_transformers(show: bool | None) -> Iterator[None]:
    """Show or hide what shows while transformers loads a model; it has one setting for the whole process."""
    before = transformers_logging.is_progress_bar_enabled()
    _show_bars_of_transformers(before if show is None else show)
    try:
        yield
    finally:
        _show_bars_of_transformers(before)


def _show_bars_of_transformers(show: bool) -> None:
    if show:
        transformers_logging.enable_progress_bar()
    else:
        transformers_logging.disable_progress_bar()


def _check_can_pin(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(
            f"pin_memory=True is for models on CUDA, whose transfers page-locked memory makes faster; this one lies on "
            f"{str(device)!r}. Leave it out."
        )


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
