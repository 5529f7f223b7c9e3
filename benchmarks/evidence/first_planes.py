"""The other read rule: the first k planes of the memory, where the package averages all K to k.

    adaptive_avg_pool(planes, k)  ->  planes[:k]

A plan can't say this, so the graph that was emitted is edited. Everything else stays: shapes,
parameters, writes.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from aim_surgery.nn.graph_module import AimGraphModule

_AVERAGES = {F.adaptive_avg_pool1d: -1, F.adaptive_avg_pool2d: -2}


def first(planes: Tensor, count: int, axis: int) -> Tensor:
    """The first entries along an axis."""
    return planes.narrow(axis, 0, count)


fx.wrap("first")


def read_first_planes(gm: AimGraphModule) -> int:
    """Let averaged reads see the first planes (features) instead.

    Args:
        gm: As `transform` emits it, form "concat"; changed in place.

    Returns:
        How many views of the memory are others now.

    Raises:
        ValueError: No read is averaged, or not all of them were found.
    """
    edited = 0
    for graph in gm._distinct_graphs():
        for node in list(graph.nodes):
            axis = _AVERAGES.get(node.target) if node.op == "call_function" else None
            if axis is None or not _is_memory(node.args[0]):
                continue
            size = node.args[1]
            count = size[0] if isinstance(size, tuple | list) else size
            if not isinstance(count, int):
                continue  # brings planes to an input's size, which stays
            node.args = (node.args[0], count, axis)
            node.target = first
            edited += 1
    gm.recompile()
    plan = gm.plan
    averaged = {
        (read.memory, read.version, read.site.spatial, read.planes)
        for read in plan.reads
        if read.averaged
    } | {
        (write.memory, write.source, write.point.spatial, write.planes)
        for write in plan.writes
        if 0 < write.planes < write.available
    }
    if not averaged or edited != len(averaged) * len(gm._distinct_graphs()):
        raise ValueError(
            f"{len(averaged)} views of the memory are averaged, {edited} were found in the graph"
        )
    return edited


def _is_memory(node: object) -> bool:
    """Whether a node is a version of the memory, padded or reshaped at most."""
    while isinstance(node, fx.Node) and node.op != "call_module":
        if node.target not in ("reshape", F.pad):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and str(node.target).startswith("aim.")
