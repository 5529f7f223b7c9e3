"""concat -> split: what was joined is computed apart and added, with the same parameters.

    conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)

W_x and W_m are slices of the widened weight, taken once a forward, right before they are used: so
backward joins their gradients as soon as both are there, and never holds them all (in a graph that
switches gradients off and on, at its beginning: a slice taken without them has none). A view of the
memory that is the same for all samples has no batch, so its product is computed once a batch; of a
linear layer it goes into the bias, of a pointwise convolution it is what the product starts from
(`pointwise`), else it broadcasts in the sum. Where each sample has its own memory, the product is
added as it is computed (`add_product`). Depthwise and grouped convolutions keep their own kernels.
Products are added in place: nothing needs what a product was before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from aim_surgery.lowering.products import write_product
from aim_surgery.nn.add_product import add_product, is_better
from aim_surgery.nn.pointwise import is_pointwise, pointwise
from aim_surgery.nn.spatial import ADAPTIVE_POOLS
from aim_surgery.nn.views import resized
from aim_surgery.planning import Plan, Read
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of
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
        if weight not in slices:
            layer = root.get_submodule(str(node.target)) if node.op == "call_module" else None
            # a slice taken without gradients would have none wherever else it is used
            with graph.inserting_before(first if switches else node):
                slices[weight] = _slices(graph, weight, read, copied=not is_pointwise(layer))
        own, memory = slices[weight]
        source = sums.get(source, source)
        varies = plan.varies(read.memory, read.version)
        if node.op == "call_module":
            operands = (source, view), (own, memory)
            product, beside = _of_layer(graph, root, node, *operands, varies=varies)
            note = note._replace(called=str(node.target))
        else:
            product, beside = _of_function(graph, node, note, (source, view), (own, memory))
        total = product
        if beside not in product.all_input_nodes:
            with graph.inserting_before(beside.next):
                wide = operator.attrgetter(weight)(root) if varies else None
                total, beside = _sum(graph, product, beside, wide, read.planes)
        node.replace_all_uses_with(total, lambda user, own=total: user is not own)
        if product is not node:
            graph.erase_node(node)
        sums[node] = total
        note_site(product, note._replace(source=source.name, beside=beside.name, sliced=own.name))
        erase_unused(joined, {source, view})
        resize_where_needed(view)
        modified = True
    return modified


def _slices(graph: fx.Graph, weight: str, read: Read, *, copied: bool) -> tuple[fx.Node, fx.Node]:
    """W_x and W_m of a widened weight."""
    site, planes = read.site, read.planes
    method, item = graph.call_method, operator.getitem
    wide = graph.get_attr(weight)
    if site.kind != "conv_transpose":
        sizes = (site.in_channels // site.groups, planes)
        parts = method("split", (wide, sizes, 1))
        own, memory = (graph.call_function(item, (parts, index)) for index in (0, 1))
        # a convolution would copy the slice to work on it, and once more in backward
        copied = copied and site.kind == "conv"
        return method("clone", (own,)) if copied else own, memory
    each = method("unflatten", (wide, 0, (site.groups, -1)))
    parts = method("split", (each, (site.in_channels // site.groups, planes), 1))
    own, memory = (graph.call_function(item, (parts, index)) for index in (0, 1))
    turned = method("transpose", (memory, 0, 1))
    return method("flatten", (own, 0, 1)), method("flatten", (turned, 1, 2))


def _of_layer(
    graph: fx.Graph,
    root: nn.Module,
    node: fx.Node,
    operands: tuple[fx.Node, fx.Node],
    weights: tuple[fx.Node, fx.Node],
    *,
    varies: bool,
) -> tuple[fx.Node, fx.Node]:
    """Both products of a site that is the call of a layer; the call itself is left to be erased.

    The first works on the second where it is their sum already; of a pointwise convolution, on the
    memory itself.
    """
    layer: Any = root.get_submodule(str(node.target))
    refuse_changed(layer, str(node.target))
    size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    groups = getattr(layer, "groups", 1)
    (source, view), (own, memory) = operands, weights
    with graph.inserting_before(node):
        bias = None if layer.bias is None else graph.get_attr(f"{node.target}.bias")
        if is_pointwise(layer):
            arguments = (source, own, bias, view, memory, layer.stride)
            return graph.call_function(pointwise, arguments), view
        if isinstance(layer, nn.Linear) and not varies:
            beside = graph.call_function(F.linear, (view, memory, bias))
            return graph.call_function(F.linear, (source, own, beside)), beside
        product = write_product(graph, layer, source, own, bias, groups=groups, output_size=size)
        beside = write_product(graph, layer, view, memory, None, groups=1, output_size=size)
    return product, beside


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
