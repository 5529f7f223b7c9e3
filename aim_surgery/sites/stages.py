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

from aim_surgery.capture import Capture
from aim_surgery.sites.boundary import Boundary
from aim_surgery.sites.features import Point, features_of
from aim_surgery.sites.flow import Flow
from aim_surgery.sites.once import found_once


@dataclass(frozen=True)
class Stages:
    """Where a write may follow.

    Attributes:
        boundaries: All places, in execution order.
        chosen: One for each stage: where a write goes if nothing speaks against it, in execution
            order, also where no later site would read it.
    """

    boundaries: tuple[Boundary, ...]
    chosen: tuple[Boundary, ...]


@found_once
def find_stages(capture: Capture) -> Stages:
    """Find the boundaries of a captured model, its stages, and one place to write in each.

    Args:
        capture: The captured model. Where training and evaluation differ, evaluation counts.

    Returns:
        The stages; all empty where no site depends on the input.
    """
    features = features_of(capture)
    flow = features.flow
    points = [point for node in flow.dominators if (point := features.at(node)) is not None]
    stages = [list(run) for _, run in groupby(points, key=lambda point: point[1].positions)]
    chosen = [point for stage in stages if (point := _first_block(flow, points, stage))]
    for point in features.last_of_resolutions({point[1].positions for point in points}):
        stages.append([point])
        chosen.append(point)
    stages.sort(key=lambda stage: flow.order[stage[0][0]])
    numbers = {node: number for number, stage in enumerate(stages, 1) for node, _ in stage}

    def numbered(some: Sequence[Point]) -> Iterator[Boundary]:
        for node, boundary in sorted(some, key=lambda point: flow.order[point[0]]):
            yield replace(boundary, stage=numbers[node])

    boundaries = tuple(numbered([point for stage in stages for point in stage]))
    return Stages(boundaries, tuple(numbered(chosen)))


def _first_block(flow: Flow, points: Sequence[Point], stage: Sequence[Point]) -> Point | None:
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
