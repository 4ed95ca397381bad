"""The suite's rows, and the tables that show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from benchmarks.contenders import BACKPROMPT, GENERATING_1, GENERATING_4, Contender
from benchmarks.measure import Spread
from benchmarks.plots import Look
from benchmarks.rows import Key
from benchmarks.suites.cappr.cases import Setting
from benchmarks.tables import Table, markdown, megabytes, with_range

CAPPR = Contender("CAPPr", Look("#009e73", "D"))
RELEASE = f"{CAPPR.name} 0.9.6"
CURVE = (BACKPROMPT, CAPPR, GENERATING_1, GENERATING_4)
"""The rivals that classify the inputs of the curve."""
NAMES = (BACKPROMPT, CAPPR)
"""The rivals that classify the inputs by names of one token."""


@dataclass(frozen=True)
class Tried(Setting):
    """CAPPr's seconds for the first prompts with a setting."""

    seconds: float


@dataclass(frozen=True)
class Line:
    """A workload, with CAPPr's best setting."""

    table: str
    workload: str
    classes: int
    texts: int
    tokens_in_strings: Annotated[int, Key("tokens in strings")]
    distinct_tokens: Annotated[int, Key("distinct tokens")]
    computed: int
    seconds: dict[str, Spread]  # by contender
    times_faster: Annotated[dict[str, Spread], Key("times faster")]  # than each rival
    setting: Setting
    tried: list[Tried]
    prompts_tried: Annotated[int, Key("prompts tried")]
    gap: float


@dataclass(frozen=True)
class Peak:
    """Bytes by which a process grows at most, None where the system does not tell, and the seconds of another run."""

    peak: int | None
    seconds: float


@dataclass(frozen=True)
class CapprPeak(Setting):
    """The same of CAPPr with a setting."""

    peak: int | None
    seconds: float


@dataclass(frozen=True)
class Memory:
    """One long prompt and many classes."""

    prompt_tokens: Annotated[int, Key("prompt tokens")]
    completion_tokens: Annotated[int, Key("completion tokens")]
    distinct_tokens: Annotated[int, Key("distinct tokens")]
    classes: int
    held: int  # bytes, by backprompt, when it is done
    bytes_a_token: Annotated[int, Key("bytes a token")]
    backprompt: Peak
    cappr: Annotated[list[CapprPeak], Key(CAPPR.name)]


@dataclass(frozen=True)
class Rows:
    """All of it, with the versions and the threads of CAPPr's process."""

    versions: dict[str, str]
    threads: int
    lines: list[Line]
    memory: Memory

    def of(self, table: str) -> list[Line]:
        """The lines of the cases of that table, in the order of the cases."""
        return [line for line in self.lines if line.table == table]


def tables_of(rows: Rows) -> list[Table]:
    """The first one is the README's."""
    five, curve, names = (rows.of(table) for table in ("five", "curve", "names"))
    return [
        Table("cappr", _short_table(five)),
        Table("table cappr", _full_table(five + curve + names)),
        Table("table curve", _curve_table(curve, names)),
        Table("table settings", _settings_table(rows.lines)),
        Table("table memory", f"{_memory_table(rows.memory)}\n\n{_held(rows.memory)}"),
    ]


def _short_table(lines: list[Line]) -> str:
    return markdown(
        ["seconds", BACKPROMPT.name, RELEASE, "times faster (lowest to highest)"],
        [[line.workload, *_medians(line, NAMES), with_range(line.times_faster[CAPPR.name], 1)] for line in lines],
    )


def _full_table(lines: list[Line]) -> str:
    headings = [
        "seconds",
        "tokens in all strings",
        "distinct",
        "computed",
        BACKPROMPT.name,
        RELEASE,
        "times faster",
        "largest gap, nats",
        "CAPPr's setting",
    ]
    rows = [
        [
            line.workload,
            *(f"{num_tokens:,}" for num_tokens in (line.tokens_in_strings, line.distinct_tokens, line.computed)),
            *(with_range(line.seconds[contender.name]) for contender in NAMES),
            with_range(line.times_faster[CAPPR.name], 1),
            f"{line.gap:.1g}",
            _in_words(line.setting),
        ]
        for line in lines
    ]
    return markdown(headings, rows)


def _curve_table(curve: list[Line], names: list[Line]) -> str:
    headings = [
        "seconds; classes",
        *(contender.name for contender in CURVE),
        *(f"{contender.name}, names of one token" for contender in NAMES),
    ]
    rows = [
        [str(line.classes), *_medians(line, CURVE), *_medians(one_token, NAMES)]
        for line, one_token in zip(curve, names, strict=True)
    ]
    return markdown(headings, rows)


def _settings_table(lines: list[Line]) -> str:
    return markdown(
        ["workload", "prompts tried", "seconds by setting, best first"],
        [[line.workload, str(line.prompts_tried), _best_first(line.tried)] for line in lines],
    )


def _best_first(tried: list[Tried]) -> str:
    best_first = sorted(tried, key=lambda setting: setting.seconds)
    return "; ".join(f"{setting.seconds:.2f}: {_in_words(setting)}" for setting in best_first)


def _memory_table(memory: Memory) -> str:
    peaks: list[tuple[str, Peak | CapprPeak]] = [(BACKPROMPT.name, memory.backprompt)]
    peaks += [(f"{RELEASE}, {_in_words(peak)}", peak) for peak in memory.cappr]
    return markdown(
        [f"{memory.prompt_tokens:,} tokens x {memory.classes} classes", "peak MB", "seconds"],
        [[label, megabytes(peak.peak), f"{peak.seconds:.1f}"] for label, peak in peaks],
    )


def _held(memory: Memory) -> str:
    repeated = memory.prompt_tokens * memory.classes + memory.completion_tokens
    return (
        f"backprompt then holds {memory.held / 1e6:,.1f} MB: {memory.held / memory.bytes_a_token:,.0f} tokens of "
        f"{memory.bytes_a_token:,} bytes, where the strings have {memory.distinct_tokens:,} distinct ones. The prompt "
        f"repeated for each class would be {repeated:,} tokens, {repeated * memory.bytes_a_token / 1e6:,.0f} MB."
    )


def _medians(line: Line, contenders: tuple[Contender, ...]) -> list[str]:
    return [f"{line.seconds[contender.name].median:.1f}" for contender in contenders]


def _in_words(setting: Setting) -> str:
    completions = setting.batch_size_completions or "all"
    cached = "cached, " if setting.cached else ""
    return f"{cached}{setting.batch_size} prompts, {completions} completions"
