"""Writes cat[x, m]: what a site with a widened weight works on."""

from __future__ import annotations

import operator

import torch
from torch import fx

from aim_surgery.planning import Read


def write_joined(
    graph: fx.Graph,
    source: fx.Node,
    view: fx.Node,
    shape: fx.Node | None,
    read: Read,
    memory_format: torch.memory_format | None,
    varies: bool,
) -> fx.Node:
    """Write cat[x, m] along the channels, group by group, at the graph's point of insertion.

    Args:
        graph: The emitted graph; changed in place.
        source: The node x.
        view: The node m (see `SiteNote.view`).
        shape: The node of x's shape; None to write one.
        read: The site's read.
        memory_format: The channels-last format of x, None where it is in another.
        varies: Whether m is another for each sample.

    Returns:
        The node that the site is to work on.
    """
    call, method = graph.call_function, graph.call_method
    dims = len(read.site.spatial)
    axis, groups = -(dims + 1), read.site.groups
    if groups > 1:
        source, shape = method("unflatten", (source, axis, (groups, -1))), None
        view = method("unsqueeze", (view, axis - 1)) if varies else view
    if not varies or groups > 1 or not dims:
        shape = call(getattr, (source, "shape")) if shape is None else shape
        lead = call(operator.getitem, (shape, slice(None, axis)))
        size = call(operator.add, (lead, (-1,) * (dims + 1)))
        view = method("expand", (view, size))
    if memory_format and groups == 1:
        view = _laid_out(graph, view, memory_format)  # or `cat` would fall back to contiguous
    joined = call(torch.cat, ([source, view], axis))
    if groups > 1:
        joined = method("flatten", (joined, axis - 1, axis))
        joined = _laid_out(graph, joined, memory_format) if memory_format else joined
    return joined


def _laid_out(graph: fx.Graph, node: fx.Node, memory_format: torch.memory_format) -> fx.Node:
    return graph.call_method("clone", (node,), {"memory_format": memory_format})
