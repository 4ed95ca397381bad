"""Folding: segments of a graph get boxes of their own in its picture, or share one box ("... 69 more")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from backprompt.visible import counted

MAX_COLUMNS = 9
"""The default number of columns of boxes in a picture; with the column of folded boxes they fill two screens."""

MAX_IN_A_ROW = 4
"""In a longer row of segments without branches between them, all but the first become one box."""


@dataclass
class Box:
    """A node of the picture, for one node of the graph or several."""

    nodes: list[int]
    title: str | None = None  # of several nodes
    is_row: bool = False  # several nodes without branches between them


class Folding:
    """The boxes of a graph's nodes: some nodes are drawn by themselves, others share a box.

    Attributes:
        boxes: the boxes by name, in written order.
        edges: the edges from box to box, and the graph's edges that each stands for.
        of: the name of each node's box.

    """

    def __init__(self, graph: nx.DiGraph, max_children: int, max_columns: int = MAX_COLUMNS) -> None:
        self._graph = graph
        self._columns = self._columns_of_nodes()
        self._max_columns = max_columns
        self._max_children = max_children
        self.boxes: dict[str, Box] = {}
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
        """Give boxes to the nodes that are drawn by themselves; return the other nodes that directly follow these.

        The number of boxes behind a box is limited, however many texts there are, and so is the number of columns: only
        the first segments and the first groups behind a node are drawn. A group is drawn only if the node before it and
        at least one of its branches are drawn.
        """
        ordered = sorted(self._graph, key=lambda node: self._graph.nodes[node]["written_order"])
        siblings: dict[tuple[int | None, bool], list[int]] = {}
        for node in ordered:
            siblings.setdefault((self._behind(node), self._is_junction(node)), []).append(node)
        kept: set[int] = set()
        for nodes in siblings.values():
            first = nodes if len(nodes) <= self._max_children else nodes[: self._max_children - 1]
            kept.update(node for node in first if self._columns[node] <= self._max_columns)
        for node in ordered:  # a topological order
            before = self._graph.pred[node]
            is_reached = not before or any(parent in self.of for parent in before)
            if node in kept and is_reached and self._is_drawn(self._behind(node)):
                self.of[node] = str(node)
                self.boxes[str(node)] = Box([node])
        return [
            [node for node in nodes if node not in kept]
            for (behind, _), nodes in siblings.items()
            if self._is_drawn(behind)
        ]

    def _columns_of_nodes(self) -> dict[int, int]:
        """Return the column of each node's box, counted from 1; a row's fourth node and all behind it share one."""
        columns: dict[int, int] = {}
        place_in_row: dict[int, int] = {}
        for node in nx.topological_sort(self._graph):
            before = self._graph.pred[node]
            columns[node] = 1 + max((columns[parent] for parent in before), default=0)
            place_in_row[node] = 1
            for parent in before:
                if self._continues(parent, node):
                    place_in_row[node] = place_in_row[parent] + 1
                    columns[node] -= place_in_row[node] > MAX_IN_A_ROW
        return columns

    def _is_junction(self, node: int) -> bool:
        return bool(self._graph.nodes[node]["kind"] == "junction")

    def _behind(self, node: int) -> int | None:
        """Return the node before a segment, or before the group that ends in a junction."""
        if self._is_junction(node):
            behind: int | None = self._graph.nodes[node]["behind"]
            return behind
        return next(iter(self._graph.pred[node]), None)

    def _is_drawn(self, node: int | None) -> bool:
        return node is None or node in self.of

    def _put_rows(self) -> None:
        """Fold the segments of a long row, except for the first, into one box."""
        for first in list(self.boxes):
            row = self._row_from(int(first)) if first in self.boxes else []
            if len(row) > MAX_IN_A_ROW:
                rest = row[1:]
                self.boxes[str(rest[0])] = Box(rest, f"{len(rest)} more segments", is_row=True)
                self.of.update(dict.fromkeys(rest, str(rest[0])))
                for node in rest[1:]:
                    del self.boxes[str(node)]

    def _row_from(self, node: int) -> list[int]:
        """Return the row that begins with this node: nodes without branches between them."""
        if any(self._continues(parent, node) for parent in self._graph.pred[node]):
            return []
        row = [node]
        while len(following := list(self._graph.succ[row[-1]])) == 1 and self._continues(row[-1], following[0]):
            row.append(following[0])
        return row

    def _continues(self, parent: int, node: int) -> bool:
        """Return whether a node is the only one behind another, and may share a box with it."""
        above, below = self._graph.nodes[parent], self._graph.nodes[node]
        return (
            len(self._graph.succ[parent]) == len(self._graph.pred[node]) == 1
            and "junction" not in (above["kind"], below["kind"])
            and not above["ends"]
        )

    def _put_fold(self, name: str, first: Sequence[int]) -> None:
        """Fold the nodes that are left out, and all nodes that only follow them, into one box."""
        nodes = [node for node in first if node not in self.of]
        if not nodes:
            return
        is_too_deep = self._columns[nodes[0]] > self._max_columns
        title = counted(len(nodes), "more group") if self._is_junction(nodes[0]) else f"{len(nodes)} more"
        self.of.update(dict.fromkeys(nodes, name))
        for node in nodes:
            following = [other for other in self._graph.succ[node] if other not in self.of]
            self.of.update(dict.fromkeys(following, name))
            nodes += following
        if is_too_deep:
            title = counted(len(nodes), "more segment")
        self.boxes[name] = Box(nodes, title)
