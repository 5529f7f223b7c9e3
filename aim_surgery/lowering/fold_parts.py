"""Parts: what needs no input but its sizes, computed while the graph is folded.

A part that depends on nothing at all is a value. One that depends on sizes is a value, for the
sizes of the example, and a node besides that says how it comes about, for other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate


@dataclass(frozen=True, eq=False)
class Part:
    """A value that needs no input but its sizes.

    Attributes:
        value: For the sizes of the example: a tensor, a number, a tuple of these.
        node: How it comes about, where it depends on sizes.
        path: Its name in the model, where it is a tensor of it.
    """

    value: Any
    node: fx.Node | None = None
    path: str = ""


class Parts:
    """Calls functions of parts, and writes those down that depend on sizes.

    Has the methods of an `fx.Graph` that write calls.

    Attributes:
        made: The nodes written.
        given: Constant tensors that they use, by the name of their `get_attr` node's target.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, given: str) -> None:
        """Start with nothing written.

        Args:
            graph: Where to write, at its point of insertion.
            root: The module that it belongs to.
            given: Path under which constants will be found.
        """
        self.made: set[fx.Node] = set()
        self.given: dict[str, Tensor] = {}
        self._graph, self._root, self._path = graph, root, given
        self._lifted: dict[int | str, fx.Node] = {}

    def call_function(self, function: Callable[..., Any], args: Any, kwargs: Any = None) -> Part:
        """Call a function."""
        return self._call("call_function", function, function, args, kwargs)

    def call_method(self, name: str, args: Any, kwargs: Any = None) -> Part:
        """Call a method of the first argument."""

        def method(own: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(own, name)(*args, **kwargs)

        return self._call("call_method", name, method, args, kwargs)

    def call_module(self, path: str, args: Any, kwargs: Any = None) -> Part:
        """Call a module of the model."""
        return self._call("call_module", path, self._root.get_submodule(path), args, kwargs)

    def lifted(self, part: Part) -> Any:
        """A part as an argument of a node."""
        if part.node is not None:
            return part.node
        if not isinstance(part.value, Tensor):
            return part.value
        key = part.path or id(part.value)
        if key not in self._lifted:
            path = part.path
            if not path:
                path = f"{self._path}.constant_{len(self.given)}"
                self.given[path] = part.value  # which keeps its id
            self._lifted[key] = self._graph.get_attr(path)
            self.made.add(self._lifted[key])
        return self._lifted[key]

    def _call(self, op: str, target: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Part:
        sized = False

        def value_of(argument: Any) -> Any:
            nonlocal sized
            if not isinstance(argument, Part):
                return argument
            sized = sized or argument.node is not None
            return argument.value

        def lifted(argument: Any) -> Any:
            return self.lifted(argument) if isinstance(argument, Part) else argument

        args, kwargs = tuple(args), dict(kwargs or {})
        values: Any = map_aggregate((args, kwargs), value_of)
        with torch.no_grad():
            value = run(*values[0], **values[1])
        if not sized:
            return Part(value)
        given: Any = map_aggregate((args, kwargs), lifted)
        node = self._graph.create_node(op, target, *given)
        self.made.add(node)
        return Part(value, node)
