"""Which nodes depend on the input, and which axis of them runs over the samples of a batch.

The first axis of the first input tensor is taken for the samples, as everywhere in PyTorch; where
the first layer works on a single sample (an image without a batch) there is no such axis, and where
the model's own sequence layers say that time comes first, it is the second.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.sites.axes import follow_axis
from aim_surgery.sites.graph import argument_of


@dataclass(frozen=True)
class Samples:
    """The samples of one graph.

    Attributes:
        count: Samples of the example; 0 where the model works on a single one, without an axis.
        axes: Axis over the samples, by node.
        dependent: Nodes that hold tensors and depend on input tensors, through tensors only: what
            is made from their sizes alone (a mask, a table of positions) is not among them.
    """

    count: int
    axes: Mapping[fx.Node, int]
    dependent: AbstractSet[fx.Node] = field(default_factory=frozenset)

    def at(self, node: fx.Node, channel_axis: int) -> tuple[int | None, int]:
        """The samples' axis of a site's input, and its entries per sample.

        Args:
            node: The input.
            channel_axis: Its axis over channels.

        Returns:
            (None, 1) where it doesn't depend on the samples, they are mixed into other axes or in
            another order: an axis that only has their number is not taken for theirs.
        """
        if not self.count or node not in self.dependent:
            return None, 1
        shape, axis = node.meta["val"].shape, self.axes.get(node)
        if axis is None or axis == channel_axis:
            return None, 1
        return axis, int(shape[axis]) // self.count


def find_samples(
    capture: Capture, graph: fx.Graph, inputs_of_sites: Sequence[tuple[fx.Node, int]]
) -> Samples:
    """Find what depends on the input, and its axis over samples.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        inputs_of_sites: What each site works on, with the number of axes of a single sample (3 for
            a 2-d convolution, 1 for a linear layer), in execution order.

    Returns:
        The samples of the graph.
    """
    dependent = _dependent(graph)
    first = next((site for site in inputs_of_sites if site[0] in dependent), None)
    shapes = {node: tuple(node.meta["val"].shape) for node in input_tensors(graph)}
    shapes = {node: shape for node, shape in shapes.items() if shape}
    if not shapes or (first is not None and first[0].meta["val"].ndim == first[1]):
        return Samples(0, {}, dependent)
    leading = next(iter(shapes.values()))
    count = leading[0]
    starts = {node: 0 for node, shape in shapes.items() if shape[0] == count}
    axes = follow_axis(capture, graph, starts, samples=count)
    if len(leading) > 2 and _time_comes_first(capture, axes):
        count = leading[1]
        starts = {node: 1 for node, s in shapes.items() if len(s) > 2 and s[1] == count}
        starts |= {node: 0 for node, s in shapes.items() if node not in starts and s[0] == count}
        axes = follow_axis(capture, graph, starts, samples=count)
    return Samples(count, axes, dependent)


def holds_tensor(value: Any) -> bool:
    """Whether a node's value is a tensor or a collection with one in it."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return isinstance(value, tuple | list) and any(map(holds_tensor, value))


def _dependent(graph: fx.Graph) -> set[fx.Node]:
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        reached = node.op == "placeholder" or any(n in dependent for n in node.all_input_nodes)
        # without a value: a dict is made
        if reached and ("val" not in node.meta or holds_tensor(node.meta["val"])):
            dependent.add(node)
    return dependent


def input_tensors(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders, and what is taken out of those that are collections."""
    collections: set[fx.Node] = set()
    for node in graph.nodes:
        taken = node.target in (operator.getitem, getattr) and node.args[0] in collections
        if node.op == "placeholder" or taken:
            if isinstance(node.meta["val"], torch.Tensor):
                yield node
            else:
                collections.add(node)


def _time_comes_first(capture: Capture, axes: Mapping[fx.Node, int]) -> bool:
    """Whether a sequence layer takes what was taken for samples as time."""
    for node, axis in axes.items():
        for user in node.users if axis == 0 else ():
            layer = capture.modules[str(user.target)] if user.op == "call_module" else None
            if (
                isinstance(layer, nn.MultiheadAttention | nn.RNNBase)
                and not layer.batch_first
                and argument_of(user, 0, "query", "input") is node
                and node.meta["val"].ndim == 3
            ):
                return True
    return False
