"""A text with its tokens coloured by their probability: for notebooks, terminals and plain text.

The strength of one colour shows surprise, and in plain text shades do, so it reads without colour vision. The
background is that of the page: colours lie over it half transparent, and letters keep the page's own colour.
"""

from __future__ import annotations

import html
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt.arguments import as_int
from backprompt.bound import bound_lm
from backprompt.lm import LM
from backprompt.logprobs import log_softmax
from backprompt.text.extents import Extent
from backprompt.text.segments import Adapted
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import TokenIds, flat, fold
from backprompt.tokens.tokenizer import added
from backprompt.visible import visible

if TYPE_CHECKING:
    from backprompt.text.node import Text
    from backprompt.tokens.tokenizer import PrivateTokenizer

_ROWS_AT_A_TIME = 64
_TOKENS_BEFORE = 8
"""A token is decoded behind this many others: alone it may be a part of a character, or lose its space."""


@dataclass(frozen=True)
class _Shade:
    """The look of tokens of at least some probability."""

    least: float
    opacity: float  # in HTML
    on_light: int  # in terminals, of the 256 colours: under black letters where the ground is light
    on_dark: int  # the same where the ground is dark
    letters_on_dark: int
    mark: str  # in plain text

    def __str__(self) -> str:
        return f"≥ {self.least:.3g}" if self.least else f"< {SHADES[-2].least:.3g}"


_BLACK, _WHITE = 16, 231

SHADES = (
    _Shade(0.5, 0.0, 0, 0, 0, ""),
    _Shade(0.1, 0.14, 230, 58, _WHITE, "░"),
    _Shade(0.01, 0.30, 222, 94, _WHITE, "▒"),
    _Shade(0.001, 0.48, 215, 130, _WHITE, "▓"),
    _Shade(0.0, 0.68, 208, 208, _BLACK, "█"),
)
_RGB = "234, 108, 18"
_JOIN, _CHANGED_JOIN = "¦", "≠"


@dataclass(frozen=True)
class ShownToken:
    r"""A token as it is shown.

    Attributes:
        token_id: its id.
        string: the characters that it adds to the string before it; "\ufffd" for a part of a character.
        logprob: its log-probability given the tokens that it sees, nats; nan if nothing predicts it.
        alternatives: the most probable tokens there, each with its log-probability; the first is the choice of greedy
            decoding.
        begins_segment: whether a segment begins with it.
        is_join_changed: whether joining that segment to the text before it changed tokens.
        adapter: the name of its segment's own adapter, "" for `with_adapter(None)`, None if it has none of its own.

    """

    token_id: int
    string: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]
    begins_segment: bool
    is_join_changed: bool
    adapter: str | None = None


class ShownText:
    """The result of `text.show()`: HTML in notebooks; in terminals colours, unless `NO_COLOR` is set; else plain text.

    Attributes:
        tokens: the `ShownToken`s, in written order.

    """

    def __init__(self, tokens: Sequence[ShownToken]) -> None:
        self.tokens = tuple(tokens)

    def __str__(self) -> str:
        return self.ansi() if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else self.plain()

    __repr__ = __str__

    def ansi(self, *, is_dark: bool | None = None) -> str:
        """Return the text with the escape sequences that terminals take for colours.

        Args:
            is_dark: whether the terminal's ground is dark; by default as the variable COLORFGBG says, or else True.

        """
        is_dark = _has_dark_ground() if is_dark is None else is_dark
        legend = " ".join(_painted(f" {shade} ", shade, is_dark) for shade in SHADES)
        body = "".join(
            _mark(token) + _painted(_broken(token.string), _shade_of(token), is_dark) for token in self.tokens
        )
        return f"{body}\n\n{legend}  {self._joins_explained()}".rstrip()

    def plain(self) -> str:
        """Return the text with marks before improbable tokens."""
        legend = "  ".join(f"{shade.mark} {shade}" for shade in SHADES[1:])
        body = "".join(_mark(token) + _mark_of_shade(token) + _broken(token.string) for token in self.tokens)
        return f"{body}\n\nprobability: {legend}  {self._joins_explained()}".rstrip()

    def _repr_html_(self) -> str:
        legend = " ".join(
            f'<span style="{_style(shade)}; padding: 0 0.5em; border-radius: 3px">{html.escape(str(shade))}</span>'
            for shade in SHADES
        )
        joins = self._joins_explained("│", "║")
        return (
            '<div style="font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7">'
            f"{''.join(map(_token_html, self.tokens))}</div>"
            f'<div style="margin-top: 0.6em; font-size: 85%">probability: {legend} &emsp;{joins}</div>'
        )

    def _joins_explained(self, join: str = _JOIN, changed_join: str = _CHANGED_JOIN) -> str:
        explained = [f"{join} a segment begins"] if any(map(_is_marked, self.tokens)) else []
        if any(token.is_join_changed for token in self.tokens):
            explained.append(f"{changed_join} one begins, and joining it changed tokens")
        return ", ".join(explained)


def show(text: Text, *, top: int = 5) -> ShownText:
    """Return a text with its tokens coloured by log-probability; see `Text.show`."""
    top = as_int(top, "top", at_least=0)
    lm = bound_lm(text, "log-probabilities")
    model_repr = text.model_repr
    with lm.session.exclusive():
        (token_ids,) = lm.session.encoder.encode([text])
        (extents,) = lm.session.encoder.extents([text])
        tokenizer = lm.session.private_tokenizer
    alternatives = _alternatives(lm, text, token_ids, top)
    starts = {extent.start: extent for extent in extents if extent.start < extent.stop}
    adapters = {idx: _adapter_of(extent) for extent in extents for idx in range(extent.start, extent.stop)}
    logprobs = model_repr.token_logprobs.tolist()
    ids = plain(flat(token_ids))
    return ShownText(
        [
            ShownToken(
                token_id,
                string,
                logprob,
                tuple((_string_of(tokenizer, ids[:idx], other), other_logprob) for other, other_logprob in others),
                begins_segment=idx in starts,
                is_join_changed=idx in starts and starts[idx].is_join_changed,
                adapter=adapters.get(idx),
            )
            for idx, (token_id, string, logprob, others) in enumerate(
                zip(ids, _strings(tokenizer, ids), logprobs, alternatives, strict=True)
            )
        ]
    )


def _alternatives(lm: LM, text: Text, token_ids: TokenIds, top: int) -> list[list[tuple[int, float]]]:
    """Return, for each token, the most probable tokens in its place, the most probable first."""
    model_repr = text.model_repr
    best: list[list[tuple[int, float]]] = []  # behind each token
    for start in range(0, len(token_ids) if top else 0, _ROWS_AT_A_TIME):
        logits = model_repr.all_logits(start, start + _ROWS_AT_A_TIME)  # (rows, vocab)
        found = log_softmax(logits).topk(min(top, logits.shape[1]), dim=-1)
        best += [
            [(i, logprob) for i, logprob in zip(ids, logprobs, strict=True) if logprob > -math.inf]
            for ids, logprobs in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]
    return [best[row] if best and row is not None else [] for row in predicting_rows(token_ids)]


def predicting_rows(token_ids: TokenIds) -> list[int | None]:
    """Return, for each token in written order, the token whose row predicts it; None if no single token precedes it."""
    rows: list[int | None] = []

    def extend(before: int | None, position: int, ids: tuple[int, ...]) -> int:
        for _ in ids:
            rows.append(before)
            before = len(rows) - 1
        assert before is not None
        return before

    fold(token_ids, None, extend, lambda before, ends, position: None)
    return rows


def _strings(tokenizer: PrivateTokenizer, ids: tuple[int, ...]) -> Iterator[str]:
    return (_string_of(tokenizer, ids[:idx], token_id) for idx, token_id in enumerate(ids))


def _string_of(tokenizer: PrivateTokenizer, before: tuple[int, ...], token_id: int) -> str:
    """Return the characters that a token adds to the string of the tokens before it."""
    near = before[-_TOKENS_BEFORE:]
    return added(tokenizer.decode(near), tokenizer.decode((*near, token_id)))


def _shade_of(token: ShownToken) -> _Shade:
    if math.isnan(token.logprob):
        return SHADES[0]
    probability = math.exp(token.logprob)
    return next(shade for shade in SHADES if probability >= shade.least)


def _is_marked(token: ShownToken) -> bool:
    return token.begins_segment and not token.is_join_changed


def _adapter_of(extent: Extent) -> str | None:
    return (extent.segment.adapter or "") if isinstance(extent.segment, Adapted) else None


def _mark(token: ShownToken) -> str:
    join = _CHANGED_JOIN if token.is_join_changed else _JOIN if token.begins_segment else ""
    return f"{join}[{_named(token.adapter)}] " if token.begins_segment and token.adapter is not None else join


def _named(adapter: str) -> str:
    return visible(adapter) if adapter else "no adapter"


def _mark_of_shade(token: ShownToken) -> str:
    return _shade_of(token).mark


def _broken(string: str) -> str:
    """Return a string with visible line breaks; a dot stands for a part of a character."""
    if string.endswith("\ufffd"):
        string = string.rstrip("\ufffd") + "·"
    return "↵\n".join(map(visible, string.split("\n")))


def _has_dark_ground() -> bool:
    """Return whether the terminal says in COLORFGBG ("15;0") that its ground is dark, or says nothing."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return not ground.isdecimal() or int(ground) in (*range(7), 8)


def _painted(string: str, shade: _Shade, is_dark: bool) -> str:
    """Return a string for terminals, on the shade's colour; the ends of lines stay as they are."""
    if not shade.opacity or not string:
        return string
    letters, ground = (shade.letters_on_dark, shade.on_dark) if is_dark else (_BLACK, shade.on_light)
    return "\n".join(f"\x1b[38;5;{letters};48;5;{ground}m{line}\x1b[0m" if line else "" for line in string.split("\n"))


def _style(shade: _Shade) -> str:
    return f"background-color: rgba({_RGB}, {shade.opacity})"


def _token_html(token: ShownToken) -> str:
    style = f"{_style(_shade_of(token))}; border-radius: 3px; margin-right: 1px"
    if token.begins_segment:
        style += f"; border-left: {'4px double' if token.is_join_changed else '2px solid'} #7d8590; padding-left: 1px"
    label = _mark(token)[1:] if token.adapter is not None else ""
    adapter = f'<sub style="opacity: 0.7">{html.escape(label)}</sub>' if label else ""
    body = html.escape(_broken(token.string))
    return f'{adapter}<span style="{style}" title="{html.escape(_hover(token))}">{body}</span>'


def _hover(token: ShownToken) -> str:
    """Return the text shown for a token when the pointer rests on it."""
    told = "nothing predicts it" if math.isnan(token.logprob) else _probability(token.logprob)
    lines = [f"{visible(token.string)!r}: {told}, id {token.token_id}"]
    for rank, (string, logprob) in enumerate(token.alternatives, 1):
        lines.append(f"{rank}. {visible(string)!r} {_probability(logprob)}")
    if token.adapter is not None:
        lines.append(f"adapter: {_named(token.adapter)}")
    if token.is_join_changed:
        lines.append("joining the segment that begins here changed tokens")
    return "\n".join(lines)


def _probability(logprob: float) -> str:
    return f"p {math.exp(logprob):.3g} (log p {logprob:.2f})"
