"""The other read rule: the first k planes of the memory, where the package averages all K to k.

    averaged(planes, k)  ->  planes[:, :k]

A plan can't say this, so the graph that was emitted is edited. Everything else stays: shapes,
parameters, writes.
"""

from __future__ import annotations

from torch import Tensor, fx

from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.nn.views import averaged


def first(memory: Tensor, count: int) -> Tensor:
    """The first floats (N, n) -> (N, k), or planes (N, n, S) -> (N, k, S)."""
    return memory[:, :count]


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
    graphs = graphs_of(gm)
    views = _averaged_views(gm)
    found = [node for graph in graphs for node in graph.nodes if node.target is averaged]
    if not views or len(found) != len(views) * len(graphs):
        raise ValueError(
            f"{len(views)} views of the memory are averaged, {len(found)} were found in "
            f"{len(graphs)} graph(s)"
        )
    for node in found:
        node.target = first
    gm.recompile()
    return len(found)


def _averaged_views(gm: AimGraphModule) -> set[tuple[object, ...]]:
    """What the plan averages: one view for all that see the same version alike."""
    plan = gm.plan
    reads: set[tuple[object, ...]] = {
        (read.memory, read.version, read.site.spatial, read.planes)
        for read in plan.reads
        if read.averaged
    }
    return reads | {
        (write.memory, write.source, write.point.spatial, write.planes)
        for write in plan.writes
        if 0 < write.planes < write.available
    }
