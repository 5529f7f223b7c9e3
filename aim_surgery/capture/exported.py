"""Exported programs (`torch.export`, `.pt2`) and graphs of aten operators, as modules to capture.

A program is a graph of operators over the tensors of the model that it was made from. As a module
it has that model's state dict, and a forward that is the graph; tracing it gives PyTorch's own words
back (`aten.py`). Before that, two things that an export has taken apart are put together again:

    addmm(b, x, permute(W, [1, 0]))      ->  linear(x, W, b)
    view(linear(x, W, b), [*lead, out])  ->  linear(reshape(x, [*lead, in]), W, b)

so that W is a layer's weight and its input has an axis over samples, and a mark where the call of a
module has returned, so that a write can follow `layer1.0`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from aim_surgery.capture.inputs import ExampleInputs
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.errors import CaptureError

_ATEN = torch.ops.aten
_LINEAR = _ATEN.linear.default
_BMM, _EXPAND = _ATEN.bmm.default, _ATEN.expand.default
_PRODUCTS = (_ATEN.addmm.default, _ATEN.mm.default, _ATEN.matmul.default, _BMM)
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_SWAPS = (
    _ATEN.t.default, _ATEN.numpy_T.default, _ATEN.permute.default, _ATEN.transpose.int,
)  # fmt: skip
_MODES = {  # where the switch between training and evaluation stands
    _ATEN.batch_norm: 5, _ATEN.dropout: 2, _ATEN.native_dropout: 2, _ATEN.instance_norm: 5,
    _ATEN._native_batch_norm_legit_functional: 5, _ATEN._native_batch_norm_legit: 5,
}  # fmt: skip


def as_module(model: Any) -> Any:
    """An exported program as a module; anything else as it is.

    Args:
        model: What a user wants to operate on; left unchanged. A graph of aten operators that
            refuses `train()` and `eval()`, as `program.module()` does, counts as a program too.

    Returns:
        A module with the program's tensors, not copies, under their own names. What `train()` and
        `eval()` say of it changes nothing in the graph.
    """
    if isinstance(model, ExportedProgram):
        module = _module(model.module())
        module.meta["example_inputs"] = _example_inputs(model)
        return module
    if isinstance(model, fx.GraphModule) and "train" in vars(model) and _operators(model):
        return _module(model)
    return model


def inputs_of_program(model: nn.Module) -> ExampleInputs | None:
    """The inputs that a program was exported with.

    Args:
        model: Any module.

    Returns:
        Tensors of their shapes, where `as_module` made the module of a program.
    """
    meta = getattr(model, "meta", None)
    return meta.get("example_inputs") if isinstance(meta, dict) else None


def program_notes(model: nn.Module) -> tuple[str, ...]:
    """What a reader of the plan should know of a program.

    Args:
        model: Any module.

    Returns:
        Notes; none where the module holds no operators.
    """
    if not isinstance(model, fx.GraphModule) or not _operators(model):
        return ()
    mode = {True: " for training", False: " for evaluation", None: ""}[_mode(model.graph)]
    return (
        f"exported{mode}: what dropout and normalisation do stays as it was exported, train() and "
        f"eval() change only what is new",
    )


# A module of a graph --------------------------------------------------------------------------


def _module(program: fx.GraphModule) -> fx.GraphModule:
    """A twin of a graph of operators: all its tensors, without its hooks, with words to trace."""
    graph = copy.deepcopy(program.graph)
    _join_products(graph)
    _mark_returns(graph)
    twin = fx.GraphModule(nn.Module(), fx.Graph(), type(program).__name__)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(twin)[name] = dict(vars(program)[name])
    vars(twin)["_non_persistent_buffers_set"] = set(program._non_persistent_buffers_set)
    known = {*vars(twin), "train", "eval"}
    vars(twin).update({name: value for name, value in vars(program).items() if name not in known})
    twin.graph = graph
    twin.train(bool(_mode(graph)))
    return twin


def _operators(module: fx.GraphModule) -> bool:
    return any(isinstance(node.target, OpOverload) for node in module.graph.nodes)


def _mode(graph: fx.Graph) -> bool | None:
    """Whether a graph does what a model in training does; None where nothing tells."""
    found: set[bool] = set()
    for node in graph.nodes:
        if isinstance(node.target, OpOverload):
            place = _MODES.get(node.target.overloadpacket)
            if place is not None and len(node.args) > place:
                found.add(node.args[place] is True)
            elif node.target is _ATEN._native_batch_norm_legit_no_training.default:
                found.add(False)
    return max(found, default=None)


def _example_inputs(program: ExportedProgram) -> ExampleInputs:
    spec = program.call_spec.in_spec
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
    elif spec is None:
        raise CaptureError("this exported program does not tell its inputs: pass example_inputs")
    else:
        names = set(program.graph_signature.user_inputs)
        nodes = [node for node in program.graph.nodes if node.name in names]
        args, kwargs = tree_unflatten([_like(node.meta.get("val")) for node in nodes], spec)
    return ExampleInputs(tuple(args), dict(kwargs), "of the exported program")


def _like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(shape, dtype=value.dtype, device=value.device)


# Linear layers ----------------------------------------------------------------------------------


def _join_products(graph: fx.Graph) -> None:
    """Linear layers in one call, where they are a product with a transposed parameter."""
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
        linear = graph.call_function(_ATEN.linear.default, operands)
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
    if weight is None or (bias and _rank(bias[0]) != 1):
        return None
    return (x, weight, *bias)


def _linear_of_view(graph: fx.Graph, node: fx.Node) -> tuple[Any, ...] | None:
    """What `view(linear(x, W, b), [*lead, out])` is as a linear call, whose input has that lead."""
    linear = node.args[0] if node.target in _VIEWS else None
    if not isinstance(linear, fx.Node) or linear.target is not _LINEAR or len(linear.users) > 1:
        return None
    x, weight, *bias = linear.args
    *lead, last = cast(list[Any], node.args[1])
    value = cast(fx.Node, weight).meta.get("val")
    if _rank(weight) != 2 or last != value.shape[0]:
        return None
    while isinstance(x, fx.Node) and x.target in _VIEWS:
        x = x.args[0]
    with graph.inserting_before(node):
        x = graph.call_function(_ATEN.reshape.default, (x, [*lead, value.shape[1]]))
    x.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    return (x, weight, *bias)


def _repeated(node: Any) -> Any:
    """What `bmm` has as its second operand where all its matrices are one."""
    view = node if isinstance(node, fx.Node) and node.target in _VIEWS else None
    expand = view.args[0] if view is not None else node
    if not isinstance(expand, fx.Node) or expand.target is not _EXPAND or _rank(node) != 3:
        return None
    matrix = cast(fx.Node, expand.args[0])
    same = _rank(matrix) == 2 and node.meta["val"].shape[1:] == matrix.meta["val"].shape
    return matrix if same else None


def _transposed_parameter(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.target not in _SWAPS or _rank(node) != 2:
        return None
    weight, *axes = node.args
    swapped = axes in ([], [[1, 0]], [0, 1], [1, 0], [-1, -2], [-2, -1])
    return weight if swapped and isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def _rank(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, torch.Tensor) else None


# Modules that returned something ----------------------------------------------------------------


def _mark_returns(graph: fx.Graph) -> None:
    """Note in the graph what is the result of which module's call, where it is one tensor."""
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
