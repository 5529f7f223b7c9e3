"""concat -> split: what was joined is computed apart and added, with the same parameters.

    conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)

The call of a convolution or a linear layer, or of their functions, becomes one of a function that
is given x, m and W whole (`nn.widened`), and does what is least work for their sizes. Of transposed
convolutions, and where options of a function are computed, W_x and W_m are slices, taken once a
forward, right before they are used: so backward joins their gradients as soon as both are there,
and never holds them all (in a graph that switches gradients off and on, at its beginning: a slice
taken without them has none). A view of the memory that is the same for all samples has no batch, so
its product is computed once a batch and broadcasts in the sum. Products are added in place: nothing
needs what a product was before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.lowering.products import write_padding, write_product
from aim_surgery.lowering.resizing import resize_where_needed
from aim_surgery.nn.spatial import CONVS
from aim_surgery.nn.widened import widened_conv, widened_linear
from aim_surgery.planning import Read
from aim_surgery.sites.graph import argument_of, called_by
from aim_surgery.surgery.beside import convolve_alone, set_input
from aim_surgery.surgery.notes import SiteNote, note_site
from aim_surgery.surgery.pieces import pieces_of, refuse_changed
from aim_surgery.surgery.tidy import erase_unused


def split_sites(graph: fx.Graph, root: nn.Module, reads: Mapping[str, Read]) -> bool:
    """Take the sites of one graph apart.

    Args:
        graph: The emitted graph; changed in place.
        root: The module that it belongs to; left unchanged.
        reads: The reads whose layers are widened, by site.

    Returns:
        Whether anything changed.

    Raises:
        AimSurgeryError: The graph is no longer what surgery wrote.
    """
    slices: dict[str, tuple[fx.Node, fx.Node]] = {}
    sums: dict[fx.Node, fx.Node] = {}  # a site may work right on another one's result
    first = next(node for node in graph.nodes if node.op != "placeholder")
    switches = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    modified = False
    for node, note, source, view, joined, _ in pieces_of(graph, reads):
        if joined is None:
            if source in sums:
                note_site(node, note._replace(source=sums[source].name))
            continue
        weight = reads[note.site].site.weights[0]
        operands = sums.get(source, source), view
        layer: Any = called_by(node, root)
        if layer is not None:
            refuse_changed(layer, str(node.target))
            note = note._replace(called=str(node.target))
        with graph.inserting_before(node):
            total = _whole(graph, node, layer, operands, weight)
        if total is not None:
            product = total
            own, beside = (cast("fx.Node", total.args[place]) for place in (1, 3))
        else:
            if weight not in slices:
                # a slice taken without gradients would have none wherever else it is used
                with graph.inserting_before(first if switches else node):
                    slices[weight] = _slices(graph, weight, reads[note.site])
            own, memory = slices[weight]
            if layer is not None:
                product, beside = _of_transposed(graph, layer, node, operands, (own, memory))
            else:
                product, beside = _of_function(graph, node, note, operands, (own, memory))
            with graph.inserting_before(beside.next):
                total = graph.call_method("add_", (product, beside))
        node.replace_all_uses_with(total, lambda user, own=total: user is not own)
        if product is not node:
            erase_unused(node, {operands[0], view})
        sums[node] = total
        pieces = {"source": operands[0].name, "beside": beside.name, "sliced": own.name}
        note_site(product, note._replace(**pieces))
        erase_unused(joined, {operands[0], view})
        resize_where_needed(view)
        modified = True
    return modified


def _whole(
    graph: fx.Graph, node: fx.Node, layer: Any, operands: tuple[fx.Node, fx.Node], weight: str
) -> fx.Node | None:
    """The sum of both products as one call (x, W, bias, m, *options); None where there is none."""
    if layer is None:
        linear, bias = node.target is F.linear, argument_of(node, 2, "bias")
        options = () if linear else _options(node)
    elif getattr(layer, "transposed", False):
        return None
    else:
        linear = isinstance(layer, nn.Linear)
        bias = None if layer.bias is None else graph.get_attr(f"{node.target}.bias")
        options = ()
        if not linear:
            operands, padding = write_padding(graph, layer, *operands)
            options = (layer.stride, padding, layer.dilation, layer.groups)
    if options is None:
        return None
    source, view = operands
    function = widened_linear if linear else widened_conv
    return graph.call_function(function, (source, graph.get_attr(weight), bias, view, *options))


def _options(node: fx.Node) -> tuple[Any, ...] | None:
    """Stride, padding, dilation and groups of a functional convolution, where they are literals."""
    dims = next((dims for dims, function in CONVS.items() if node.target is function), None)
    if dims is None:
        return None
    names = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    options = [argument_of(node, at, name, default=default) for at, name, default in names]
    options = [(value,) * dims if isinstance(value, int) else value for value in options]
    groups = argument_of(node, 6, "groups", default=1)
    if not isinstance(groups, int) or not all(_is_literal(value, dims) for value in options):
        return None
    return (*(value if isinstance(value, str) else tuple(value) for value in options), groups)


def _is_literal(option: Any, dims: int) -> bool:
    if isinstance(option, str):
        return True
    if not isinstance(option, tuple | list) or len(option) != dims:
        return False
    return all(isinstance(number, int) for number in option)


def _slices(graph: fx.Graph, weight: str, read: Read) -> tuple[fx.Node, fx.Node]:
    """W_x and W_m of a widened weight."""
    site, planes = read.site, read.planes
    method, item = graph.call_method, operator.getitem
    wide = graph.get_attr(weight)
    if site.kind != "conv_transpose":
        sizes = (site.in_channels // site.groups, planes)
        parts = method("split", (wide, sizes, 1))
        own, memory = (graph.call_function(item, (parts, index)) for index in (0, 1))
        # a convolution would copy the slice to work on it, and once more in backward
        return method("clone", (own,)) if site.kind == "conv" else own, memory
    each = method("unflatten", (wide, 0, (site.groups, -1)))
    parts = method("split", (each, (site.in_channels // site.groups, planes), 1))
    own, memory = (graph.call_function(item, (parts, index)) for index in (0, 1))
    turned = method("transpose", (memory, 0, 1))
    return method("flatten", (own, 0, 1)), method("flatten", (turned, 1, 2))


def _of_transposed(
    graph: fx.Graph,
    layer: Any,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    weights: tuple[fx.Node, fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """Both products of a transposed convolution's call, which is left to be erased."""
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    (source, view), (own, memory) = operands, weights
    with graph.inserting_before(node):
        bias = None if layer.bias is None else graph.get_attr(f"{node.target}.bias")
        options = {"groups": layer.groups, "output_size": size}
        product = write_product(graph, layer, source, own, bias, **options)
        options["groups"] = 1
        return product, write_product(graph, layer, view, memory, None, **options)


def _of_function(
    graph: fx.Graph,
    node: fx.Node,
    note: SiteNote,
    operands: tuple[fx.Node, fx.Node],
    weights: tuple[fx.Node, fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """Both products of a site that is a function of its weight; the node is the first of them."""
    (source, view), (own, memory) = operands, weights
    set_input(node, note, source)
    wide = argument_of(node, 1, "weight")
    node.replace_input_with(wide, own)
    erase_unused(wide)
    with graph.inserting_before(node.next):
        return node, convolve_alone(graph, node, view, memory)
