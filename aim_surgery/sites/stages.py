"""Where a write may follow: boundaries, the stages that they form, and one point for each stage.

    boundary    a dominator of the output, in the flow of features, that is one feature tensor
    stage       a run of boundaries with one number of positions per sample,
                numel / (channels · samples): windows (B·n, w·w, C), maps (B, H, W, C) and
                (B, C, H, W) of one resolution count alike
    block       a stretch between two neighbouring boundaries that holds a site; it ends at the last
                boundary before the next site, so after norm and activation
    chosen      the end of the first block of each stage

Where features flow around (U-Net, feature pyramids) few resolutions have dominators. There, the
last node of each resolution stands in. Sequences of a causal model, or of one with a mask as input,
are left to the user: a write pools over all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from aim_surgery.capture import Capture
from aim_surgery.sites.boundary import Boundary, analysed_trace
from aim_surgery.sites.causal import find_causal
from aim_surgery.sites.features import Features, Point
from aim_surgery.sites.flow import Flow
from aim_surgery.sites.masks import find_input_mask
from aim_surgery.sites.once import found_once


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


@found_once
def find_stages(capture: Capture) -> Stages:
    """Find the boundaries of a captured model, its stages, and one place to write in each.

    Args:
        capture: The captured model. Where training and evaluation differ, evaluation counts.

    Returns:
        The stages; all empty where no site depends on the input.
    """
    features = Features(capture, analysed_trace(capture).graph)
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
    kept, refused = _without_leaks(capture, features, tuple(numbered(chosen)))
    return Stages(boundaries, kept, refused)


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


def _without_leaks(
    capture: Capture, features: Features, chosen: tuple[Boundary, ...]
) -> tuple[tuple[Boundary, ...], tuple[tuple[str, str], ...]]:
    """Leave out sequences (N, T, C) and (N, C, T) whose positions must not all see each other."""
    sequences = [p for p in chosen if len(p.spatial) <= 1 and p.positions > 1]
    reason = _why_not_pooled(capture, features) if sequences else ""
    if not reason:
        return chosen, ()
    kept = tuple(point for point in chosen if point not in sequences)
    return kept, tuple((point.name, reason) for point in sequences)


def _why_not_pooled(capture: Capture, features: Features) -> str:
    causal = find_causal(capture, features)
    if causal:
        return (
            f"later tokens are hidden from earlier ones ({causal} is causal): a write pooled over "
            f"all tokens would show earlier tokens what comes later. Name points by hand "
            f"(write_at=...) if that is meant, or use write='none'"
        )
    mask = find_input_mask(features)
    if mask:
        return (
            f"{mask}: a write pools over all tokens, also those that a mask input hides, so what a "
            f"sample gives would depend on how far it is padded. Name points by hand "
            f"(write_at=...) if inputs are never padded, or if write='batch' is used and only "
            f"training may see padding; or use write='none'"
        )
    return ""
