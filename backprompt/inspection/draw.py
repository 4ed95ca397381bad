"""Pictures of the graph of texts: the order of segments, and which segments are computed, reused, evicted or missing.

    texts --to_networkx--> graph --Folding--> boxes --_Picture--> DOT --Drawing--> SVG, PNG, PDF

A status is shown by colour, border and words, so no colour vision is needed. Boxes have backgrounds of their own. Their
borders, and everything outside of them, have colours that show on white and on black.
"""

from __future__ import annotations

import html
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import graphviz
import networkx as nx

from backprompt.arguments import as_int
from backprompt.drawing import Drawing
from backprompt.inspection.folding import MAX_COLUMNS, Box, Folding
from backprompt.inspection.frames import Frame, frames_of
from backprompt.inspection.graph import STATUSES, Status, graph_of
from backprompt.inspection.looks import GREY, INK, LOOKS, MEANINGS, as_html, legend_text, swatch
from backprompt.text.checks import as_texts
from backprompt.text.node import Text
from backprompt.visible import LINE_WIDTH, counted, shortened, visible, wrapped

_TOOLTIP_CHARACTERS = 600
_MONOSPACE = "DejaVu Sans Mono,Menlo,Consolas,Courier New,monospace"
_SANS = "Helvetica,Arial,DejaVu Sans,sans-serif"


def draw(
    texts: Text | Iterable[Text],
    *,
    max_children: int = 6,
    max_characters: int = 56,
    max_columns: int = MAX_COLUMNS,
) -> Drawing:
    """Return a picture of texts: their segments as boxes, and edges to the next segments. Nothing is computed.

        bp.draw(texts)                                 # in a notebook it shows itself
        bp.draw(texts).render("tree", format="svg")    # or png, pdf; needs no `dot` on the path

    A box shows the string of a segment, shortened in the middle, the number of its distinct tokens, their bytes, and
    their status: computed by the latest evaluation, reused from memory, read from disk, evicted, or not evaluated. The
    branches of a group stand side by side in a frame. A join is marked if it changed tokens of a part that another text
    has unchanged, so the two texts do not share these tokens. The usual reason is a blank at the end of that part,
    which belongs at the beginning of the next part.

    Args:
        texts: a text or several; texts without a model are drawn by their strings.
        max_children: if more texts or groups than this follow a segment, the last ones become one box ("... 69 more").
        max_characters: strings longer than this are shown without their middle.
        max_columns: the segments behind this number of columns become one box for each branch.

    Returns:
        A `graphviz.Digraph`, to be rendered or changed further.

    Raises:
        ValueError: a number is too small.
        TextTypeError, JoinError, TokenizerError: see `to_networkx`.

    """
    max_children = as_int(max_children, "max_children", at_least=2)
    max_characters = as_int(max_characters, "max_characters", at_least=2)
    max_columns = as_int(max_columns, "max_columns", at_least=1)
    graph = graph_of(as_texts(texts, "draw"))
    return _Picture(graph, Folding(graph, max_children, max_columns), max_characters).drawn()


class _Picture:
    """Writes boxes as DOT."""

    def __init__(self, graph: nx.DiGraph, folding: Folding, max_characters: int) -> None:
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
            fontcolor=GREY,
            tooltip=" ",
        )
        drawing.attr("node", shape="box", style="rounded,filled", margin="0.14,0.07", fontname=_SANS, fontsize="11")
        drawing.attr("edge", tailport="e", headport="w")
        drawing.attr("edge", color=GREY, arrowsize="0.6", fontname=_SANS, fontsize="11", fontcolor=GREY, tooltip=" ")
        boxes = self._folding.boxes.values()
        frames = [frame for frame in frames_of(self._graph) if any(frame.nodes.issuperset(box.nodes) for box in boxes)]
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

    def _put(self, drawing: graphviz.Digraph, frame: Frame | None, frames: Sequence[Frame]) -> None:
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
            # From left to right, Graphviz draws the contents of a frame upside down. (Around frames in frames,
            # Graphviz follows an order of its own; the order of branches means nothing.)
            _put_in_order(drawing, first[::-1])
        for other in inner:
            label = "side by side: none sees the others" if other.num_branches > 1 else "sees nothing before it"
            with drawing.subgraph(name=f"cluster{min(other.junctions)}") as cluster:
                cluster.attr(label=label, color=GREY, style="rounded,dashed", margin="10", labelloc="t")
                self._put(cluster, other, frames)

    def _node(self, box: Box) -> dict[str, str]:
        if self._graph.nodes[box.nodes[0]]["kind"] == "junction" and box.title is None:
            data = self._graph.nodes[box.nodes[0]]
            ends = f"; {_ending(len(data['ends']))}" if data["ends"] else ""
            tooltip = f"The group ends: what follows sees all branches{ends}."
            return {
                "shape": "circle",
                "label": "",
                "width": "0.13",
                "color": GREY,
                "fillcolor": GREY,
                "tooltip": tooltip,
            }
        statuses = self._statuses(box)
        look = LOOKS[max(statuses, key=lambda status: (statuses[status], -STATUSES.index(status)))]
        return {
            "label": self._label(box, statuses),
            "tooltip": _attribute(self._tooltip(box)),
            "fillcolor": look.fill,
            "color": look.border,
            "style": f"rounded,filled,{look.style}",
            "penwidth": str(look.width),
            "peripheries": str(look.lines),
            "fontcolor": INK,
        }

    def _edge(self, edges: Sequence[tuple[int, int]]) -> dict[str, str]:
        data = [self._graph.edges[edge] for edge in edges]
        if any(edge["is_join_changed"] and self._splits(node) for (_, node), edge in zip(edges, data, strict=True)):
            return {"style": "bold", "arrowhead": "diamond", "arrowsize": "0.9"}
        times = sum(edge["times"] for edge in data)
        return {"label": f"{times} times"} if len(edges) == 1 and times > 1 else {}

    def _splits(self, node: int) -> bool:
        """Return whether joining a segment changed tokens before it that another text has unchanged."""
        if not self._graph.nodes[node]["is_join_changed"]:
            return False
        return any(
            self._graph.nodes[parent]["ends"]
            or not all(self._graph.nodes[other]["is_join_changed"] for other in self._graph.succ[parent])
            for parent in self._graph.pred[node]
        )

    def _statuses(self, box: Box) -> Counter[Status]:
        """Count a box's tokens by status; a box without tokens has one status, with the count 0."""
        counts: Counter[Status] = Counter()
        for node in box.nodes:
            counts.update(self._graph.nodes[node]["statuses"])
        if not counts:
            counts[next((s for n in box.nodes if (s := self._graph.nodes[n]["status"])), "not evaluated")] = 0
        return counts

    def _label(self, box: Box, statuses: Counter[Status]) -> str:
        first = self._graph.nodes[box.nodes[0]]
        if box.title is not None:
            lines = [f'<FONT POINT-SIZE="13"><B>… {html.escape(box.title)}</B></FONT>']
        else:
            string = first["string"] if first["kind"] != "special tokens" else f"{first['string']} (special)"
            lines = [
                f'<FONT FACE="{_MONOSPACE}" POINT-SIZE="12">{as_html(line)}</FONT>'
                for line in wrapped(f"“{visible(shortened(string, self._max_characters))}”", self._line_width)
            ]
        lines += [as_html(line) for line in self._account(box)]
        has_model = "no model" not in statuses
        if has_model:
            lines.append(f"<I>{as_html(_told(statuses))}</I>")
        return "<" + "".join(f'{line}<BR ALIGN="LEFT"/>' for line in lines) + ">"

    def _account(self, box: Box) -> list[str]:
        data = [self._graph.nodes[node] for node in box.nodes]
        texts = sum(len(node["ends"]) for node in data)
        if data[0]["position"] is None:
            parts = []
        elif box.title is None and data[0]["num_own_tokens"] < data[0]["num_tokens"]:
            num_shared = data[0]["num_tokens"] - data[0]["num_own_tokens"]
            parts = [f"{counted(data[0]['num_tokens'], 'token')}, {num_shared:,} shared"]
        else:
            parts = [counted(sum(node["num_own_tokens"] for node in data), "token")]
        num_bytes = sum(node["num_bytes"] or 0 for node in data)
        if num_bytes:
            parts.append(_size(num_bytes))
        lines = [" · ".join(parts)] if parts else []
        has_following = any(self._graph.succ[node] for node in box.nodes)
        if box.title is not None and texts:
            lines.insert(0, counted(texts, "text"))
        elif data[0]["num_texts"] > 1 and (box.title is None or box.is_row):
            lines.append(
                f"in {data[0]['num_texts']:,} texts" + (f"; {_ending(texts)}" if texts and has_following else "")
            )
        if num_changed := sum(map(self._splits, box.nodes)):
            lines.append("≠ at its join" if box.title is None else f"≠ at {counted(num_changed, 'join')}")
        if adapters := {node["adapter"] for node in data} - {None}:
            lines.append(
                "under "
                + ", ".join(f"the adapter {visible(name)}" if name else "no adapter" for name in sorted(adapters))
            )
        if reasons := {reason for node in data for reason in node["generated"]}:
            lines.append(f"generated: {', '.join(sorted(reasons))}")
        if any(node["is_frozen"] for node in data):
            lines.append("frozen: sees nothing before it")
        return lines

    def _tooltip(self, box: Box) -> str:
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
        rows = [f'<TD COLSPAN="2" ALIGN="LEFT">{as_html(self._summary(nodes))}</TD>']
        rows += [swatch(status) + legend_text(MEANINGS[status]) for status in statuses if status in MEANINGS]
        if any(map(self._splits, self._graph)):
            rows.append("<TD>◆</TD>" + legend_text("≠ tokens merged where the two meet: not shared with other texts"))
        if any(data["kind"] == "junction" for data in nodes):
            rows.append("<TD>●</TD>" + legend_text("a group ends: what follows sees all of its branches"))
        table = "".join(f"<TR>{row}</TR>" for row in rows)
        return f'<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3" CELLPADDING="1">{table}</TABLE>>'

    def _summary(self, nodes: Sequence[Mapping[str, Any]]) -> str:
        texts = counted(self._graph.graph["num_texts"], "text")
        num_tokens = self._graph.graph["num_tokens"]
        if not num_tokens:
            return f"{texts}, {counted(sum(data['kind'] != 'junction' for data in nodes), 'segment')}"
        num_own = sum(data["num_own_tokens"] for data in nodes)
        return f"{texts}: {counted(num_own, 'distinct token')}, {num_tokens:,} in all strings"


def _put_in_order(drawing: graphviz.Digraph, names: Sequence[str]) -> None:
    """Put boxes without a predecessor in the same frame one below the other."""
    with drawing.subgraph() as same:
        same.attr(rank="same")
        for name, next_name in itertools.pairwise(names):
            same.edge(name, next_name, style="invis", tailport="_", headport="_")


def _attribute(shown: str) -> str:
    r"""Return a string escaped for attributes, in which Graphviz reads entities, and twice escapes such as \N."""
    return html.escape(shown).replace("\\", "&#92;" * 4)


def _told(statuses: Counter[Status]) -> str:
    told = [status for status in STATUSES if status in statuses]
    if len(told) == 1:
        return told[0]
    return ", ".join(f"{statuses[status]:,} {status}" for status in told)


def _ending(num_texts: int) -> str:
    return "1 text ends here" if num_texts == 1 else f"{num_texts:,} texts end here"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if size >= 9.95 or unit == "B" else f"{size:.1f} {unit}"
