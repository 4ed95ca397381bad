"""Explanation: the cost of evaluating texts, in figures, as a table, and in sentences."""

from __future__ import annotations

import html
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from backprompt.inspection.missing import Miss, Reason
from backprompt.visible import counted, visible

Named: TypeAlias = Callable[[int], str]
"""A name for the text with an index, in sentences."""

BY_INDEX: Named = "texts[{}]".format

MAX_SHOWN = 12
"""The printed account names at most this many missing segments."""

_REASONS: dict[Reason, str] = {
    "evicted": "computed once, and dropped over the budget",
    "join": "held alone, but the join changed tokens",
    "other model": "stored under another model",
    "elsewhere": "held behind other tokens",
    "too short": "never computed, or too short to be stored by themselves",
    "never computed": "never computed, as far as is known",
}


@dataclass(frozen=True)
class Divergence:
    """The place where the common beginning of all texts ends.

    Attributes:
        text_idx: the text that differs from the first text there.
        segment_idx, segment: the segment of that text with the first token that is not common; the text's last segment
            if the text ends there.
        token_idx: the index of the first token that is not common, and so the number of common tokens.
        cause: "token": the tokens differ. "join": both texts have the same segments up to there, but the next segment
            in one of them changed its tokens. "end": one of the two texts ends.

    """

    text_idx: int
    segment_idx: int
    segment: str
    token_idx: int
    cause: Literal["token", "join", "end"]


@dataclass(frozen=True)
class Actual:
    """The actual figures of an evaluation; the names are those of `Stats`."""

    tokens_computed: int
    tokens_recomputed: int
    tokens_loaded: int
    tokens_fetched: int
    forward_passes: int
    model_calls: int
    seconds: float
    bytes_held: int


@dataclass(frozen=True)
class Explanation:
    """The cost of evaluating texts; `str()` is a table, notebooks show it, and `rich.print` takes it, too.

    Attributes:
        num_texts: the number of texts.
        num_groups: the number of texts with groups or frozen segments, which no plain call computes.
        tokens_requested: the tokens in all texts. Plain calls, one per text, would forward all of them.
        tokens_distinct: distinct tokens; two tokens are the same if they and all tokens before them are equal.
        tokens_shared: requested minus distinct tokens, without special tokens at the beginning.
        tokens_in_memory: distinct tokens whose hidden states are held on the device.
        tokens_in_host: distinct tokens whose hidden states are held in the second pool.
        tokens_on_disk: distinct tokens whose hidden states are in the store, as its index says.
        tokens_to_compute: tokens to be forwarded. A token whose states are held is among them if its keys and values
            were dropped.
        tokens_to_recompute: the tokens to be forwarded that were forwarded before.
        pass_tokens: the number of tokens in each packed pass.
        bytes_needed: the bytes that all the texts take in memory.
        bytes_held: the bytes held in memory now, for any texts.
        budget_bytes: the `LM`'s `memory_bytes`.
        seconds: the expected time at the rate of this `LM` so far, with the output head; None before its first
            computation.
        seconds_saved: the time that the `tokens_requested` which are not computed would take at that rate.
        divergence: the place where the common beginning of the texts ends; None for one text, texts with groups, and
            equal texts.
        misses: segments with tokens that are held nowhere, in the order of the texts.
        actual: the actual figures, with `analyze=True`.

    """

    num_texts: int
    num_groups: int
    tokens_requested: int
    tokens_distinct: int
    tokens_shared: int
    tokens_in_memory: int
    tokens_in_host: int
    tokens_on_disk: int
    tokens_to_compute: int
    tokens_to_recompute: int
    pass_tokens: tuple[int, ...]
    bytes_needed: int
    bytes_held: int
    budget_bytes: int
    seconds: float | None
    seconds_saved: float | None
    divergence: Divergence | None
    misses: tuple[Miss, ...]
    actual: Actual | None = None

    @property
    def forward_passes(self) -> int:
        """The number of packed passes that are expected."""
        return len(self.pass_tokens)

    @property
    def times_fewer(self) -> float:
        """The tokens that plain calls would forward, divided by the tokens to compute; infinite if these are none."""
        return self.tokens_requested / self.tokens_to_compute if self.tokens_to_compute else math.inf

    @property
    def exceeds_budget(self) -> bool:
        """Whether the texts together take more memory than the `LM` may hold."""
        return self.bytes_needed > self.budget_bytes

    @property
    def sentences(self) -> list[str]:
        """The meaning of the numbers: whether sharing pays, where sharing stops, and which texts do not fit."""
        return self._sentences(BY_INDEX)

    def _sentences(self, named: Named) -> list[str]:
        return [*self._gain(named), *self._warnings()]

    def to_dict(self, named: Named = BY_INDEX) -> dict[str, Any]:
        """Return all figures as dicts, lists, strings and numbers, such as JSON takes; `named` names texts by index."""
        return {
            **asdict(self),
            "pass_tokens": list(self.pass_tokens),
            "misses": [asdict(miss) for miss in self.misses],
            "forward_passes": self.forward_passes,
            "exceeds_budget": self.exceeds_budget,
            "sentences": self._sentences(named),
        }

    def __str__(self) -> str:
        return self.in_lines()

    def in_lines(self, named: Named = BY_INDEX) -> str:
        """Return the table and the sentences as plain text; `named` names texts by index."""
        rows = [("", "expected", "actual"), *self._rows()]
        columns = range(3 if self.actual is not None else 2)
        widths = [max(len(row[column]) for row in rows) for column in columns]
        lines = ["  ".join(_aligned(row[column], widths[column], column) for column in columns) for row in rows]
        return "\n".join(line.rstrip() for line in [*lines, "", *self._said(named)])

    def show(self, named: Named = BY_INDEX) -> None:
        """Print the cost: as a table of rich if rich is installed and the output is a terminal, else as plain text.

        Args:
            named: names texts by index; by default `texts[0]` and so on.

        """
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from rich import print as print_rich

            print_rich(self._in_rich(named))
        else:
            print(self.in_lines(named))

    def __rich__(self) -> Any:
        return self._in_rich(BY_INDEX)

    def _in_rich(self, named: Named) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text as RichText

        table = Table("", "expected")
        if self.actual is not None:
            table.add_column("actual")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self._rows():
            table.add_row(*row[: len(table.columns)])
        return Group(table, *map(RichText, self._said(named)))

    def _repr_html_(self) -> str:
        head = ["", "expected", "actual"][: 2 if self.actual is None else 3]
        rows = "".join(f"<tr>{_cells(row[: len(head)], 'td')}</tr>" for row in self._rows())
        lines = "<br>".join(html.escape(line) for line in self._said(BY_INDEX))
        return f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table><p>{lines}</p>"

    def _said(self, named: Named) -> list[str]:
        """Return the lines below the table, fit for display, since they quote texts and stores."""
        return [visible(line) for line in [*self._sentences(named), *self._missing_lines(named)]]

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return each figure's name, its expected and its actual value; "" for a value that is missing."""
        done = self.actual
        passes = " + ".join(f"{num_tokens:,}" for num_tokens in self.pass_tokens[:4])
        passes += f" + ... {self.forward_passes - 4} more" if self.forward_passes > 4 else ""
        rows = [
            ("tokens in all texts", f"{self.tokens_requested:,}", ""),
            ("  distinct", f"{self.tokens_distinct:,}", ""),
            ("  in memory", f"{self.tokens_in_memory:,}", ""),
            ("  in host memory", f"{self.tokens_in_host:,}", f"{done.tokens_fetched:,} fetched" if done else ""),
            ("  on disk", f"{self.tokens_on_disk:,}", f"{done.tokens_loaded:,} loaded" if done else ""),
            ("tokens to compute", f"{self.tokens_to_compute:,}", f"{done.tokens_computed:,}" if done else ""),
            ("  once more", f"{self.tokens_to_recompute:,}", f"{done.tokens_recomputed:,}" if done else ""),
            ("passes", str(self.forward_passes), str(done.forward_passes) if done else ""),
            ("  tokens in each", passes or "none", ""),
            ("  model calls, by levels", "", str(done.model_calls) if done else ""),
            ("bytes these texts take", _bytes(self.bytes_needed), ""),
            ("bytes held now", _bytes(self.bytes_held), _bytes(done.bytes_held) if done else ""),
            ("bytes allowed", _bytes(self.budget_bytes), ""),
            (
                "seconds",
                "unknown before the first pass" if self.seconds is None else f"{self.seconds:.3g}",
                f"{done.seconds:.3g}" if done else "",
            ),
        ]
        optional = {
            "  in host memory": self.tokens_in_host or (done and done.tokens_fetched),
            "  on disk": self.tokens_on_disk or (done and done.tokens_loaded),
            "  once more": self.tokens_to_recompute or (done and done.tokens_recomputed),
            "  tokens in each": self.forward_passes > 1,
            "  model calls, by levels": done and done.model_calls > done.forward_passes,
        }
        return [row for row in rows if optional.get(row[0], True)]

    def _gain(self, named: Named) -> Iterator[str]:
        plain, computed = self.tokens_requested, self.tokens_to_compute
        if self.num_texts > 1 and not self.tokens_shared:
            if self.tokens_distinct == plain:
                yield "Sharing saves nothing here: prompts differ from the first token."
            else:
                yield "Sharing saves only special tokens here: prompts differ from the first token behind them."
        saved = "" if self.seconds_saved is None else f", about {self.seconds_saved:.2g} s less"
        if not computed:
            calls = "Plain calls" if not self.num_groups else "One text after the other"
            yield f"No token is forwarded, because all of them are held. {calls} would forward {plain:,} tokens{saved}."
        elif computed < plain:
            what = "one text" if self.num_texts == 1 else f"{self.num_texts:,} texts together"
            yield (
                f"Evaluating {what} forwards {computed:,} tokens instead of {plain:,}: {self.times_fewer:.1f} times "
                f"fewer{saved}."
            )
            num_held = self.tokens_distinct - computed
            if num_held:
                num_shared = plain - computed - num_held
                others = f"; sharing saves the other {num_shared:,}" if num_shared else ""
                yield f"Of the tokens saved, {num_held:,} are held already{others}."
        elif self.num_texts == 1 and not self.num_groups:
            yield f"One text without held tokens forwards {plain:,} tokens, as its plain call does."
        elif self.num_texts == 1:
            yield f"One text without held tokens forwards {plain:,} tokens, each of its branches once."
        if self.divergence is not None and self.tokens_shared:
            yield self._where_sharing_stops(self.divergence, named)

    def _where_sharing_stops(self, at: Divergence, named: Named) -> str:
        common = f"All texts have their first {counted(at.token_idx, 'token')} in common"
        common = common if at.token_idx else "No token is common to all texts"
        if at.cause == "end":
            return f"{common}: {named(0)} or {named(at.text_idx)} is no longer than that."
        because = (
            ", because the next segment of one of them changed the tokens at the join" if at.cause == "join" else ""
        )
        return (
            f"{common}: {named(at.text_idx)} parts from {named(0)} at token {at.token_idx:,}, in segment "
            f"{at.segment_idx} ({at.segment}){because}."
        )

    def _warnings(self) -> Iterator[str]:
        if self.exceeds_budget:
            yield (
                f"Warning: these texts take {_bytes(self.bytes_needed)}, more than the budget of "
                f"{_bytes(self.budget_bytes)}; part of them will be dropped, and computed again when asked for. Give "
                "the LM more: LM(..., memory_bytes=...)."
            )

    def _missing_lines(self, named: Named) -> list[str]:
        """Return a line for each of the first missing segments with a known reason, and counts of the others."""
        if not self.misses:
            return []
        tense = "were" if self.actual is not None else "are"
        lines = ["", f"Segments that {tense} missing, and why:"]
        explained = [miss for miss in self.misses if miss.reason != "never computed"]
        first = dict.fromkeys(explained[:MAX_SHOWN])
        for miss in first:
            shared = f" (in {miss.num_texts} texts)" if miss.num_texts > 1 else ""
            lines.append(
                f"  {named(miss.text_idx)}, segment {miss.segment_idx} {miss.segment}{shared}, {miss.num_missing} of "
                f"{miss.stop - miss.start} tokens: {miss.why}"
            )
        others = Counter(miss.reason for miss in self.misses if miss not in first)
        more = " more" if first else ""
        lines += [f"  {count:,}{more} segments: {_REASONS[reason]}" for reason, count in others.items()]
        return lines


def _bytes(num_bytes: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:.3g} {unit}"
    return f"{num_bytes} B"


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _cells(cells: Iterable[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in cells)
