"""Rules: which calls carry an offset on; what becomes of it says `fold_offsets`.

A rule is told a node, of which at least one argument has an offset. `rule_of` looks at nothing but
the node's call and the run that `fold_watch` made, so it can be asked before the node is written.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.capture.leaves import is_plain
from aim_surgery.lowering import fold_offsets as offsets
from aim_surgery.lowering.fold_graph import FoldWriter, Rule
from aim_surgery.lowering.fold_offsets import dtype_of, ndim_of, source_of, subtracts
from aim_surgery.nn.layer_types import BATCH_NORM_TYPES, LAYER_TYPES
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of, called_name

_CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
             nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)  # fmt: skip
_LINEAR_TYPES = (*_AVERAGES, nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle, nn.Flatten)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_STOCK = (*LAYER_TYPES, *BATCH_NORM_TYPES, *_CLAMPS, *_LINEAR_TYPES, *_NOTHING)

_LINEAR = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d,
           F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d, F.interpolate, F.pixel_shuffle,
           F.pixel_unshuffle)  # fmt: skip
_MOVES = frozenset(("permute", "transpose", "swapaxes", "mean"))
_SUMS = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub)
_SCALINGS = (operator.mul, operator.truediv, torch.mul, torch.div)
_MATMULS = (torch.matmul, operator.matmul, torch.mm)
_LOOKS = frozenset(("size", "dim", "ndimension", "numel", "is_floating_point", "stride"))
_ATTRIBUTES = frozenset(("shape", "dtype", "device", "ndim", "is_cuda"))


def rule_of(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """Find the rule of a node.

    Args:
        writer: Knows the model and the run.
        node: Of the graph to be folded.

    Returns:
        The rule; None where what comes in has to be the original's value.
    """
    layer = writer.layer_of(node)
    if layer is not None:
        return _rule_of_layer(writer, node, layer)
    if node.op == "call_method":
        return _rule_of_method(writer, node)
    return _rule_of_function(writer, node) if node.op == "call_function" else None


def _rule_of_layer(writer: FoldWriter, node: fx.Node, layer: nn.Module) -> Rule | None:
    if isinstance(layer, WriteBlock) and layer.per == "batch":
        return offsets.look  # in evaluation, it doesn't even look
    kind = next((kind for kind in _STOCK if isinstance(layer, kind)), None)
    alone = bool(node.args) and all(writer.known(n) for n in node.all_input_nodes[1:])
    if kind is None or not alone or not is_plain(layer):
        return None
    if kind in LAYER_TYPES:
        return offsets.layer_product
    if kind in BATCH_NORM_TYPES:
        fixed = not layer.training and layer.running_mean is not None
        return offsets.batch_norm if fixed else None
    if kind in _CLAMPS:
        return offsets.clamp
    if kind in _NOTHING:
        return None if layer.training else offsets.unchanged
    if isinstance(layer, nn.Flatten):
        return offsets.linear if layer.start_dim > 0 else None
    return offsets.linear


def _rule_of_method(writer: FoldWriter, node: fx.Node) -> Rule | None:
    name, source = str(node.target), node.args[0]
    if name in _LOOKS:
        return offsets.look
    if name == "to" and len(node.args) == 2 and isinstance(node.args[1], fx.Node):
        apart = source in writer.aside or source in writer.watched.constant
        return offsets.look if apart else None
    if name in ("relu", "relu_"):
        return offsets.clamp
    if name in ("contiguous", "clone"):
        return offsets.unchanged
    if name in ("add", "add_", "sub", "sub_") and "alpha" not in node.kwargs:
        return offsets.added if _alike(writer, node) else None
    if name in ("mul", "div") and not node.kwargs:
        return _scaling_rule(writer, node)
    if name == "matmul":
        return _matmul_rule(writer, node)
    if name == "flatten":
        return _flatten_rule(writer, node)
    if name in _MOVES:
        return _move_rule(writer, node)
    return None


def _rule_of_function(writer: FoldWriter, node: fx.Node) -> Rule | None:
    function: Any = node.target
    source = node.args[0] if node.args else None
    if function is getattr:
        return offsets.look if node.args[1] in _ATTRIBUTES else None
    if function in _SUMS:
        return offsets.added if _alike(writer, node) and "alpha" not in node.kwargs else None
    if function in (torch.cat, torch.concat):
        return _cat_rule(writer, node)
    if not isinstance(source, fx.Node):
        return None
    if function in (F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, F.hardtanh):
        return offsets.clamp
    rest = [n for n in node.all_input_nodes if n is not source]
    if function is F.linear or function in CONV_FUNCTIONS:
        return offsets.function_product if _are_constant(writer, rest) else None
    if function in _SCALINGS:
        return _scaling_rule(writer, node)
    if function in _MATMULS:
        return _matmul_rule(writer, node)
    if function is torch.flatten:
        return _flatten_rule(writer, node)
    if function in (torch.permute, torch.transpose, torch.swapaxes, torch.mean):
        return _move_rule(writer, node)
    if function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        trains = argument_of(node, 2, "training", default=True)
        trains = writer.watched.seen[trains].value if isinstance(trains, fx.Node) else trains
        return offsets.unchanged if trains is False else None
    if function is F.pad:
        nothing = argument_of(node, 3, "value") in (None, 0)
        inside = nothing and _pads_behind_samples(writer, node)
        return offsets.linear if inside and all(writer.known(n) for n in rest) else None
    if function in _LINEAR:
        return offsets.linear if all(writer.known(n) for n in rest) else None
    return None


def _matmul_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """A product with a constant matrix at the right."""
    other = argument_of(node, 1, "other", "mat2")
    constant = isinstance(other, fx.Node) and other in writer.watched.constant
    return offsets.matmul if constant and ndim_of(writer, other) == 2 else None


def _pads_behind_samples(writer: FoldWriter, node: fx.Node) -> bool:
    """Whether the first axis, which offsets have of length one, is not padded."""
    pads = argument_of(node, 1, "pad")
    return isinstance(pads, list | tuple) and len(pads) < 2 * ndim_of(writer, node.args[0])


def _alike(writer: FoldWriter, node: fx.Node) -> bool:
    """Whether a sum's operands are tensors of its own type, or numbers; one has its sizes.

    The memory's part itself is no first operand of a difference: what stays would change its sign.
    """
    if len(node.args) != 2:
        return False
    if node.args[0] in writer.aside and subtracts(node):
        return False
    seen = writer.watched.seen
    out = seen[node]
    whole = False
    for operand in node.args:
        if not isinstance(operand, fx.Node):
            continue
        if seen[operand].shape is None:
            return False
        if seen[operand].dtype != out.dtype:
            return False
        if operand not in writer.aside and operand not in writer.watched.constant:
            whole = whole or seen[operand].shape == out.shape
    return whole


def _flatten_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    start = argument_of(node, 1, "start_dim", default=0)
    inside = isinstance(start, int) and start % ndim_of(writer, source_of(node)) > 0
    return offsets.linear if inside else None


def _move_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """Axes are told by numbers, and the first one stays where it is."""
    if node.all_input_nodes[1:] or "dtype" in node.kwargs:
        return None
    name, ndim = called_name(node), ndim_of(writer, source_of(node))
    axes: Any = node.args[1:]
    if name == "mean":
        axes = argument_of(node, 1, "dim")
    axes = (
        axes[0]
        if isinstance(axes, tuple | list) and axes and not isinstance(axes[0], int)
        else axes
    )
    axes = (axes,) if isinstance(axes, int) else axes
    if not axes or not all(isinstance(axis, int) for axis in axes):
        return None
    axes = [axis % ndim for axis in axes]
    stays = axes[0] == 0 if name == "permute" else 0 not in axes
    return offsets.moved if stays else None


def _scaling_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """A product with a number or a constant; a quotient, where that is the divisor."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    second_is_live = isinstance(second, fx.Node) and second not in writer.watched.constant
    other = first if second_is_live else second
    if isinstance(other, fx.Node) and other not in writer.watched.constant:
        return None
    divides = called_name(node) in ("div", "truediv")
    if isinstance(other, fx.Node):
        ndim = ndim_of(writer, other)
        source = second if second_is_live else first
        if ndim > ndim_of(writer, source) or writer.watched.seen[other].dtype != dtype_of(
            writer, node
        ):
            return None
    return None if divides and second_is_live else offsets.scaling


def _cat_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """Tensors, behind one another along another axis than the samples'."""
    tensors = node.args[0] if node.args else None
    axis = argument_of(node, 1, "dim", default=0)
    if not isinstance(tensors, list | tuple) or not isinstance(axis, int):
        return None
    if not all(
        isinstance(n, fx.Node) and dtype_of(writer, n) == dtype_of(writer, node) for n in tensors
    ):
        return None
    if not writer.aside.isdisjoint(tensors):
        return None
    return offsets.cat if axis % ndim_of(writer, node) > 0 else None


def _are_constant(writer: FoldWriter, nodes: list[fx.Node]) -> bool:
    return writer.watched.constant.issuperset(nodes)
