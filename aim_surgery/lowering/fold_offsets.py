"""What becomes of a call whose argument t + o has an offset: `fold_rules` says of which calls.

    product       W(t + o) + b         = (W t + b) + W o
    batch norm    s (t + o) + c        = s t + (s o + c)          in evaluation
    relu          max(t + o, 0)        = max(t, -o) + o           relu6, hardtanh alike
    sum           (t + o) + (t' + o')  = (t + t') + (o + o')
    linear        f(t + o)             = f(t) + f(o)              pooling, flatten, resize, scaling

Each function is given the writer and the node of such a call, writes what stands for the node, and
returns that with its offset.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.lowering.fold_graph import FoldWriter, Live
from aim_surgery.lowering.fold_norms import affine
from aim_surgery.lowering.fold_parts import Part
from aim_surgery.lowering.products import write_product
from aim_surgery.nn.folded import at_least, scaled_plus, within
from aim_surgery.nn.pointwise import sees_one_position
from aim_surgery.sites.graph import argument_of, called_name

# Products -----------------------------------------------------------------------------------------


def layer_product(writer: FoldWriter, node: fx.Node) -> Live:
    """The call of a layer: of x without the offset, and of the offset alone."""
    layer, offset = writer.layer_of(node), _own_offset(writer, node)
    assert layer is not None
    if isinstance(layer, nn.Linear):
        offset = _whole(writer, node, offset, layer.in_features, -1)
    elif not sees_one_position(layer):
        offset = writer.spread(offset, source_of(node))
    else:
        dims = len(layer.kernel_size)  # type: ignore[arg-type]
        offset = _whole(writer, node, offset, layer.in_channels, -1 - dims)
    t = writer.copy(node)
    weight = Part(layer.weight.detach(), None, f"{node.target}.weight")  # type: ignore[operator]
    size = writer.as_part(argument_of(node, 1, "output_size"))
    groups: Any = getattr(layer, "groups", 1)
    options = {"groups": groups, "output_size": size}
    return Live(t, write_product(writer.parts, layer, offset, weight, None, **options))


def function_product(writer: FoldWriter, node: fx.Node) -> Live:
    """The same of a function that is given its weight."""
    offset = _own_offset(writer, node)
    if node.target is F.linear:
        weight = writer.as_part(argument_of(node, 1, "weight"))
        offset = _whole(writer, node, offset, weight.value.shape[-1], -1)
    else:
        offset = writer.spread(offset, source_of(node))
    t = writer.copy(node)
    args, kwargs = [*writer.as_part(node.args[1:])], writer.as_part(node.kwargs)
    if len(args) > 1:
        args[1] = None
    kwargs = {key: value for key, value in kwargs.items() if key not in ("bias", "input")}
    return Live(t, writer.parts.call_function(node.target, (offset, *args), kwargs))  # type: ignore[arg-type]


def matmul(writer: FoldWriter, node: fx.Node) -> Live:
    """The same of a product with a constant matrix."""
    weight = writer.as_part(argument_of(node, 1, "other", "mat2"))
    offset = _whole(writer, node, _own_offset(writer, node), weight.value.shape[0], -1)
    t = writer.copy(node)
    return Live(t, writer.parts.call_function(torch.matmul, (offset, weight)))


# Norms and clamps ---------------------------------------------------------------------------------


def batch_norm(writer: FoldWriter, node: fx.Node) -> Live:
    """S (t + o) + c = s t + (s o + c): the pass that it takes anyway, and no offset any more."""
    layer: Any = writer.layer_of(node)
    lead = (1, -1, *(1,) * (ndim_of(writer, node) - 2))
    scale, shift = (Part(values.view(lead)) for values in affine(layer))
    offset = writer.parts.call_function(operator.mul, (_own_offset(writer, node), scale))
    offset = writer.parts.call_function(operator.add, (offset, shift))
    source = source_of(node)
    entry = writer.env[source]
    assert isinstance(entry, Live)
    last = len(source.users) == 1 and writer.is_new(entry.t)
    return writer.use(node, scaled_plus, entry.t, [offset, scale], last)


def clamp(writer: FoldWriter, node: fx.Node) -> Live:
    """max(t + o, low) = max(t, low - o) + o: bounds are moved, and the offset goes on."""
    offset = _own_offset(writer, node)
    low, high, inplace = _bounds(writer, node)
    source = writer.env[source_of(node)]
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


# Sums and what is linear --------------------------------------------------------------------------


def added(writer: FoldWriter, node: fx.Node) -> Live:
    """Both offsets are added; one operand may be the memory's part itself, which is all offset."""
    first, second = node.args[:2]
    offsets = writer.offset(first), writer.offset(second)
    minus = subtracts(node)
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


def unchanged(writer: FoldWriter, node: fx.Node) -> Live:
    """The same call, and the same offset behind it."""
    return Live(writer.copy(node), _own_offset(writer, node))


def look(writer: FoldWriter, node: fx.Node) -> Live:
    """What is asked of a tensor is the same without its offset."""
    return Live(writer.copy(node))


def linear(writer: FoldWriter, node: fx.Node) -> Live:
    """The same call of the offset, as a batch of one."""
    return _called_again(writer, node, writer.spread(_own_offset(writer, node), source_of(node)))


def moved(writer: FoldWriter, node: fx.Node) -> Live:
    """The same call of the offset, which may have a size of one along any axis."""
    return _called_again(writer, node, _own_offset(writer, node))


def _called_again(writer: FoldWriter, node: fx.Node, offset: Part) -> Live:
    t = writer.copy(node)
    args, kwargs = (offset, *writer.as_part(node.args[1:])), writer.as_part(node.kwargs)
    if node.op == "call_function":
        return Live(t, writer.parts.call_function(node.target, args, kwargs))  # type: ignore[arg-type]
    call = writer.parts.call_method if node.op == "call_method" else writer.parts.call_module
    return Live(t, call(str(node.target), args, kwargs))


def scaling(writer: FoldWriter, node: fx.Node) -> Live:
    """Both are scaled."""
    t = writer.copy(node)
    args = [
        offset if (offset := writer.offset(argument)) is not None else writer.as_part(argument)
        for argument in node.args
    ]
    divides = called_name(node) in ("div", "truediv")
    return Live(t, writer.parts.call_function(operator.truediv if divides else operator.mul, args))


def cat(writer: FoldWriter, node: fx.Node) -> Live:
    """Offsets are joined as the tensors are; zeros where one has none."""
    axis = argument_of(node, 1, "dim", default=0)
    offsets = []
    ndim = ndim_of(writer, node)
    for source in node.args[0]:  # type: ignore[union-attr]
        offset = writer.offset(source)
        if offset is None:
            some = next(o for n in node.args[0] if (o := writer.offset(n)) is not None)  # type: ignore[union-attr]
            offset = Part(some.value.new_zeros((1,) * ndim))
        offsets.append(writer.spread(offset, source))
    return Live(writer.copy(node), writer.parts.call_function(torch.cat, (offsets, axis)))


# Questions ----------------------------------------------------------------------------------------


def source_of(node: fx.Node) -> fx.Node:
    """The node that a call works on."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def ndim_of(writer: FoldWriter, node: Any) -> int:
    """How many axes a node has, in the run that was watched."""
    return len(writer.watched.seen[node].shape or ())


def dtype_of(writer: FoldWriter, node: Any) -> Any:
    """The dtype of a node, in the run that was watched."""
    return writer.watched.seen[node].dtype


def subtracts(node: fx.Node) -> bool:
    """Whether a sum is a difference."""
    return called_name(node).removeprefix("i").startswith("sub")


def _own_offset(writer: FoldWriter, node: fx.Node) -> Part:
    offset = writer.offset(node.args[0])
    assert offset is not None
    return offset


def _whole(writer: FoldWriter, node: fx.Node, offset: Part, size: Any, axis: int) -> Part:
    """An offset with all entries along the axis that a product sums over."""
    return offset if offset.value.shape[axis] == size else writer.spread(offset, source_of(node))
