"""Questions about nodes that both sites and unread weights ask."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.capture import Capture

_SIZES = (int, float, torch.Size, torch.device, torch.dtype)
_LIKE = ("to", "type_as")  # x.to(other)


def weight_sources(
    capture: Capture, graph: fx.Graph, *, sized: bool = False
) -> dict[fx.Node, tuple[str, ...]]:
    """Nodes that depend on no input, with the parameters they are made of.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        sized: Whether to count those that depend on sizes of inputs, too, and rows of tables.

    Returns:
        Qualified names of parameters by node; () for what is made of buffers and constants alone.
    """
    parameters = capture.floating_parameters
    sources: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            sources[node] = (str(node.target),) if node.target in parameters else ()
        elif node.op in ("call_function", "call_method"):
            inputs = node.all_input_nodes
            if sized and called_name(node) in _LIKE and inputs[1:]:
                inputs = inputs[:1]  # of the other tensor only the dtype and the device count
            if all(source in sources for source in inputs):
                names = (name for source in inputs for name in sources[source])
                sources[node] = tuple(dict.fromkeys(names))
            elif sized and isinstance(node.meta.get("val"), _SIZES):
                sources[node] = ()
        elif sized and all(source in sources for source in node.all_input_nodes):
            table = capture.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(table, nn.Embedding):
                sources[node] = (f"{node.target}.weight",)
    return sources


def attribute(capture: Capture, qualname: str) -> Any:
    """What a qualified name stands for in the model."""
    path, _, name = qualname.rpartition(".")
    return getattr(capture.modules[path], name)


def called_by(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls; None where it calls none."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def argument_of(node: fx.Node, index: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, by position or by one of its names."""
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def is_call(
    node: fx.Node, functions: tuple[Callable[..., Any], ...], methods: frozenset[str] | set[str]
) -> bool:
    """Whether a node calls one of these functions, or a method of one of these names."""
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def called_name(node: fx.Node) -> str:
    """The bare name of the function or method that a node calls."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def changes_in_place(node: fx.Node) -> bool:
    """Whether a call's result is its first argument, changed: `x[i] = y`, `x.add_(y)`."""
    if node.op not in ("call_function", "call_method") or node.users or not node.args:
        return False
    name = called_name(node)
    changes = node.target is operator.setitem or (name.endswith("_") and not name.endswith("__"))
    return changes and isinstance(node.args[0], fx.Node)


def embeddings(capture: Capture, graph: fx.Graph) -> set[fx.Node]:
    """Nodes that look up rows of a table by integers."""
    return {
        node
        for node in graph.nodes
        if is_call(node, (F.embedding, F.embedding_bag), frozenset())
        or (
            node.op == "call_module"
            and isinstance(capture.modules[str(node.target)], nn.Embedding | nn.EmbeddingBag)
        )
    }


def is_float(source: Any) -> bool:
    """Whether an argument is a node that carries a floating tensor."""
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()
