"""Whether a model mixes the entries of an axis with one another: then they are no samples.

    attention       over the places that are attended to: -2 of keys and values
    products        sums over the last axis of the first and the last but one of the second operand,
                    a letter of einsum that two operands share and the result hasn't
    layers          the last axis of a linear layer, channels and places of a convolution, the time
                    of a recurrent one
    softmax         along its dim

Reductions are none of these: statistics of a batch (`x.mean(0)`) are taken of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.capture.values import node_value
from aim_surgery.sites.axis_moves import shape_of
from aim_surgery.sites.axis_rules import spelled_operands
from aim_surgery.sites.graph import argument_of, called_name


class Mixing(IntEnum):
    """What becomes of the entries of an axis.

    Attributes:
        NONE: Nothing tells that they are mixed.
        BESIDE: They are the queries of other inputs' keys, which don't have that axis: positions,
            or samples that all look at one table.
        AMONG: They are mixed with one another.
    """

    NONE = 0
    BESIDE = 1
    AMONG = 2


def find_mixing(
    capture: Capture,
    graph: fx.Graph,
    axes: Mapping[fx.Node, int],
    count: int,
    dependent: AbstractSet[fx.Node],
) -> Mixing:
    """Find what a graph does along an axis.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        axes: The axis by node (`follow_samples`).
        count: Entries of that axis in the inputs.
        dependent: Nodes that depend on the inputs.

    Returns:
        The most that some call does.
    """
    found = Mixing.NONE
    for node in graph.nodes:
        if node.op == "call_module":
            check = _layer_check(capture.modules[str(node.target)])
        else:
            check = _CHECKS.get(called_name(node)) if node.op.startswith("call") else None
        if check is not None and any(source in axes for source in node.all_input_nodes):
            found = max(found, check(_Along(capture, node, axes, count, dependent)))
        if found is Mixing.AMONG:
            break
    return found


@dataclass(frozen=True)
class _Along:
    """A call, and the axis of what it works on."""

    capture: Capture
    node: fx.Node
    axes: Mapping[fx.Node, int]
    count: int
    dependent: AbstractSet[fx.Node]

    def of(self, source: Any) -> int | None:
        """The axis of an operand, from the end; None where it has none, or may have."""
        shape = shape_of(source.meta.get("val")) if isinstance(source, fx.Node) else None
        axis = self.axes.get(source)
        # where there is one entry, an axis without any other would look the same
        if shape is None or axis is None or (self.count == 1 and shape[axis] != 1):
            return None
        return axis - len(shape)

    def beside(self, source: Any) -> bool:
        """Whether an operand comes from the inputs, without that axis."""
        return source in self.dependent and source not in self.axes


Check = Callable[[_Along], Mixing]


def _among(mixed: bool) -> Mixing:
    return Mixing.AMONG if mixed else Mixing.NONE


def _attended(along: _Along) -> Mixing:
    query, key, value = (
        argument_of(along.node, index, name) for index, name in enumerate(("query", "key", "value"))
    )
    if along.of(query) == -1 or along.of(key) in (-1, -2) or along.of(value) == -2:
        return Mixing.AMONG
    return Mixing.BESIDE if along.of(query) == -2 and along.beside(key) else Mixing.NONE


def _multiplied(first_index: int) -> Check:
    def check(along: _Along) -> Mixing:
        first = argument_of(along.node, first_index, "input", "mat1", "batch1")
        second = argument_of(along.node, first_index + 1, "other", "mat2", "batch2", "vec")
        shape = shape_of(node_value(second))
        summed = -1 if shape is not None and len(shape) == 1 else -2
        if along.of(first) == -1 or along.of(second) == summed:
            return Mixing.AMONG
        return Mixing.BESIDE if along.of(first) == -2 and along.beside(second) else Mixing.NONE

    return check


def _contracted(along: _Along) -> Mixing:
    terms, result = spelled_operands(along.node)
    for source, letters in terms:
        axis = along.of(source)
        letter = None if axis is None else letters[axis]
        if letter is None or (result is not None and letter in result):
            continue
        if sum(letter in others for _, others in terms) > 1:
            return Mixing.AMONG
    return Mixing.NONE


def _normalised(along: _Along) -> Mixing:
    dim = node_value(argument_of(along.node, 1, "dim"))
    if along.node.op == "call_module":
        layer: Any = along.capture.modules[str(along.node.target)]
        dim = layer.dim
    source = argument_of(along.node, 0, "input")
    shape, axis = shape_of(node_value(source)) or (), along.of(source)
    if dim is None:  # as torch chooses it
        dim = 0 if len(shape) in (0, 1, 3) else 1
    return _among(axis is not None and (dim - axis) % len(shape) == 0)


def _of_features(along: _Along) -> Mixing:
    return _among(along.of(argument_of(along.node, 0, "input")) == -1)


def _convolved(along: _Along) -> Mixing:
    source = argument_of(along.node, 0, "input")
    axis = along.of(source)
    if along.node.op == "call_module":
        layer: Any = along.capture.modules[str(along.node.target)]
        dims, groups = len(layer.kernel_size), layer.groups
    else:
        name = called_name(along.node)
        dims = int(name[-2])
        place = 7 if "transpose" in name else 6
        groups = node_value(argument_of(along.node, place, "groups", default=1))
    if axis is None or axis < -dims - 1:
        return Mixing.NONE
    # in groups, the channels may be those of several samples: (1, B·C, H, W)
    return _among(axis >= -dims or groups == 1)


def _over_time(along: _Along) -> Mixing:
    source = argument_of(along.node, 0, "query", "input")
    batch_first = False
    if along.node.op == "call_module":
        layer: Any = along.capture.modules[str(along.node.target)]
        batch_first = layer.batch_first
    shape, axis = shape_of(node_value(source)) or (), along.of(source)
    single = len(shape) == 2
    return _among(axis is not None and (single or axis != (-3 if batch_first else -2)))


_CHECKS: dict[str, Check] = {
    "scaled_dot_product_attention": _attended,
    **dict.fromkeys(("matmul", "imatmul", "mm", "bmm", "mv"), _multiplied(0)),
    **dict.fromkeys(("addmm", "baddbmm"), _multiplied(1)),
    "einsum": _contracted,
    "softmax": _normalised,
    "linear": _of_features,
    **{f"conv{kind}{dims}d": _convolved for dims in (1, 2, 3) for kind in ("", "_transpose")},
    "multi_head_attention_forward": _over_time,
}


def _layer_check(layer: nn.Module) -> Check | None:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return _convolved
    if isinstance(layer, nn.Linear):
        return _of_features
    if isinstance(layer, nn.Softmax):
        return _normalised
    return _over_time if isinstance(layer, nn.RNNBase | nn.MultiheadAttention) else None
