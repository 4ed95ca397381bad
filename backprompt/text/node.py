"""The node: a text, composed with `+` and `|`.

A `Text` is immutable and holds no tensors. It is a leaf with one segment (a string, a tuple of token ids, or a group of
branches that do not see each other), or two texts side by side. Operators only build: they tokenize nothing and compute
nothing.

    Text("a") + "b" + "c"          ((a b) c)
    Text("a") + (Text("b") + "c")  (a (b c))

Both are the same text: equality and hash depend on the flattened segments and on the `LM`. The hash is kept
incrementally, as a polynomial over the hashes of the segments, so the hash is associative and costs O(1) for each `+`:
`hash(x + y) = hash(x) * BASE ** segments(y) + hash(y)`. Walks use an explicit stack, so any depth works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from backprompt.arguments import as_bool, as_choice, as_list, is_python_int
from backprompt.errors import MixedModelsError, TextTypeError
from backprompt.text.engine import Engine, as_engine
from backprompt.text.questions import Questions, bound_engine
from backprompt.text.segments import POSITIONS, Branch, Group, Positions, Segment, leaves, shown, under_adapter
from backprompt.visible import abbreviated, shortened

PRIME = (1 << 61) - 1
_BASE = 0x1A2B3C4D5E6F789
_REPR_CHARACTERS = 60

_EAGER: ContextVar[bool] = ContextVar("backprompt_eager", default=False)


@contextmanager
def eager() -> Iterator[None]:
    """Evaluate each text when it is built, while the context lasts.

    Texts without a model and texts of zero tokens are not evaluated. The setting is a context variable: other threads
    and tasks do not see it.
    """
    token = _EAGER.set(True)
    try:
        yield
    finally:
        _EAGER.reset(token)


@contextmanager
def lazily() -> Iterator[None]:
    """Turn `eager` off while the context lasts, for internal texts that the user never sees."""
    token = _EAGER.set(False)
    try:
        yield
    finally:
        _EAGER.reset(token)


class Text(Questions):
    """A text that a language model can be asked about; composed with `+`.

    Args:
        string: the text. An empty string is allowed and adds nothing.
        lm: the `LM` that evaluates the text, or a `(model, tokenizer)` tuple. Without `lm`, the text takes the `LM` of
            the first text that it is joined with.
        add_special_tokens: whether the text gets the special tokens that the tokenizer puts around a string; an `LM`
            may leave them out for all texts. Pass False for a string that has them already, such as a rendered chat
            template. The option takes effect only at the beginning of a joined text.

    Raises:
        TextTypeError: `string` is not a `str`, or `add_special_tokens` is not a `bool`.

    """

    __slots__ = (
        "__weakref__",
        "_add_special_tokens",
        "_hash",
        "_left",
        "_lm",
        "_noted",
        "_noted_by",
        "_num_segments",
        "_right",
        "_segment",
        "_whole_hash",
    )

    _lm: Engine[Text] | None
    _left: Text | None
    _right: Text | None
    _segment: Segment
    _add_special_tokens: bool
    _num_segments: int
    _hash: int
    _noted: Any
    _noted_by: object
    _whole_hash: int | None

    def __init__(
        self, string: str, lm: Engine[Text] | tuple[Any, Any] | None = None, *, add_special_tokens: bool = True
    ) -> None:
        if not isinstance(string, str):
            raise TextTypeError(
                f"Text() takes a str, not {type(string).__name__}: {abbreviated(string)}. "
                "Convert it with str(...) first; for token ids use Text.from_tokens(ids, lm)."
            )
        add_special_tokens = as_bool(add_special_tokens, "add_special_tokens", error=TextTypeError)
        self._init_leaf(string, None if lm is None else as_engine(lm), add_special_tokens)

    @classmethod
    def from_tokens(cls, token_ids: Iterable[int], lm: Engine[Text] | tuple[Any, Any]) -> Text:
        """Return a text of one segment made of token ids, which are never re-tokenized.

        Such a segment is a hard boundary: the text behind it is encoded as a continuation (no special tokens, no dummy
        prefix space). The string of the segment is what its ids add to the decoded text before.

        Raises:
            TextTypeError: an element is not an `int`.

        """
        segment = tuple(as_list(token_ids, "Text.from_tokens takes ints in order"))
        if not {int}.issuperset(map(type, segment)):
            for token_id in segment:
                if not is_python_int(token_id):
                    raise TextTypeError(
                        f"Text.from_tokens takes ints, not {type(token_id).__name__}: {token_id!r}. "
                        "A tensor or an array of ids becomes ints with .tolist()."
                    )
        return _leaf(segment, None if lm is None else as_engine(lm))

    def _init_leaf(self, segment: Segment, lm: Engine[Text] | None, add_special_tokens: bool) -> None:
        self._segment = segment
        self._add_special_tokens = add_special_tokens
        self._left = self._right = None
        self._lm = lm
        self._noted = self._noted_by = self._whole_hash = None
        self._num_segments = 1 if segment else 0
        self._hash = hash(segment) % PRIME if segment else 0
        if _EAGER.get():
            self._evaluate_eagerly()

    # Composing

    def __add__(self, other: Text | str) -> Text:
        return _concatenate(self, _as_text(other, "+"))

    def __radd__(self, other: Text | str) -> Text:
        if isinstance(other, int) and other == 0:
            raise TextTypeError("sum() of texts needs a Text as its start: sum(texts, Text('')).")
        return _concatenate(_as_text(other, "+"), self)

    def join(self, texts: Iterable[Text | str]) -> Text:
        """Return the texts with this text between them, like `str.join`; a string counts as a list of its characters.

        Raises:
            TextTypeError: an element is neither a `Text` nor a `str`, or the elements have no order (set, mapping).

        """
        joined: Text | None = None
        for item in texts if isinstance(texts, str) else as_list(texts, "join takes texts in order"):
            text = _as_text(item, "join")
            joined = text if joined is None else _concatenate(_concatenate(joined, self), text)
        return Text("", self._lm) if joined is None else _concatenate(Text("", self._lm), joined)

    def __or__(self, other: Text | str) -> Text:
        """Return a group of two branches: each sees the text before the group; the text behind the group sees both.

        Python binds `+` before `|`: `context + a | b` is `(context + a) | b`. Write `context + (a | b)`. A group joined
        with `|` becomes one larger group; empty branches are dropped, and a group of one branch becomes that branch.
        """
        return _in_parallel([self, _as_text(other, "|")], "shared")

    def __ror__(self, other: Text | str) -> Text:
        return _in_parallel([_as_text(other, "|"), self], "shared")

    def frozen(self) -> Text:
        """Return this text as a segment that sees nothing before it, as if the segment stood alone.

        The segment is encoded as a text of its own and starts at position 0. The text behind the segment sees it and
        starts after the largest position seen. The representation equals that of the text alone, so it is reused
        anywhere.
        """
        segments = self.segments
        if not segments or _is_frozen(segments):
            return self
        branch = Branch(segments, is_frozen=True, add_special_tokens=self._add_special_tokens)
        return _leaf(Group((branch,)), self._lm)

    def with_adapter(self, name: str | None) -> Text:
        """Return this text with all its tokens computed under one adapter of the model, whatever adapters are active.

            (context + question.with_adapter("judge")).logits

        The text before and behind is not changed: `context` is computed once for questions under any adapter. The
        adapter replaces the adapters that parts of this text have. Tokens without an adapter of their own are computed
        under the active adapters of the model. Tokens that are added behind a text (generated tokens, completions of
        `classify`) are computed under the adapter of the text's last segment.

        Args:
            name: the name of a LoRA that is loaded into the model (by `load_adapter` of peft or transformers). The name
                is checked on evaluation. None: no adapter.

        Raises:
            TextTypeError: `name` is neither a `str` nor None.

        """
        if not (name is None or isinstance(name, str)):
            raise TextTypeError(f"with_adapter takes the name of an adapter or None, not {abbreviated(name)}.")
        with lazily():
            text = _from_segments(under_adapter(self.segments, name), self._lm, self._add_special_tokens)
        if _EAGER.get():
            text._evaluate_eagerly()
        return text

    # Reading, without a model

    @property
    def lm(self) -> Engine[Text] | None:
        """The `LM` that this text is bound to, or None."""
        return self._lm

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments from left to right: strings, tuples of token ids, and groups; empty segments are left out."""
        if self._left is None:
            return (self._segment,) if self._segment else ()
        return tuple(self._walk_segments())

    @property
    def add_special_tokens(self) -> bool:
        """Whether the text gets the tokenizer's special tokens, if the `LM` adds them; the first part decides."""
        return self._add_special_tokens

    @property
    def string(self) -> str:
        """The whole string, branches in written order.

        A segment of token ids contributes what its ids add to the decoded text before.
        """
        parts = list(leaves(self._walk_segments()))
        strings = [part for part in parts if isinstance(part, str)]
        if len(strings) == len(parts):
            return "".join(strings)
        return bound_engine(self, "the string of token ids").string(self)

    def __str__(self) -> str:
        return self.string

    def __repr__(self) -> str:
        option = "" if self._add_special_tokens else ", add_special_tokens=False"
        return f"Text({shortened(shown(self._walk_segments()), _REPR_CHARACTERS, gap='...')}{option})"

    def __hash__(self) -> int:
        whole = self._whole_hash
        if whole is None:
            whole = hash((self._hash, self._num_segments, self._add_special_tokens, id(self._lm)))
            self._whole_hash = whole
        return whole

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Text):
            return NotImplemented
        if self._lm is not other._lm or self._add_special_tokens is not other._add_special_tokens:
            return False
        if self._num_segments != other._num_segments or self._hash != other._hash:
            return False
        return all(a == b for a, b in zip(self._walk_segments(), other._walk_segments(), strict=True))

    def __copy__(self) -> Text:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_segments, (self.segments, self._lm, self._add_special_tokens)

    def _walk_segments(self) -> Iterator[Segment]:
        stack = [self]
        while stack:
            text = stack.pop()
            if text._left is not None and text._right is not None:
                stack += (text._right, text._left)
            elif text._segment:
                yield text._segment

    @property
    def _is_nothing(self) -> bool:
        """Whether joining this text changes nothing. An empty text may still turn off special tokens for the rest."""
        return self._num_segments == 0 and self._add_special_tokens

    def _plain(self) -> Text:
        """Return this text without the additional data of a subclass."""
        return self

    def _evaluate_eagerly(self) -> None:
        if self._lm is not None and self._lm.tokens(self):
            self._lm.evaluate([self])


def sides(text: Text) -> tuple[Text, Text] | None:
    """Return the two texts that a text joins; None for a text of at most one segment.

    Texts that are built on one text have this text as their left side, so they can share the work on it.
    """
    return None if text._left is None or text._right is None else (text._left, text._right)


def given_ids(text: Text) -> tuple[int, ...] | None:
    """Return the ids of a text that is built of nothing else, and that no text behind changes; else None."""
    segment = text._segment or ()
    return segment if text._left is None and isinstance(segment, tuple) else None


def note(text: Text, of: object, value: Any) -> None:
    """Keep a value with a text for as long as the text lives; replaces an older value. `of` is the value's owner."""
    text._noted, text._noted_by = value, of


def noted(text: Text, of: object) -> Any:
    """Return the value that `note` kept last if `of` is its owner; else None."""
    return text._noted if text._noted_by is of else None


def _concatenate(left: Text, right: Text) -> Text:
    """Return `left + right`; raises MixedModelsError if both are bound to different models."""
    lm = _common_lm(left._lm, right)
    left, right = left._plain(), right._plain()
    if (right._is_nothing or (right._num_segments == 0 and not left._is_nothing)) and left._lm is lm:
        return left
    if left._is_nothing and right._lm is lm:
        return right
    text = Text.__new__(Text)
    text._add_special_tokens = (right if left._is_nothing else left)._add_special_tokens
    text._segment = ""
    text._left, text._right, text._lm = left, right, lm
    text._noted = text._noted_by = text._whole_hash = None
    text._num_segments = left._num_segments + right._num_segments
    shift = _BASE if right._num_segments == 1 else pow(_BASE, right._num_segments, PRIME)
    text._hash = (left._hash * shift + right._hash) % PRIME
    if _EAGER.get():
        text._evaluate_eagerly()
    return text


def parallel(texts: Iterable[Text | str], *, positions: Positions = "shared") -> Text:
    """Return a group of texts that do not see each other; see `Text.__or__`.

    Args:
        texts: the branches. Empty branches are dropped, and a group of one branch becomes that branch.
        positions: "shared": each branch starts where the group starts. So a branch does not depend on the others, and
            its results are reused in any subset and order. The text behind the group starts after the longest branch
            (parallel context windows, Ratner et al. 2022, arXiv 2212.10947). `|` makes groups of this kind; such groups
            in `texts` are merged into the new group. "sequential": positions as if the branches stood one after the
            other.

    Raises:
        TextTypeError: an element is neither a `Text` nor a `str`.
        MixedModelsError: the texts belong to two different `LM` objects.
        ValueError: `positions` is unknown.
        GroupError: groups are nested too deeply.

    """
    as_choice(positions, "positions", POSITIONS)
    listed = as_list(texts, "parallel takes a list of texts")
    return _in_parallel([_as_text(text, "parallel") for text in listed], positions)


def _in_parallel(given: Sequence[Text], positions: Positions) -> Text:
    lm = None
    for text in given:
        lm = _common_lm(lm, text)
    branches: list[Branch] = []
    for text in given:
        segments = text.segments
        merged = _shared_group(segments) if positions == "shared" or _is_frozen(segments) else None
        branches += merged.branches if merged is not None else [Branch(segments)] if segments else []
    if not branches:
        return Text("", lm)
    # Special tokens stand once before a group, unless every branch goes without them.
    seeing = [text for text in given if not _sees_nothing(text.segments)]
    add_special_tokens = not seeing or any(text._add_special_tokens for text in seeing)
    if len(branches) == 1 and not branches[0].is_frozen:
        return _from_segments(branches[0].segments, lm, add_special_tokens)
    group = Group(tuple(branches), positions if len(branches) > 1 else "shared")
    return _leaf(group, lm, add_special_tokens)


def _shared_group(segments: Sequence[Segment]) -> Group | None:
    """Return the only segment if it is a group whose branches share positions."""
    only = segments[0] if len(segments) == 1 else None
    return only if isinstance(only, Group) and only.positions == "shared" else None


def _sees_nothing(segments: Sequence[Segment]) -> bool:
    """Return whether a branch with these segments is empty or begins frozen, so that it ignores the text before it."""
    first = segments[0] if segments else None
    return first is None or (isinstance(first, Group) and all(branch.is_frozen for branch in first.branches))


def _is_frozen(segments: Sequence[Segment]) -> bool:
    group = _shared_group(segments)
    return group is not None and len(group.branches) == 1


def _common_lm(lm: Engine[Text] | None, text: Text) -> Engine[Text] | None:
    """Return the `LM` of `text` joined with texts of `lm`; either may be None."""
    if lm is not None and text._lm is not None and text._lm is not lm:
        raise MixedModelsError(
            f"{text!r} and the text that it is joined with belong to two different LM objects, whose representations "
            "never mix. Build both texts with one LM; a (model, tokenizer) tuple finds the same LM each time."
        )
    return text._lm if lm is None else lm


def _leaf(segment: Segment, lm: Engine[Text] | None, add_special_tokens: bool = True) -> Text:
    text = Text.__new__(Text)
    text._init_leaf(segment, lm, add_special_tokens)
    return text


def _from_segments(segments: Sequence[Segment], lm: Engine[Text] | None, add_special_tokens: bool = True) -> Text:
    """Return a text of these segments."""
    text = Text("", lm, add_special_tokens=add_special_tokens)
    for segment in segments:
        text = _concatenate(text, _leaf(segment, lm))
    return text


def _as_text(value: object, operation: str) -> Text:
    if isinstance(value, Text):
        return value
    if isinstance(value, str):
        return _leaf(value, None)
    raise TextTypeError(
        f"{operation} takes a Text or a str, not {type(value).__name__}: {abbreviated(value)}. "
        "Convert it with str(...) first."
    )
