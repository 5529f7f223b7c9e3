"""What becomes of one axis of a tensor (its samples, its channels) on the way through a graph.

A write needs to know which axis of a feature tensor runs over samples and which over channels, in
whatever layout a model works. Shapes alone don't tell (a batch of 8 with 8 tokens), so the axis is
followed call by call from where it is known:

    permute, getitem, ...   by their arguments
    view, flatten, ...      by the prefix rule (`axis_moves.reshaped_axis`)
    all other calls         the axis of the same place and size; operands of lower rank are aligned
                            from the right, as broadcasting does
    sort, h[perm], flip, ...    along the samples: lost, since the order is no longer theirs

An axis that none of this finds again is lost: better none than a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.axis_index import overwrites
from aim_surgery.sites.axis_moves import LOST, Move, shape_of
from aim_surgery.sites.axis_rules import rule_of
from aim_surgery.sites.graph import changes_in_place


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
    axes: dict[fx.Node, int] = {}
    lost: set[fx.Node] = set()
    for node in graph.nodes:
        axis = starts.get(node)
        if axis is None and node.op.startswith("call"):
            axis = _axis_after(capture, node, axes, lost, samples)
        if axis is not None and axis != LOST:
            axes[node] = axis
        elif samples and _follows(node, axes, lost):
            lost.add(node)
        if changes_in_place(node) and (axis == LOST or (samples and overwrites(node, axes))):
            axes.pop(node.args[0], None)
            lost.add(node.args[0])
    return axes


def _follows(node: fx.Node, axes: Mapping[fx.Node, int], lost: AbstractSet[fx.Node]) -> bool:
    depends = any(source in axes or source in lost for source in node.all_input_nodes)
    return depends and shape_of(node.meta.get("val")) is not None


def _axis_after(
    capture: Capture,
    node: fx.Node,
    axes: Mapping[fx.Node, int],
    lost: AbstractSet[fx.Node],
    samples: int,
) -> int | None:
    sources = [source for source in node.all_input_nodes if source in axes]
    after = shape_of(node.meta.get("val")) if sources else None
    if after is None:
        return None
    rule = rule_of(capture, node)
    found = set()
    for source in sources:
        before = shape_of(source.meta["val"])
        if before is not None:
            found.add(rule(Move(node, source, axes[source], before, after, samples, lost)))
    if LOST in found:
        return LOST
    found.discard(None)
    return found.pop() if len(found) == 1 else None  # operands that disagree: it is lost
