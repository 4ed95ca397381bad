"""Explaining what an evaluation does, as a database's EXPLAIN does: what is held, what will be computed, and why.

Texts are looked up (lookup.py) and planned in a forest of their own, so that nothing is forwarded or dropped for it.
With `analyze=True` they are evaluated then, and what was done stands beside what was expected.
"""

from __future__ import annotations

import html
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from backprompt._visible import visible
from backprompt.arguments import as_bool
from backprompt.bound import lm_of
from backprompt.errors import MixedModelsError
from backprompt.evaluator import Evaluator
from backprompt.lookup import where
from backprompt.missing import Miss, Reason, misses, shown_segment
from backprompt.radix import common_length
from backprompt.text import Text
from backprompt.texts import as_texts
from backprompt.token_graph import TokenGraph, TokenIds, flat

if TYPE_CHECKING:
    from backprompt.extents import Extent
    from backprompt.lm import LM
    from backprompt.stats import Stats

MAX_SHOWN = 12
"""How many missing segments the printed account names."""

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
    """Where the beginning that all texts have in common ends.

    Attributes:
        text_idx: the text that parts from the first one there.
        segment_idx, segment: the segment of it that the token belongs to; its last one where the text ends.
        token_idx: the first token that is not common, which is also how many are.
        cause: "token": the tokens differ. "join": they differ though both texts have the same segments up to there:
            what follows in one of them changed its tokens. "end": one of the two texts ends.

    """

    text_idx: int
    segment_idx: int
    segment: str
    token_idx: int
    cause: Literal["token", "join", "end"]


@dataclass(frozen=True)
class Actual:
    """What evaluating the texts did: see `Stats`, whose names these are."""

    tokens_computed: int
    tokens_recomputed: int
    tokens_loaded: int
    tokens_fetched: int
    forward_passes: int
    seconds: float
    bytes_held: int


@dataclass(frozen=True)
class Explanation:
    """What evaluating texts takes; `str()` is a table, in notebooks it shows itself, and `rich.print` takes it, too.

    Attributes:
        num_texts: how many texts.
        num_groups: of these, how many have groups or frozen segments, which no plain call computes.
        tokens_requested: tokens in all of them: what plain calls, one a text, would forward.
        tokens_distinct: tokens with all that stands before them, each once.
        tokens_shared: how many fewer these are than those in all texts, special tokens at the beginning left out.
        tokens_in_memory: of the distinct ones, those whose hidden states are held on the device,
        tokens_in_host: in the second pool,
        tokens_on_disk: or are in the store, as its index says.
        tokens_to_compute: to be forwarded. Where keys and values were dropped, tokens whose states are held are among
            them.
        tokens_to_recompute: of these, how many were forwarded before.
        pass_tokens: how many tokens each packed pass forwards.
        bytes_needed: what all of the texts take in memory.
        bytes_held: what is held there now, of whatever texts.
        budget_bytes: the `LM`'s `memory_bytes`.
        seconds: expected, at the rate of this `LM` so far, its output head included; None before it has computed
            anything.
        seconds_saved: what the other `tokens_requested` would take at that rate.
        divergence: where the common beginning of the texts ends; None for a single text, for texts with groups, and
            where all are the same.
        misses: segments of which something is held nowhere, in the order of the texts.
        actual: what was done, with `analyze=True`.

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
        """How many packed passes are expected."""
        return len(self.pass_tokens)

    @property
    def times_fewer(self) -> float:
        """How many times fewer tokens are forwarded than by plain calls; infinite where none is."""
        return self.tokens_requested / self.tokens_to_compute if self.tokens_to_compute else math.inf

    @property
    def exceeds_budget(self) -> bool:
        """Whether the texts together take more memory than the `LM` may hold."""
        return self.bytes_needed > self.budget_bytes

    @property
    def sentences(self) -> list[str]:
        """What the numbers mean: whether sharing pays, where it stops, what does not fit."""
        return [*self._gain(), *self._warnings()]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as dicts, lists, strings and numbers, such as JSON takes."""
        return {
            **asdict(self),
            "pass_tokens": list(self.pass_tokens),
            "misses": [asdict(miss) for miss in self.misses],
            "forward_passes": self.forward_passes,
            "exceeds_budget": self.exceeds_budget,
            "sentences": self.sentences,
        }

    def __str__(self) -> str:
        rows = [("", "expected", "actual"), *self._rows()]
        columns = range(3 if self.actual is not None else 2)
        widths = [max(len(row[column]) for row in rows) for column in columns]
        lines = ["  ".join(_aligned(row[column], widths[column], column) for column in columns) for row in rows]
        return "\n".join(line.rstrip() for line in [*lines, "", *self._said()])

    def show(self) -> None:
        """Print it: as a table of rich where that is installed and the output is a terminal, else as plain text."""
        if sys.stdout.isatty() and find_spec("rich") is not None:
            from rich import print as print_rich

            print_rich(self)
        else:
            print(self)

    def __rich__(self) -> Any:
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
        return Group(table, *map(RichText, self._said()))

    def _repr_html_(self) -> str:
        head = ["", "expected", "actual"][: 2 if self.actual is None else 3]
        rows = "".join(f"<tr>{_cells(row[: len(head)], 'td')}</tr>" for row in self._rows())
        lines = "<br>".join(html.escape(line) for line in self._said())
        return f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{rows}</tbody></table><p>{lines}</p>"

    def _said(self) -> list[str]:
        """Return what is said below the table; it quotes texts, and what a store says of itself."""
        return [visible(line) for line in [*self.sentences, *self._missing_lines()]]

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return what each figure is, its expected and its actual value; "" for what there is none of."""
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
            ("bytes these texts take", _bytes(self.bytes_needed), ""),
            ("bytes held now", _bytes(self.bytes_held), _bytes(done.bytes_held) if done else ""),
            ("bytes allowed", _bytes(self.budget_bytes), ""),
            (
                "seconds",
                "unknown until something was computed" if self.seconds is None else f"{self.seconds:.3g}",
                f"{done.seconds:.3g}" if done else "",
            ),
        ]
        optional = {
            "  in host memory": self.tokens_in_host or (done and done.tokens_fetched),
            "  on disk": self.tokens_on_disk or (done and done.tokens_loaded),
            "  once more": self.tokens_to_recompute or (done and done.tokens_recomputed),
            "  tokens in each": self.forward_passes > 1,
        }
        return [row for row in rows if optional.get(row[0], True)]

    def _gain(self) -> Iterator[str]:
        plain, computed = self.tokens_requested, self.tokens_to_compute
        if self.num_texts > 1 and not self.tokens_shared:
            if self.tokens_distinct == plain:
                yield "Sharing saves nothing here: prompts differ from the first token."
            else:
                yield "Sharing saves only special tokens here: prompts differ from the first token behind them."
        saved = "" if self.seconds_saved is None else f", about {self.seconds_saved:.2g} s less"
        if not computed:
            calls = "Plain calls" if not self.num_groups else "One text after the other"
            yield f"Nothing is forwarded: all of it is there. {calls} would forward {plain:,} tokens{saved}."
        elif computed < plain:
            what = "one text" if self.num_texts == 1 else f"{self.num_texts:,} texts together"
            yield (
                f"Evaluating {what} forwards {computed:,} tokens instead of {plain:,}: {self.times_fewer:.1f} times "
                f"fewer{saved}."
            )
            num_held = self.tokens_distinct - computed
            if num_held:
                of = "All" if num_held == plain - computed else f"{num_held:,} of"
                yield f"{of} the {plain - computed:,} saved are held already."
        elif self.num_texts == 1 and not self.num_groups:
            yield f"One text of which nothing is held forwards {plain:,} tokens, as its plain call does."
        elif self.num_texts == 1:
            yield f"One text of which nothing is held forwards {plain:,} tokens, each of its branches once."
        if self.divergence is not None and self.tokens_shared:
            yield self._where_sharing_stops(self.divergence)

    def _where_sharing_stops(self, at: Divergence) -> str:
        common = f"All texts have their first {at.token_idx:,} tokens in common"
        common = common if at.token_idx else "No token is common to all texts"
        if at.cause == "end":
            return f"{common}: texts[0] or texts[{at.text_idx}] is no longer than that."
        because = ", because what follows in one of them changed the tokens at the join" if at.cause == "join" else ""
        return (
            f"{common}: texts[{at.text_idx}] parts from texts[0] at token {at.token_idx:,}, in segment "
            f"{at.segment_idx} ({at.segment}){because}."
        )

    def _warnings(self) -> Iterator[str]:
        if self.exceeds_budget:
            yield (
                f"Warning: these texts take {_bytes(self.bytes_needed)}, more than the budget of "
                f"{_bytes(self.budget_bytes)}; part of them will be dropped, and computed again when asked for. Give "
                "the LM more: LM(..., memory_bytes=...)."
            )

    def _missing_lines(self) -> list[str]:
        """Return a line for each of the first missing segments of which a reason is known, and counts of the others."""
        if not self.misses:
            return []
        tense = "was" if self.actual is not None else "is"
        lines = ["", f"What {tense} not there, and why:"]
        explained = [miss for miss in self.misses if miss.reason != "never computed"]
        named = dict.fromkeys(explained[:MAX_SHOWN])
        for miss in named:
            shared = f" (in {miss.num_texts} texts)" if miss.num_texts > 1 else ""
            lines.append(
                f"  texts[{miss.text_idx}], segment {miss.segment_idx} {miss.segment}{shared}, {miss.num_missing} of "
                f"{miss.stop - miss.start} tokens: {miss.why}"
            )
        unnamed = Counter(miss.reason for miss in self.misses if miss not in named)
        more = " more" if named else ""
        lines += [f"  {count:,}{more} segments: {_REASONS[reason]}" for reason, count in unnamed.items()]
        return lines


def explain(texts: Text | Iterable[Text], *, analyze: bool = False) -> Explanation:
    """Return what evaluating texts takes: what is held of them, and what is forwarded, in how many passes, and why.

    Nothing of the texts is forwarded, loaded or dropped. An `LM` that has not evaluated anything yet checks itself on
    12 tokens, as it would then, which also tells how many bytes a token takes. With a store its index is asked, and it
    is searched for what other models left there of what is missing.

    Args:
        texts: a text or several of one `LM`.
        analyze: evaluate them then, and add the actual figures.

    Raises:
        ValueError: there are no texts, or `analyze` is neither True nor False.
        TextTypeError, UnboundTextError: an element is not a text, or has no model.
        MixedModelsError: texts of two different `LM` objects.
        What `evaluate` raises for texts that cannot be evaluated, also without `analyze`.

    """
    as_bool(analyze, "analyze")
    listed = listed_texts(texts, "explain")
    lm = one_lm(listed)
    lm.check(listed)
    with lm.session.exclusive():
        explained = _expected(lm, lm.session.current(), listed)
        if not analyze:
            return explained
        before = lm.stats
        lm.evaluate(listed)
        return _with_actual(explained, lm.stats - before, lm.stats.bytes_held)


def listed_texts(texts: Text | Iterable[Text], what: str) -> list[Text]:
    """Return a text or several as a list; `what` takes them.

    Raises:
        ValueError: there are none.
        TextTypeError: it is a string, or nothing that one can go through.

    """
    listed = as_texts(texts, what)
    if not listed:
        raise ValueError(f"{what} needs at least one text.")
    return listed


def one_lm(texts: Sequence[Text]) -> LM:
    """Return the `LM` that all of these belong to.

    Raises:
        TextTypeError, UnboundTextError, MixedModelsError: one is not a text, has no `LM`, or another one.

    """
    for idx, text in enumerate(texts):
        if lm_of(text, idx) is not texts[0].lm:
            raise MixedModelsError(
                f"texts[{idx}], {text!r}, belongs to another LM than texts[0]. Ask about the texts of one LM at a time."
            )
    return lm_of(texts[0], 0)


def _expected(lm: LM, evaluator: Evaluator, texts: Sequence[Text]) -> Explanation:
    """Return what evaluating the texts would do; the lock must be held."""
    encoded = lm.session.encoder.encode(texts)
    extents = lm.session.encoder.extents(texts)
    sketch = evaluator.sketch(encoded)
    num_tokens = {"memory": 0, "host": 0, "disk": 0, "evicted": 0, "absent": 0}
    for span in sketch.forest.spans():
        num_tokens[where(span)] += len(span.token_ids)
    passes = sketch.passes(evaluator.max_tokens_per_forward)
    to_compute = [span for spans in passes for span in spans]
    num_to_compute = sum(len(span.token_ids) for span in to_compute)
    done = lm.stats
    seconds_a_token = done.seconds / done.tokens_computed if done.tokens_computed else None
    num_requested, num_distinct = sum(map(len, encoded)), sum(num_tokens.values())
    return Explanation(
        num_texts=len(texts),
        num_groups=sum(isinstance(token_ids, TokenGraph) for token_ids in encoded),
        tokens_requested=num_requested,
        tokens_distinct=num_distinct,
        tokens_shared=num_requested - num_distinct - _num_shared_special(encoded, extents),
        tokens_in_memory=num_tokens["memory"],
        tokens_in_host=num_tokens["host"],
        tokens_on_disk=num_tokens["disk"],
        tokens_to_compute=num_to_compute,
        tokens_to_recompute=sum(len(span.token_ids) for span in to_compute if span.was_computed),
        pass_tokens=tuple(sum(len(span.token_ids) for span in spans) for spans in passes),
        bytes_needed=num_distinct * evaluator.token_bytes,
        bytes_held=done.bytes_held,
        budget_bytes=evaluator.memory.max_bytes,
        seconds=None if seconds_a_token is None else seconds_a_token * num_to_compute,
        seconds_saved=None if seconds_a_token is None else seconds_a_token * (num_requested - num_to_compute),
        divergence=_divergence(encoded, extents),
        misses=tuple(misses(evaluator, encoded, extents)),
    )


def _num_shared_special(encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]) -> int:
    """Return how many special tokens at the beginning of texts are not forwarded because other texts have them."""
    beginnings = [
        flat(token_ids)[: own[0].num_special if own else len(token_ids)]
        for token_ids, own in zip(encoded, extents, strict=True)
    ]
    distinct = {ids[:stop] for ids in beginnings for stop in range(1, len(ids) + 1)}
    return sum(map(len, beginnings)) - len(distinct)


def _with_actual(explained: Explanation, done: Stats, bytes_held: int) -> Explanation:
    figures = {f.name: getattr(done, f.name) for f in fields(Actual) if f.name != "bytes_held"}
    return Explanation(
        **{f.name: getattr(explained, f.name) for f in fields(Explanation) if f.name != "actual"},
        actual=Actual(**figures, bytes_held=bytes_held),
    )


def _divergence(encoded: Sequence[TokenIds], extents: Sequence[Sequence[Extent]]) -> Divergence | None:
    if any(isinstance(token_ids, TokenGraph) for token_ids in encoded):
        return None
    first = flat(encoded[0])
    token_idx, text_idx = len(first), 0
    for idx, token_ids in enumerate(encoded):
        num_common = common_length(first[:token_idx], flat(token_ids), 0)
        is_longer = not text_idx and len(token_ids) > num_common  # than the first text, which is its beginning
        if num_common < token_idx or is_longer:
            token_idx, text_idx = num_common, idx
    if text_idx == 0:
        return None
    ours, others = extents[0], extents[text_idx]
    pairs = zip(ours, others, strict=False)
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0].segment == pair[1].segment, pairs))
    behind = [own[num_common] for own in (ours, others) if num_common < len(own)]
    cause: Literal["token", "join", "end"] = "token"
    if any(extent.start <= token_idx < extent.start + len(extent.replaced) for extent in behind):
        cause = "join"
    elif token_idx in (len(first), len(encoded[text_idx])):
        cause = "end"
    segment_idx = next((idx for idx, extent in enumerate(others) if token_idx < extent.stop), len(others) - 1)
    segment = others[segment_idx].segment if others else ""  # of special tokens only
    return Divergence(text_idx, max(0, segment_idx), shown_segment(segment), token_idx, cause)


# How it looks


def _bytes(num_bytes: int) -> str:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if num_bytes >= 1000**power:
            return f"{num_bytes / 1000**power:.3g} {unit}"
    return f"{num_bytes} B"


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _cells(cells: Iterable[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in cells)
