"""An fx graph as plain data that pickles: one tuple a node, functions by qualified name.

fx pickles a `GraphModule` as Python code and traces that code again on loading, which answers
`self.dropout.training` once and for all. Plain data keeps every node as it is.
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name, map_aggregate

from aim_surgery.nn.rebuilt import Rebuilt

GraphState = list[tuple[str, str, str | Rebuilt, Any, Any, Any]]

NOTE = "aim"  # the key in `node.meta` of what surgery notes down for later passes: plain data


class _Ref(str):
    """The name of a node, where an argument is one."""

    __slots__ = ()


class _Constant(str):
    """The name of a constant of torch's that old protocols of pickle don't know."""

    __slots__ = ()


_UNPICKLED = (torch.memory_format, torch.layout)


def graph_state(graph: fx.Graph) -> GraphState:
    """Describe a graph as plain data.

    Args:
        graph: Any graph whose functions can be imported by name.

    Returns:
        (op, name, target, args, kwargs, note) for each node, in order.
    """
    return [
        (
            node.op,
            node.name,
            node.target if isinstance(node.target, str) else _name_of(node.target),
            map_aggregate(node.args, _to_plain),
            map_aggregate(node.kwargs, _to_plain),
            map_aggregate(node.meta.get(NOTE), _to_plain),
        )
        for node in graph.nodes
    ]


def graph_from_state(state: GraphState) -> fx.Graph:
    """Rebuild a graph from `graph_state`.

    Args:
        state: The nodes.

    Returns:
        A new graph with the same nodes under the same names, with the same notes.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def from_plain(argument: Any) -> Any:
        if isinstance(argument, _Constant):
            return _function(argument)
        return nodes[argument] if isinstance(argument, _Ref) else argument

    for op, name, target, args, kwargs, note in state:
        resolved = _function(target) if op == "call_function" else target
        nodes[name] = graph.create_node(
            op, resolved, map_aggregate(args, from_plain), map_aggregate(kwargs, from_plain), name
        )
        if note is not None:
            nodes[name].meta[NOTE] = map_aggregate(note, from_plain)
    return graph


def _to_plain(argument: Any) -> Any:
    if isinstance(argument, _UNPICKLED):
        return _Constant(str(argument))  # torch.channels_last
    return _Ref(argument.name) if isinstance(argument, fx.Node) else argument


def _name_of(function: Callable[..., Any]) -> str | Rebuilt:
    if isinstance(function, Rebuilt):
        return function  # pickles by itself
    if getattr(builtins, getattr(function, "__name__", ""), None) is function:
        return f"builtins.{function.__name__}"
    return _get_qualified_name(function)


def _function(name: str | Rebuilt) -> Callable[..., Any]:
    if isinstance(name, Rebuilt):
        return name
    if name.startswith("torch."):  # also for `torch.ops`, which is no importable module
        return _resolve(torch, name.split(".")[1:])
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return _resolve(module, parts[cut:])
    raise ImportError(f"cannot find {name}, which a pickled graph calls")


def _resolve(value: Any, names: list[str]) -> Any:
    for name in names:
        value = getattr(value, name)
    return value
