"""concat -> split: what was joined is computed apart and added, with the same parameters.

    conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)

The call of a convolution or a linear layer becomes one of a function that is given x, m and W whole
(`nn.widened`), and does what is least work for their sizes. Of transposed convolutions and of
functions that are called with a weight, W_x and W_m are slices, taken once a forward, right before
they are used: so backward joins their gradients as soon as both are there, and never holds them all
(in a graph that switches gradients off and on, at its beginning: a slice taken without them has
none). A view of the memory that is the same for all samples has no batch, so its product is
computed once a batch and broadcasts in the sum. Where each sample has its own memory, the product
is added as it is computed (`add_product`). Products are added in place: nothing needs what a
product was before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from aim_surgery.lowering.products import write_padding, write_product
from aim_surgery.nn.add_product import add_product, is_better
from aim_surgery.nn.spatial import ADAPTIVE_POOLS
from aim_surgery.nn.views import resized
from aim_surgery.nn.widened import widened_conv, widened_linear
from aim_surgery.planning import Plan, Read
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of, called_by
from aim_surgery.surgery.beside import convolve_alone, set_input
from aim_surgery.surgery.notes import SiteNote, note_site
from aim_surgery.surgery.pieces import pieces_of, refuse_changed
from aim_surgery.surgery.tidy import erase_unused


def split_sites(graph: fx.Graph, root: nn.Module, plan: Plan, reads: Mapping[str, Read]) -> bool:
    """Take the sites of one graph apart.

    Args:
        graph: The emitted graph; changed in place.
        root: The module that it belongs to; left unchanged.
        plan: What it was operated by.
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
            continue
        read = reads[note.site]
        weight = read.site.weights[0]
        operands = sums.get(source, source), view
        layer: Any = called_by(node, root)
        if layer is not None:
            refuse_changed(layer, str(node.target))
            note = note._replace(called=str(node.target))
        if layer is not None and not getattr(layer, "transposed", False):
            with graph.inserting_before(node):
                own = graph.get_attr(weight)
                product, beside = _of_layer(graph, layer, str(node.target), operands, own)
        else:
            if weight not in slices:
                # a slice taken without gradients would have none wherever else it is used
                with graph.inserting_before(first if switches else node):
                    slices[weight] = _slices(graph, weight, read)
            own, memory = slices[weight]
            if layer is not None:
                product, beside = _of_transposed(graph, layer, node, operands, (own, memory))
            else:
                product, beside = _of_function(graph, node, note, operands, (own, memory))
        total = product
        if beside not in product.all_input_nodes:
            varies = plan.varies(read.memory, read.version)
            with graph.inserting_before(beside.next):
                wide = operator.attrgetter(weight)(root) if varies else None
                total, beside = _sum(graph, product, beside, wide, read.planes)
        node.replace_all_uses_with(total, lambda user, own=total: user is not own)
        if product is not node:
            graph.erase_node(node)
        sums[node] = total
        pieces = {"source": operands[0].name, "beside": beside.name, "sliced": own.name}
        note_site(product, note._replace(**pieces))
        erase_unused(joined, {operands[0], view})
        resize_where_needed(view)
        modified = True
    return modified


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


def _of_layer(
    graph: fx.Graph, layer: Any, path: str, operands: tuple[fx.Node, fx.Node], wide: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """The sum of both products of a layer's call, and the operand of it that is the memory."""
    bias = None if layer.bias is None else graph.get_attr(f"{path}.bias")
    if isinstance(layer, nn.Linear):
        source, view = operands
        return graph.call_function(widened_linear, (source, wide, bias, view)), view
    (source, view), padding = write_padding(graph, layer, *operands)
    arguments = (source, wide, bias, view, layer.stride, padding, layer.dilation, layer.groups)
    return graph.call_function(widened_conv, arguments), view


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
        if node.target in CONV_FUNCTIONS:
            return node, convolve_alone(graph, node, view, memory)
        return node, graph.call_function(F.linear, (view, memory))


def _sum(
    graph: fx.Graph, product: fx.Node, beside: fx.Node, wide: Tensor | None, planes: int
) -> tuple[fx.Node, fx.Node]:
    """Both products added in place, and the operand that is the memory's.

    Of samples that have a memory each, a convolution is added without being written out, unless its
    columns (k·K numbers a position) would be more than its result.
    """
    convolves = beside.target in (F.conv1d, F.conv2d, F.conv3d)
    if wide is None or not convolves or not is_better(planes, len(wide), wide.shape[2:]):
        return graph.call_method("add_", (product, beside)), beside
    names = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    options = [argument_of(beside, at, name, default=default) for at, name, default in names]
    dims = wide.ndim - 2
    options = [(option,) * dims if isinstance(option, int) else option for option in options]
    numbers = all(
        isinstance(option, tuple | list)
        and len(option) == dims
        and all(isinstance(number, int) for number in option)
        for option in options
    )
    if not numbers:
        return graph.call_method("add_", (product, beside)), beside
    view, memory = argument_of(beside, 0, "input"), argument_of(beside, 1, "weight")
    assert isinstance(view, fx.Node)
    total = graph.call_function(add_product, (product, view, memory, *map(tuple, options)))
    graph.erase_node(beside)
    return total, view


def resize_where_needed(view: fx.Node) -> None:
    """Let planes that have a site's size be seen as they are.

    Args:
        view: What a site sees of the memory; the graph changes in place.
    """
    node = view
    while node.target in ("to", "reshape", torch.repeat_interleave):
        node = node.all_input_nodes[0]
    if node.target in ADAPTIVE_POOLS.values() and isinstance(node.args[1], fx.Node):
        node.target = resized
