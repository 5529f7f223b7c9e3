"""Writes m · f(R_m): the memory's part of a product with rows of a table (`sites/tables.py`).

R_m goes through the steps that R goes through. Sizes that a step is given are those of R's own way,
but for the number of columns, which is k.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.planning import Read
from aim_surgery.sites import Call
from aim_surgery.sites.graph import argument_of, called_name
from aim_surgery.sites.tables import RESHAPES, Table
from aim_surgery.surgery.modules import beside_path


def write_table(
    graph: fx.Graph,
    call: Call,
    copied: Mapping[fx.Node, fx.Node],
    read: Read,
    view: fx.Node,
    *,
    varies: bool,
) -> fx.Node:
    """Write m · f(R_m) at the graph's point of insertion.

    Args:
        graph: The emitted graph; changed in place.
        call: The site, a product with a table.
        copied: What stands for the captured graph's nodes, up to the site's.
        read: The site's read.
        view: The node m: (k,), or of the input's rank where it varies between samples.
        varies: Whether it does.

    Returns:
        The node to be added to the site's; it broadcasts against it.
    """
    table = call.table
    assert table is not None
    rows = _as_parameter(graph, graph.get_attr(f"{beside_path(read)}.weight"), table)
    if table.start.op == "call_module":
        indices = copied[argument_of(table.start, 0, "input")]
        rows = graph.call_function(F.embedding, (indices, rows))
    env = {**copied, table.start: rows}
    for step, axis in table.steps:
        env[step] = _step(graph, step, axis, env, read.planes)
    weight = graph.call_method("to", (env[table.weight], view))
    if not varies:
        rank = table.source.meta["val"].ndim
        view = graph.call_method("reshape", (view, (1,) * (rank - 1) + (-1,)))
    node = call.node
    if node.target is torch.einsum:
        operands = (view, weight) if table.index == 1 else (weight, view)
        return graph.call_function(torch.einsum, (node.args[0], *operands))
    if node.target is F.linear:
        return graph.call_function(F.linear, (view, weight))
    return graph.call_function(torch.matmul, (view, weight))


def _as_parameter(graph: fx.Graph, rows: fx.Node, table: Table) -> fx.Node:
    """R_m in the layout of R: its rows as R's other axes, its columns where R has them."""
    rest = [size for axis, size in enumerate(table.shape) if axis != table.axis]
    if len(rest) > 1:
        rows = graph.call_method("unflatten", (rows, 0, tuple(rest)))
    if not rest:
        return graph.call_method("squeeze", (rows, 0))
    if table.axis != len(rest):
        rows = graph.call_method("movedim", (rows, -1, table.axis))
    return rows


def _step(
    graph: fx.Graph,
    step: fx.Node,
    axis: int,
    env: Mapping[fx.Node, fx.Node],
    planes: int,
) -> fx.Node:
    """Write a step once more, of k columns, which are `axis` of its result."""
    twin = graph.node_copy(step, env.__getitem__)
    twin.meta, twin.type = {}, None
    name = called_name(step)
    if name in RESHAPES:
        key = "size" if name == "expand" else "shape"
        key = key if key in twin.kwargs else ""
        sizes: Any = twin.kwargs[key] if key else twin.args[1:]
        if not key and len(sizes) == 1 and not isinstance(sizes[0], int):
            (sizes,) = sizes
        with graph.inserting_before(twin):
            sizes = _resized(graph, sizes, axis, planes)
        if key:
            twin.update_kwarg(key, sizes)
        else:
            twin.args = (twin.args[0], sizes)
    return twin


def _resized(graph: fx.Graph, sizes: Any, axis: int, planes: int) -> Any:
    """Sizes with another one in one place."""
    if not isinstance(sizes, fx.Node):
        return (*sizes[:axis], planes, *sizes[axis + 1 :])
    first, rest = (
        graph.call_function(operator.getitem, (sizes, part))
        for part in (slice(None, axis), slice(axis + 1, None))
    )
    return graph.call_function(
        operator.add, (graph.call_function(operator.add, (first, (planes,))), rest)
    )
