"""Writes conv(m, W_m): the part of a site's sum that is the memory's, where W_m lives beside.

    conv(cat[x, m], [W_x ; W_m]) = conv(x, W_x) + conv(m, W_m)

A view that is the same for all samples has no batch, and neither has the result: it is computed
once and broadcasts in the sum. W_m has one group, because each group of W_x gets all k planes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.planning import Read
from aim_surgery.surgery.modules import beside_path
from aim_surgery.surgery.notes import SiteNote


def write_beside(
    graph: fx.Graph,
    node: fx.Node,
    read: Read,
    note: SiteNote,
    view: fx.Node,
    *,
    computed: bool = False,
) -> fx.Node:
    """Write conv(m, W_m) at the graph's point of insertion.

    Args:
        graph: The emitted graph; changed in place.
        node: The site's node, which gives conv(x, W_x); its options are copied.
        read: The site's read.
        note: What is noted at the node.
        view: The node m.
        computed: Whether W_x is computed, maybe in another dtype than its parameter's.

    Returns:
        The node to be added to the site's.
    """
    path = beside_path(read)
    if node.op == "call_module":
        twin = _copied(graph, node)
        twin.target = path
        set_input(twin, note, view)
        _without_batch(graph, twin, len(read.site.spatial))
        return twin
    weight = graph.get_attr(f"{path}.weight")
    if computed:
        weight = graph.call_method("to", (weight, view))
    if read.site.kind == "linear":
        product = graph.call_function(F.linear, (view, weight))
        if len(note.features) > 1:
            product = graph.call_method("unflatten", (product, -1, note.features))
        return graph.call_method("unsqueeze", (product, -1)) if note.rows else product
    return convolve_alone(graph, node, view, weight)


def input_of(node: fx.Node, note: SiteNote) -> fx.Node | None:
    """What a site's node works on; None where that is no node."""
    positional = note.input_index < len(node.args)
    found = node.args[note.input_index] if positional else node.kwargs.get(note.input_name)
    return found if isinstance(found, fx.Node) else None


def set_input(node: fx.Node, note: SiteNote, source: fx.Node) -> None:
    """Let a site's node work on something else."""
    if note.input_index < len(node.args):
        node.update_arg(note.input_index, source)
    else:
        node.update_kwarg(note.input_name, source)


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    twin = graph.node_copy(node)
    twin.meta = {}
    return twin


def _without_batch(graph: fx.Graph, twin: fx.Node, dims: int) -> None:
    """Cut a transposed convolution's `output_size` down to the spatial sizes."""
    if len(twin.args) < 2 and "output_size" not in twin.kwargs:
        return
    size = twin.args[1] if len(twin.args) > 1 else twin.kwargs["output_size"]
    if isinstance(size, fx.Node):
        with graph.inserting_before(twin):
            size = graph.call_function(operator.getitem, (size, slice(-dims, None)))
    elif isinstance(size, Sequence):
        size = size[-dims:]
    twin.args = twin.args[:1]
    twin.kwargs = {**twin.kwargs, "output_size": size}


def convolve_alone(graph: fx.Graph, node: fx.Node, view: fx.Node, weight: fx.Node) -> fx.Node:
    """Write conv(m, W_m) as a functional convolution is written: no bias, one group.

    Args:
        graph: The emitted graph; changed in place.
        node: The site's node; its options are copied.
        view: The node m.
        weight: The node W_m.

    Returns:
        The new node.
    """
    twin = _copied(graph, node)
    args, kwargs = list(twin.args), dict(twin.kwargs)
    replacements = {0: ("input", view), 1: ("weight", weight), 2: ("bias", None), 6: ("groups", 1)}
    for index, (name, value) in replacements.items():
        if index < len(args):
            args[index] = value
        elif name in kwargs:
            kwargs[name] = value
    twin.args, twin.kwargs = tuple(args), kwargs
    return twin
