"""What becomes of one axis of a tensor (its samples, its channels) on the way through a graph.

A write needs to know which axis of a feature tensor runs over samples and which over channels, in
whatever layout a model works. Shapes alone don't tell (a batch of 8 with 8 tokens), so the axis is
followed call by call from where it is known:

    permute, getitem, ...   by their arguments
    view, flatten, ...      by the prefix rule (`axis_moves.reshaped_axis`)
    all other calls         the axis of the same place and size; operands of lower rank are aligned
                            from the right, as broadcasting does
    (T, B, C) -> (T·B, C)   samples behind others in one axis: followed till they have one again
    sort, h[perm], flip, ...    along the samples: lost, since the order is no longer theirs

An axis that none of this finds again is lost: better none than a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.axis_index import overwrites
from aim_surgery.sites.axis_moves import LOST, Move, regrouped, reshaped, shape_of
from aim_surgery.sites.axis_rules import rule_of
from aim_surgery.sites.graph import changes_in_place

_Place = tuple[int, int]  # an axis, and how often it runs over all entries


def follow_axis(
    capture: Capture, graph: fx.Graph, starts: Mapping[fx.Node, int], *, samples: int = 0
) -> dict[fx.Node, int]:
    """Follow one axis through a graph.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        starts: Nodes where the axis is known, non-negative.
        samples: The number of samples, for their axis: it keeps its size, or holds several entries
            per sample. 0 for channels, which a split, a concatenation or padding may change.

    Returns:
        The axis by node, for each node whose value is a tensor that still has it. For a tuple of
        tensors, the axis of its elements.
    """
    return _follow(capture, graph, starts, samples)[0]


def follow_samples(
    capture: Capture, graph: fx.Graph, starts: Mapping[fx.Node, int], count: int
) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
    """Follow the axis of samples, and where it is a part of another.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        starts: Nodes where the axis is known, non-negative.
        count: The number of samples.

    Returns:
        The axis by node (`follow_axis`); and the axis that holds the samples behind others, for
        each node that has such a one instead: (T·B, C).
    """
    axes, behind = _follow(capture, graph, starts, count)
    return axes, {node: axis for node, (axis, _) in behind.items()}


def _follow(
    capture: Capture, graph: fx.Graph, starts: Mapping[fx.Node, int], samples: int
) -> tuple[dict[fx.Node, int], dict[fx.Node, _Place]]:
    axes: dict[fx.Node, int] = {}
    behind: dict[fx.Node, _Place] = {}
    lost: set[fx.Node] = set()
    for node in graph.nodes:
        axis, outer = starts.get(node), 1
        if axis is None and node.op.startswith("call"):
            axis, outer = _after(capture, node, axes, behind, lost, samples) or (None, 1)
        if axis is not None and axis != LOST and outer == 1:
            axes[node] = axis
        elif samples and _follows(node, axes, lost):
            lost.add(node)
            if axis is not None and axis != LOST:
                behind[node] = axis, outer
        if changes_in_place(node):
            if axis == LOST or (samples and overwrites(node, axes)):
                axes.pop(node.args[0], None)
                lost.add(node.args[0])
            behind.pop(node.args[0], None)
    return axes, behind


def _follows(node: fx.Node, axes: Mapping[fx.Node, int], lost: AbstractSet[fx.Node]) -> bool:
    depends = any(source in axes or source in lost for source in node.all_input_nodes)
    return depends and shape_of(node.meta.get("val")) is not None


def _after(
    capture: Capture,
    node: fx.Node,
    axes: Mapping[fx.Node, int],
    behind: Mapping[fx.Node, _Place],
    lost: AbstractSet[fx.Node],
    samples: int,
) -> _Place | None:
    places = {n: (axes[n], 1) for n in node.all_input_nodes if n in axes}
    if behind:
        places |= {n: behind[n] for n in node.all_input_nodes if n in behind}
    after = shape_of(node.meta.get("val")) if places else None
    if after is None:
        return None
    rule = rule_of(capture, node)
    found: set[_Place | None] = set()
    for source, (axis, outer) in places.items():
        before = shape_of(source.meta["val"])
        if before is None:
            continue
        if samples and rule is reshaped:
            found.add(regrouped(before, axis, outer, after, samples=samples))
            continue
        place = rule(Move(node, source, axis, before, after, samples, lost))
        if place == LOST:
            return LOST, 1
        if place is not None and (outer == 1 or after[place] == before[axis]):
            found.add((place, outer))
    found.discard(None)
    return found.pop() if len(found) == 1 else None  # operands that disagree: it is lost
