"""Puts together, in a graph of aten operators, what an export has taken apart.

    addmm(b, x, permute(W, [1, 0]))      ->  linear(x, W, b)
    view(linear(x, W, b), [*lead, out])  ->  linear(reshape(x, [*lead, in]), W, b)

so that W is a layer's weight and its input has an axis over samples; and a mark where the call of a
module has returned, so that a write can follow `layer1.0` as in the model itself.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from aim_surgery.capture.proxy import ValueProxy

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default
_BMM, _EXPAND = _ATEN.bmm.default, _ATEN.expand.default
_PRODUCTS = (_ATEN.addmm.default, _ATEN.mm.default, _ATEN.matmul.default, _BMM)
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_SWAPS = (
    _ATEN.t.default, _ATEN.numpy_T.default, _ATEN.permute.default, _ATEN.transpose.int,
)  # fmt: skip


def join_products(graph: fx.Graph) -> None:
    """Write linear layers in one call, where they are a product with a transposed parameter.

    Args:
        graph: A graph of operators, with values on its nodes; changed in place.
    """
    for node in list(graph.nodes):
        product = _linear_of_product(node)
        if product is not None:
            _replace(graph, node, product)
    for node in list(graph.nodes):
        lifted = _linear_of_view(graph, node)
        if lifted is not None:
            _replace(graph, node, lifted)


def _replace(graph: fx.Graph, node: fx.Node, operands: tuple[Any, ...]) -> None:
    """Put a linear call in the place of a node; what nothing else needs goes with it."""
    with graph.inserting_before(node):
        linear = graph.call_function(_LINEAR, operands)
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    pending = [node]
    while pending:
        unused = pending.pop()
        if not unused.users and unused.target in (*_PRODUCTS, *_VIEWS, *_SWAPS, _EXPAND, _LINEAR):
            pending += unused.all_input_nodes
            graph.erase_node(unused)


def _linear_of_product(node: fx.Node) -> tuple[Any, ...] | None:
    if node.target not in _PRODUCTS or node.kwargs:
        return None
    *bias, x, transposed = node.args
    if node.target is _BMM:
        transposed = _repeated(transposed)
    weight = _transposed_parameter(transposed)
    if weight is None:
        return None
    fits = not bias or (_rank(bias[0]) == 1 and _value(bias[0]).shape == _value(weight).shape[:1])
    return (x, weight, *bias) if fits else None


def _linear_of_view(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...] | None:
    """What `view(linear(x, W, b), [*lead, out])` is as a linear call, whose input has that lead."""
    linear = node.args[0] if node.target in _VIEWS else None
    if not isinstance(linear, fx.Node) or linear.target is not _LINEAR or len(linear.users) > 1:
        return None
    x, weight, *bias = linear.args
    *lead, last = cast(list[Any], node.args[1])
    if _rank(weight) != 2 or last != _value(weight).shape[0]:
        return None
    first = linear
    while isinstance(x, fx.Node) and x.target in _VIEWS and len(x.users) == 1:
        first, x = x, x.args[0]
    if _changes_something(first, node):
        return None
    with graph.inserting_before(node):
        size = [*lead, _value(weight).shape[1]]
        x = graph.call_function(_ATEN.reshape.default, (x, size))
    x.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    return (x, weight, *bias)


def _changes_something(first: fx.Node, last: fx.Node) -> bool:
    """Whether something is changed in place from one node to another."""
    while first is not last:
        if isinstance(first.target, OpOverload) and first.target._schema.is_mutable:
            return True
        first = first.next
    return False


def _repeated(node: Any) -> Any:
    """What `bmm` has as its second operand where all its matrices are one."""
    view = node if isinstance(node, fx.Node) and node.target in _VIEWS else None
    expand = view.args[0] if view is not None else node
    if not isinstance(expand, fx.Node) or expand.target is not _EXPAND or _rank(node) != 3:
        return None
    matrix = cast(fx.Node, expand.args[0])
    same = _rank(matrix) == 2 and _value(node).shape[1:] == _value(matrix).shape
    return matrix if same else None


def _transposed_parameter(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.target not in _SWAPS or _rank(node) != 2:
        return None
    weight, *axes = node.args
    swapped = axes in ([], [[1, 0]], [0, 1], [1, 0], [-1, -2], [-2, -1])
    return weight if swapped and isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _rank(node: Any) -> int | None:
    value = _value(node)
    return value.ndim if isinstance(value, torch.Tensor) else None


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


# Modules that returned something -----------------------------------------------------------


def mark_returns(graph: fx.Graph) -> None:
    """Note in a graph what is the result of which module's call, where it is one tensor.

    Args:
        graph: A graph whose nodes tell what modules they come from; gets calls of a function that
            gives back what comes in, and that tells the tracer.
    """
    results: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        for call in _calls(node) if _rank(node) is not None else ():
            users = [user for user in node.users if not _updates_buffer(user)]
            if any(call not in _calls(user) for user in users):
                results.setdefault(call, []).append(node)
    returned: dict[fx.Node, list[str]] = {}
    for call, nodes in results.items():
        if len(nodes) == 1:
            returned.setdefault(nodes[0], []).append(_calls(nodes[0])[call])
    for node, paths in returned.items():
        users = list(node.users)
        with graph.inserting_after(node):
            mark = graph.call_function(_returned_by, (node, tuple(reversed(paths))))
        for user in users:
            user.replace_input_with(node, mark)


def _updates_buffer(node: fx.Node) -> bool:
    if node.target is not _ATEN.copy_.default or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[0].op == "get_attr"


def _calls(node: fx.Node) -> dict[str, str]:
    """The calls of modules that a node is part of, outermost first, with their paths."""
    stack = node.meta.get("nn_module_stack") or {}
    return {call: entry[0] for call, entry in stack.items() if entry[0]}


def _returned_by(result: Any, paths: tuple[str, ...]) -> Any:
    """What the calls of these modules returned, innermost first; noted on the node, if traced."""
    if type(result) is ValueProxy:
        result.node.meta.setdefault("returned_by", []).extend(paths)
    return result
