"""A boundary as frozen data: a place in a graph where one feature tensor is all that flows on.

A user names it as the model's code does: by the module call that returns it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from aim_surgery.capture import Capture, Trace
from aim_surgery.sites.once import found_once


@dataclass(frozen=True)
class Boundary:
    """A node that a write may follow.

    Attributes:
        name: Qualified name of the outermost module whose call returns it (`layer1.0`), else the
            node's own name; later calls of the same module get `@1`, `@2`, ...
        names: All names that it goes by: modules that return it, innermost first, and the node's.
        stage: Number of its stage from 1, in execution order.
        channels: Features of each position.
        channel_axis: Axis of the tensor that runs over them, non-negative.
        sample_axis: Axis that runs over the samples; None where the model works on a single one.
        spatial: Sizes of a feature map on the example, whichever layout it has, (N, C, *spatial) or
            (N, *spatial, C); () for tokens (N, T, C) and vectors (N, C).
        positions: Positions per sample on the example.
        dominates: Whether all features pass it; False for the last node of a resolution where
            features also flow around.
    """

    name: str
    names: tuple[str, ...]
    stage: int
    channels: int
    channel_axis: int
    sample_axis: int | None
    spatial: tuple[int, ...]
    positions: int
    dominates: bool


def analysed_trace(capture: Capture) -> Trace:
    """The trace that boundaries are looked for in: evaluation, which has no auxiliary heads."""
    return capture.evaluation_first[0]


@found_once
def node_names(capture: Capture, graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """The names that each node goes by, modules that return it (innermost first) before its own.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.

    Returns:
        Names by node; no name belongs to two nodes.
    """
    inside = tuple(f"{call.path}." for trace in capture.traces for call in trace.opaque)
    calls: Counter[str] = Counter()
    names: defaultdict[fx.Node, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for path in dict.fromkeys(node.meta.get("returned_by", ())):
            if not path.startswith(inside):
                names[node].append(f"{path}@{calls[path]}" if calls[path] else path)
                calls[path] += 1
    taken = {name: node for node, paths in names.items() for name in paths}
    for node in graph.nodes:
        own = node.name if taken.get(node.name, node) is node else f"{node.name}@node"
        if own not in names[node]:
            names[node].append(own)
    return {node: tuple(found) for node, found in names.items()}


def boundary_nodes(capture: Capture, graph: fx.Graph, names: Collection[str]) -> dict[str, fx.Node]:
    """Where boundaries are in a graph: each mode's graph has nodes of its own.

    Args:
        capture: The captured model.
        graph: One of its graphs.
        names: Names of boundaries, any that they go by.

    Returns:
        The node of each name; names that have none there are missing. A name that is no module's
        counts as the same node in the other mode's graph where it does the same thing there.
    """
    analysed = analysed_trace(capture).graph
    found = _by_name(capture, graph)
    if graph is analysed:
        return {name: found[name] for name in names if name in found}
    original = _by_name(capture, analysed)
    return {
        name: found[name]
        for name in names
        if name in found
        and (name not in original or _does_the_same(found[name], original[name], name))
    }


def _by_name(capture: Capture, graph: fx.Graph) -> dict[str, fx.Node]:
    return {name: node for node, names in node_names(capture, graph).items() for name in names}


def _does_the_same(node: fx.Node, other: fx.Node, name: str) -> bool:
    value, expected = node.meta.get("val"), other.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return False
    same_call = (node.op, node.target) == (other.op, other.target)
    return value.shape == expected.shape and (same_call or name != node.name)
