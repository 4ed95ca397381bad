"""LM: a model and its tokenizer, and all that was computed with them.

    texts --Encoder--> token ids --Forest, plan--> passes --Executor--> blocks of rows --> ModelRepr

One lock guards all of it, so one `LM` may be used from many threads; the model itself is never touched, so it may be
called by others meanwhile. If others change its weights meanwhile, a call that computes with them raises an error.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from backprompt.archive import Archive, Root
from backprompt.arguments import as_bool, as_int, as_list, as_text, as_texts
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
    TokenIdError,
    UnboundTextError,
    UnsupportedModelError,
)
from backprompt.evaluator import Counters, Evaluator, PinnedText, TokenScores, Wanted, split_to_score
from backprompt.executor import plain_surroundings
from backprompt.forking import ForkableLock, watch_lm
from backprompt.host import HostMemory
from backprompt.identity import EXACT, root_key
from backprompt.lookup import Piece
from backprompt.memory import default_host_bytes, default_max_bytes, parse_bytes
from backprompt.progress import showing
from backprompt.radix import Place
from backprompt.representation import Batch, Evaluated, ModelRepr, Pin
from backprompt.skeleton import model_device, unwrap
from backprompt.stops import StopStrings
from backprompt.store import DiskStore, Store
from backprompt.store.paths import check_folder
from backprompt.text import Text, lazily
from backprompt.token_graph import TokenIds, before_last, ends_in_group, flat, is_beginning, num_positions
from backprompt.tokenizer import PrivateTokenizer
from backprompt.tokens import JOINS, Encoder, Extent, Join, Joins
from backprompt.weights import WeightsMonitor, content_hash

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 256 << 20
"""Bound of the pool of logit rows, which are large (200 kB in GPT-2) and cheap to compute again."""


_CHANGED_WHILE_HASHED = (
    "The model's weights have changed while they were hashed, so the hash is of no one state of them. Call again, and "
    "let other threads change weights between calls."
)

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
        ValueError, TypeError: an option has a value that it cannot have.
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
        check_options(
            joins=joins,
            add_special_tokens=add_special_tokens,
            memory_bytes=memory_bytes,
            host_memory_bytes=host_memory_bytes,
            pin_memory=pin_memory,
            max_tokens_per_forward=max_tokens_per_forward,
            store=store,
            beyond_trained_length=beyond_trained_length,
            pack_weights=pack_weights,
        )
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
        self._store = DiskStore(store) if isinstance(store, (str, os.PathLike)) else store
        if self._store is not None and self._store is not store:
            weakref.finalize(self, self._store.close)  # nobody else can close it
        self._monitor = WeightsMonitor(model)  # before anything is made of the weights
        self._evaluator = self._make_evaluator(self._tokenizer_copy, self._monitor)
        self._evaluated: WeakKeyDictionary[Text, Evaluated] = WeakKeyDictionary()
        watch_lm(self)

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
            NonFiniteError: the model returned NaN or infinity; names the text.
            StaleRepresentationError: weights changed meanwhile; nothing that was computed is kept.
            UnsupportedModelError: see the class.

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
        self,
        texts: Iterable[Text],
        starts: Iterable[Text | int] | None = None,
        *,
        show_progress_bar: bool | None = None,
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of their tokens, from `starts[i]` on in text i.

            lm.token_logprobs([prompt + " Paris", prompt + " Lyon"], [prompt, prompt])

        Rows of the output head that predict only tokens before the start are not computed, and a text's last token is
        not forwarded for this (if it is scored, and one token stands before it), since no row of its own is needed. A
        text may have one token more than the model has positions.

        Args:
            texts: of this `LM`.
            starts: for each text what is not scored: a `Text` that it begins with, or a number of its tokens. Prefer
                the `Text`. Where a token spans their join, a prompt's tokens are no beginning of the whole text's: a
                `Text` is refused then, and a number scores something else.
            show_progress_bar: see `evaluate`.

        Returns:
            A tensor a text, `(tokens - start,)`, nats, float64 for a model in float64 and else float32; nan for a first
            token, which nothing predicts.

        Raises:
            ValueError: `starts` has another length than `texts`, a start is negative or beyond its text's end, or its
                tokens are no beginning of its text's.
            What `evaluate` raises.

        """
        return [s.logprobs for s in self.token_scores(texts, starts, show_progress_bar=show_progress_bar)]

    def token_scores(
        self,
        texts: Iterable[Text],
        starts: Iterable[Text | int] | None = None,
        *,
        show_progress_bar: bool | None = None,
    ) -> list[TokenScores]:
        """Return what `token_logprobs` returns and, beside it, whether each token is the most probable one.

        Both are read off the same rows of the output head.

        Returns:
            Scores a text, `.logprobs` and `.is_argmax`, each `(tokens - start,)`; see `TokenScores`.

        Raises:
            What `token_logprobs` raises.

        """
        texts = self._own_texts(texts)
        given = [0] * len(texts) if starts is None else as_list(starts, "starts must be a Text or an int for each text")
        if len(given) != len(texts):
            raise ValueError(f"starts has {len(given)} elements for {len(texts)} texts; give one start a text.")
        with self._exclusive(), showing(show_progress_bar):
            first = self._first_scored(texts, given)
            encoded = self._checked_ids(texts, first, is_scoring=True)
            return self._evaluator.token_scores_of(list(zip(encoded, first, strict=True))) if texts else []

    def next_token_logprobs(
        self, texts: Iterable[Text], token_ids: Sequence[Sequence[int]], *, show_progress_bar: bool | None = None
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of given tokens as the next one of each.

        Args:
            texts: any texts that do not end in a group.
            token_ids: for each text the ids to score; they are not forwarded.
            show_progress_bar: see `evaluate`.

        Returns:
            A tensor a text, `(ids,)`, nats, float64 for a model in float64 and else float32, on the model's device.

        Raises:
            ValueError: `token_ids` has another length than `texts`.
            GroupError: a text ends in a group, so it has no last token.
            TokenIdError: an id is not one of the model's.
            What `evaluate` raises.

        """
        texts = self._own_texts(texts)
        token_ids = [
            as_list(ids, f"token_ids[{idx}] must be a sequence of ids")
            for idx, ids in enumerate(as_list(token_ids, "token_ids must be a sequence of ids for each text"))
        ]
        if len(token_ids) != len(texts):
            raise ValueError(
                f"token_ids has {len(token_ids)} elements for {len(texts)} texts; give a sequence of ids a text."
            )
        with self._exclusive(), showing(show_progress_bar):
            self._current()
            for text, encoded in zip(texts, self._encoder.encode(texts), strict=True):
                check_has_last_token(text, encoded)
            candidates = [tuple(map(self._known_id, ids)) for ids in token_ids]
            wanted = [Wanted(ids, len(ids), own) for ids, own in zip(self._checked_ids(texts), candidates, strict=True)]
            found = self._evaluator.scored(wanted) if wanted else []
            logprobs = [
                scored.candidates[i].logprob for scored, own in zip(found, candidates, strict=True) for i in own
            ]
            executor = self._evaluator.executor
            together = torch.tensor(logprobs, dtype=executor.logprob_dtype, device=executor.device)
            return list(torch.split(together, [len(own) for own in candidates]))

    def decoding(
        self, *, max_new_tokens: int, stops: StopStrings, seed: int | None, given: Mapping[str, Any]
    ) -> Decoding:
        """Return checked options of `generate`; see `backprompt.generate`."""
        return Decoding(
            unwrap(self._model),
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            stops=stops,
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
        with self._exclusive():
            self._current()
            found = self._ids_before_more(texts)
            for text, token_ids in zip(texts, found, strict=True):
                check_has_last_token(text, token_ids)
            return found

    def completion_ids(self, strings: Sequence[str], *, is_continuation: bool = False) -> list[tuple[int, ...]]:
        """Return the ids of each string encoded by itself, without special tokens; see completions.py."""
        with self._exclusive():
            self._current()
            return self._tokenizer_copy.encode(strings, is_continuation=is_continuation) if strings else []

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The strings that the tokenizer takes for one token each: special tokens and others that were added."""
        with self._exclusive():
            self._current()
            return self._tokenizer_copy.added_tokens

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
            monitor = WeightsMonitor(self._model)
            weights = content_hash(self._model)
            if monitor.has_changed():
                raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
            if self._checkpoint is not None:
                self._checkpoint.forget_unless(weights)  # whether memory or weights are to blame
            tokenizer = PrivateTokenizer(self.tokenizer).fingerprint()
            if (weights, tokenizer) != (self._content_hash, self._tokenizer_copy.fingerprint()):
                self._start_over(PrivateTokenizer(self.tokenizer), monitor)
                self._content_hash = weights

    def _own_texts(self, texts: Iterable[Text]) -> list[Text]:
        listed = as_list(texts, "an LM takes several Texts in a list")
        for idx, text in enumerate(listed):
            if lm_of(text, idx) is not self:
                raise UnboundTextError(
                    f"texts[{idx}], {text!r}, belongs to another LM: use backprompt.evaluate(texts)."
                )
        return listed

    def _ids_before_more(self, texts: Sequence[Text]) -> list[TokenIds]:
        """Return the ids of texts as they are where something follows; the lock must be held."""
        with lazily():
            marker = Text.from_tokens([0], self)
            followed = [Text("", self) + text + marker for text in texts]
        return [before_last(token_ids) for token_ids in self._encoder.encode(followed)]

    def _first_scored(self, texts: Sequence[Text], starts: Sequence[Text | int]) -> list[int]:
        """Return the first token to score of each text; the lock must be held.

        Raises:
            ValueError: a start is no beginning of its text.

        """
        self._current()
        beginnings = list(dict.fromkeys(start for start in starts if isinstance(start, Text)))
        ids_of = dict(zip(beginnings, self._ids_before_more(beginnings), strict=True))
        first = []
        for idx, (text, start, whole) in enumerate(zip(texts, starts, self._encoder.encode(texts), strict=True)):
            if isinstance(start, Text):
                if not is_beginning(ids_of[start], whole):
                    self._raise_no_beginning(
                        f"starts[{idx}], {start!r}, is no beginning of {text!r}", ids_of[start], whole
                    )
                first.append(len(ids_of[start]))
            elif isinstance(start, bool) or not isinstance(start, Integral):
                raise TypeError(f"starts[{idx}] must be a Text or an int, not {type(start).__name__}: {start!r}.")
            else:
                first.append(int(start))
        return first

    def _raise_no_beginning(self, message: str, start: TokenIds, whole: TokenIds) -> None:
        ids, whole_ids = flat(start), flat(whole)
        idx = next((idx for idx, pair in enumerate(zip(ids, whole_ids, strict=False)) if pair[0] != pair[1]), None)
        if idx is not None:
            shown, expected = (
                f"{i[idx]} ({self._tokenizer_copy.decode(i[idx : idx + 1])!a})" for i in (whole_ids, ids)
            )
            reason = f"token {idx} of the text is {shown}, and that of the start is {expected}"
        elif len(ids) > len(whole_ids):
            reason = f"it has {len(ids)} tokens, and the text has {len(whole_ids)}"
        else:
            reason = "its groups are others, or go on behind it"
        raise ValueError(
            f"{message}: {reason}. Where a token spans their join, let the start end before it (often before a space), "
            "or add what follows as token ids, which are never joined: prompt + Text.from_tokens(ids, lm)."
        )

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
            batch = Batch(evaluator)
            new = {text: batch.add(Place(end, ids)) for end, (text, ids) in zip(ends, missing.items(), strict=True)}
            self._evaluated.update(new)
            known |= new
        return [known[text] for text in texts]

    def _known_id(self, token_id: int) -> int:
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise TypeError(f"token_ids must be ints, not {type(token_id).__name__}: {token_id!r}.")
        num_embeddings = self._evaluator.executor.limits.num_embeddings
        if not 0 <= token_id < num_embeddings:
            raise TokenIdError(f"Token id {token_id} is not one of the model's, which are 0 to {num_embeddings - 1}.")
        return int(token_id)

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
        """Keep other threads out, and the caller's torch settings too; what is computed is of one state of the weights.

        An error within, whatever it is and wherever it comes, has the evaluator recover before anything else is done.

        Raises:
            StaleRepresentationError: weights changed meanwhile.

        """
        with self._lock, plain_surroundings(self._evaluator.executor.device):
            if self._has_failed:
                self._evaluator.recover()
                self._has_failed = False
            try:
                work_before = self._counters.work
                yield
                if self._counters.work != work_before:
                    self._evaluator.check_unchanged()
            except BaseException:
                self._has_failed = True
                raise

    def _before_fork(self) -> None:
        self._lock.acquire()

    def _after_fork(self) -> None:
        self._lock.release()

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

    def _make_evaluator(self, tokenizer: PrivateTokenizer, monitor: WeightsMonitor) -> Evaluator:
        model, archive = unwrap(self._model), None
        device = model_device(model)
        host = HostMemory(self._host_memory_bytes, Location(torch.device("cpu"), self._pin_memory), Location(device))
        if self._store is not None:
            reference = weakref.ref(self)  # a cycle would keep tensors alive for longer than the LM

            def root() -> Root:
                lm = reference()
                assert lm is not None
                return lm._root(in_store=True)

            archive = Archive(self._store, root, monitor.has_changed, tokenizer.decode, device)
        return Evaluator(
            model,
            monitor.has_changed,
            self._counters,
            self._max_tokens_per_forward,
            self._memory_bytes,
            host,
            MAX_RESULT_BYTES,
            tokenizer.decode,
            archive,
            pack_weights=self._pack_weights,
        )

    def _root(self, *, in_store: bool = False) -> Root:
        """Return what all keys are built on, or those of what the store may have made inexact.

        The first use hashes every weight.
        """
        if self._content_hash is None:
            weights = self._hash_weights()
            if self._monitor.has_changed():
                raise StaleRepresentationError(_CHANGED_WHILE_HASHED)
            self._content_hash = weights
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

    def _start_over(self, tokenizer: PrivateTokenizer, monitor: WeightsMonitor | None = None) -> None:
        """Start over with the model as it is now, which is what `monitor` saw if that is given, and a tokenizer.

        Nothing changes if the model can no longer be evaluated.
        An error on the way leaves the old evaluator, closed: `_current` sees that, and starts over once more.
        """
        logger.info("Weights or tokenizer have changed: dropping what was computed with the old ones.")
        monitor = WeightsMonitor(self._model) if monitor is None else monitor  # before anything is made of the weights
        evaluator = self._make_evaluator(tokenizer, monitor)
        encoder = Encoder(tokenizer, self._joins, self._add_special_tokens)
        self._content_hash = self._checkpoint = None
        self._evaluator.close()
        self._evaluated = WeakKeyDictionary()
        self._encoder = encoder
        self._tokenizer_copy = tokenizer
        self._monitor = monitor
        self._evaluator = evaluator


_SHARED: WeakValueDictionary[tuple[int, int], LM] = WeakValueDictionary()
_SHARED_LOCK = ForkableLock()
watch_lm(_SHARED_LOCK)


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
    listed = as_texts(texts, "evaluate")
    by_lm: dict[LM, list[int]] = {}
    for idx, text in enumerate(listed):
        by_lm.setdefault(lm_of(text, idx), []).append(idx)
    reprs: dict[int, ModelRepr] = {}
    for lm, indices in by_lm.items():
        own = [listed[idx] for idx in indices]
        reprs.update(zip(indices, lm.evaluate(own, show_progress_bar=show_progress_bar), strict=True))
    return [reprs[idx] for idx in range(len(listed))]


def check_has_last_token(text: Text, token_ids: TokenIds) -> None:
    """Raise GroupError for a text that ends in a group; `token_ids` are its own."""
    if ends_in_group(token_ids):
        raise GroupError(f"{text!r} ends in a group, so it has no last token. Add a segment behind it.")


def lm_of(text: object, idx: int) -> LM:
    """Return the `LM` of an element of `texts`."""
    text = as_text(text, f"texts[{idx}]")
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
        ValueError, TypeError: a device that is not there, a dtype that weights cannot have, an option that `LM` does
            not have, or a value that it cannot have; before anything is loaded.
        ModelLoadError: the model or the tokenizer cannot be found or downloaded.
        OSError: the path of a store cannot be the folder of one; see `DiskStore`.
        UnsupportedModelError: see `LM`.

    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise TypeError(f"name must be a hub id or the path of a model's folder, not {name!r}.")
    chosen = _default_device() if device is None else available_device(device)
    dtype = _dtype_of_weights(dtype, chosen)
    if show_progress_bar is not None:
        as_bool(show_progress_bar, "show_progress_bar")
    check_options(**lm_options)
    if lm_options.get("pin_memory"):
        _check_can_pin(chosen)
    if isinstance(store := lm_options.get("store"), (str, os.PathLike)):
        check_folder(store)
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


def check_options(**given: Any) -> None:
    """Raise for options of an `LM` that are none, or have a value that they cannot have.

    Raises:
        TypeError: an option that there is not, or a store that is neither one nor a path.
        ValueError: another value that an option cannot have.

    """
    for name, value in given.items():
        match name:
            case "joins":
                if value not in JOINS:
                    raise ValueError(f"joins must be one of {', '.join(map(repr, JOINS))}, not {value!r}.")
            case "add_special_tokens" | "pin_memory" | "beyond_trained_length" | "pack_weights":
                as_bool(value, name)
            case "memory_bytes" | "host_memory_bytes":
                if value is not None:
                    parse_bytes(value, name)
            case "max_tokens_per_forward":
                if value is not None:
                    as_int(value, name, at_least=1)
            case "store":
                if not (value is None or isinstance(value, (Store, os.PathLike)) or (isinstance(value, str) and value)):
                    raise TypeError(f"store must be a path or a backprompt.Store, not {value!r}.")
            case _:
                options = ", ".join(inspect.getfullargspec(LM.__init__).kwonlyargs)
                raise TypeError(f"An LM has no option {name!r}. It has {options}.")


def available_device(device: str | int | torch.device, named: str | None = None) -> torch.device:
    """Return a device that is there.

    Args:
        device: what was asked for.
        named: how an error calls it; by default as an argument, `device='cuda'`.

    Raises:
        TypeError: it is no device.
        ValueError: it is not there, or holds no weights.

    """
    named = f"device={str(device)!r}" if named is None else named
    if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
        raise TypeError(f'device must be the name of one, such as "cpu", or a torch.device, not {device!r}.')
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # An assertion where torch is without CUDA, an import where a device is another package's.
    except (RuntimeError, AssertionError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(f"{named} cannot be used: {reason}. Leave it out for {str(_default_device())!r}.") from error
    if found.type == "meta":
        raise ValueError(f"{named} holds no weights. Leave it out, or name one that does.")
    return found


def _dtype_of_weights(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Return the dtype that weights are loaded in."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype == "auto":
        return "auto"
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f'dtype must be "auto" or a floating-point dtype of torch, as "float32" or torch.bfloat16, not {dtype!r}.'
        )
    return found


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
