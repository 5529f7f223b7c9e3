"""Rules: which calls carry an offset on, and what becomes of it.

    product       W(t + o) + b         = (W t + b) + W o
    batch norm    s (t + o) + c        = s t + (s o + c)          in evaluation
    relu          max(t + o, 0)        = max(t, -o) + o           relu6, hardtanh alike
    sum           (t + o) + (t' + o')  = (t + t') + (o + o')
    linear        f(t + o)             = f(t) + f(o)              pooling, flatten, resize, scaling

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
from aim_surgery.lowering.fold_graph import FoldWriter, Live, Rule
from aim_surgery.lowering.fold_norms import affine
from aim_surgery.lowering.fold_parts import Part
from aim_surgery.lowering.products import write_product
from aim_surgery.nn.folded import at_least, scaled_plus, within
from aim_surgery.nn.layer_types import BATCH_NORM_TYPES, LAYER_TYPES
from aim_surgery.nn.pointwise import sees_one_position
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
        return _look  # in evaluation, it doesn't even look
    kind = next((kind for kind in _STOCK if isinstance(layer, kind)), None)
    alone = bool(node.args) and all(writer.known(n) for n in node.all_input_nodes[1:])
    if kind is None or not alone or not is_plain(layer):
        return None
    if kind in LAYER_TYPES:
        return _layer_product
    if kind in BATCH_NORM_TYPES:
        fixed = not layer.training and layer.running_mean is not None
        return _batch_norm if fixed else None
    if kind in _CLAMPS:
        return _clamp
    if kind in _NOTHING:
        return None if layer.training else _unchanged
    if isinstance(layer, nn.Flatten):
        return _linear if layer.start_dim > 0 else None
    return _linear


def _rule_of_method(writer: FoldWriter, node: fx.Node) -> Rule | None:
    name, source = str(node.target), node.args[0]
    if name in _LOOKS:
        return _look
    if name == "to" and len(node.args) == 2 and isinstance(node.args[1], fx.Node):
        apart = source in writer.aside or source in writer.watched.constant
        return _look if apart else None
    if name in ("relu", "relu_"):
        return _clamp
    if name in ("contiguous", "clone"):
        return _unchanged
    if name in ("add", "add_", "sub", "sub_") and "alpha" not in node.kwargs:
        return _sum if _alike(writer, node) else None
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
        return _look if node.args[1] in _ATTRIBUTES else None
    if function in _SUMS:
        return _sum if _alike(writer, node) and "alpha" not in node.kwargs else None
    if function in (torch.cat, torch.concat):
        return _cat_rule(writer, node)
    if not isinstance(source, fx.Node):
        return None
    if function in (F.relu, torch.relu, torch.relu_, F.relu_, F.relu6, F.hardtanh):
        return _clamp
    rest = [n for n in node.all_input_nodes if n is not source]
    if function is F.linear or function in CONV_FUNCTIONS:
        return _function_product if _are_constant(writer, rest) else None
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
        return _unchanged if trains is False else None
    if function is F.pad:
        nothing = argument_of(node, 3, "value") in (None, 0)
        return _linear if nothing and all(writer.known(n) for n in rest) else None
    if function in _LINEAR:
        return _linear if all(writer.known(n) for n in rest) else None
    return None


# Products -----------------------------------------------------------------------------------


def _layer_product(writer: FoldWriter, node: fx.Node) -> Live:
    layer, offset = writer.layer_of(node), _own_offset(writer, node)
    assert layer is not None
    if isinstance(layer, nn.Linear):
        offset = _whole(writer, node, offset, layer.in_features, -1)
    elif not sees_one_position(layer):
        offset = writer.spread(offset, _source(node))
    else:
        dims = len(layer.kernel_size)  # type: ignore[arg-type]
        offset = _whole(writer, node, offset, layer.in_channels, -1 - dims)
    t = writer.copy(node)
    weight = Part(layer.weight.detach(), None, f"{node.target}.weight")  # type: ignore[operator]
    size = writer.as_part(argument_of(node, 1, "output_size"))
    groups: Any = getattr(layer, "groups", 1)
    options = {"groups": groups, "output_size": size}
    return Live(t, write_product(writer.parts, layer, offset, weight, None, **options))


def _function_product(writer: FoldWriter, node: fx.Node) -> Live:
    offset = _own_offset(writer, node)
    if node.target is F.linear:
        weight = writer.as_part(argument_of(node, 1, "weight"))
        offset = _whole(writer, node, offset, weight.value.shape[-1], -1)
    else:
        offset = writer.spread(offset, _source(node))
    t = writer.copy(node)
    args, kwargs = [*writer.as_part(node.args[1:])], writer.as_part(node.kwargs)
    if len(args) > 1:
        args[1] = None
    kwargs = {key: value for key, value in kwargs.items() if key not in ("bias", "input")}
    return Live(t, writer.parts.call_function(node.target, (offset, *args), kwargs))  # type: ignore[arg-type]


def _matmul_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """A product with a constant matrix at the right."""
    other = argument_of(node, 1, "other", "mat2")
    constant = isinstance(other, fx.Node) and other in writer.watched.constant
    return _matmul if constant and _ndim(writer, other) == 2 else None


def _matmul(writer: FoldWriter, node: fx.Node) -> Live:
    weight = writer.as_part(argument_of(node, 1, "other", "mat2"))
    offset = _whole(writer, node, _own_offset(writer, node), weight.value.shape[0], -1)
    t = writer.copy(node)
    return Live(t, writer.parts.call_function(torch.matmul, (offset, weight)))


# Norms and clamps ---------------------------------------------------------------------------


def _batch_norm(writer: FoldWriter, node: fx.Node) -> Live:
    """S (t + o) + c = s t + (s o + c): the pass that it takes anyway, and no offset any more."""
    layer: Any = writer.layer_of(node)
    lead = (1, -1, *(1,) * (_ndim(writer, node) - 2))
    scale, shift = (Part(values.view(lead)) for values in affine(layer))
    offset = writer.parts.call_function(operator.mul, (_own_offset(writer, node), scale))
    offset = writer.parts.call_function(operator.add, (offset, shift))
    source = _source(node)
    entry = writer.env[source]
    assert isinstance(entry, Live)
    last = len(source.users) == 1 and writer.is_new(entry.t)
    return writer.use(node, scaled_plus, entry.t, [offset, scale], last)


def _clamp(writer: FoldWriter, node: fx.Node) -> Live:
    offset = _own_offset(writer, node)
    low, high, inplace = _bounds(writer, node)
    source = writer.env[_source(node)]
    assert isinstance(source, Live)
    parts = [writer.parts.call_function(operator.sub, (low, offset))]
    if high is not None:
        parts.append(writer.parts.call_function(operator.sub, (high, offset)))
    function = at_least if high is None else within
    return Live(writer.use(node, function, source.t, parts, inplace).t, offset)


def _bounds(writer: FoldWriter, node: fx.Node) -> tuple[float, float | None, bool]:
    """The least and the most that a clamp gives, and whether it works in place."""
    layer: Any = writer.layer_of(node)
    if layer is not None:
        if isinstance(layer, nn.ReLU):
            return 0, None, layer.inplace
        return layer.min_val, layer.max_val, layer.inplace
    place = 3 if node.target is F.hardtanh else 1
    inplace = argument_of(node, place, "inplace", default=False) is True
    inplace |= called_name(node).endswith("_")
    if node.target is F.relu6:
        return 0, 6, inplace
    if node.target is F.hardtanh:
        low = argument_of(node, 1, "min_val", default=-1.0)
        return low, argument_of(node, 2, "max_val", default=1.0), inplace
    return 0, None, inplace


# Sums and what is linear --------------------------------------------------------------------


def _sum(writer: FoldWriter, node: fx.Node) -> Live:
    """Both offsets are added; one operand may be the memory's part itself, which is all offset."""
    first, second = node.args[:2]
    offsets = writer.offset(first), writer.offset(second)
    minus = _subtracts(node)
    part = next((n for n in (first, second) if isinstance(writer.env.get(n), Part)), None)  # type: ignore[arg-type]
    if part is None:
        t = writer.copy(node)
    else:
        entry = writer.env[second if part is first else first]  # type: ignore[index]
        assert isinstance(entry, Live)
        t = entry.t
    if offsets[1] is None:
        return Live(t, offsets[0])
    if offsets[0] is None:
        return Live(
            t, writer.parts.call_function(operator.neg, offsets[1:]) if minus else offsets[1]
        )
    function = operator.sub if minus else operator.add
    return Live(t, writer.parts.call_function(function, offsets))


def _subtracts(node: fx.Node) -> bool:
    return called_name(node).removeprefix("i").startswith("sub")


def _alike(writer: FoldWriter, node: fx.Node) -> bool:
    """Whether a sum's operands are tensors of its own type, or numbers; one has its sizes.

    The memory's part itself is no first operand of a difference: what stays would change its sign.
    """
    if len(node.args) != 2:
        return False
    if node.args[0] in writer.aside and _subtracts(node):
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


def _unchanged(writer: FoldWriter, node: fx.Node) -> Live:
    return Live(writer.copy(node), _own_offset(writer, node))


def _look(writer: FoldWriter, node: fx.Node) -> Live:
    """What is asked of a tensor is the same without its offset."""
    return Live(writer.copy(node))


def _linear(writer: FoldWriter, node: fx.Node) -> Live:
    """The same call of the offset, as a batch of one."""
    return _called_again(writer, node, writer.spread(_own_offset(writer, node), _source(node)))


def _moved(writer: FoldWriter, node: fx.Node) -> Live:
    """The same call of the offset, which may have a size of one along any axis."""
    return _called_again(writer, node, _own_offset(writer, node))


def _called_again(writer: FoldWriter, node: fx.Node, offset: Part) -> Live:
    t = writer.copy(node)
    args, kwargs = (offset, *writer.as_part(node.args[1:])), writer.as_part(node.kwargs)
    if node.op == "call_function":
        return Live(t, writer.parts.call_function(node.target, args, kwargs))  # type: ignore[arg-type]
    call = writer.parts.call_method if node.op == "call_method" else writer.parts.call_module
    return Live(t, call(str(node.target), args, kwargs))


def _flatten_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    start = argument_of(node, 1, "start_dim", default=0)
    inside = isinstance(start, int) and start % _ndim(writer, _source(node)) > 0
    return _linear if inside else None


def _move_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """Axes are told by numbers, and the first one stays where it is."""
    if node.all_input_nodes[1:] or "dtype" in node.kwargs:
        return None
    name, ndim = called_name(node), _ndim(writer, _source(node))
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
    return _moved if stays else None


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
        ndim = _ndim(writer, other)
        source = second if second_is_live else first
        if ndim > _ndim(writer, source) or writer.watched.seen[other].dtype != _dtype(writer, node):
            return None
    return None if divides and second_is_live else _scaling


def _scaling(writer: FoldWriter, node: fx.Node) -> Live:
    t = writer.copy(node)
    args = [
        offset if (offset := writer.offset(argument)) is not None else writer.as_part(argument)
        for argument in node.args
    ]
    divides = called_name(node) in ("div", "truediv")
    return Live(t, writer.parts.call_function(operator.truediv if divides else operator.mul, args))


def _cat_rule(writer: FoldWriter, node: fx.Node) -> Rule | None:
    """Tensors, behind one another along another axis than the samples'."""
    tensors = node.args[0] if node.args else None
    axis = argument_of(node, 1, "dim", default=0)
    if not isinstance(tensors, list | tuple) or not isinstance(axis, int):
        return None
    if not all(
        isinstance(n, fx.Node) and _dtype(writer, n) == _dtype(writer, node) for n in tensors
    ):
        return None
    if not writer.aside.isdisjoint(tensors):
        return None
    return _cat if axis % _ndim(writer, node) > 0 else None


def _cat(writer: FoldWriter, node: fx.Node) -> Live:
    axis = argument_of(node, 1, "dim", default=0)
    offsets = []
    ndim = _ndim(writer, node)
    for source in node.args[0]:  # type: ignore[union-attr]
        offset = writer.offset(source)
        if offset is None:
            some = next(o for n in node.args[0] if (o := writer.offset(n)) is not None)  # type: ignore[union-attr]
            offset = Part(some.value.new_zeros((1,) * ndim))
        offsets.append(writer.spread(offset, source))
    return Live(writer.copy(node), writer.parts.call_function(torch.cat, (offsets, axis)))


# Questions ----------------------------------------------------------------------------------


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _own_offset(writer: FoldWriter, node: fx.Node) -> Part:
    offset = writer.offset(node.args[0])
    assert offset is not None
    return offset


def _whole(writer: FoldWriter, node: fx.Node, offset: Part, size: Any, axis: int) -> Part:
    """An offset with all entries along the axis that a product sums over."""
    return offset if offset.value.shape[axis] == size else writer.spread(offset, _source(node))


def _are_constant(writer: FoldWriter, nodes: list[fx.Node]) -> bool:
    return writer.watched.constant.issuperset(nodes)


def _ndim(writer: FoldWriter, node: Any) -> int:
    return len(writer.watched.seen[node].shape or ())


def _dtype(writer: FoldWriter, node: Any) -> Any:
    return writer.watched.seen[node].dtype
