"""Exported programs (`torch.export`, `.pt2`) and graphs of aten operators, as modules to capture.

A program is a graph of operators over the tensors of the model that it was made from. As a module
it has that model's state dict, and a forward that is the graph. What an export has taken apart is
put together in it (`rejoin.py`); tracing it then gives PyTorch's own words back (`aten.py`).
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import fx, nn
from torch._higher_order_ops.wrap import wrap_with_autocast, wrap_with_set_grad_enabled
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_unflatten

from aim_surgery.capture.inputs import ExampleInputs
from aim_surgery.capture.rejoin import join_products, mark_returns
from aim_surgery.capture.where import is_own
from aim_surgery.errors import CaptureError

_ATEN = torch.ops.aten
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
    _refuse_branches(program.graph)
    graph = _copied(program.graph)
    join_products(graph)
    mark_returns(graph)
    twin = fx.GraphModule(nn.Module(), fx.Graph(), type(program).__name__)
    _adopt(twin, program)
    twin.graph = graph
    twin.train(bool(_mode(graph)))
    return twin


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy that takes and gives what the graph does, `codegen` says how; no deep copy of that."""
    twin = fx.Graph()
    output = twin.graph_copy(graph, {}, return_output_node=True)
    result, last = cast(tuple[Any, fx.Node], output)
    twin.output(result).meta = dict(last.meta)
    twin.set_codegen(graph._codegen)
    return twin


def _adopt(twin: nn.Module, module: nn.Module) -> nn.Module:
    """Give a twin the tensors of a module, plain ones as buffers that are not saved."""
    vars(twin)["_parameters"] = dict(module._parameters)
    vars(twin)["_buffers"] = dict(module._buffers)
    vars(twin)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    vars(twin)["_modules"] = {
        name: _adopt(nn.Module(), child) if type(child) is nn.Module else child
        for name, child in module._modules.items()
    }
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            twin.register_buffer(name, value, persistent=False)
        elif name not in vars(twin) and name not in ("train", "eval"):
            vars(twin)[name] = value
    return twin


def _refuse_branches(graph: fx.Graph) -> None:
    for node in graph.nodes:
        part = node.target
        if not isinstance(part, HigherOrderOperator) or part is wrap_with_set_grad_enabled:
            continue
        remedy = "Transform the model itself: what branches on data stays a Python call there"
        if part is wrap_with_autocast:
            remedy = "program.run_decompositions() writes its casts out: transform that"
        raise CaptureError(
            f"{node.name}{_line(node)} is a call of torch.ops.higher_order.{part.name()}: a "
            f"program in this exported program, which a graph of calls can't hold. {remedy}"
        )


def _line(node: fx.Node) -> str:
    """Where in the model's source a node comes from."""
    trace = node.meta.get("stack_trace") or ""
    lines = [f"{f}:{n}" for f, n in re.findall(r'File "([^"<]+)", line (\d+)', trace) if is_own(f)]
    return f" ({lines[-1]})" if lines else ""


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


def _example_inputs(program: ExportedProgram) -> ExampleInputs | None:
    spec = program.call_spec.in_spec
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
    elif spec is None:
        return None
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
