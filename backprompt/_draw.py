"""Pictures of the graph of texts: what follows what, and what of it is computed, reused, evicted or missing.

    texts --to_networkx--> graph --_Folding--> boxes --_Picture--> DOT --Graphviz--> SVG, PNG, PDF

A status is told by colour, by border and by words, so it reads without colour vision. Boxes have grounds of their own;
their borders, and what stands outside of them, are of colours that show on white and on black.
"""

from __future__ import annotations

import html
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphviz
import networkx as nx

from backprompt._graph import STATUSES, Status, graph_of
from backprompt._visible import LINE_WIDTH, shortened, visible, wrapped
from backprompt.arguments import as_int
from backprompt.errors import DrawingError
from backprompt.forking import ForkableLock, watch_store
from backprompt.text import Text
from backprompt.texts import as_texts

MAX_IN_A_ROW = 4
"""Of more segments than this that only follow each other, all but the first become one box."""

_TOOLTIP_CHARACTERS = 600
_GREY = "#7d8590"
_INK = "#1f2328"
_MONOSPACE = "DejaVu Sans Mono,Menlo,Consolas,Courier New,monospace"
_SANS = "Helvetica,Arial,DejaVu Sans,sans-serif"


@dataclass(frozen=True)
class _Look:
    """How a status is drawn; `style`, `width` and `lines` tell its border from others without colour."""

    fill: str
    border: str
    style: str = "solid"
    width: float = 1.0
    lines: int = 1


_LOOKS: Mapping[Status, _Look] = {
    "computed now": _Look("#ffd8a8", "#d9480f", width=2.6),
    "reused from memory": _Look("#cfe3fb", "#2b7bd0"),
    "from disk": _Look("#d3f0dd", "#1f8f56", width=1.3, lines=2),
    "evicted": _Look("#f0d5ea", "#b5489c", style="dashed", width=2.0),
    "not evaluated": _Look("#f4f4f5", _GREY, style="dotted", width=2.8),
    "no model": _Look("#ffffff", _GREY),
}

_MEANINGS: Mapping[Status, str] = {
    "computed now": "computed now: by the latest evaluation",
    "reused from memory": "reused from memory: held since an earlier evaluation",
    "from disk": "from disk: read from the store, or there to be read",
    "evicted": "evicted: dropped over the memory budget, to be computed again",
    "not evaluated": "not evaluated: to be computed",
}


def draw(
    texts: Text | Iterable[Text],
    *,
    max_children: int = 6,
    max_characters: int = 56,
) -> Drawing:
    """Return a picture of texts: their segments as boxes, and what follows what. Nothing is computed.

        bp.draw(texts)                                 # in a notebook it shows itself
        bp.draw(texts).render("tree", format="svg")    # or png, pdf; needs no `dot` on the path

    A box has its string, shortened in the middle, its distinct tokens, their bytes, and what became of them: computed
    by the latest evaluation, reused from memory, read from disk, evicted, or not evaluated. The branches of a group
    stand side by side in a frame. A join at which tokens changed is marked.

    Args:
        texts: a text or several; texts without a model are drawn by their strings.
        max_children: of more texts, or groups, that follow one segment, the last ones become one box ("... 69 more").
        max_characters: of longer strings the middle is left out.

    Returns:
        A `graphviz.Digraph`, to be rendered or changed further.

    Raises:
        ValueError: a number is too small.
        TextTypeError, JoinError, TokenizerError: see `to_networkx`.

    """
    max_children = as_int(max_children, "max_children", at_least=2)
    max_characters = as_int(max_characters, "max_characters", at_least=2)
    graph = graph_of(as_texts(texts, "draw"))
    return _Picture(graph, _Folding(graph, max_children), max_characters).drawn()


class Drawing(graphviz.Digraph):  # type: ignore[misc]  # graphviz has no types
    """A `graphviz.Digraph` that needs no `dot` on the path: it is laid out by the Graphviz that pygraphviz carries.

    It shows itself in notebooks. Where pygraphviz is not there, a `dot` on the path serves.
    """

    def pipe(
        self, format: str | None = None, *, engine: str | None = None, encoding: str | None = None, **options: Any
    ) -> bytes | str:
        """Return the picture as bytes, or with `encoding` as a string; see `graphviz.Digraph.pipe`.

        Raises:
            DrawingError: there is no such format, or nothing to lay it out with.

        """
        format, engine = format or self.format, engine or self.engine
        needs_dot = any(value for name, value in options.items() if name != "quiet")
        data = None if needs_dot else _laid_out(self.source, format, engine)
        if data is not None:
            return data if encoding is None else data.decode(encoding)
        if shutil.which("dot") is None:
            raise DrawingError(
                "Nothing is there to lay the picture out with: neither pygraphviz nor Graphviz's `dot`. "
                "Install one: pip install pygraphviz."
            )
        piped: bytes | str = super().pipe(format, engine=engine, encoding=encoding, **options)
        return piped

    def render(
        self,
        filename: str | os.PathLike[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        view: bool = False,
        cleanup: bool = False,
        format: str | None = None,
        *,
        outfile: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> str:
        """Write the picture to a file and return its path; see `graphviz.Digraph.render`.

        `.render("tree", format="svg")` writes the source to `tree` and the picture to `tree.svg`. A path that ends as a
        picture's does is the picture's own: `.render("tree.svg")` writes nothing else.

        Raises:
            DrawingError: there is no such format, or nothing to lay it out with.

        """
        path = Path(self.directory if directory is None else directory, outfile or filename or self.filename)
        suffix = path.suffix[1:].lower()
        is_picture = suffix in graphviz.FORMATS and format in (None, suffix) and suffix not in ("gv", "dot")
        format = format or (suffix if is_picture else self.format)
        picture = path if is_picture or outfile is not None else Path(f"{path}.{format}")
        data = self.pipe(format, **options)
        assert isinstance(data, bytes)
        picture.parent.mkdir(parents=True, exist_ok=True)
        if picture != path and not cleanup:
            path.write_text(self.source, encoding="utf-8")
        picture.write_bytes(data)
        if view:
            graphviz.view(str(picture))
        return str(picture)


_LAYOUT_LOCK = ForkableLock()
"""Graphviz keeps its state in globals."""
watch_store(_LAYOUT_LOCK)


def _laid_out(source: str, format: str, engine: str) -> bytes | None:
    """Return the picture of DOT source by the Graphviz that pygraphviz carries; None where there is none."""
    try:
        import pygraphviz
    except ImportError:
        return None
    with _LAYOUT_LOCK:
        try:
            data = pygraphviz.AGraph(string=source).draw(format=format, prog=engine)
        except (ValueError, TypeError) as error:  # a TypeError is what comes of an unknown format
            raise DrawingError(
                f"Graphviz cannot draw this as {format!r} with {engine!r}. Formats that it always has are "
                '"svg", "png" and "pdf".'
            ) from error
    return bytes(data)


# What is shown


@dataclass
class _Box:
    """A node of the picture: one of the graph's, or several in one."""

    nodes: list[int]
    title: str | None = None  # of several
    is_row: bool = False  # several that only follow each other


class _Folding:
    """Which nodes of a graph are drawn by themselves, and which become one box with others.

    Attributes:
        boxes: by name, in written order.
        edges: from box to box, and those of the graph that each stands for.
        of: the name of each node's box.

    """

    def __init__(self, graph: nx.DiGraph, max_children: int) -> None:
        self._graph = graph
        self._max_children = max_children
        self.boxes: dict[str, _Box] = {}
        self.of: dict[int, str] = {}
        folds = self._visible_and_folds()
        self._put_rows()
        for idx, first in enumerate(folds):
            self._put_fold(f"more{idx}", first)
        edges = sorted(graph.edges, key=lambda edge: [graph.nodes[node]["written_order"] for node in edge])
        self.edges: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for parent, node in edges:
            if self.of[parent] != self.of[node]:
                self.edges.setdefault((self.of[parent], self.of[node]), []).append((parent, node))

    def _visible_and_folds(self) -> list[list[int]]:
        """Give boxes to the nodes that are drawn by themselves; return the others that follow one of these directly.

        So many boxes follow one, however many texts there are: only the first segments and the first groups behind a
        node are drawn, and a group only where what it stands behind is drawn, and one of its branches.
        """
        ordered = sorted(self._graph, key=lambda node: self._graph.nodes[node]["written_order"])
        siblings: dict[tuple[int | None, bool], list[int]] = {}
        for node in ordered:
            siblings.setdefault((self._behind(node), self._is_junction(node)), []).append(node)
        kept: set[int] = set()
        for nodes in siblings.values():
            kept.update(nodes if len(nodes) <= self._max_children else nodes[: self._max_children - 1])
        for node in ordered:  # a topological order
            before = self._graph.pred[node]
            is_reached = not before or any(parent in self.of for parent in before)
            if node in kept and is_reached and self._is_drawn(self._behind(node)):
                self.of[node] = str(node)
                self.boxes[str(node)] = _Box([node])
        return [
            [node for node in nodes if node not in kept]
            for (behind, _), nodes in siblings.items()
            if self._is_drawn(behind)
        ]

    def _is_junction(self, node: int) -> bool:
        return bool(self._graph.nodes[node]["kind"] == "junction")

    def _behind(self, node: int) -> int | None:
        """Return what a segment, or the group that ends in a junction, stands behind."""
        if self._is_junction(node):
            behind: int | None = self._graph.nodes[node]["behind"]
            return behind
        return next(iter(self._graph.pred[node]), None)

    def _is_drawn(self, node: int | None) -> bool:
        return node is None or node in self.of

    def _put_rows(self) -> None:
        """Let a long row of segments be one box, but for the first."""
        for first in list(self.boxes):
            row = self._row_from(int(first)) if first in self.boxes else []
            if len(row) > MAX_IN_A_ROW:
                rest = row[1:]
                self.boxes[str(rest[0])] = _Box(rest, f"{len(rest)} more segments", is_row=True)
                self.of.update(dict.fromkeys(rest, str(rest[0])))
                for node in rest[1:]:
                    del self.boxes[str(node)]

    def _row_from(self, node: int) -> list[int]:
        """Return the row of nodes that only follow each other and begins with this one."""
        if any(self._continues(parent, node) for parent in self._graph.pred[node]):
            return []
        row = [node]
        while len(following := list(self._graph.succ[row[-1]])) == 1 and self._continues(row[-1], following[0]):
            row.append(following[0])
        return row

    def _continues(self, parent: int, node: int) -> bool:
        """Return whether a node is the only one behind another, and may stand in one box with it."""
        above, below = self._graph.nodes[parent], self._graph.nodes[node]
        return (
            len(self._graph.succ[parent]) == len(self._graph.pred[node]) == 1
            and "junction" not in (above["kind"], below["kind"])
            and not above["ends"]
        )

    def _put_fold(self, name: str, first: Sequence[int]) -> None:
        """Let what is left out be one box, with all that only follows it."""
        nodes = [node for node in first if node not in self.of]
        if not nodes:
            return
        title = _counted(len(nodes), "more group") if self._is_junction(nodes[0]) else f"{len(nodes)} more"
        self.of.update(dict.fromkeys(nodes, name))
        for node in nodes:
            following = [other for other in self._graph.succ[node] if other not in self.of]
            self.of.update(dict.fromkeys(following, name))
            nodes += following
        self.boxes[name] = _Box(nodes, title)


class _Picture:
    """Writes boxes as DOT."""

    def __init__(self, graph: nx.DiGraph, folding: _Folding, max_characters: int) -> None:
        self._graph = graph
        self._folding = folding
        self._max_characters = max_characters
        self._line_width = min(LINE_WIDTH, max(12, max_characters // 2))

    def drawn(self) -> Drawing:
        """Return the picture."""
        drawing = Drawing("texts", format="svg")
        drawing.attr(
            "graph",
            rankdir="LR",
            bgcolor="transparent",
            pad="0.1",
            nodesep="0.12",
            ranksep="0.5",
            ordering="out",
            label=self._legend(),
            labelloc="b",
            labeljust="l",
            fontname=_SANS,
            fontsize="11",
            fontcolor=_GREY,
            tooltip=" ",
        )
        drawing.attr("node", shape="box", style="rounded,filled", margin="0.14,0.07", fontname=_SANS, fontsize="11")
        drawing.attr("edge", tailport="e", headport="w")
        drawing.attr("edge", color=_GREY, arrowsize="0.6", fontname=_SANS, fontsize="11", fontcolor=_GREY, tooltip=" ")
        boxes = self._folding.boxes.values()
        frames = [frame for frame in _frames(self._graph) if any(frame.nodes.issuperset(box.nodes) for box in boxes)]
        self._put(drawing, None, frames)
        self._put_roots_in_order(drawing, set().union(*(frame.nodes for frame in frames)))
        for (parent, node), edges in self._folding.edges.items():
            drawing.edge(parent, node, **self._edge(edges))
        return drawing

    def _put_roots_in_order(self, drawing: graphviz.Digraph, framed: set[int]) -> None:
        boxes = self._folding.boxes
        following = {node for _, node in self._folding.edges}
        roots = [name for name in boxes if name not in following and not framed.intersection(boxes[name].nodes)]
        _put_in_order(drawing, roots)

    def _put(self, drawing: graphviz.Digraph, frame: _Frame | None, frames: Sequence[_Frame]) -> None:
        """Put the boxes that stand in a frame, and the frames within it."""
        inner = [other for other in frames if other.outer is frame]
        own = frame.nodes if frame is not None else set(self._graph)
        within = set().union(*(other.nodes for other in inner))
        boxes = {
            name: box
            for name, box in self._folding.boxes.items()
            if own.issuperset(box.nodes) and not within.issuperset(box.nodes)
        }
        for name, box in boxes.items():
            drawing.node(name, **self._node(box))
        if frame is not None:
            boxes_before = {parent for parent, box in self._folding.boxes.items() if own.issuperset(box.nodes)}
            following = {node for parent, node in self._folding.edges if parent in boxes_before}
            first = [name for name in boxes if name not in following]
            # From left to right Graphviz stands what is in a frame on its head. (Around frames in frames it follows
            # an order of its own; that of branches means nothing.)
            _put_in_order(drawing, first[::-1])
        for other in inner:
            label = "side by side: none sees the others" if other.num_branches > 1 else "sees nothing before it"
            with drawing.subgraph(name=f"cluster{min(other.junctions)}") as cluster:
                cluster.attr(label=label, color=_GREY, style="rounded,dashed", margin="10", labelloc="t")
                self._put(cluster, other, frames)

    def _node(self, box: _Box) -> dict[str, str]:
        if self._graph.nodes[box.nodes[0]]["kind"] == "junction" and box.title is None:
            data = self._graph.nodes[box.nodes[0]]
            ends = f"; {_ending(len(data['ends']))}" if data["ends"] else ""
            tooltip = f"The group ends: what follows sees all branches{ends}."
            return {
                "shape": "circle",
                "label": "",
                "width": "0.13",
                "color": _GREY,
                "fillcolor": _GREY,
                "tooltip": tooltip,
            }
        statuses = self._statuses(box)
        look = _LOOKS[max(statuses, key=lambda status: (statuses[status], -STATUSES.index(status)))]
        return {
            "label": self._label(box, statuses),
            "tooltip": _attribute(self._tooltip(box)),
            "fillcolor": look.fill,
            "color": look.border,
            "style": f"rounded,filled,{look.style}",
            "penwidth": str(look.width),
            "peripheries": str(look.lines),
            "fontcolor": _INK,
        }

    def _edge(self, edges: Sequence[tuple[int, int]]) -> dict[str, str]:
        data = [self._graph.edges[edge] for edge in edges]
        if any(edge["is_join_changed"] for edge in data):
            return {"style": "bold", "arrowhead": "diamond", "arrowsize": "0.9"}
        times = sum(edge["times"] for edge in data)
        return {"label": f"{times} times"} if len(edges) == 1 and times > 1 else {}

    def _statuses(self, box: _Box) -> Counter[Status]:
        """Count a box's tokens by status; of none, its one status counts 0."""
        counts: Counter[Status] = Counter()
        for node in box.nodes:
            counts.update(self._graph.nodes[node]["statuses"])
        if not counts:
            counts[next((s for n in box.nodes if (s := self._graph.nodes[n]["status"])), "not evaluated")] = 0
        return counts

    def _label(self, box: _Box, statuses: Counter[Status]) -> str:
        first = self._graph.nodes[box.nodes[0]]
        if box.title is not None:
            lines = [f'<FONT POINT-SIZE="13"><B>… {html.escape(box.title)}</B></FONT>']
        else:
            string = first["string"] if first["kind"] != "special tokens" else f"{first['string']} (special)"
            lines = [
                f'<FONT FACE="{_MONOSPACE}" POINT-SIZE="12">{_html(line)}</FONT>'
                for line in wrapped(f"“{visible(shortened(string, self._max_characters))}”", self._line_width)
            ]
        lines += [_html(line) for line in self._account(box)]
        has_model = "no model" not in statuses
        if has_model:
            lines.append(f"<I>{_html(_told(statuses))}</I>")
        return "<" + "".join(f'{line}<BR ALIGN="LEFT"/>' for line in lines) + ">"

    def _account(self, box: _Box) -> list[str]:
        data = [self._graph.nodes[node] for node in box.nodes]
        texts = sum(len(node["ends"]) for node in data)
        if data[0]["position"] is None:
            parts = []
        elif box.title is None and data[0]["num_own_tokens"] < data[0]["num_tokens"]:
            num_shared = data[0]["num_tokens"] - data[0]["num_own_tokens"]
            parts = [f"{_counted(data[0]['num_tokens'], 'token')}, {num_shared:,} shared"]
        else:
            parts = [_counted(sum(node["num_own_tokens"] for node in data), "token")]
        num_bytes = sum(node["num_bytes"] or 0 for node in data)
        if num_bytes:
            parts.append(_size(num_bytes))
        lines = [" · ".join(parts)] if parts else []
        has_following = any(self._graph.succ[node] for node in box.nodes)
        if box.title is not None and texts:
            lines.insert(0, _counted(texts, "text"))
        elif data[0]["num_texts"] > 1 and (box.title is None or box.is_row):
            lines.append(
                f"in {data[0]['num_texts']:,} texts" + (f"; {_ending(texts)}" if texts and has_following else "")
            )
        if num_changed := sum(node["is_join_changed"] for node in data):
            lines.append("≠ at its join" if box.title is None else f"≠ at {_counted(num_changed, 'join')}")
        if any(node["is_frozen"] for node in data):
            lines.append("frozen: sees nothing before it")
        return lines

    def _tooltip(self, box: _Box) -> str:
        strings = [
            visible(shortened(self._graph.nodes[node]["string"], _TOOLTIP_CHARACTERS)) for node in box.nodes[:20]
        ]
        return shortened(" | ".join(strings), _TOOLTIP_CHARACTERS) or " "

    def _legend(self) -> str:
        nodes = [data for _, data in self._graph.nodes(data=True)]
        if not nodes:
            return "<nothing to draw: no text has a segment>"
        found = {status for data in nodes for status in (data["statuses"] or [data["status"]])}
        statuses = [status for status in STATUSES if status in found]
        rows = [f'<TD COLSPAN="2" ALIGN="LEFT">{_html(self._summary(nodes))}</TD>']
        rows += [_swatch(status) + _legend_text(_MEANINGS[status]) for status in statuses if status in _MEANINGS]
        if any(data["is_join_changed"] for data in nodes):
            rows.append(
                "<TD>◆</TD>" + _legend_text("≠ tokens merged where the two meet; they are those of the whole string")
            )
        if any(data["kind"] == "junction" for data in nodes):
            rows.append("<TD>●</TD>" + _legend_text("a group ends: what follows sees all of its branches"))
        table = "".join(f"<TR>{row}</TR>" for row in rows)
        return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="1">{table}</TABLE>>'

    def _summary(self, nodes: Sequence[Mapping[str, Any]]) -> str:
        texts = _counted(self._graph.graph["num_texts"], "text")
        num_tokens = self._graph.graph["num_tokens"]
        if not num_tokens:
            return f"{texts}, {_counted(sum(data['kind'] != 'junction' for data in nodes), 'segment')}"
        num_own = sum(data["num_own_tokens"] for data in nodes)
        return f"{texts}: {_counted(num_own, 'distinct token')}, {num_tokens:,} in all strings"


def _put_in_order(drawing: graphviz.Digraph, names: Sequence[str]) -> None:
    """Let boxes that follow nothing in the same frame stand one below the other."""
    with drawing.subgraph() as same:
        same.attr(rank="same")
        for name, next_name in itertools.pairwise(names):
            same.edge(name, next_name, style="invis", tailport="_", headport="_")


@dataclass(eq=False)
class _Frame:
    """The branches of a group, or of groups that stand behind the same and share branches.

    Frames are disjoint or within each other: a frozen branch that stands behind different beginnings is in the first.
    """

    behind: int | None
    nodes: set[int]
    junctions: set[int]
    ends: set[int]
    num_branches: int  # of one group
    outer: _Frame | None = None


def _frames(graph: nx.DiGraph) -> list[_Frame]:
    """Return the frames around groups."""
    frames: list[_Frame] = []
    for junction, data in sorted(graph.nodes(data=True), key=lambda node: node[1]["written_order"]):
        if data["kind"] == "junction":
            _add_frame(frames, _frame(graph, junction))
    for frame in frames:
        outer = [other for other in frames if frame.nodes < other.nodes]
        frame.outer = min(outer, key=lambda other: len(other.nodes), default=None)
    return frames


def _frame(graph: nx.DiGraph, junction: int) -> _Frame:
    behind = graph.nodes[junction]["behind"]
    times = {end: graph.edges[end, junction]["times"] for end in graph.pred[junction] if end != behind}
    return _Frame(behind, _branches(graph, junction), {junction}, set(times), sum(times.values()))


def _add_frame(frames: list[_Frame], found: _Frame) -> None:
    """Add the frame of a group to those of groups that end before it."""
    num_nodes = len(found.nodes)
    crossing = [frame for frame in frames if not (frame.nodes < found.nodes and frame.junctions <= found.nodes)]
    for frame in crossing:
        if frame.behind != found.behind:
            found.nodes -= frame.nodes
    found.ends &= found.nodes
    if len(found.nodes) < num_nodes and len(found.ends) < 2:
        return  # the others stand in the frames of other groups
    for frame in crossing:
        if frame.behind == found.behind and frame.nodes & found.nodes:
            found.nodes |= frame.nodes
            found.junctions |= frame.junctions
            found.ends |= frame.ends
            found.num_branches = max(found.num_branches, frame.num_branches)
            frames.remove(frame)
    frames.append(found)


def _branches(graph: nx.DiGraph, junction: int) -> set[int]:
    """Return the nodes of the group that ends here."""
    branches: set[int] = set()
    for end in graph.pred[junction]:
        branches |= {end} | nx.ancestors(graph, end)
    behind = graph.nodes[junction]["behind"]
    return branches if behind is None else branches - {behind} - nx.ancestors(graph, behind)


# Strings


def _html(shown: str) -> str:
    """Return a string for Graphviz's HTML-like labels, in which spaces would run together."""
    escaped = html.escape(shown).replace(" ", "&#160;")
    # A tag keeps the backslash from what follows: Graphviz replaces \N by the node's name, however it is written.
    return escaped.replace("\\", f'<FONT COLOR="{_INK}">&#92;</FONT>')


def _attribute(shown: str) -> str:
    r"""Return a string for attributes, in which Graphviz reads entities, and escapes such as \N twice."""
    return html.escape(shown).replace("\\", "&#92;" * 4)


def _told(statuses: Counter[Status]) -> str:
    told = [status for status in STATUSES if status in statuses]
    if len(told) == 1:
        return told[0]
    return ", ".join(f"{statuses[status]:,} {status}" for status in told)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _ending(num_texts: int) -> str:
    return "1 text ends here" if num_texts == 1 else f"{num_texts:,} texts end here"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if size >= 9.95 or unit == "B" else f"{size:.1f} {unit}"


def _legend_text(text: str) -> str:
    return f'<TD ALIGN="LEFT">{_html(text)}</TD>'


def _swatch(status: Status) -> str:
    look = _LOOKS[status]
    border = f'BORDER="{round(look.width)}" COLOR="{look.border}" STYLE="{look.style}"'
    ground = f'BGCOLOR="{look.fill}"'
    if look.lines == 2:  # the inner one has the ground
        table, cell = f'{border} CELLSPACING="2"', f'{border} {ground} WIDTH="22" HEIGHT="8"'
    else:
        table, cell = f'{border} {ground} CELLSPACING="0"', 'BORDER="0" WIDTH="26" HEIGHT="12"'
    return f'<TD ALIGN="LEFT"><TABLE {table}><TR><TD {cell} FIXEDSIZE="TRUE"></TD></TR></TABLE></TD>'
