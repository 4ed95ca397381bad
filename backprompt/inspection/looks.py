"""Looks: the colour, the border and the words for each status, in boxes and in the legend."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from backprompt.inspection.graph import Status

GREY = "#7d8590"
INK = "#1f2328"


@dataclass(frozen=True)
class Look:
    """The look of a status; `style`, `width` and `lines` tell its border from others without colour."""

    fill: str
    border: str
    style: str = "solid"
    width: float = 1.0
    lines: int = 1


LOOKS: Mapping[Status, Look] = {
    "computed now": Look("#ffd8a8", "#d9480f", width=2.6),
    "reused from memory": Look("#cfe3fb", "#2b7bd0"),
    "from disk": Look("#d3f0dd", "#1f8f56", width=1.3, lines=2),
    "evicted": Look("#f0d5ea", "#b5489c", style="dashed", width=2.0),
    "not evaluated": Look("#f4f4f5", GREY, style="dotted", width=2.8),
    "no model": Look("#ffffff", GREY),
}

MEANINGS: Mapping[Status, str] = {
    "computed now": "computed now: by the latest evaluation",
    "reused from memory": "reused from memory: held since an earlier evaluation",
    "from disk": "from disk: read from the store, or there to be read",
    "evicted": "evicted: dropped over the memory budget, to be computed again",
    "not evaluated": "not evaluated: to be computed",
}


def as_html(shown: str) -> str:
    """Return a string for Graphviz's HTML-like labels, in which spaces would run together."""
    escaped = html.escape(shown).replace(" ", "&#160;")
    # A tag separates the backslash from the next letter: Graphviz replaces any spelling of \N by the node's name.
    return escaped.replace("\\", f'<FONT COLOR="{INK}">&#92;</FONT>')


def legend_text(text: str) -> str:
    """Return the cell of the legend with the meaning of a sign."""
    return f'<TD ALIGN="LEFT">{as_html(text)}</TD>'


def swatch(status: Status) -> str:
    """Return the cell of the legend with the look of a status."""
    look = LOOKS[status]
    border = f'BORDER="{round(look.width)}" COLOR="{look.border}" STYLE="{look.style}"'
    ground = f'BGCOLOR="{look.fill}"'
    if look.lines == 2:  # the inner box has the background
        table, cell = f'{border} CELLSPACING="2"', f'{border} {ground} WIDTH="22" HEIGHT="8"'
    else:
        table, cell = f'{border} {ground} CELLSPACING="0"', 'BORDER="0" WIDTH="26" HEIGHT="12"'
    return f'<TD ALIGN="LEFT"><TABLE {table}><TR><TD {cell} FIXEDSIZE="TRUE"></TD></TR></TABLE></TD>'
