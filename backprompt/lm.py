"""LM: the façade of a model with its tokenizer, as users see it.

It documents and delegates: all state is its `Session`'s. One lock guards that, so one `LM` may be used from many
threads; the model itself is never touched, so it may be called by others meanwhile. If others change its weights
meanwhile, a call that computes with them raises an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from backprompt.errors import (
    NotPicklableError,
    UnsupportedModelError,
)
from backprompt.evaluation.lookup import Piece
from backprompt.evaluation.scores import TokenScores
from backprompt.forking import ForkableLock, watch_lm
from backprompt.progress import showing
from backprompt.session.options import Options, check_options
from backprompt.session.representation import ModelRepr, Pin, pinned
from backprompt.session.session import Session
from backprompt.session.stats import Stats, stats_of
from backprompt.session.text_scores import next_token_logprobs, token_scores
from backprompt.store import Store
from backprompt.text.engine import Engine
from backprompt.text.extents import Extent, Join
from backprompt.text.node import Text
from backprompt.tokens.graph import flat
from backprompt.tokens.joins import Joins


class LM(Engine[Text]):
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
        options = Options(
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
        check_options(**vars(options))
        if not isinstance(model, nn.Module):
            raise UnsupportedModelError(
                f"An LM wraps a model of transformers, not {type(model).__name__}. "
                "To load one by its name or path use backprompt.load(name)."
            )
        self._session = Session(model, tokenizer, options)

    def __repr__(self) -> str:
        joins = self._session.options.joins
        return f"LM({type(self._session.model).__name__}, {type(self.tokenizer).__name__}, joins={joins!r})"

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
        self._session.fingerprint.hand_out()
        return self._session.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as it was given."""
        return self._session.tokenizer

    @property
    def session(self) -> Session:
        """The state behind this façade, for the modules and the tests of this package."""
        return self._session

    @property
    def stats(self) -> Stats:
        """What was done so far and what is held now."""
        with self._session.exclusive():
            return stats_of(self._session.counters, self._session.evaluator)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the model's weights, configuration, adapters and dtype, and of the tokenizer.

        The root of all keys. The first use, and the first after a change, hashes every weight; that of what `load` read
        is remembered between processes, in `$BACKPROMPT_CACHE_HOME` or `backprompt` in the user's cache directory.
        """
        with self._session.exclusive():
            self._session.current()
            return self._session.fingerprint.root().key.hex()

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
        texts = self._session.own_texts(texts)
        with self._session.exclusive(), showing(show_progress_bar):
            self._session.current().forest.begin_evaluation()
            return [ModelRepr(self._session, evaluated) for evaluated in self._session.evaluate(texts)]

    def representation(self, text: Text) -> ModelRepr:
        """Return what `evaluate` returns of a text; of one that is held this is no evaluation, only a look."""
        with self._session.exclusive():
            return ModelRepr(self._session, *self._session.evaluate([text]))

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
        with showing(show_progress_bar):
            found = token_scores(self._session, texts, starts)
        return list(torch.split(found.scores.logprobs, list(found.lengths)))

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
        with showing(show_progress_bar):
            return token_scores(self._session, texts, starts).split()

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
        with showing(show_progress_bar):
            return next_token_logprobs(self._session, texts, token_ids)

    def save(self, text: Text) -> None:
        """Write a text's representation to the store; see `Text.save`."""
        self._session.save(text)

    def pin(self, text: Text) -> Pin:
        """Evaluate a text and hold all of it until it is released; see `Text.pin`."""
        return pinned(self._session, text)

    def check(self, texts: Iterable[Text]) -> None:
        """Raise what `evaluate` raises for texts that cannot be evaluated; computes nothing."""
        self._session.check(texts)

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
        texts = self._session.own_texts(texts)
        with self._session.exclusive():
            evaluator = self._session.current()
            sketch = evaluator.sketch(self._session.encoder.encode(texts))
            return [sketch.pieces(inserted) for inserted in sketch.texts]

    def extents(self, texts: Iterable[Text]) -> list[list[Extent]]:
        """Return which tokens of each text its strings and runs of token ids became, in written order.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            JoinError, TokenizerError: a text that cannot be encoded.

        """
        texts = self._session.own_texts(texts)
        with self._session.exclusive():
            self._session.current()
            return self._session.encoder.extents(texts)

    def tokens(self, text: Text) -> tuple[int, ...]:
        """Return the token ids of a text; see `Text.tokens`."""
        with self._session.exclusive():
            self._session.current()
            return flat(self._session.encoder.encode([text])[0])

    def joins(self, text: Text) -> list[Join]:
        """Return the joins of a text that change tokens; see `Text.joins`."""
        with self._session.exclusive():
            self._session.current()
            return self._session.encoder.joins(text)

    def string(self, text: Text) -> str:
        """Return the string of a text with segments of token ids; see `Text.string`."""
        with self._session.exclusive():
            self._session.current()
            return self._session.encoder.string(text)

    def clear(self) -> None:
        """Drop everything that was computed, pinned texts too.

        Texts and representations stay valid and are recomputed when asked.
        """
        self._session.clear()

    def refresh(self) -> None:
        """Hash every weight and the tokenizer again, and drop what was computed if they have changed.

        Needed only after changes that the quick look before each evaluation cannot see: writes through `.data` to a
        few elements, settings of modules that are neither parameters nor buffers, or single merges replaced within
        the tokenizer, or files rewritten in place from which weights are mapped into memory. Refresh after them and
        before evaluating: with a store, what is computed in between is stored as that of the old weights. Without an
        earlier use of `fingerprint` there is nothing to compare with, and everything is dropped.
        """
        self._session.refresh()


_SHARED: WeakValueDictionary[tuple[int, int], LM] = WeakValueDictionary()
_SHARED_SESSIONS: WeakValueDictionary[tuple[int, int], Session] = WeakValueDictionary()
_SHARED_LOCK = ForkableLock()
watch_lm(_SHARED_LOCK)


def shared_lm(model: nn.Module, tokenizer: Any) -> LM:
    """Return the one `LM` of this pair of objects, for as long as anything refers to it."""
    with _SHARED_LOCK:
        pair = (id(model), id(tokenizer))  # ids stay taken while the session holds both objects
        lm = _SHARED.get(pair)
        if lm is None:
            session = _SHARED_SESSIONS.get(pair)  # a representation may have outlived the LM and all of its texts
            lm = LM(model, tokenizer) if session is None else _facade_of(session)
            _SHARED[pair], _SHARED_SESSIONS[pair] = lm, lm.session
        return lm


def _facade_of(session: Session) -> LM:
    lm = LM.__new__(LM)
    lm._session = session
    return lm
