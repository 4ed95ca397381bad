"""LM: the façade of a model with its tokenizer, as users see it.

`LM` documents and delegates: all state lies in its `Session`. One lock guards the session, so one `LM` may be used from
many threads, and calls that wait are answered together. The model itself is never changed, so other code may call it at
the same time. If other code changes its weights during a call that computes with them, the call raises an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from backprompt.arguments import as_bool
from backprompt.asynchronous import Asynchronous
from backprompt.errors import (
    NotPicklableError,
    UnsupportedModelError,
)
from backprompt.evaluation.lookup import Piece
from backprompt.evaluation.scores import TokenScores
from backprompt.forking import ForkableLock, watch_lm
from backprompt.progress import showing
from backprompt.session.attention import ReadsAttention
from backprompt.session.distributions import Entropies, TopLogprobs, entropies, top_logprobs
from backprompt.session.options import Options, check_options
from backprompt.session.representation import ModelRepr, Pin, pinned, result, save
from backprompt.session.session import Session
from backprompt.session.stats import Stats, stats_of
from backprompt.session.text_scores import next_token_logprobs, token_scores
from backprompt.store import Store
from backprompt.text.engine import Engine, Result
from backprompt.text.extents import Extent, Join
from backprompt.text.node import Text
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import flat
from backprompt.tokens.joins import Joins
from backprompt.visible import abbreviated

_ASKED_BY_TEXTS = frozenset(
    {"extents", "joins", "look_up", "pin", "representation", "result", "save", "session", "string", "tokens"}
)
"""Names of the protocol `Engine`, and the session: text.tokens, text.pin() and the like are the public ways."""


class LM(Engine[Text], Asynchronous, ReadsAttention):
    """A causal language model of transformers with its tokenizer; starts with an empty cache.

    The model is left unchanged: evaluation runs on a private copy that shares its weights, in eval mode, without
    gradients. Copying an `LM` returns the same object.

    Args:
        model: any causal LM of transformers whose attention goes through transformers' attention interface. accelerate
            may have spread it over devices, or offloaded it.
        tokenizer: its tokenizer.
        joins: how strings that meet in a text are encoded. "exact" encodes the whole string; "split" encodes every
            segment on its own; "error" raises where the two differ.
        add_special_tokens: whether each text gets the special tokens that the tokenizer adds to a whole string.
        memory_bytes: the budget for results held between calls: keys, values, hidden states and log-probabilities. A
            number of bytes or text such as "2 GB"; by default half of the free memory of the device (of several
            devices, the one with the least). Results beyond the budget are dropped, and computed again on demand.
        host_memory_bytes: a second budget, in host memory: results beyond the first budget move there instead, and back
            on demand. By default a quarter of the free host memory, and 0 for a model that lies in host memory itself.
        pin_memory: use page-locked host memory for the second budget, for faster transfers; for models on CUDA.
        max_tokens_per_forward: the largest number of tokens in one packed pass; by default chosen by device: on CUDA as
            many as fit a share of the free memory, from 2,048 to 32,768.
        store: a store of representations, the path of a store's folder (created if missing), or a URL such as
            "s3://bucket/prompts" (see `ObjectStore`). Stored results are not computed again. New results are stored
            according to the store's `persist` ("always" for a path and a URL).
        beyond_trained_length: allow texts that are longer than a rotary model was trained for.
        pack_weights: on the CPU, hold a second copy of the weights of all linear layers, in the order in which they are
            multiplied. The copy takes as many bytes as those weights (`lm.stats.packed_weight_bytes`; 494 MB for GPT-2)
            and makes passes faster, above all passes of few tokens, as in generation. For weights in float32 or
            bfloat16. On CUDA the output head's weight is copied even without this option if the model is in half
            precision, its vocabulary is no multiple of 8, and the copy takes at most a third of its bytes.
    Raises:
        ValueError, TypeError: an option has an invalid value.
        UnsupportedModelError: the model cannot be evaluated exactly, or its weights cannot be packed; the message names
            the reason. Some reasons are found only in the first evaluation.
        TokenizerError: `tokenizer` is not a tokenizer.

    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,  # required; None lets `LM("gpt2")` get a helpful error
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
                f"An LM wraps a model of transformers, not {type(model).__name__}. To load a model by its name or "
                f"path, use backprompt.load({abbreviated(model) if isinstance(model, str) else 'name'})."
            )
        self._session = Session(model, tokenizer, options)

    def __repr__(self) -> str:
        joins = self._session.options.joins
        return f"LM({type(self._session.model).__name__}, {type(self.tokenizer).__name__}, joins={joins!r})"

    def __dir__(self) -> list[str]:
        """Return the names that users need, without the names that texts call on their engine."""
        return sorted(set(super().__dir__()) - _ASKED_BY_TEXTS)

    def __copy__(self) -> LM:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise NotPicklableError(
            "An LM cannot be pickled: it holds a model, a lock and a cache. Pickle texts without a model, or "
            "strings, and build the LM again in the process that loads them (backprompt.load(name))."
        )

    @property
    def model(self) -> nn.Module:
        """The model, as given.

        The caller may change its weights, so a fingerprint first used after this access is always computed anew.
        """
        self._session.fingerprint.hand_out()
        return self._session.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as given."""
        return self._session.tokenizer

    @property
    def session(self) -> Session:
        """The state behind this façade, for the modules and the tests of this package."""
        return self._session

    @property
    def stats(self) -> Stats:
        """Counts of the work done so far and of the results held now."""
        with self._session.exclusive():
            return stats_of(self._session.counters, self._session.evaluator)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the model's weights, configuration, adapters and dtype, and of the tokenizer.

        All keys of results derive from this hash. The first use, and the first use after a change, hashes every weight.
        For a model from `load` the fingerprint is kept between processes, in `$BACKPROMPT_CACHE_HOME` or `backprompt`
        in the user's cache directory.
        """
        with self._session.exclusive():
            self._session.current()
            return self._session.fingerprint.root().key.hex()

    def evaluate(self, texts: Iterable[Text], *, show_progress_bar: bool | None = None) -> list[ModelRepr]:
        """Return a `ModelRepr` for each text; missing parts are computed in as few packed passes as possible.

        Args:
            texts: texts of this `LM`.
            show_progress_bar: by default a bar shows on a terminal if evaluation takes several passes and over two
                seconds.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            EmptyTextError, TextTooLongError, TokenIdError, JoinError, TokenizerError: a text cannot be evaluated; the
                message names the text, and nothing is computed.
            NonFiniteError: the model returned NaN or infinity; the message names the text.
            StaleRepresentationError: weights changed during the call; no result of the call is kept.
            UnsupportedModelError: see the class.

        """
        texts = self._session.own_texts(texts)
        with showing(show_progress_bar):
            found = self._session.evaluated(texts, begins=True)
        return [ModelRepr(self._session, evaluated) for evaluated in found]

    def representation(self, text: Text) -> ModelRepr:
        """Return the representation of a text, as `evaluate` does; if it is in memory, no evaluation is counted."""
        return ModelRepr(self._session, self._session.read(text))

    def result(self, text: Text, name: Result) -> torch.Tensor:
        """Return a result of a text's representation; if it is in memory, the lock is taken only once."""
        return result(self._session, text, name)

    def token_logprobs(
        self,
        texts: Iterable[Text],
        starts: Iterable[Text | int] | None = None,
        *,
        show_progress_bar: bool | None = None,
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of their tokens; in text i those from `starts[i]` on.

            lm.token_logprobs([prompt + " Paris", prompt + " Lyon"], [prompt, prompt])

        Rows of the output head that predict only tokens before the start are not computed. A text's last token is not
        forwarded if it is scored and another token stands before it, since its own row is not needed. So a text may
        have one token more than the model has positions.

        Args:
            texts: texts of this `LM`.
            starts: for each text its unscored beginning: a `Text`, or a number of tokens. Prefer the `Text`. If a token
                spans the end of a prompt, the prompt's tokens are not a prefix of the whole text's tokens: a `Text` is
                then refused, and a number scores different tokens.
            show_progress_bar: see `evaluate`.

        Returns:
            A tensor for each text, `(tokens - start,)`, nats, float64 for a model in float64 and else float32; nan for
            the first token of a text, which has no prediction. The tensors are views of one tensor, whose memory is
            kept as long as any view: `.clone()` a result that you keep or pickle by itself.

        Raises:
            ValueError: `starts` has another length than `texts`, a start is negative or beyond its text's end, or the
                tokens of a start are not a prefix of its text's tokens.
            All errors of `evaluate`.

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
        """Return the results of `token_logprobs`, and whether each token is the most probable one.

        Both results come from the same rows of the output head.

        Returns:
            Scores for each text, `.logprobs` and `.is_argmax`, each `(tokens - start,)`; see `TokenScores`. The tensors
            are views, like those of `token_logprobs`.

        Raises:
            All errors of `token_logprobs`.

        """
        with showing(show_progress_bar):
            return token_scores(self._session, texts, starts).split()

    def entropies(
        self,
        texts: Iterable[Text],
        starts: Iterable[Text | int] | None = None,
        *,
        temperature: float = 1.0,
        show_progress_bar: bool | None = None,
    ) -> Entropies:
        """Evaluate texts and return the entropies of the distributions that predict their tokens.

            found = lm.entropies([prompt + " Paris", prompt + " Lyon"], [prompt, prompt])
            found.entropies  # of all texts, (tokens,)
            found.split()  # of each text

        Each distinct row of the output head is computed once, however many texts share it, and is not kept.

        Args:
            texts, starts, show_progress_bar: see `token_logprobs`.
            temperature: divides the logits.

        Raises:
            All errors of `token_logprobs`, and TypeError and ValueError for a temperature that is not a number above 0.

        """
        with showing(show_progress_bar):
            return entropies(self._session, texts, starts, temperature)

    def top_logprobs(
        self,
        texts: Iterable[Text],
        k: int,
        starts: Iterable[Text | int] | None = None,
        *,
        temperature: float = 1.0,
        show_progress_bar: bool | None = None,
    ) -> TopLogprobs:
        """Evaluate texts and return the `k` most probable tokens at each token's position.

        Args:
            texts, starts, show_progress_bar: see `token_logprobs`.
            k: the number of tokens at each position.
            temperature: divides the logits.

        Raises:
            All errors of `entropies`, and ValueError for a `k` that is not an int from 1 to the size of the vocabulary.

        """
        with showing(show_progress_bar):
            return top_logprobs(self._session, texts, k, starts, temperature)

    def next_token_logprobs(
        self, texts: Iterable[Text], token_ids: Sequence[Sequence[int]], *, show_progress_bar: bool | None = None
    ) -> list[torch.Tensor]:
        """Evaluate texts and return the log-probabilities of given tokens as the next token of each text.

        Args:
            texts: texts that do not end in a group.
            token_ids: for each text the ids to score; they are not forwarded.
            show_progress_bar: see `evaluate`.

        Returns:
            A tensor for each text, `(ids,)`, nats, float64 for a model in float64 and else float32, on the model's
            device. The tensors are views, like those of `token_logprobs`.

        Raises:
            ValueError: `token_ids` has another length than `texts`.
            GroupError: a text ends in a group, so it has no last token.
            TokenIdError: the model has no such token id.
            All errors of `evaluate`.

        """
        with showing(show_progress_bar):
            return next_token_logprobs(self._session, texts, token_ids)

    def save(self, text: Text) -> None:
        """Write a text's representation to the store; see `Text.save`."""
        save(self._session, text)

    def pin(self, text: Text) -> Pin:
        """Evaluate a text and hold all of it until it is released; see `Text.pin`."""
        return pinned(self._session, text)

    def check(self, texts: Iterable[Text]) -> None:
        """Raise the errors of `evaluate` for texts that cannot be evaluated, without computing."""
        self._session.check(texts)

    def look_up(self, texts: Iterable[Text]) -> list[list[Piece]]:
        """Return where the tokens of texts are held, as pieces of each text in written order.

        Nothing is computed, loaded or inserted, and the order of eviction stays the same. Only the index of a store is
        read; the first such call hashes the model's weights, as `fingerprint` does.

        Returns:
            For each text a list of pieces that cover `text.tokens` without gaps.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            JoinError, TokenizerError: a text cannot be encoded.

        """
        texts = self._session.own_texts(texts)
        with self._session.exclusive():
            evaluator = self._session.current()
            sketch = evaluator.sketch(self._session.encoder.encode(texts))
            return [sketch.pieces(inserted) for inserted in sketch.texts]

    def extents(self, texts: Iterable[Text]) -> list[list[Extent]]:
        """Return the tokens of each segment (a string or a run of token ids) of each text, in written order.

        Raises:
            TextTypeError, UnboundTextError: an element is not a text of this `LM`.
            JoinError, TokenizerError: a text cannot be encoded.

        """
        texts = self._session.own_texts(texts)
        with self._session.exclusive():
            self._session.current(with_weights=False)
            return self._session.encoder.extents(texts)

    def tokens(self, text: Text) -> tuple[int, ...]:
        """Return the token ids of a text; see `Text.tokens`."""
        with self._session.exclusive():
            self._session.current(with_weights=False)
            return plain(flat(self._session.encoder.encode([text])[0]))

    def joins(self, text: Text) -> list[Join]:
        """Return the joins of a text that change tokens; see `Text.joins`."""
        with self._session.exclusive():
            self._session.current(with_weights=False)
            return self._session.encoder.joins(text)

    def string(self, text: Text) -> str:
        """Return the string of a text with segments of token ids; see `Text.string`."""
        with self._session.exclusive():
            self._session.current(with_weights=False)
            return self._session.encoder.string(text)

    def clear(self) -> None:
        """Drop all computed results, including those of pinned texts.

        Texts and representations stay valid and are recomputed on demand.
        """
        self._session.clear()

    def refresh(self, *, compare: bool = True) -> None:
        """Hash every weight and the tokenizer again, and drop all computed results if either changed.

        `refresh` is needed only after changes that the quick check before each evaluation cannot see: writes through
        `.data` to a few elements, settings of modules that are neither parameters nor buffers, single merges replaced
        within the tokenizer, or files rewritten in place while weights are mapped from them. Refresh before evaluating:
        with a store, results computed in between are stored as those of the old weights. Without an earlier use of
        `fingerprint` no hash exists to compare with, and all results are dropped.

        Args:
            compare: False drops all results without reading the weights: for weights that have surely changed, as after
                a step of training. Settings of modules must be unchanged.

        """
        self._session.refresh(compare=as_bool(compare, "compare"))


_SHARED: WeakValueDictionary[tuple[int, int], LM] = WeakValueDictionary()
_SHARED_SESSIONS: WeakValueDictionary[tuple[int, int], Session] = WeakValueDictionary()
_SHARED_LOCK = ForkableLock()
watch_lm(_SHARED_LOCK)


def shared_lm(model: nn.Module, tokenizer: Any) -> LM:
    """Return the one `LM` of this pair of objects, shared for as long as any reference to it exists."""
    with _SHARED_LOCK:
        pair = (id(model), id(tokenizer))  # both ids stay taken while the session holds the objects
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
