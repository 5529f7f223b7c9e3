"""Whose tensors are whose: a pass may give a layer other values where nobody else looks at them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn

from aim_surgery.capture.leaves import is_plain


class Ownership:
    """What a graph and its modules have to do with parameters, as they stand when it is made.

    Attributes:
        looked_at: Paths of the tensors that the graph itself works with.
        calls: How often the graph calls each module, by path.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        """Count.

        Args:
            graph: Left unchanged.
            root: The module that it belongs to; left unchanged.
        """
        self._root = root
        self.calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
        self.looked_at = {str(n.target) for n in graph.nodes if n.op == "get_attr" and n.users}
        self._owners = Counter(
            id(parameter)
            for _, module in root.named_modules(remove_duplicate=False)
            for parameter in module._parameters.values()
            if parameter is not None
        )

    def is_alone(self, node: fx.Node, *names: str) -> bool:
        """Whether a node's call is all that has to do with tensors of the layer that it calls.

        Args:
            node: The call of a layer.
            names: The layer's parameters in question; one that is None belongs to nobody.

        Returns:
            False, too, where hooks or a forward of its own would see what changes, or where a
            parameter is computed at each call.
        """
        path = str(node.target)
        layer: Any = self._root.get_submodule(path)
        if not is_plain(layer) or self.calls[path] != 1:
            return False
        return all(
            getattr(layer, name) is (tensor := layer._parameters.get(name))
            and f"{path}.{name}" not in self.looked_at
            and self._owners[id(tensor)] <= 1
            for name in names
        )
