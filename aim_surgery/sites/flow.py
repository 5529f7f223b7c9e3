"""The flow of features: the part of a graph that a cut at one node must stop.

Nodes that hold floating tensors and lie downstream of a first site or embedding (one that depends
on the input and has none before it), through tensors only. So masks, position tables and sizes,
which reach every block of a transformer, are no way around a block. A root leads to all of these
first nodes, the features that the model returns lead to a sink; the dominators of the sink are the
nodes that all features pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import fx

from aim_surgery.nn.rebuilt import Rebuilt
from aim_surgery.sites.calls import Call
from aim_surgery.sites.graph import changes_in_place

ROOT, SINK = "root", "sink"


@dataclass(frozen=True, eq=False)
class Flow:
    """The features of one graph.

    Attributes:
        edges: From each node to its users; from `ROOT` to the first nodes; from what is returned to
            `SINK`.
        order: Place of each node in execution order.
        sites: The sites in it, in execution order.
    """

    edges: nx.DiGraph
    order: Mapping[fx.Node, int]
    sites: tuple[Call, ...]

    @cached_property
    def reaching(self) -> tuple[fx.Node, ...]:
        """Nodes on some way from the root to the sink, in execution order."""
        ways = nx.ancestors(self.edges, SINK) if SINK in self.edges else set()
        return tuple(sorted(ways - {ROOT}, key=self.order.__getitem__))

    @cached_property
    def dominators(self) -> tuple[fx.Node, ...]:
        """Nodes that all ways from the root to the sink pass, in execution order."""
        if not self.reaching:
            return ()
        before = nx.immediate_dominators(self.edges, ROOT)
        chain: list[fx.Node] = []
        node = before[SINK]
        while node != ROOT:
            chain.append(node)
            node = before[node]
        return tuple(reversed(chain))

    def around(self, node: fx.Node) -> str:
        """The first site, after a node, that features reach around it; "" where there is none."""
        edges = nx.restricted_view(self.edges, [node], [])
        reached = nx.descendants(edges, ROOT)
        later = (call for call in self.sites if self.order[call.node] > self.order[node])
        return next((call.site.name for call in later if call.node in reached), "")


def find_flow(
    graph: fx.Graph,
    calls: Sequence[Call],
    tables: AbstractSet[fx.Node],
    dependent: AbstractSet[fx.Node],
) -> Flow:
    """Find the flow of features in a captured graph.

    Args:
        graph: The graph.
        calls: Its sites.
        tables: Its look-ups in tables.
        dependent: Nodes that depend on the input, through tensors.

    Returns:
        The flow; empty where no site depends on the input.
    """
    sites = {call.node: call for call in calls if call.node in dependent}
    first = (sites.keys() | tables) & dependent
    edges = nx.DiGraph()
    edges.add_node(ROOT)
    for node in graph.nodes:
        sources = [source for source in node.all_input_nodes if source in edges]
        if node.op == "output":
            edges.add_edges_from((source, SINK) for source in sources)
        elif changes_in_place(node):
            edges.add_edges_from((s, node.args[0]) for s in sources if s is not node.args[0])
        elif sources or node in first:
            if not sources:
                edges.add_edge(ROOT, node)
            if _carries(node):
                edges.add_edges_from((source, node) for source in sources)
    order = {node: place for place, node in enumerate(graph.nodes)}
    return Flow(edges, order, tuple(call for node, call in sites.items() if node in edges))


def _carries(node: fx.Node) -> bool:
    """Whether features leave a node: as tensors, or in a dict or object that is made of them."""
    is_made = "val" not in node.meta or isinstance(node.target, Rebuilt)
    return is_made or holds_features(node.meta["val"])


def holds_features(value: Any) -> bool:
    """Whether a value is a floating or complex tensor, or a collection with one in it."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return isinstance(value, tuple | list) and any(map(holds_features, value))
