"""Frames around segments of a graph that stand side by side in a group, and around groups within groups."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx


@dataclass(eq=False)
class Frame:
    """The branches of a group, or of groups that stand behind the same node and share branches.

    Frames are disjoint or nested. So a frozen branch that groups behind different nodes share is in the first frame.
    """

    behind: int | None
    nodes: set[int]
    junctions: set[int]
    ends: set[int]
    num_branches: int  # of one group
    outer: Frame | None = None


def frames_of(graph: nx.DiGraph) -> list[Frame]:
    """Return the frames around groups."""
    frames: list[Frame] = []
    for junction, data in sorted(graph.nodes(data=True), key=lambda node: node[1]["written_order"]):
        if data["kind"] == "junction":
            _add_frame(frames, _frame(graph, junction))
    for frame in frames:
        outer = [other for other in frames if frame.nodes < other.nodes]
        frame.outer = min(outer, key=lambda other: len(other.nodes), default=None)
    return frames


def _frame(graph: nx.DiGraph, junction: int) -> Frame:
    behind = graph.nodes[junction]["behind"]
    times = {end: graph.edges[end, junction]["times"] for end in graph.pred[junction] if end != behind}
    return Frame(behind, _branches(graph, junction), {junction}, set(times), sum(times.values()))


def _add_frame(frames: list[Frame], found: Frame) -> None:
    """Add the frame of a group to those of groups that end before it."""
    num_nodes = len(found.nodes)
    crossing = [frame for frame in frames if not (frame.nodes < found.nodes and frame.junctions <= found.nodes)]
    for frame in crossing:
        if frame.behind != found.behind:
            found.nodes -= frame.nodes
    found.ends &= found.nodes
    if len(found.nodes) < num_nodes and len(found.ends) < 2:
        return  # the other branches stand in the frames of other groups
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
