"""Which nodes depend on the input, and which axis of them runs over the samples of a batch.

The first axis of the first input tensor is taken for the samples, as everywhere in PyTorch; where
the first layer works on a single sample (an image without a batch) there is no such axis. What a
model mixes with one another is no samples: where it attends over the entries of the first axis
(time comes first), the samples are the second, and none where that is mixed as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.axes import follow_samples
from aim_surgery.sites.axis_mixing import Mixing, find_mixing


@dataclass(frozen=True)
class Samples:
    """The samples of one graph.

    Attributes:
        count: Samples of the example; 0 where the model works on a single one, without an axis.
        axes: Axis over the samples, by node; empty where all axes that may be are mixed.
        dependent: Nodes that hold tensors and depend on input tensors, through tensors only: what
            is made from their sizes alone (a mask, a table of positions) is not among them.
    """

    count: int
    axes: Mapping[fx.Node, int]
    dependent: AbstractSet[fx.Node] = field(default_factory=frozenset)

    @property
    def leading(self) -> int | None:
        """The samples' axis in the first input that has one, None where none has."""
        return next((axis for node, axis in self.axes.items() if node.op == "placeholder"), None)

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
    shapes = {node: tuple(node.meta["val"].shape) for node in input_tensors(graph)}
    shapes = {node: shape for node, shape in shapes.items() if shape}
    if not shapes or _is_single(capture, graph, inputs_of_sites, shapes, dependent):
        return Samples(0, {}, dependent)
    count = next(iter(shapes.values()))[0]
    starts = {node: 0 for node, shape in shapes.items() if shape[0] == count}
    axes, behind = follow_samples(capture, graph, starts, count)
    mixing = find_mixing(capture, graph, axes | behind, count, dependent)
    if mixing:
        second = _second_axis(capture, graph, shapes, dependent)
        if second is not None:
            return second
        axes = {} if mixing is Mixing.AMONG else axes
    return Samples(count, axes, dependent)


def _is_single(
    capture: Capture,
    graph: fx.Graph,
    inputs_of_sites: Sequence[tuple[fx.Node, int]],
    shapes: Mapping[fx.Node, Sequence[int]],
    dependent: AbstractSet[fx.Node],
) -> bool:
    """Whether the input is one sample without an axis for samples: the first site gets one.

    It may get something else that has no such axis (a time step, a condition for all, a mean over
    samples); then the first site that does get the leading input's first axis tells.
    """
    first = next((site for site in inputs_of_sites if site[0] in dependent), None)
    if first is None or first[0].meta["val"].ndim != first[1]:
        return False
    leading, shape = next(iter(shapes.items()))
    held, _ = follow_samples(capture, graph, {leading: 0}, shape[0])
    told = next((site for site in inputs_of_sites if site[0] in held), first)
    return told[0].meta["val"].ndim == told[1]


def _second_axis(
    capture: Capture,
    graph: fx.Graph,
    shapes: Mapping[fx.Node, Sequence[int]],
    dependent: AbstractSet[fx.Node],
) -> Samples | None:
    """The samples, if they may be the second axis of the inputs: time comes first."""
    leading = next(iter(shapes.values()))
    alike = [shape for shape in shapes.values() if len(shape) == len(leading)]
    if len(leading) < 2 or len({shape[1] for shape in alike}) > 1:
        return None
    count = leading[1]
    starts = {}
    for node, shape in shapes.items():
        if len(shape) != len(leading) and shape[0] == count:  # a padding mask (B, T)
            starts[node] = 0
        elif len(shape) > 1 and shape[1] == count:
            starts[node] = 1
    axes, behind = follow_samples(capture, graph, starts, count)
    if find_mixing(capture, graph, axes | behind, count, dependent):
        return None
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
