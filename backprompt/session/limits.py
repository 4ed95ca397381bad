"""The texts that a model can evaluate and continue: limits on their positions and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backprompt.arguments import is_int
from backprompt.errors import EmptyTextError, GroupError, TextTooLongError, TokenIdError
from backprompt.model.limits import Limits
from backprompt.text.node import Text
from backprompt.tokens.adapted import number_of, numbers_in, plain
from backprompt.tokens.graph import TokenIds, ends_in_group, flat, num_positions


@dataclass(frozen=True)
class TextLimits:
    """The limits of a model, as an `LM` applies them to texts.

    Attributes:
        model: the limits of the model itself.
        beyond_trained_length: whether texts may be longer than the model was trained for.
        adapters: the numbers of the adapters that segments are under.

    """

    model: Limits
    beyond_trained_length: bool
    adapters: frozenset[int] = frozenset()

    def check(self, text: Text, token_ids: TokenIds, length: int | None = None) -> None:
        """Raise if a text cannot be evaluated; `length`: the number of positions to evaluate, by default all.

        Raises:
            EmptyTextError, TokenIdError, TextTooLongError: the text is empty, has an unknown id, or is too long.

        """
        if not token_ids:
            raise EmptyTextError(
                f"{text!r} has no tokens, so there is nothing to evaluate. Add a string to it, or start it with a "
                "token such as the tokenizer's BOS: Text.from_tokens([tokenizer.bos_token_id], lm)."
            )
        self._check_ids(text, flat(token_ids))
        what = "tokens" if isinstance(token_ids, tuple) or self.model.counts_tokens else "positions"
        num_given, num_beside = num_positions(token_ids), self._num_beside(token_ids)
        length = num_given if length is None else length
        self.check_length(repr(text), num_given + num_beside, length + num_beside, what)

    def check_all(self, texts: Sequence[Text], encoded: Sequence[TokenIds], lengths: Sequence[int]) -> None:
        """Raise for the first text that cannot be evaluated; see `check`. `lengths`: the positions to evaluate."""
        if not self.are_fine(encoded, lengths):
            for text, token_ids, length in zip(texts, encoded, lengths, strict=True):
                self.check(text, token_ids, length)

    def are_fine(self, encoded: Sequence[TokenIds], lengths: Sequence[int]) -> bool:
        """Return whether the extreme ids and lengths of all texts together show that each text can be evaluated."""
        if not all(encoded):
            return False
        distinct = self._plain(tuple(set().union(*map(flat, encoded))))
        lowest, highest = min(distinct, default=0), max(distinct, default=0)
        has_room = self.model.max_tokens is None or max(lengths, default=0) <= self.model.max_tokens
        is_plain = not self.model.counts_tokens or not any(map(self._num_beside, encoded))
        return has_room and is_plain and lowest >= 0 and highest < self.model.num_embeddings

    def check_room(self, text: Text, token_ids: TokenIds, max_new_tokens: int) -> None:
        """Raise TextTooLongError if there is no room for `max_new_tokens` behind a text."""
        limits = self.model
        if limits.max_tokens is None or (limits.why_hard is None and self.beyond_trained_length):
            return
        room = limits.max_tokens - num_positions(token_ids) - self._num_beside(token_ids)
        if max_new_tokens > room:
            raise TextTooLongError(
                f"{text!r} has {num_positions(token_ids)} tokens and the model has {limits.max_tokens} positions, "
                "so there "
                f"is no room for max_new_tokens={max_new_tokens}. Ask for at most {room}, or shorten the text."
            )

    def as_id(self, token_id: int) -> int:
        """Return a token id of the model as an int.

        Raises:
            TypeError: `token_id` is not an int.
            TokenIdError: the model has no such id.

        """
        if not is_int(token_id):
            raise TypeError(f"token_ids must be ints, not {type(token_id).__name__}: {token_id!r}.")
        num_embeddings = self.model.num_embeddings
        if not 0 <= token_id < num_embeddings:
            raise TokenIdError(
                f"Token id {token_id} is not one of the model's ids, which are 0 to {num_embeddings - 1}."
            )
        return int(token_id)

    def _plain(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return ids without their adapters; ids with numbers of unknown adapters stay as they are."""
        if self.adapters.issuperset(numbers_in(ids)):
            return plain(ids)
        return tuple(plain([token_id])[0] if number_of(token_id) in self.adapters else token_id for token_id in ids)

    def _num_beside(self, token_ids: TokenIds) -> int:
        """Return the number of tokens that share a position with another token, if the model's limit counts tokens."""
        return len(flat(token_ids)) - num_positions(token_ids) if self.model.counts_tokens else 0

    def _check_ids(self, text: Text, ids: tuple[int, ...]) -> None:
        ids = self._plain(ids)
        num_embeddings = self.model.num_embeddings
        if min(ids) < 0 or max(ids) >= num_embeddings:
            position, token_id = next((p, t) for p, t in enumerate(ids) if not 0 <= t < num_embeddings)
            raise TokenIdError(
                f"{text!r} has token id {token_id} at position {position}, but the model's embedding and head have ids "
                f"0 to {num_embeddings - 1}. Use the model's own tokenizer, or model.resize_token_embeddings(...)."
            )

    def check_length(self, shown: str, num_given: int, length: int, what: str = "tokens") -> None:
        """Raise TextTooLongError for a text that takes more positions than the model has.

        Args:
            shown: the text, for the message.
            num_given: the number of tokens or positions of the text, as `what` says.
            length: the number of positions that its evaluation takes.
            what: the name of the counted units, "tokens" or "positions".

        """
        limits = self.model
        if limits.max_tokens is None or length <= limits.max_tokens:
            return
        too_long = f"{shown} has {num_given} {what}, but the model has {limits.max_tokens} positions"
        if limits.why_hard is not None:
            raise TextTooLongError(f"{too_long}: {limits.why_hard}. Shorten the text by {length - limits.max_tokens}.")
        if not self.beyond_trained_length:
            raise TextTooLongError(
                f"{too_long} that it was trained for. Shorten the text by {length - limits.max_tokens}, or allow "
                "such texts at your own risk with LM(..., beyond_trained_length=True)."
            )


def check_has_last_token(text: Text | str, token_ids: TokenIds) -> None:
    """Raise GroupError for a text that ends in a group; the message shows the text, or the given string."""
    if ends_in_group(token_ids):
        shown = text if isinstance(text, str) else repr(text)
        raise GroupError(
            f"{shown} ends in a group, so no single last token predicts the next one. Add a segment "
            "behind the group: text + '...'."
        )
