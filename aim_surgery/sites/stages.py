"""Where a write may follow: boundaries, the stages that they form, and one point for each stage.

    boundary    a dominator of the output, in the flow of features, that is one feature tensor
    stage       a run of boundaries with one number of positions per sample,
                numel / (channels · samples): windows (B·n, w·w, C), maps (B, H, W, C) and
                (B, C, H, W) of one resolution count alike
    block       a stretch between two neighbouring boundaries that holds a site; it ends at the last
                boundary before the next site, so after norm and activation
    chosen      the end of the first block of each stage

Where features flow around (U-Net, feature pyramids) few resolutions have dominators. There, the
last node of each resolution stands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.axes import follow_axis
from aim_surgery.sites.boundary import Boundary, analysed_trace, node_names
from aim_surgery.sites.calls import Call, find_calls, samples_of
from aim_surgery.sites.causal import find_causal
from aim_surgery.sites.flow import Flow, find_flow
from aim_surgery.sites.graph import embeddings

_Point = tuple[fx.Node, Boundary]


@dataclass(frozen=True)
class Stages:
    """Where a write may follow.

    Attributes:
        boundaries: All places, in execution order.
        chosen: One for each stage: where a write goes if nothing else is said, in execution order,
            also where no later site would read it.
        refused: Places that would have been chosen but for a reason, with it.
    """

    boundaries: tuple[Boundary, ...]
    chosen: tuple[Boundary, ...]
    refused: tuple[tuple[str, str], ...] = ()


def find_stages(capture: Capture) -> Stages:
    """Find the boundaries of a captured model, its stages, and one place to write in each.

    Args:
        capture: The captured model. Where training and evaluation differ, evaluation counts.

    Returns:
        The stages; all empty where no site depends on the input.
    """
    graph = analysed_trace(capture).graph
    features = _Features(capture, graph)
    flow = features.flow
    points = [point for node in flow.dominators if (point := features.at(node)) is not None]
    stages = [list(run) for _, run in groupby(points, key=lambda point: point[1].positions)]
    chosen = [point for stage in stages if (point := _first_block(flow, points, stage))]
    for point in features.last_of_resolutions({point[1].positions for point in points}):
        stages.append([point])
        chosen.append(point)
    stages.sort(key=lambda stage: flow.order[stage[0][0]])
    numbers = {node: number for number, stage in enumerate(stages, 1) for node, _ in stage}

    def numbered(some: Sequence[_Point]) -> Iterator[Boundary]:
        for node, boundary in sorted(some, key=lambda point: flow.order[point[0]]):
            yield replace(boundary, stage=numbers[node])

    boundaries = tuple(numbered([point for stage in stages for point in stage]))
    kept, refused = _without_causal(capture, graph, tuple(numbered(chosen)))
    return Stages(boundaries, kept, refused)


def _first_block(flow: Flow, points: Sequence[_Point], stage: Sequence[_Point]) -> _Point | None:
    """The end of the first block of a stage, None where no site works in it."""
    ways = set(flow.reaching)
    places = [flow.order[call.node] for call in flow.sites if call.node in ways]
    index = points.index(stage[0])
    start = flow.order[points[index - 1][0]] if index else -1
    begun = next((place for place in places if place > start), None)
    ends = [flow.order[node] for node, _ in stage]
    first = next((end for end in ends if begun is not None and end >= begun), None)
    if first is None:
        return None
    following = next((place for place in places if place > first), len(flow.order))
    last = max(end for end in ends if first <= end < following)
    return stage[ends.index(last)]


class _Features:
    """What a node carries, on one graph: samples, channels, positions."""

    def __init__(self, capture: Capture, graph: fx.Graph) -> None:
        self.calls = find_calls(capture, graph)
        self.samples = samples_of(capture, graph, self.calls)
        tables = embeddings(capture, graph)
        starts = {node: node.meta["val"].ndim - 1 for node in tables}
        starts |= {call.node: call.channel_axis(call.node) for call in self.calls}
        self.channels = follow_axis(capture, graph, starts)
        self.flow = find_flow(graph, self.calls, tables, self.samples.dependent)
        self._names = node_names(capture, graph)
        self._without_grad = set(_without_grad(graph))

    def at(self, node: fx.Node, *, dominates: bool = True) -> _Point | None:
        """The boundary that a node is, if it carries one feature tensor with known axes."""
        value, channel_axis = node.meta.get("val"), self.channels.get(node)
        if not isinstance(value, torch.Tensor) or channel_axis is None:
            return None
        if not value.is_floating_point() or node in self._without_grad:
            return None
        sample_axis = self.samples.axes.get(node)
        if self.samples.count and (
            sample_axis in (None, channel_axis) or value.shape[sample_axis] != self.samples.count
        ):
            return None
        names = self._names[node]
        paths = names[:-1] or names
        positions = self._positions(value, int(value.shape[channel_axis]))
        if positions < 1:
            return None
        return node, Boundary(
            name=min(paths, key=lambda path: path.count(".")),
            names=names,
            stage=0,
            channels=int(value.shape[channel_axis]),
            channel_axis=channel_axis,
            sample_axis=sample_axis,
            spatial=_spatial(tuple(value.shape), channel_axis, sample_axis),
            positions=positions,
            dominates=dominates,
        )

    def last_of_resolutions(self, covered: set[int]) -> Iterator[_Point]:
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


def _without_causal(
    capture: Capture, graph: fx.Graph, chosen: tuple[Boundary, ...]
) -> tuple[tuple[Boundary, ...], tuple[tuple[str, str], ...]]:
    tokens = [point for point in chosen if not point.spatial and point.positions > 1]
    causal = find_causal(capture, graph) if tokens else ""
    if not causal:
        return chosen, ()
    reason = (
        f"attention is causal ({causal}): a write pooled over all tokens would show earlier tokens "
        f"what comes later. Name points by hand (write_at=...) if that is meant, or use "
        f"write='none'"
    )
    kept = tuple(point for point in chosen if point not in tokens)
    return kept, tuple((point.name, reason) for point in tokens)
