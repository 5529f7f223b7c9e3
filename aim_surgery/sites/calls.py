"""Which nodes of a captured graph are sites: calls of layers, functions, matrix products.

A call is a site where its weight does not depend on the input: a plain parameter, a tied one, or
one computed from parameters (weight standardisation, parametrisations).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torch.fx.node import map_arg

from aim_surgery.capture import Capture
from aim_surgery.nn.layer_types import LAYER_TYPES
from aim_surgery.sites.graph import argument_of, attribute, is_call, is_float, weight_sources
from aim_surgery.sites.layers import (
    geometry_of,
    weights_of,
    why_beside,
    why_inside_too,
    why_not_plain,
)
from aim_surgery.sites.once import found_once
from aim_surgery.sites.products import Product, find_product
from aim_surgery.sites.samples import Samples, find_samples
from aim_surgery.sites.site import Kind, Site
from aim_surgery.sites.tables import Table, find_table

_CONV_KINDS: tuple[Kind, ...] = ("conv", "conv_transpose")
CONV_FUNCTIONS: dict[Any, Kind] = {
    getattr(home, f"{kind}{dims}d"): kind
    for dims in (1, 2, 3)
    for kind in _CONV_KINDS
    for home in (F, torch)
}
_MATMULS = (torch.matmul, operator.matmul, torch.mm)


@dataclass(frozen=True)
class Call:
    """A site with its node: what surgery needs and a plan must not hold."""

    site: Site
    node: fx.Node
    input_index: int  # position of the activation among the node's arguments
    input_name: str  # its keyword
    weight_first: bool = False  # a product W @ x, whose features are rows
    weight: fx.Node | None = None  # its weight, where the layer is no module of the graph
    product: Product | None = None  # where its weight is no plain matrix
    table: Table | None = None  # where it multiplies with rows of one

    @property
    def source(self) -> fx.Node:
        """What the site works on."""
        return argument_of(self.node, self.input_index, self.input_name)

    def channel_axis(self, node: fx.Node) -> int:
        """The axis over channels of the site's input or output, non-negative."""
        behind = len(self.site.kernel_size) or int(self.weight_first)
        return max(node.meta["val"].ndim - 1 - behind, 0)


@found_once
def find_calls(capture: Capture, graph: fx.Graph) -> tuple[Call, ...]:
    """The sites of one graph with their nodes, in execution order.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.

    Returns:
        One `Call` for each site.
    """
    weights = weight_sources(capture, graph)
    looked_at = _weights_looked_at(capture)
    seen: Counter[str] = Counter()
    geometries: dict[str, list[tuple[Any, ...]]] = {}
    model = capture.model
    taken = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    formulas: dict[fx.Node | str, int] = {}
    sized = weight_sources(capture, graph, sized=True)
    found = [
        call
        for node in graph.nodes
        if (
            call := _layer_call(capture, looked_at, node)
            or _function_call(capture, weights, node)
            or _table_call(capture, sized, node)
        )
    ]
    samples = samples_of(capture, graph, found)
    calls = []
    for call in found:
        site = call.site
        geometry = (
            site.kind,
            site.in_channels,
            site.out_channels,
            site.groups,
            site.kernel_size,
            _formula(call.weight, formulas),
        )
        known = geometries.setdefault(site.layer, [])
        if geometry not in known:
            known.append(geometry)
        # two shapes or slices of one weight (an autoencoder that decodes with W^T, the query and
        # the key part of packed attention) are two layers
        layer = _layer_name(site.layer, known.index(geometry), taken)
        name = f"{layer}@{seen[layer]}" if seen[layer] else layer
        seen[layer] += 1
        axis, windows = samples.at(call.source, call.channel_axis(call.source))
        unaligned = call.product is not None and not call.product.aligned
        # W @ x: samples would lie behind the features
        behind = call.weight_first and axis == call.source.meta["val"].ndim - 1
        if unaligned or behind:
            axis, windows = None, 1
        if not site.spatial:
            entries = call.node.meta["val"].numel() // max(site.out_channels, 1)
            site = replace(site, positions=-(-entries // (max(samples.count, 1) * windows)))
        site = replace(site, name=name, layer=layer, sample_axis=axis, windows=windows)
        calls.append(replace(call, site=site))
    return tuple(calls)


def samples_of(capture: Capture, graph: fx.Graph, calls: Sequence[Call]) -> Samples:
    """Where the samples are in a graph whose sites are known (`find_samples`)."""
    worked_on = [(c.source, len(c.site.kernel_size) + 1) for c in calls if c.table is None]
    return find_samples(capture, graph, worked_on)


# Module calls -------------------------------------------------------------------------------


def _layer_call(capture: Capture, looked_at: frozenset[str], node: fx.Node) -> Call | None:
    if node.op != "call_module":
        return None
    layer = capture.modules[str(node.target)]
    source = argument_of(node, 0, "input")
    if not isinstance(layer, LAYER_TYPES) or not is_float(source):
        return None
    names = weights_of(capture, str(node.target))
    geometry = geometry_of(layer)
    if not names or geometry is None or not _is_product(layer, source, node):
        return None
    why = why_beside(capture, layer) or why_inside_too(capture, layer.weight)
    if not why and not looked_at.isdisjoint(names):
        why = "its weight has other uses"
    kind, inputs, outputs, groups, kernel = geometry
    features = (inputs, outputs)
    site = _site(str(node.target), kind, features, groups, kernel, source, node, names, why)
    return Call(site, node, 0, "input")


def _is_product(layer: nn.Module, source: fx.Node, node: fx.Node) -> bool:
    """Whether the call gives what the layer alone would: hooks may have changed the shape."""
    value, output = source.meta["val"], node.meta["val"]
    if not isinstance(output, torch.Tensor):
        return False
    if not (layer._forward_hooks or layer._forward_pre_hooks) or len(node.all_input_nodes) > 1:
        return True
    if isinstance(layer, nn.Linear):
        return output.shape == (*value.shape[:-1], layer.out_features)
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    lead, sizes = value.shape[: -len(layer.kernel_size) - 1], value.shape[-len(layer.kernel_size) :]
    after = tuple(_output_size(layer, axis, int(size)) for axis, size in enumerate(sizes))
    return output.shape == (*lead, layer.out_channels, *after)


def _output_size(layer: nn.modules.conv._ConvNd, axis: int, size: int) -> int:
    """Positions along one axis after a convolution (see the formulas of `nn.Conv2d`)."""
    stride, reach = layer.stride[axis], layer.dilation[axis] * (layer.kernel_size[axis] - 1)
    if isinstance(layer.padding, str):
        padding = reach / 2 if layer.padding == "same" else 0
    else:
        padding = int(layer.padding[axis])
    if layer.transposed:
        return int((size - 1) * stride - 2 * padding + reach + layer.output_padding[axis] + 1)
    return int((size + 2 * padding - reach - 1) // stride + 1)


# Function calls -----------------------------------------------------------------------------


def _function_call(
    capture: Capture,
    weights: dict[fx.Node, tuple[str, ...]],
    node: fx.Node,
) -> Call | None:
    found = _operands(node, weights)
    if found is None:
        return _product_call(weights, node)
    kind, source, weight = found.kind, found.source, found.weight
    names = weights.get(weight)
    if not names or not is_float(source):
        return None
    shape = tuple(weight.meta["val"].shape)
    groups = 1
    if kind == "linear":
        rows_are_outputs = node.target is F.linear or found.weight_first
        features = (shape[1], shape[0]) if rows_are_outputs else (shape[0], shape[1])
        kernel = ()
    else:
        groups = argument_of(node, 6, "groups", default=1)
        if not isinstance(groups, int):
            return None
        kernel = shape[2:]
        features = (shape[1] * groups, shape[0])
        if kind == "conv_transpose":
            features = (shape[0], shape[1] * groups)
    why = _why_function_beside(capture, kind, node, weight)
    # `conv.weight` belongs to the layer `conv`, though its forward has been traced through
    layer = names[0].removesuffix(".weight")
    first = found.weight_first
    site = _site(layer, kind, features, groups, kernel, source, node, names, why, rows=first)
    return Call(site, node, found.index, found.name, first, weight)


def _product_call(weights: dict[fx.Node, tuple[str, ...]], node: fx.Node) -> Call | None:
    found = find_product(node)
    names = weights.get(found.weight) if found is not None else None
    if found is None or not names or found.source in weights or not is_float(found.source):
        return None
    sizes = (found.inputs, math.prod(found.features))
    layer, why = names[0].removesuffix(".weight"), "it is no product with a plain matrix"
    site = _site(layer, "linear", sizes, 1, (), found.source, node, names, why)
    return Call(site, node, found.index, found.name, weight=found.weight, product=found)


def _table_call(
    capture: Capture, weights: dict[fx.Node, tuple[str, ...]], node: fx.Node
) -> Call | None:
    table = find_table(capture, weights, node)
    if table is None:
        return None
    names = weights[table.weight]
    sizes = (table.columns, table.rows)
    layer, why = names[0].removesuffix(".weight"), "it multiplies with rows of a table"
    site = _site(layer, "linear", sizes, 1, (), table.source, node, names, why)
    return Call(site, node, table.index, table.name, table=table)


@dataclass(frozen=True)
class _Operands:
    """What a function multiplies: an activation and a weight."""

    kind: Kind
    source: fx.Node
    weight: fx.Node
    index: int  # of the activation among the arguments
    name: str  # its keyword
    weight_first: bool = False


def _operands(node: fx.Node, weights: dict[fx.Node, tuple[str, ...]]) -> _Operands | None:
    """The operands of a functional site, None where the call is none."""
    function = node.target if node.op == "call_function" else None
    if function in CONV_FUNCTIONS or function is F.linear:
        kind: Kind = CONV_FUNCTIONS.get(function, "linear")
        places = ((0, ("input",)), (1, ("weight",)))
    elif is_call(node, (torch.addmm,), {"addmm"}):
        kind, places = "linear", ((1, ("mat1",)), (2, ("mat2",)))
    elif is_call(node, _MATMULS, {"matmul", "mm"}):
        kind, places = "linear", ((0, ("input",)), (1, ("other", "mat2")))
    else:
        return None
    first, second = (argument_of(node, index, *names) for index, names in places)
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    weight_first = kind == "linear" and function is not F.linear and first in weights
    source, weight = (second, first) if weight_first else (first, second)
    if source in weights or (kind == "linear" and weight.meta["val"].ndim != 2):
        return None
    index, names = places[1 if weight_first else 0]
    name = next((name for name in names if name in node.kwargs), names[0])
    return _Operands(kind, source, weight, index, name, weight_first)


def _why_function_beside(capture: Capture, kind: Kind, node: fx.Node, weight: fx.Node) -> str:
    if weight.op != "get_attr":
        return "its weight is computed"
    if kind == "linear" and node.target is not F.linear:
        return "it is a matrix product"
    parameter = attribute(capture, str(weight.target))
    why = why_not_plain(capture, parameter) or why_inside_too(capture, parameter)
    if why:
        return why
    path = str(weight.target).rpartition(".")[0]
    calls = (n for n in node.graph.nodes if n.op == "call_module" and n.target == path)
    if len(_uses(weight)) > 1 or next(calls, None) is not None:
        return "its weight has other uses"
    elsewhere = _uses_in_other_graphs(capture, weight)
    if len(elsewhere) > 1 or any(user.target is not node.target for user in elsewhere):
        return "its weight has other uses in another mode"
    module = capture.modules[path]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "its weight is an embedding"
    return ""


def _uses_in_other_graphs(capture: Capture, weight: fx.Node) -> list[fx.Node]:
    same = (node for node in _named(capture) if node.target == weight.target)
    return [user for node in same if node.graph is not weight.graph for user in _uses(node)]


def _formula(node: fx.Node | None, numbers: dict[fx.Node | str, int]) -> int | None:
    """The number of what a weight is computed by: equal formulas have one; None: a parameter."""
    if node is None or node.op == "get_attr":
        return None
    pending = [node]
    while pending:
        last = pending[-1]
        missing = [source for source in last.all_input_nodes if source not in numbers]
        pending += missing
        if not missing:
            arguments = map_arg((last.args, last.kwargs), lambda n: ("number", numbers[n]))
            formula = f"{last.op} {last.target} {arguments}"
            numbers[last] = numbers.setdefault(formula, len(numbers))
            pending.pop()
    return numbers[node]


# Both ---------------------------------------------------------------------------------------


def _site(
    layer: str,
    kind: Kind,
    features: tuple[int, int],
    groups: int,
    kernel: tuple[int, ...],
    source: fx.Node,
    node: fx.Node,
    weights: tuple[str, ...],
    why_beside: str,
    *,
    rows: bool = False,
) -> Site:
    """A site from its nodes' values; `rows`: a product whose features are rows, not columns."""
    value, output = source.meta["val"], node.meta["val"]
    dims = len(kernel)
    spatial = tuple(value.shape[value.ndim - dims :]) if dims else ()
    after = output.shape[output.ndim - dims :] if dims else output.shape[1:-1]
    if rows:
        after = (*output.shape[1:-2], output.shape[-1]) if output.ndim > 1 else ()
    return Site(
        name=layer,
        layer=layer,
        kind=kind,
        in_channels=int(features[0]),
        out_channels=int(features[1]),
        groups=groups,
        kernel_size=tuple(int(size) for size in kernel),
        spatial=tuple(int(size) for size in spatial),
        positions=math.prod(int(size) for size in after),
        output_size=tuple(int(size) for size in after) if dims else (),
        weights=weights,
        widens=not why_beside,
        why_beside=why_beside,
    )


def _layer_name(layer: str, number: int, taken: Collection[str]) -> str:
    """A name for the further shapes of a weight, `W_2`, that nothing else in the model has."""
    free = (name for n in itertools.count(2) if (name := f"{layer}_{n}") not in taken)
    return next(itertools.islice(free, number - 1, None)) if number else layer


def _weights_looked_at(capture: Capture) -> frozenset[str]:
    """Parameters that some graph uses by name: not through a call of their own layer alone."""
    return frozenset(str(node.target) for node in _named(capture) if _uses(node))


@found_once
def _named(capture: Capture) -> tuple[fx.Node, ...]:
    """The nodes of all graphs that give a tensor by name."""
    nodes = (node for trace in capture.traces for node in trace.graph.nodes)
    return tuple(node for node in nodes if node.op == "get_attr")


def _uses(weight: fx.Node) -> list[fx.Node]:
    """The users of a weight that a wider one would not do for: its dtype it has all the same."""
    return [
        user
        for user in weight.users
        if user.target is not getattr or user.args[1] not in ("dtype", "device")
    ]
