"""A text with its tokens coloured by their probability, or by attention: for notebooks, terminals and plain text.

The strength of one colour shows surprise or attention, in plain text the darkness of a mark, so no colour vision is
needed. The background is that of the page: colours are half transparent, and letters keep the page's own colour.
"""

from __future__ import annotations

import html
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from backprompt.arguments import as_indices, as_int
from backprompt.bound import bound_lm
from backprompt.lm import LM
from backprompt.text.extents import Extent
from backprompt.text.segments import Adapted
from backprompt.tokens.adapted import plain
from backprompt.tokens.graph import flat
from backprompt.tokens.tokenizer import added
from backprompt.visible import visible

if TYPE_CHECKING:
    from backprompt.text.node import Text
    from backprompt.tokens.tokenizer import PrivateTokenizer

_TOKENS_BEFORE = 8
"""A token is decoded behind this many others, because alone it may be part of a character or lose its space."""


@dataclass(frozen=True)
class _Shade:
    """The look of tokens with a value of at least `least`."""

    least: float
    opacity: float  # in HTML
    on_light: int  # in light terminals: the background of black letters, one of 256 colours
    on_dark: int  # in dark terminals: the background of letters
    letters_on_dark: int
    mark: str  # in plain text


@dataclass(frozen=True)
class Scale:
    """The looks of tokens, by one of their values.

    Attributes:
        name: the name of the value.
        rgb: the colour in HTML.
        shades: from the largest values to the smallest.

    """

    name: str
    rgb: str
    shades: tuple[_Shade, ...]

    def shade_of(self, value: float) -> _Shade:
        """Return the look of a value."""
        return next(shade for shade in self.shades if value >= shade.least)

    def label(self, shade: _Shade) -> str:
        """Return the values of a shade, for the legend."""
        return f"≥ {shade.least:.3g}" if shade.least else f"< {self.shades[-2].least:.3g}"

    def style(self, shade: _Shade) -> str:
        """Return the style of a shade in HTML."""
        return f"background-color: rgba({self.rgb}, {shade.opacity})"


_BLACK, _WHITE = 16, 231

SHADES = (
    _Shade(0.5, 0.0, 0, 0, 0, ""),
    _Shade(0.1, 0.14, 230, 58, _WHITE, "░"),
    _Shade(0.01, 0.30, 222, 94, _WHITE, "▒"),
    _Shade(0.001, 0.48, 215, 130, _WHITE, "▓"),
    _Shade(0.0, 0.68, 208, 208, _BLACK, "█"),
)
PROBABILITY = Scale("probability", "234, 108, 18", SHADES)
ATTENTION = Scale(
    "attention",
    "52, 120, 220",
    (
        _Shade(0.3, 0.68, 75, 75, _BLACK, "█"),
        _Shade(0.1, 0.48, 111, 32, _WHITE, "▓"),
        _Shade(0.03, 0.30, 153, 25, _WHITE, "▒"),
        _Shade(0.01, 0.14, 195, 17, _WHITE, "░"),
        _Shade(0.0, 0.0, 0, 0, 0, ""),
    ),
)
_JOIN, _CHANGED_JOIN, _ATTENDS = "¦", "≠", "▸"


@dataclass(frozen=True)
class ShownToken:
    r"""A token as it is shown.

    Attributes:
        token_id: its id.
        string: the characters that it adds to the string before it; "\ufffd" for a part of a character.
        logprob: its log-probability given the tokens that it sees, nats; nan if nothing predicts it.
        alternatives: the most probable tokens at its position, each with its log-probability; the first is the choice
            of greedy decoding.
        begins_segment: whether a segment begins with it.
        is_join_changed: whether joining that segment to the text before it changed tokens.
        adapter: the name of its segment's own adapter, "" for `with_adapter(None)`, None if it has none of its own.
        attention: the share of attention that it gets from the token of `show(attention_from=...)`; None without such a
            token.
        attends: whether it is this attending token.

    """

    token_id: int
    string: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]
    begins_segment: bool
    is_join_changed: bool
    adapter: str | None = None
    attention: float | None = None
    attends: bool = False


class ShownText:
    """The result of `text.show()`: HTML in notebooks; in terminals colours, unless `NO_COLOR` is set; else plain text.

    Attributes:
        tokens: the `ShownToken`s, in written order.

    """

    def __init__(self, tokens: Sequence[ShownToken]) -> None:
        self.tokens = tuple(tokens)
        self._scale = ATTENTION if any(token.attends for token in self.tokens) else PROBABILITY

    def __str__(self) -> str:
        return self.ansi() if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else self.plain()

    __repr__ = __str__

    def ansi(self, *, is_dark: bool | None = None) -> str:
        """Return the text with escape sequences for the colours of terminals.

        Args:
            is_dark: whether the terminal's background is dark; by default the variable COLORFGBG decides, and without
                it True.

        """
        is_dark = _has_dark_ground() if is_dark is None else is_dark
        scale = self._scale
        legend = " ".join(_painted(f" {scale.label(shade)} ", shade, is_dark) for shade in scale.shades)
        body = "".join(
            _mark(token) + _painted(_broken(token.string), _shade_of(token), is_dark) for token in self.tokens
        )
        return f"{body}\n\n{legend}  {self._marks_explained()}".rstrip()

    def plain(self) -> str:
        """Return the text with marks before tokens that are improbable or get attention."""
        scale = self._scale
        legend = "  ".join(f"{shade.mark} {scale.label(shade)}" for shade in scale.shades if shade.mark)
        body = "".join(_mark(token) + _shade_of(token).mark + _broken(token.string) for token in self.tokens)
        return f"{body}\n\n{scale.name}: {legend}  {self._marks_explained()}".rstrip()

    def _repr_html_(self) -> str:
        scale = self._scale
        legend = " ".join(
            f'<span style="{scale.style(shade)}; padding: 0 0.5em; border-radius: 3px">'
            f"{html.escape(scale.label(shade))}</span>"
            for shade in scale.shades
        )
        marks = self._marks_explained("│", "║", "▁")
        return (
            '<div style="font-family: monospace; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7">'
            f"{''.join(map(_token_html, self.tokens))}</div>"
            f'<div style="margin-top: 0.6em; font-size: 85%">{scale.name}: {legend} &emsp;{marks}</div>'
        )

    def _marks_explained(self, join: str = _JOIN, changed_join: str = _CHANGED_JOIN, attends: str = _ATTENDS) -> str:
        explained = [f"{join} a segment begins"] if any(map(_is_marked, self.tokens)) else []
        if any(token.is_join_changed for token in self.tokens):
            explained.append(f"{changed_join} one begins, and joining it changed tokens")
        if any(token.attends for token in self.tokens):
            explained.append(f"{attends} the token that attends")
        return ", ".join(explained)


def show(
    text: Text,
    *,
    top: int = 5,
    attention_from: int | None = None,
    layers: int | slice | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
) -> ShownText:
    """Return a text with its tokens coloured by log-probability, or by attention; see `Text.show`."""
    top = as_int(top, "top", at_least=0)
    lm = bound_lm(text, "log-probabilities")
    if attention_from is None and (layers is not None or heads is not None):
        raise ValueError(
            "layers and heads choose attention, so they need attention_from, the token that attends. "
            "Add it, or leave them out."
        )
    model_repr = text.model_repr
    row, attention = None, [None] * model_repr.num_tokens
    if attention_from is not None:
        (row,) = as_indices([attention_from], "attention_from", model_repr.num_tokens)
        attention = model_repr.attention(layers, heads, row).mean(dim=(0, 1))[0].tolist()
    with lm.session.exclusive():
        (token_ids,) = lm.session.encoder.encode([text])
        (extents,) = lm.session.encoder.extents([text])
        tokenizer = lm.session.private_tokenizer
    alternatives = _alternatives(lm, text, top)
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
                attention=attention[idx],
                attends=idx == row,
            )
            for idx, (token_id, string, logprob, others) in enumerate(
                zip(ids, strings_of(tokenizer, ids), logprobs, alternatives, strict=True)
            )
        ]
    )


def _alternatives(lm: LM, text: Text, top: int) -> list[list[tuple[int, float]]]:
    """Return, for each token, the most probable tokens at its position, the most probable first."""
    if top == 0:
        return [[] for _ in text.tokens]
    found = lm.top_logprobs([text], min(top, lm.session.vocab_size))
    return [
        [(token_id, logprob) for token_id, logprob in zip(ids, logprobs, strict=True) if logprob > -math.inf]
        for ids, logprobs in zip(found.token_ids.tolist(), found.logprobs.tolist(), strict=True)
    ]


def strings_of(tokenizer: PrivateTokenizer, ids: tuple[int, ...]) -> Iterator[str]:
    """Yield the characters that each token adds to the string of the tokens before it."""
    return (_string_of(tokenizer, ids[:idx], token_id) for idx, token_id in enumerate(ids))


def _string_of(tokenizer: PrivateTokenizer, before: tuple[int, ...], token_id: int) -> str:
    """Return the characters that a token adds to the string of the tokens before it."""
    near = before[-_TOKENS_BEFORE:]
    return added(tokenizer.decode(near), tokenizer.decode((*near, token_id)))


def _shade_of(token: ShownToken) -> _Shade:
    if token.attention is not None:
        return ATTENTION.shade_of(token.attention)
    return SHADES[0] if math.isnan(token.logprob) else PROBABILITY.shade_of(math.exp(token.logprob))


def _is_marked(token: ShownToken) -> bool:
    return token.begins_segment and not token.is_join_changed


def _adapter_of(extent: Extent) -> str | None:
    return (extent.segment.adapter or "") if isinstance(extent.segment, Adapted) else None


def _mark(token: ShownToken) -> str:
    join = _CHANGED_JOIN if token.is_join_changed else _JOIN if token.begins_segment else ""
    join += _ATTENDS if token.attends else ""
    return f"{join}[{_named(token.adapter)}] " if token.begins_segment and token.adapter is not None else join


def _named(adapter: str) -> str:
    return visible(adapter) if adapter else "no adapter"


def _broken(string: str) -> str:
    """Return a string with visible line breaks; a dot stands for a part of a character."""
    if string.endswith("\ufffd"):
        string = string.rstrip("\ufffd") + "·"
    return "↵\n".join(map(visible, string.split("\n")))


def _has_dark_ground() -> bool:
    """Return whether the terminal's background is dark, as COLORFGBG says ("15;0"); True if it says nothing."""
    ground = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return not ground.isdecimal() or int(ground) in (*range(7), 8)


def _painted(string: str, shade: _Shade, is_dark: bool) -> str:
    """Return a string for terminals, on the shade's colour; the ends of lines stay as they are."""
    if not shade.opacity or not string:
        return string
    letters, ground = (shade.letters_on_dark, shade.on_dark) if is_dark else (_BLACK, shade.on_light)
    return "\n".join(f"\x1b[38;5;{letters};48;5;{ground}m{line}\x1b[0m" if line else "" for line in string.split("\n"))


def _token_html(token: ShownToken) -> str:
    scale = PROBABILITY if token.attention is None else ATTENTION
    style = f"{scale.style(_shade_of(token))}; border-radius: 3px; margin-right: 1px"
    if token.attends:
        style += "; border-bottom: 3px solid #7d8590"
    if token.begins_segment:
        style += f"; border-left: {'4px double' if token.is_join_changed else '2px solid'} #7d8590; padding-left: 1px"
    label = f"[{_named(token.adapter)}] " if token.begins_segment and token.adapter is not None else ""
    adapter = f'<sub style="opacity: 0.7">{html.escape(label)}</sub>' if label else ""
    body = html.escape(_broken(token.string))
    return f'{adapter}<span style="{style}" title="{html.escape(_hover(token))}">{body}</span>'


def _hover(token: ShownToken) -> str:
    """Return the text shown for a token when the pointer rests on it."""
    told = "nothing predicts it" if math.isnan(token.logprob) else _probability(token.logprob)
    lines = [f"{visible(token.string)!r}: {told}, id {token.token_id}"]
    for rank, (string, logprob) in enumerate(token.alternatives, 1):
        lines.append(f"{rank}. {visible(string)!r} {_probability(logprob)}")
    if token.attention is not None:
        lines.append(f"attention: {token.attention:.3g}")
    if token.adapter is not None:
        lines.append(f"adapter: {_named(token.adapter)}")
    if token.is_join_changed:
        lines.append("joining the segment that begins here changed tokens")
    return "\n".join(lines)


def _probability(logprob: float) -> str:
    return f"p {math.exp(logprob):.3g} (log p {logprob:.2f})"
