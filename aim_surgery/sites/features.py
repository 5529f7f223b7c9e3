"""What the nodes of one graph carry: samples, channels, positions; and which are boundaries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.axes import follow_axis
from aim_surgery.sites.boundary import Boundary, analysed_trace, node_names
from aim_surgery.sites.calls import Call, find_calls, samples_of
from aim_surgery.sites.flow import find_flow
from aim_surgery.sites.graph import embeddings
from aim_surgery.sites.once import found_once

Point = tuple[fx.Node, Boundary]

_MOST_AXES = 5  # samples, channels and three of a map: what convolutions know


class Features:
    """What a node carries, on one graph.

    Attributes:
        graph: The graph.
        samples: Its samples.
        flow: Its flow of features.
    """

    def __init__(self, capture: Capture, graph: fx.Graph) -> None:
        self.graph = graph
        # what rows of a table give is no features
        calls = [call for call in find_calls(capture, graph) if call.table is None]
        self.samples = samples_of(capture, graph, calls)
        tables = embeddings(capture, graph)
        starts = {node: node.meta["val"].ndim - 1 for node in tables}
        starts |= {call.node: call.channel_axis(call.node) for call in calls}
        self._channels = follow_axis(capture, graph, starts)
        self.flow = find_flow(graph, calls, tables, self.samples.dependent)
        self._names = node_names(capture, graph)
        self._without_grad = set(_without_grad(graph))

    def at(self, node: fx.Node, *, dominates: bool = True) -> Point | None:
        """The boundary that a node is, if it carries one feature tensor with known axes."""
        if self.why_not(node):
            return None
        value, channel_axis = node.meta["val"], self._channels[node]
        sample_axis = self.samples.axes.get(node)
        names = self._names[node]
        paths = names[:-1] or names
        return node, Boundary(
            name=min(paths, key=lambda path: path.count(".")),
            names=names,
            stage=0,
            channels=int(value.shape[channel_axis]),
            channel_axis=channel_axis,
            sample_axis=sample_axis,
            spatial=_spatial(tuple(value.shape), channel_axis, sample_axis),
            positions=self._positions(value, int(value.shape[channel_axis])),
            dominates=dominates,
        )

    def why_not(self, node: fx.Node) -> str:
        """Why a node is no boundary wherever it lies, as a predicate; "" where it may be one."""
        value, channel_axis = node.meta.get("val"), self._channels.get(node)
        if not isinstance(value, torch.Tensor):
            return "returns no single tensor"
        if not value.is_floating_point():
            return f"carries no features but {str(value.dtype).removeprefix('torch.')} numbers"
        if node in self._without_grad:
            return "lies where gradients are switched off, so what a write adds could not learn"
        shape, count = list(value.shape), self.samples.count
        if channel_axis is None:
            return f"has the shape {shape}, of which it is not known which axis runs over channels"
        axis = self.samples.axes.get(node)
        if count and (axis is None or axis == channel_axis):
            return (
                f"has the shape {shape}, of which it is not known which axis runs over samples in "
                f"their order"
            )
        if count and axis is not None and shape[axis] != count:
            return (
                f"has the shape {shape}, with {shape[axis] // count} entries for each of {count} "
                f"samples on axis {axis}; a write needs one"
            )
        if not _spatial(tuple(shape), channel_axis, axis) and channel_axis < len(shape) - 1:
            return f"has the shape {shape}, vectors with their channels on axis {channel_axis}"
        if len(shape) > _MOST_AXES and channel_axis < len(shape) - 1:
            return f"has the shape {shape}, neither a map of up to three axes nor channels last"
        if self._positions(value, shape[channel_axis]) < 1:
            return f"has the shape {shape}, less than one position for each of {count} samples"
        return ""

    def last_of_resolutions(self, covered: set[int]) -> Iterator[Point]:
        """Where most sites work at other resolutions than some: the last node of each other one."""
        ways = set(self.flow.reaching)
        sites = [call for call in self.flow.sites if call.node in ways]
        positions = [self._positions_of(call) for call in sites]
        positions = [count for count in positions if count > 1] or positions
        if 2 * sum(count in covered for count in positions) >= len(positions):
            return
        missing = set(positions) - covered - {1}
        for node in reversed(self.flow.reaching):
            point = self.at(node, dominates=False) if missing else None
            if point is not None and point[1].positions in missing:
                missing.remove(point[1].positions)
                yield point

    def _positions_of(self, call: Call) -> int:
        return self._positions(call.node.meta["val"], call.site.out_channels)

    def _positions(self, value: torch.Tensor, channels: int) -> int:
        return int(value.numel()) // max(channels * max(self.samples.count, 1), 1)


@found_once
def features_of(capture: Capture) -> Features:
    """What is carried by the graph that boundaries are looked for in."""
    return Features(capture, analysed_trace(capture).graph)


def _spatial(shape: tuple[int, ...], channels: int, samples: int | None) -> tuple[int, ...]:
    sizes = tuple(int(size) for axis, size in enumerate(shape) if axis not in (channels, samples))
    tokens = channels == len(shape) - 1 and len(sizes) == 1
    return () if tokens or len(sizes) > 3 else sizes


def _without_grad(graph: fx.Graph) -> Iterator[fx.Node]:
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = node.args[0] is not False
        elif not enabled:
            yield node
