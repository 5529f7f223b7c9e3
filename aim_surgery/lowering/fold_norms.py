"""conv -> batch norm becomes one convolution, memory or not.

    s (W_x x + b + W_m m) + c  =  (s W_x) x + (s b + c) + (s W_m) m

In evaluation scale s and shift c are constants, one a channel. Both weights are scaled, so a sum of
two products stays one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture.leaves import is_plain
from aim_surgery.lowering.ownership import Ownership
from aim_surgery.nn.graph_state import NOTE
from aim_surgery.nn.layer_types import BATCH_NORM_TYPES, CONV_TRANSPOSE_TYPES, CONV_TYPES
from aim_surgery.sites.graph import argument_of, called_by
from aim_surgery.surgery.notes import SiteNote

_CONVS = (*CONV_TYPES, *CONV_TRANSPOSE_TYPES)


def affine(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a batch norm in evaluation, (C,) each."""
    with torch.no_grad():
        scale = (layer.running_var + layer.eps).rsqrt()
        scale = scale if layer.weight is None else layer.weight * scale
        shift = -layer.running_mean * scale
        return scale, shift if layer.bias is None else layer.bias + shift


def fold_batch_norms(graph: fx.Graph, root: nn.Module) -> int:
    """Merge each batch norm in evaluation into the convolution that it alone follows.

    Args:
        graph: A graph in which each read is a sum of two products; changed in place.
        root: The module that it belongs to; weights and biases change, merged norms go.

    Returns:
        How many were merged.
    """
    owned = Ownership(graph, root)
    layers_looked_at = {path.rpartition(".")[0] for path in owned.looked_at}

    def alone(node: fx.Node) -> nn.modules.conv._ConvNd | None:
        """The convolution that a node calls, where nothing else has to do with its tensors."""
        layer = called_by(node, root)
        own = isinstance(layer, _CONVS) and owned.is_alone(node, "weight", "bias")
        return layer if own else None  # type: ignore[return-value]

    merged = 0
    for node in list(graph.nodes):
        norm: Any = called_by(node, root)
        if not isinstance(norm, BATCH_NORM_TYPES) or not is_plain(norm) or norm.training:
            continue
        source = argument_of(node, 0, "input")
        if norm.running_mean is None or not isinstance(source, fx.Node):
            continue
        products = _products(source)
        layers = [alone(product) for product in products]
        if len(source.users) > 1 or None in layers:
            continue
        scale, shift = affine(norm)
        for layer, added in zip(layers, (shift, None), strict=False):
            _scale(layer, scale, added)
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        if owned.calls[str(node.target)] == 1 and node.target not in layers_looked_at:
            root.delete_submodule(str(node.target))  # pyright: ignore[reportCallIssue]
        merged += 1
    return merged


def _products(node: fx.Node) -> list[fx.Node]:
    """The products that a node is the sum of, the layer's own first."""
    if node.target not in (operator.add, operator.iadd) or len(node.args) != 2:
        return [node]
    site, beside = node.args
    note = site.meta.get(NOTE) if isinstance(site, fx.Node) else None
    reads = (
        isinstance(note, SiteNote) and isinstance(beside, fx.Node) and note.beside == beside.name
    )
    if reads and len(site.users) == len(beside.users) == 1:  # type: ignore[union-attr]
        return [site, beside]  # type: ignore[list-item]
    return [node]


def _scale(layer: Any, scale: torch.Tensor, shift: Any) -> None:
    """Scale a convolution's output; add a shift, with its scaled bias."""
    weight = layer._parameters["weight"].detach()
    rest = (1,) * len(layer.kernel_size)
    if layer.transposed:
        each = scale.view(layer.groups, 1, -1, *rest)
        wide = (weight.unflatten(0, (layer.groups, -1)) * each).flatten(0, 1)
    else:
        wide = weight * scale.view(-1, 1, *rest)
    layer._parameters["weight"] = nn.Parameter(wide.to(weight), requires_grad=False)
    if shift is not None:
        bias = layer._parameters.get("bias")
        shift = shift if bias is None else bias.detach() * scale + shift
        layer._parameters["bias"] = nn.Parameter(shift.to(weight), requires_grad=False)
