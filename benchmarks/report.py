"""Tables and plots from `results.json`. README tables stand between markers and are rewritten in place."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

Line = dict[str, Any]

RIVAL_HEADINGS = {
    "plain padded": "plain padded",
    "cache recipe (deepcopy)": "cache recipe",
    "CAPPr's way": "CAPPr's way",
    "original toy": "original toy",
    "generating 1 token": "generating 1 token",
    "generating 4 tokens": "generating 4 tokens",
}


CURVE_RIVALS = ("CAPPr", "generating 1 token", "generating 4 tokens")


def table(lines: list[Line]) -> str:
    """All measured columns, a Markdown row a workload."""
    rivals = [name for name in RIVAL_HEADINGS if any(name in line["seconds"] for line in lines)]
    headings = [
        "workload",
        "tokens in all strings",
        "computed",
        "seconds (lowest to highest)",
        "control",
        "of the matmul limit",
        "of the dense forward",
        *(RIVAL_HEADINGS[name] for name in rivals),
        "peak MB",
        *(f"{RIVAL_HEADINGS[name]}, MB" for name in rivals),
    ]
    rows = []
    for line in lines:
        ours, seconds = line["seconds"]["backprompt"], line["seconds"]
        rows.append(
            [
                line["workload"],
                f"{line['tokens_in_strings']:,}",
                f"{line['tokens_computed']:,}",
                f"{ours['median']:.2f} ({ours['lowest']:.2f} to {ours['highest']:.2f})",
                f"{seconds['control']['median']:.2f}",
                _spread(line["fraction_of_matmul_limit"]),
                _spread(line["fraction_of_dense_forward"]),
                *(_seconds(line, name) for name in rivals),
                _megabytes(line, "backprompt"),
                *(_megabytes(line, name) for name in rivals),
            ]
        )
    return _markdown(headings, rows)


def summary(lines: list[Line]) -> str:
    """What the README shows: seconds, and how many times faster than each rival."""
    rivals = ("plain padded", "cache recipe (deepcopy)", "CAPPr's way", "original toy")
    headings = [
        "seconds",
        "tokens in all strings",
        "distinct",
        "backprompt",
        *(RIVAL_HEADINGS[name] for name in rivals),
    ]
    rows = []
    for line in lines:
        ours = line["seconds"]["backprompt"]["median"]
        cells = []
        for name in rivals:
            cells.append(f"{_seconds(line, name)} ({_times(line, name)})" if name in line["seconds"] else "")
        rows.append(
            [line["workload"], f"{line['tokens_in_strings']:,}", f"{line['tokens_computed']:,}", f"{ours:.1f}", *cells]
        )
    return _markdown(headings, rows)


def again(line: Line) -> str:
    """What evaluating cached texts costs."""
    seconds, num_texts = line["seconds_to_evaluate_again"], line["num_texts"]
    return (
        f"Evaluating {num_texts:,} texts that are cached takes {seconds:.3f} s, {1e6 * seconds / num_texts:.1f} "
        "microseconds a text (the best of five)."
    )


def store_tables(measured: dict[str, Any]) -> dict[str, str]:
    """The tables of the suite "store"."""
    return {
        **_fresh_process_tables(measured["fresh process"]),
        **_entries_tables(measured),
        "table budget": _budget_table(measured["budget"]),
    }


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:,.0f}" if value >= 0.1 else f"{1e3 * value:.3g}"


def _fresh_process_tables(fresh: dict[str, Any]) -> dict[str, str]:
    seconds, faster, num_bytes = fresh["seconds"], fresh["times faster"], fresh["bytes"]
    headings = ["milliseconds", "computed", "read, warm page cache", "times faster", "read, cold", "times faster"]
    names = {
        "prompt": f"`.logits` of the stored prompt of {fresh['tokens']:,} tokens",
        "child": "of a child, one token longer",
    }
    rows = [
        [
            label,
            _milliseconds(seconds[f"{name}, computed"]["median"]),
            *(
                cell
                for state in ("warm", "cold")
                for cell in (
                    _milliseconds(seconds[f"{name}, {state}"]["median"]),
                    f"{faster[f'{name}, {state}']['median']:.0f} ({faster[f'{name}, {state}']['lowest']:.0f} to "
                    f"{faster[f'{name}, {state}']['highest']:.0f})",
                )
            ),
        ]
        for name, label in names.items()
    ]
    tables = {"table fresh": _markdown(headings, rows)}
    tables["table reading"] = _markdown(
        [f"the entry's {num_bytes / 1e6:.1f} MB", "milliseconds", "MB/s"],
        [
            [label, _milliseconds(value), f"{num_bytes / value / 1e6:,.0f}"]
            for label, value in (
                ("`store.get`: read and checked", fresh["entry"]["read and checked"]),
                ("`Path.read_bytes`", fresh["entry"]["bytes only"]),
                ("`cat`, warm", seconds["cat, warm"]["median"]),
                ("`cat`, cold", seconds["cat, cold"]["median"]),
            )
        ],
    )
    tables["table once"] = _markdown(
        ["once a process, milliseconds", ""],
        [
            ["fingerprint of the weights, first process", _milliseconds(fresh["first fingerprint"])],
            ["fingerprint of the weights, other processes", _milliseconds(fresh["later fingerprint"])],
            ["computing the prompt, no store", _milliseconds(seconds["computed"]["median"])],
            ["computing and storing it", _milliseconds(seconds["computed and stored"]["median"])],
        ],
    )
    return tables


def _entries_tables(measured: dict[str, Any]) -> dict[str, str]:
    many, tables = measured["many entries"], {}
    tables["table runs"] = _markdown(
        ["tokens in a run", "computing, in company, ms", "writing, ms", "reading, ms"],
        [
            [str(line["tokens"]), *(_milliseconds(line[name]) for name in ("computing", "writing", "reading"))]
            for line in measured["runs"]
        ],
    )
    tables["table precision"] = _markdown(
        ["stored as", "bytes a token", "relative error", "largest change, nats", "divergence, nats"],
        [
            [
                line["dtype"],
                f"{line['bytes a token']:,.0f}",
                *(f"{line[name]:.2g}" for name in ("relative error", "largest change, nats", "divergence, nats")),
            ]
            for line in measured["precision"]
        ],
    )
    tables["table many"] = _markdown(
        [f"{many['entries']:,} entries, milliseconds", "median", "lowest", "highest"],
        [
            [name, *(_milliseconds(many[name][which]) for which in ("median", "lowest", "highest"))]
            for name in ("opening", "looking up", "reading one")
        ]
        + [[name, _milliseconds(many[name]), "", ""] for name in ("opening without its index", "writing one")]
        + [["memory grown, MB", f"{many['memory grown'] / 1e6:.1f}", "", ""]],
    )
    return tables


def _budget_table(budget: dict[str, Any]) -> str:
    return _markdown(
        [
            f"a forest of {budget['bytes'] / 1e6:,.0f} MB",
            "seconds",
            "times as long",
            "computed",
            "recomputed",
            "held, MB",
            "at most, MB",
            "once more, reversed, s",
            "computed",
        ],
        [
            [
                name,
                f"{line['seconds']['median']:.1f}",
                _spread(line["times as long"]),
                f"{line['computed']:,}",
                f"{line['recomputed']:,}",
                f"{line['held'] / 1e6:,.0f}",
                f"{line['peak'] / 1e6:,.0f}",
                f"{line['again']:.1f}",
                f"{line['computed again']:,}",
            ]
            for name, line in budget["lines"].items()
        ],
    )


def harness_table(lines: list[Line]) -> str:
    """The table of the suite "lm-eval"."""
    headings = [
        "8 shots",
        "requests",
        "tokens in all of them",
        "tokens, `hf`",
        "tokens, `backprompt`",
        "seconds, `hf` (batch size)",
        "seconds, `backprompt` (lowest to highest)",
        "times faster",
    ]
    rows = []
    for line in lines:
        ours, hf = line["seconds"]["backprompt"], line["seconds"]["hf"]
        rows.append(
            [
                f"{line['questions']} questions, {line['task']}",
                f"{line['requests']:,}",
                f"{line['tokens in all requests']:,}",
                f"{line['tokens']['hf']:,}",
                f"{line['tokens']['backprompt']:,}",
                f"{hf:.1f} ({line['batch size']})",
                f"{ours['median']:.1f} ({ours['lowest']:.1f} to {ours['highest']:.1f})",
                f"{hf / ours['median']:.0f}",
            ]
        )
    return _markdown(headings, rows)


def cappr_tables(measured: dict[str, Any]) -> dict[str, str]:
    """The tables of the suite "cappr"; the first one is the README's."""
    five = [line for line in measured["lines"] if line["table"] == "five"]
    curve = [line for line in measured["lines"] if line["table"] == "curve"]
    names = [line for line in measured["lines"] if line["table"] == "names"]
    memory = measured["memory"]
    return {
        "cappr": _markdown(
            ["seconds", "backprompt", "CAPPr 0.9.6", "times faster (lowest to highest)"],
            [
                [
                    line["workload"],
                    *(f"{line['seconds'][name]['median']:.1f}" for name in ("backprompt", "CAPPr")),
                    _spread_of_one_digit(line["times faster"]["CAPPr"]),
                ]
                for line in five
            ],
        ),
        "table cappr": _markdown(
            [
                "seconds",
                "tokens in all strings",
                "distinct",
                "computed",
                "backprompt",
                "CAPPr 0.9.6",
                "times faster",
                "largest gap, nats",
                "CAPPr's setting",
            ],
            [
                [
                    line["workload"],
                    *(f"{line[name]:,}" for name in ("tokens in strings", "distinct tokens", "computed")),
                    *(_spread(line["seconds"][name]) for name in ("backprompt", "CAPPr")),
                    _spread_of_one_digit(line["times faster"]["CAPPr"]),
                    f"{line['gap']:.1g}",
                    _setting(line["setting"]),
                ]
                for line in five + curve + names
            ],
        ),
        "table curve": _markdown(
            [
                "seconds; classes",
                *("backprompt", *CURVE_RIVALS),
                *("backprompt, names of one token", "CAPPr, names of one token"),
            ],
            [
                [
                    str(line["classes"]),
                    *(f"{line['seconds'][name]['median']:.1f}" for name in ("backprompt", *CURVE_RIVALS)),
                    *(f"{one_token['seconds'][name]['median']:.1f}" for name in ("backprompt", "CAPPr")),
                ]
                for line, one_token in zip(curve, names, strict=True)
            ],
        ),
        "table settings": _markdown(
            ["workload", "prompts tried", "seconds by setting, best first"],
            [
                [
                    line["workload"],
                    str(line["prompts tried"]),
                    "; ".join(
                        f"{tried['seconds']:.2f}: {_setting(tried)}"
                        for tried in sorted(line["tried"], key=lambda tried: tried["seconds"])
                    ),
                ]
                for line in measured["lines"]
            ],
        ),
        "table memory": _markdown(
            [f"{memory['prompt tokens']:,} tokens x {memory['classes']} classes", "peak MB", "seconds"],
            [
                [name, "" if line["peak"] is None else f"{line['peak'] / 1e6:,.0f}", f"{line['seconds']:.1f}"]
                for name, line in [("backprompt", memory["backprompt"])]
                + [(f"CAPPr 0.9.6, {_setting(line)}", line) for line in memory["CAPPr"]]
            ],
        )
        + "\n\n"
        + _held(memory),
    }


def _setting(setting: dict[str, Any]) -> str:
    completions = setting["batch_size_completions"] or "all"
    cached = "cached, " if setting["cached"] else ""
    return f"{cached}{setting['batch_size']} prompts, {completions} completions"


def _held(memory: dict[str, Any]) -> str:
    distinct, token_bytes = memory["distinct tokens"], memory["bytes a token"]
    repeated = memory["prompt tokens"] * memory["classes"] + memory["completion tokens"]
    return (
        f"backprompt then holds {memory['held'] / 1e6:,.1f} MB: {memory['held'] / token_bytes:,.0f} tokens of "
        f"{token_bytes:,} bytes, where the strings have {distinct:,} distinct ones. The prompt repeated for each class "
        f"would be {repeated:,} tokens, {repeated * token_bytes / 1e6:,.0f} MB."
    )


def generation_table(measured: dict[str, Any]) -> str:
    """The table of the suite "generation"."""
    ways = ["backprompt", "backprompt, packed weights"]
    rivals = ["model.generate", *(["vLLM"] if "vLLM" in measured["lines"][0]["seconds"] else [])]
    headings = [
        "32 new tokens each, behind 200 tokens",
        "tokens",
        "seconds",
        *(f"times faster than {_code(rival)}" for rival in rivals),
        "of the matmul limit",
    ]
    rows = []
    for line in measured["lines"]:
        prompts = f"{line['prompts']} prompt{'s' if line['prompts'] > 1 else ''}"
        for way in ways:
            faster = line[f"{way}, times faster"]
            rows.append(
                [
                    f"{prompts}, {way}",
                    f"{line['tokens']['backprompt']:,}",
                    _spread(line["seconds"][way]),
                    *(_spread_of_one_digit(faster[rival]) for rival in rivals),
                    _spread(faster[f"matrix products of {way}"]),
                ]
            )
        for rival in rivals:
            tokens = line["tokens"].get(rival)
            seconds = _spread(line["seconds"][rival])
            rows.append(
                [f"{prompts}, {_code(rival)}", f"{tokens:,}" if tokens else "", seconds, *("" for _ in rivals), ""]
            )
    samples = measured["samples"]
    return _markdown(headings, rows) + (
        f"\n\nThe packed copy of the weights takes {measured['packed weights'] / 1e6:,.0f} MB. "
        f"{samples['samples']} samples of one prompt of {samples['prompt tokens']} tokens, {samples['new tokens']} "
        f"tokens each, are held in {samples['held'] / 1e6:,.1f} MB; the prompt once and the new tokens take "
        f"{samples['prompt once and new tokens'] / 1e6:,.1f} MB."
    )


def _code(name: str) -> str:
    return f"`{name}`" if "." in name else name


def lookahead_table(measured: dict[str, Any]) -> str:
    """The table of the suite "lookahead"."""
    headings = ["task", "new tokens", "passes", "with look-ahead", "tokens", "with look-ahead", "seconds"]
    rows = [
        [
            line["task"],
            f"{line['new tokens']:,}",
            *(f"{line[way]['passes']:,}" for way in ("without", "with")),
            *(f"{line[way]['tokens']:,}" for way in ("without", "with")),
            *(_spread(line["seconds"][way]) for way in ("without", "with")),
            _spread_of_one_digit(line["times faster"]),
        ]
        for line in measured["lines"]
    ]
    return _markdown([*headings, "with look-ahead", "times faster"], rows)


def search_table(lines: list[Line]) -> str:
    """The table of the suite "search"."""
    headings = [
        "classes",
        "score",
        "tokens, exhaustive",
        "tokens, best-first",
        "times fewer",
        "seconds, exhaustive",
        "seconds, best-first",
        "times faster",
        "passes",
    ]
    rows = [
        [
            f"{line['classes']:,}",
            line["aggregate"],
            f"{line['exhaustive, tokens']:,}",
            f"{line['best-first, tokens']:,}",
            f"{line['exhaustive, tokens'] / line['best-first, tokens']:.1f}",
            *(f"{line['seconds'][name]['median']:.2f}" for name in ("exhaustive", "best-first")),
            _spread_of_one_digit(line["times faster"]),
            f"{line['exhaustive, passes']}, {line['best-first, passes']}",
        ]
        for line in lines
    ]
    return _markdown(headings, rows)


def write_tables(results: dict[str, Any]) -> None:
    """Rewrite what stands between `<!-- NAME -->` and `<!-- /NAME -->` in the README files."""
    tables = tables_of(results)
    for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


def tables_of(results: dict[str, Any]) -> dict[str, str]:
    """Every table by its marker's name."""
    suites: dict[str, list[Line]] = {}
    for line in results["lines"]:
        suites.setdefault(line["suite"], []).append(line)
    tables = {f"table {name}": table(lines) for name, lines in suites.items()}
    tables["summary"] = summary(suites.get("five", []) + suites.get("others", []))
    leaves = suites.get("leaves", [])
    tables["again"] = "\n".join(map(again, leaves))
    if "store" in results:
        tables |= store_tables(results["store"])
    if "lm-eval" in results:
        tables["table harness"] = harness_table(results["lm-eval"])
    if "cappr" in results:
        tables |= cappr_tables(results["cappr"])
    if "search" in results:
        tables["table search"] = search_table(results["search"]["lines"])
    if "generation" in results:
        tables["table generation"] = generation_table(results["generation"])
    if "lookahead" in results:
        tables["table lookahead"] = lookahead_table(results["lookahead"])
    machines = dict.fromkeys(
        ", ".join(_fact(key, value) for key, value in machine.items()) for machine in results["machines"].values()
    )
    tables["machine"] = "\n\n".join(machines)
    return tables


def _fact(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        return f"{name} {value}"
    return f"{name} (" + ", ".join(_fact(key, inner) for key, inner in value.items()) + ")"


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with every marked part replaced; one whose suite was not measured stays as it is."""

    def replace(match: re.Match[str]) -> str:
        if match[1] not in tables:
            return match[0]
        return f"<!-- {match[1]} -->\n{tables[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ((?:table )?\w+) -->\n.*?<!-- /\1 -->", replace, page, flags=re.DOTALL)


# Plots


def draw_plots(results: dict[str, Any], folder: Path) -> None:
    """Write each plot for light and for dark pages."""
    import matplotlib as mpl  # only plots need it
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "backprompt"  # the same numbers give the same file
    folder.mkdir(exist_ok=True)
    for theme, ink in (("light", "#24292f"), ("dark", "#e6edf3")):
        for name, (draw, lines) in _plots_of(results).items():
            figure = Figure(figsize=(8.2, 3.6), layout="constrained")
            figure.patch.set_alpha(0)
            axes = figure.subplots()
            axes.patch.set_alpha(0)
            draw(axes, lines)
            _paint(axes, ink)
            figure.savefig(folder / f"{name}-{theme}.svg", metadata={"Date": None})


def _plots_of(results: dict[str, Any]) -> dict[str, tuple[Callable[[Any, list[Line]], None], list[Line]]]:
    """How to draw each plot whose suite was measured, and from what."""
    lines = results["lines"]
    plots = {name: (draw, lines) for name, (suite, draw) in PLOTS.items() if _of(lines, suite)}
    if "cappr" in results:
        plots["classes"] = _cappr_curve, results["cappr"]["lines"]
    if "search" in results:
        plots["search"] = _search_curve, results["search"]["lines"]
    return plots


@dataclass(frozen=True)
class _Look:
    """How a contender is drawn: told by its marker or hatching without colour vision, too."""

    colour: str
    marker: str
    hatch: str = ""
    style: str = "-"


OURS = _Look("#d55e00", "o")
LOOKS = {  # colours of Okabe and Ito, "Color Universal Design", which are told apart without colour vision
    "backprompt": OURS,
    "plain padded": _Look("#8c8c8c", "s"),
    "cache recipe (deepcopy)": _Look("#56b4e9", "^", "////"),
    "CAPPr's way": _Look("#009e73", "D", "...."),
    "CAPPr": _Look("#009e73", "D"),
    "original toy": _Look("#cc79a7", "v", "xxxx"),
    "generating 1 token": _Look("#56b4e9", "^"),
    "generating 4 tokens": _Look("#cc79a7", "v"),
    "dense forward": _Look("#0072b2", "x", style="--"),
}


def _of(lines: list[Line], *suites: str) -> list[Line]:
    return [line for line in lines if line["suite"] in suites]


def _bars(axes: Any, lines: list[Line]) -> None:
    chosen = (_of(lines, "five") + _of(lines, "others"))[::-1]
    names = ("backprompt", "plain padded", "cache recipe (deepcopy)", "CAPPr's way", "original toy")
    height = 0.84 / len(names)
    for name_idx, name in enumerate(names):
        seconds = [line["seconds"].get(name, {}).get("median") for line in chosen]
        places = [idx + 0.42 - (name_idx + 0.5) * height for idx, s in enumerate(seconds) if s is not None]
        look = LOOKS[name]
        widths = [s for s in seconds if s is not None]
        axes.barh(
            places, widths, height, label=name, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0
        )
    axes.set_yticks(range(len(chosen)), [line["workload"] for line in chosen], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds, log scale; shorter is better")
    _legend(axes)
    axes.figure.set_size_inches(8.2, 4.6)


def _curves(axes: Any, lines: list[Line], xs: list[float], names: tuple[str, ...]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    for name in names:
        points = [
            (x, line["seconds"][name]["median"]) for x, line in zip(xs, lines, strict=True) if name in line["seconds"]
        ]
        look = LOOKS[name]
        axes.plot(
            *zip(*points, strict=True), look.style, marker=look.marker, markersize=5, label=name, color=look.colour
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("seconds, log scale")
    _legend(axes)


def _cappr_curve(axes: Any, lines: list[Line]) -> None:
    chosen = [line for line in lines if line["table"] == "curve"]
    xs = [line["classes"] for line in chosen]
    _curves(axes, chosen, xs, ("backprompt", *CURVE_RIVALS))
    names = [line for line in lines if line["table"] == "names"]
    for name in ("backprompt", "CAPPr"):
        seconds = [line["seconds"][name]["median"] for line in names]
        look = LOOKS[name]
        label = f"{name}, names of one token"
        axes.plot(
            xs, seconds, ":", marker=look.marker, markersize=5, markerfacecolor="none", label=label, color=look.colour
        )
    _legend(axes)
    _label_classes(axes, xs)


def _search_curve(axes: Any, lines: list[Line]) -> None:
    for search, look in (("exhaustive", LOOKS["plain padded"]), ("best-first", OURS)):
        for aggregate, style in (("sum", "-"), ("mean", "--")):
            chosen = [line for line in lines if line["aggregate"] == aggregate]
            seconds = [line["seconds"][search]["median"] for line in chosen]
            label = f"{search}, by {aggregate}"
            classes = [line["classes"] for line in chosen]
            axes.plot(classes, seconds, style, marker=look.marker, markersize=5, label=label, color=look.colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(f"number of classes, log scale; {lines[0]['prompts']} prompts")
    axes.set_ylabel("seconds, log scale")
    _legend(axes)


def _label_classes(axes: Any, xs: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:.0f}" for x in xs])
    axes.set_xlabel("number of classes; 96 inputs")


def _prefix(axes: Any, lines: list[Line]) -> None:
    chosen = _of(lines, "prefix")
    xs = [line["tokens_shared"] for line in chosen]
    _curves(axes, chosen, xs, ("backprompt", "plain padded", "cache recipe (deepcopy)"))
    axes.set_xlabel("tokens that all 8 prompts share; about 100 of their own each")


def _depth(axes: Any, lines: list[Line]) -> None:
    chosen = _of(lines, "depth")
    xs = [line["num_texts"] for line in chosen]
    _curves(axes, chosen, xs, ("backprompt", "plain padded", "dense forward"))
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:.0f}" for x in xs])
    axes.set_xlabel("depth of the tree: a chain of that many parts, a leaf hanging from each; about equal tokens")


PLOTS = {
    "workloads": ("five", _bars),
    "prefix": ("prefix", _prefix),
    "depth": ("depth", _depth),
}


def _legend(axes: Any) -> None:
    """Beside the plot, where it covers nothing."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _paint(axes: Any, ink: str) -> None:
    axes.tick_params(colors=ink, which="both", labelsize=8)
    axes.xaxis.label.set_color(ink)
    axes.yaxis.label.set_color(ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    for text in axes.get_legend().get_texts():
        text.set_color(ink)


# Cells


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, ["---"] * len(headings), *rows])


def _spread(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['lowest']:.2f} to {spread['highest']:.2f})"


def _spread_of_one_digit(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['lowest']:.1f} to {spread['highest']:.1f})"


def _seconds(line: Line, name: str) -> str:
    spread = line["seconds"].get(name)
    if spread is None:
        return ""
    return ("~" if name in line["sampled"] else "") + f"{spread['median']:.1f}"


def _times(line: Line, name: str) -> str:
    """How many times as long a rival takes: the median over the rounds in which it ran, two digits."""
    pairs = zip(line["seconds"][name]["values"], line["seconds"]["backprompt"]["values"])  # noqa: B905  # it ran in fewer
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{float(f'{ratio:.1e}'):.0f}x"


def _megabytes(line: Line, name: str) -> str:
    num_bytes = line["peak_bytes"].get(name)
    return "" if num_bytes is None else f"{num_bytes / 1e6:,.0f}"
