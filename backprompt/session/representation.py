"""ModelRepr: the representation of one text by a model.

A `ModelRepr` is thin: it names a text's token ids and its end in the forest. The `LM` keeps the tensors, copies them
when they are read, and recomputes dropped ones. Logits and log-probabilities are computed from hidden states on first
use, for this text and, reading ahead, for the texts that were evaluated together with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backprompt.arguments import as_indices
from backprompt.attention.maps import Chosen
from backprompt.errors import GroupError, NoStoreError, StaleRepresentationError
from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.holders import PinnedText
from backprompt.forest.keys import key_of
from backprompt.forest.span import Inserted, Span
from backprompt.memory.snapshots import snapshot_of
from backprompt.session.evaluated import Evaluated
from backprompt.session.limits import check_has_last_token
from backprompt.session.session import Session
from backprompt.session.spans import Bounds, bounds_of
from backprompt.text.engine import Result
from backprompt.text.node import Text
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import TokenGraph, TokenIds, flat

if TYPE_CHECKING:
    from transformers import DynamicCache


class ModelRepr:
    """The representation of one text by one model.

    All tensors are detached copies on the model's device: changing them changes no cached tensor. Once the model's
    weights have changed, reading the key or a tensor other than `input_ids` raises `StaleRepresentationError`. Results
    that were already computed can be read until an evaluation notices the change.
    """

    def __init__(self, session: Session, evaluated: Evaluated) -> None:
        self._session = session
        self._evaluated = evaluated

    def __repr__(self) -> str:
        return f"ModelRepr({self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """The number of the text's tokens, special tokens included."""
        return len(self._evaluated.token_ids)

    @property
    def input_ids(self) -> Tensor:
        """Token ids in written order, `(tokens,)`, int64."""
        return torch.tensor(plain(flat(self._evaluated.token_ids)), device=self._evaluated.evaluator.executor.device)

    @property
    def key(self) -> str:
        """The SHA-256, as hex, that names this representation by content.

        The key covers model, adapter, dtype, tokenizer and token ids, and whether a part was stored in fewer bits.
        The first use hashes the model's weights.
        """
        with self._session.exclusive():
            self._check_current()
            root = self._session.fingerprint.root(in_store=self.stored_error > 0)
            return key_of(self._evaluated.token_ids, root.key).hex()

    @property
    def stored_error(self) -> float:
        """The largest relative error of the keys, values and hidden states behind the results.

        The error is 0 unless the `LM`'s store uses fewer bits (`DiskStore(path, dtype="int8")`) and a part came from
        the store. Then `key` differs from that of the exact representation.
        """
        with self._session.exclusive():
            return max(span.error for span in self._evaluated.end.closure())

    @property
    def num_bytes(self) -> int:
        """The bytes of the text's keys, values, hidden states and log-probabilities when all of them are in memory."""
        return _num_bytes(self._evaluated.evaluator, self._evaluated.end)

    @property
    def logits(self) -> Tensor:
        """Next-token logits, `(vocab,)`, in the model's dtype.

        Raises:
            GroupError: the text ends in a group, so no single last token predicts the next one.

        """
        with self._session.exclusive():
            self._check_evaluator(self._session.evaluator)
            return self._logits()

    @property
    def token_logprobs(self) -> Tensor:
        """Log-probability of each token given the tokens that it sees, `(tokens,)`, nats.

        The dtype is float64 for a model in float64, else float32. A token of probability 0 has -inf. A token that no
        single token predicts has nan: the first token of a text, and the first token behind a group. The first token of
        a branch follows the token before the group.
        """
        with self._session.exclusive():
            self._check_evaluator(self._session.evaluator)
            return self._token_logprobs()

    @property
    def hidden_states(self) -> Tensor:
        """Final hidden states, the input of the output head, `(tokens, hidden)`, in the model's dtype."""
        with self._held() as (evaluator, text):
            return evaluator.readout.hidden_states(text)

    def all_logits(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the logits after each of the tokens `start..stop`, `(tokens, vocab)`.

        Row i has the logits of the token after token `start + i`. Indices work as in Python's slices. A whole text's
        logits are large (tokens x vocab): request only the rows that you need.
        """
        start, stop, _ = slice(start, stop).indices(self.num_tokens)
        with self._session.exclusive():
            self._check_current()
            with self._held() as (evaluator, text):
                return evaluator.readout.all_logits(text, start, stop)

    def attention(
        self,
        layers: int | slice | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        rows: int | slice | Iterable[int] | None = None,
        *,
        over: Iterable[Bounds] | None = None,
    ) -> Tensor:
        """Return attention weights: the share of each key in a token's attention, for chosen tokens, layers and heads.

            text.model_repr.attention(rows=-1)[:, :, 0]                        # the last token's, in all layers
            text.model_repr.attention(-1, rows=-1, over=lm.extents([text])[0])  # by segment, in the last layer

        The weights are those of the plain call with `output_attentions=True` and eager attention, in float32 at least;
        for texts with groups, under the declared mask. They add up to 1 over the keys, or to less where a model has
        attention sinks. A whole map is large (layers x heads x tokens x tokens): request only the part that you need.

        Only the chosen rows are forwarded once more, up to the last chosen layer, against the keys in memory. Weights
        are kept in a pool of 64 MB, where the same call finds them again, also for another text with the same token
        ids.

        Args:
            layers: indices of layers with attention, as in Python's sequences; None for all.
            heads: indices of heads of queries; None for all.
            rows: indices of the tokens that attend, in written order; None for all.
            over: spans of tokens, each with `start` and `stop`, such as the `Extent` objects of `lm.extents` or slices.
                The weights of a span's tokens are added up without making the whole map.

        Returns:
            `(layers, heads, rows, keys)`, or `(layers, heads, rows, spans)`, float64 for a model in float64, else
            float32. Keys are the text's own tokens in written order.

        Raises:
            UnsupportedModelError: the model is evaluated by levels, with its own attention, which cannot be read; or
                the chosen layers have different numbers of heads.
            ValueError: a layer, head, row or span with such an index does not exist, or none is chosen.

        """
        (weights,) = attention_of(self._session, [self], layers, heads, rows, [over])
        return weights

    def past_key_values(self) -> DynamicCache:
        """Return a fresh copy of all keys and values, batch 1, for `model(...)` and `model.generate`.

        The cache covers every token of the text. `model(new_ids, past_key_values=...)` takes only the ids behind the
        text, `model.generate(text_ids_and_new_ids, past_key_values=...)` all ids. New ids are required: with only the
        text's own ids, `generate` forwards them a second time. To generate directly behind the text, use the cache of
        all tokens but the last: `Text.from_tokens(text.tokens[:-1], lm)().past_key_values()`, which forwards no token.

        Raises:
            GroupError: the text has groups or frozen segments, whose positions a cache of transformers cannot express.
            UnsupportedModelError: the model's own cache has another form.

        """
        if isinstance(self._evaluated.token_ids, TokenGraph):
            raise GroupError(
                "past_key_values() does not work for texts with groups or frozen segments: the model would take "
                "the number of cached tokens for the next position. Read logits and log-probabilities from the "
                "text itself."
            )
        with self._held(with_keys_values=True) as (evaluator, text):
            return evaluator.executor.dynamic_cache(evaluator.readout.keys_values(text.end), snapshot_of(text.end))

    def _logits(self) -> Tensor:
        pooled = self._evaluated.evaluator.readout.pooled_logits(self._evaluated.end)
        if pooled is not None:  # even if the text's states were dropped
            return pooled
        check_has_last_token(f"This text of {self.num_tokens} tokens", self._evaluated.token_ids)
        with self._held() as (evaluator, text):
            return evaluator.readout.last_logits(text.end, partial(self._read_ahead, "logits"))

    def _token_logprobs(self) -> Tensor:
        if self._evaluated.is_computed:
            scored = self._evaluated.evaluator.readout.scored_logprobs(self._evaluated.inserted)
            if scored is not None:  # no computation is needed, so no states have to be held
                return scored
        with self._held() as (evaluator, text):
            return evaluator.readout.token_logprobs(text, partial(self._read_ahead, "token_logprobs"))

    @contextmanager
    def _held(self, *, with_keys_values: bool = False) -> Iterator[tuple[Evaluator, Inserted]]:
        """Hold the lock, and keep the text in memory; a dropped text is computed again."""
        with self._session.exclusive():
            self._check_evaluator(self._session.evaluator)
            if not self._evaluated.is_computed or (with_keys_values and not self._evaluated.has_keys_values):
                self._check_current()  # a computation follows
            with self._evaluated.held(with_keys_values=with_keys_values) as text:
                yield self._evaluated.evaluator, text

    def _check_current(self) -> None:
        """Raise if the weights have changed; called before a computation with them."""
        self._check_evaluator(self._session.current())

    def _check_evaluator(self, current: Evaluator) -> None:
        if current is not self._evaluated.evaluator:
            raise StaleRepresentationError(
                f"The model's weights (or its tokenizer) have changed since this representation of {self.num_tokens} "
                "tokens was computed. Evaluate the text again: evaluate(text), or text.model_repr."
            )

    def _read_ahead(self, what: str) -> list[Inserted]:
        """Return the texts whose result `what` is computed along with this one's; called only before a computation."""
        self._check_current()
        return self._evaluated.batch.ahead_of(self._evaluated.batch_idx, what)


def result(session: Session, text: Text, name: Result) -> Tensor:
    """Return a result of a text; if the text is in memory, the lock is taken only once."""
    with session.exclusive():
        found = session.held(text)
        if found is not None:
            held = ModelRepr(session, found)
            return held._logits() if name == "logits" else held._token_logprobs()
    computed = ModelRepr(session, session.evaluated([text], begins=False)[0])
    return computed.logits if name == "logits" else computed.token_logprobs


def attention_of(
    session: Session,
    reprs: Sequence[ModelRepr],
    layers: int | slice | Iterable[int] | None,
    heads: int | Iterable[int] | None,
    rows: int | slice | Iterable[int] | None,
    over: Sequence[Iterable[Bounds] | None],
) -> list[Tensor]:
    """Return attention weights of representations of one session; see `LM.attention`."""
    with session.exclusive():
        for model_repr in reprs:
            model_repr._check_evaluator(session.evaluator)
        maps = session.evaluator.attention_maps
        chosen_layers = as_indices(layers, "layers", maps.num_layers())
        chosen_heads = None if heads is None else as_indices(heads, "heads")
        rows = list(rows) if isinstance(rows, Iterable) else rows
        asked: list[tuple[TokenIds, Chosen]] = []
        for model_repr, own in zip(reprs, over, strict=True):
            num_tokens = model_repr.num_tokens
            spans = None if own is None else bounds_of(own, num_tokens)
            chosen = Chosen(chosen_layers, chosen_heads, as_indices(rows, "rows", num_tokens), spans)
            asked.append((model_repr._evaluated.token_ids, chosen))
        found = {key: weights for key in asked if (weights := maps.pooled(*key)) is not None}
        missing = {key: model_repr for key, model_repr in zip(asked, reprs, strict=True) if key not in found}
        for keys in _held_together(list(missing), maps.max_held_tokens):
            with ExitStack() as held:
                missing[keys[0]]._check_current()
                texts = [held.enter_context(missing[key]._held(with_keys_values=True))[1] for key in keys]
                found.update(zip(keys, maps.read(texts, [chosen for _, chosen in keys]), strict=True))
        firsts = dict(zip(reversed(asked), range(len(asked) - 1, -1, -1), strict=True))
        return [found[key] if idx == firsts[key] else found[key].clone() for idx, key in enumerate(asked)]


def _held_together(
    asked: Sequence[tuple[TokenIds, Chosen]], max_tokens: int
) -> Iterator[Sequence[tuple[TokenIds, Chosen]]]:
    """Yield groups of texts to keep in memory together: one text, or several of at most `max_tokens` tokens in all."""
    start, num_tokens = 0, 0
    for idx, (token_ids, _) in enumerate(asked):
        num_tokens += len(token_ids)
        if num_tokens > max_tokens and idx > start:
            yield asked[start:idx]
            start, num_tokens = idx, len(token_ids)
    if asked:
        yield asked[start:]


def check_current(model_repr: ModelRepr) -> None:
    """Raise StaleRepresentationError if the weights have changed since the evaluation; the lock must be held."""
    model_repr._check_current()


class Pin:
    """Keeps a text's whole representation in memory, within the `LM`'s budget, until the pin is released.

    A context manager: `with text.pin(): ...`. After a call of `lm.clear()` or a change of the model's weights, the pin
    holds no results, and `release` does nothing.
    """

    def __init__(self, session: Session, evaluator: Evaluator, text: PinnedText) -> None:
        self._session = session
        self._evaluator = evaluator
        self._text = text

    def __repr__(self) -> str:
        is_held = self._evaluator.is_pinned(self._text)
        return f"Pin({len(self._text.token_ids)} tokens, {'held' if is_held else 'released'})"

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    @property
    def num_bytes(self) -> int:
        """The bytes that the pin would take by itself; in the budget, tokens shared between pins count once."""
        is_held = self._evaluator.is_pinned(self._text)
        return _num_bytes(self._evaluator, self._text.end) if is_held and self._text.end is not None else 0

    def release(self) -> None:
        """Release the text; a second call does nothing."""
        with self._session.exclusive():
            self._evaluator.unpin(self._text)


def pinned(session: Session, text: Text) -> Pin:
    """Evaluate a text and return a pin that keeps all of it in memory; see `Text.pin`."""
    (text,) = session.own_texts([text])
    held = PinnedText()
    try:
        with session.exclusive():
            (held.token_ids,) = session.checked_ids([text])
            session.evaluator.pin(held)
            pin = Pin(session, session.evaluator, held)
        return pin
    except BaseException:  # a caller without the pin cannot release it
        with session.exclusive():
            session.evaluator.unpin(held)
        raise


def save(session: Session, text: Text) -> None:
    """Write a text's representation to the store; see `Text.save`."""
    if session.store is None:
        raise NoStoreError(
            "This LM has no store to save to. Give the LM a store: load(name, store='prompts.bp') or LM(..., "
            "store=...)."
        )
    if session.store.persist == "never":
        raise NoStoreError(f'{session.store!r} was opened with persist="never". Open it with "explicit" or "always".')
    (text,) = session.own_texts([text])
    with session.exclusive():
        (token_ids,) = session.checked_ids([text])
        session.evaluator.save(token_ids)


def _num_bytes(evaluator: Evaluator, end: Span) -> int:
    """Return the bytes of a text's distinct tokens."""
    return evaluator.computation.num_bytes_of([end])
