"""Tidies a graph after a pass."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


def erase_unused(node: fx.Node, keep: Collection[fx.Node] = ()) -> None:
    """Erase a node that nobody uses, then those that it alone used, and so on.

    Args:
        node: Where to begin; left alone if it is used.
        keep: Nodes to stop at.
    """
    unused = [node]
    while unused:
        node = unused.pop()
        if node.users or node in keep or node._erased:
            continue
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        unused += sources
