"""Where is written, and which version of the memory each site reads.

    write points     one after the first block of each stage, or those that the user names
    version(site)    how many of them are executed before the site

A write that no later site reads is left out, with its reason. A site whose input is not split by
samples (a table of position biases) can't take one copy a sample; it reads what was there before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.config import AimConfig
from aim_surgery.errors import PlanError, listed
from aim_surgery.planning.plan import UNREAD
from aim_surgery.sites import (
    Boundary,
    Site,
    Skip,
    boundary_nodes,
    find_calls,
    find_stages,
    match_boundaries,
    may_leak_unseen,
    why_not_pooled,
)

_UNSEEN = (
    "whether later tokens are hidden from earlier ones can't all be seen on the meta device: plan "
    "with a model that has values, or use write='none' if it is causal"
)


@dataclass(frozen=True)
class Schedule:
    """When is written and read.

    Attributes:
        points: Where is written, in execution order: the i-th (from 1) makes version i.
        versions: Version that each site reads, by name.
        left_out: Points where a write was left out, with reasons.
        notes: What a reader of the plan should know.
    """

    points: tuple[Boundary, ...]
    versions: Mapping[str, int]
    left_out: tuple[Skip, ...]
    notes: tuple[str, ...] = ()


def schedule_writes(capture: Capture, config: AimConfig, sites: Sequence[Site]) -> Schedule:
    """Choose the write points, and the version that each site reads.

    Args:
        capture: The captured model.
        config: Its `write`, `write_at` and `carry` decide.
        sites: The sites that will read.

    Returns:
        The schedule; an empty one where nothing is to be written.

    Raises:
        PlanError: A named write point can't be one, or there is nothing to carry.
    """
    if config.write == "none":
        return Schedule((), {}, ())
    if capture.whole:
        return _without_graph(config, capture.why_whole)
    stages = find_stages(capture)
    if config.write_at is None:
        refused = why_not_pooled(capture, stages.chosen)
        points = [point for point in stages.chosen if point not in refused]
        left_out = [Skip(point.name, (), reason) for point, reason in refused.items()]
    else:
        patterns = (config.write_at,) if isinstance(config.write_at, str) else config.write_at
        found = {p for pattern in patterns for p in match_boundaries(stages, capture, pattern)}
        points = [boundary for boundary in stages.boundaries if boundary in found]
        left_out = []
    timelines = [_Timeline(capture, trace.graph, points) for trace in capture.traces]
    varies = config.write == "sample"
    readers = [s for s in sites if not s.inside and _can_read(s, points, varies)]
    kept: list[Boundary] = []
    for point in points:
        reason = ""
        if not all(timeline.has(point) for timeline in timelines):
            reason = "the model passes it in one of its modes only"
        elif not all(t.in_order([*kept, point]) for t in timelines):
            reason = "the model's other mode passes the write points in another order"
        elif not any(t.before(point, site) for t in timelines for site in readers):
            reason = UNREAD
        if reason:
            left_out.append(Skip(point.name, (), reason))
        else:
            kept.append(point)
    if not kept and config.carry == "state":
        raise PlanError(
            f"carry='state': there is no write, so there is nothing to carry "
            f"({'; '.join(f'{skip.name}: {skip.reason}' for skip in left_out) or 'no stage'}); "
            f"name a write point with write_at, or use carry='weights'"
        )
    versions = {
        site.name: min(
            sum(timeline.before(point, site) for point in kept)
            for timeline in timelines
            if timeline.runs(site)
        )
        for site in readers
    }
    notes = _notes(sites, readers, kept)
    if config.write_at is None and may_leak_unseen(capture, kept):
        notes += (_UNSEEN,)
    if not kept:
        notes = (_nothing_written(left_out),)
    return Schedule(tuple(kept), versions, tuple(left_out), notes)


class _Timeline:
    """When write points and sites are executed in one graph."""

    def __init__(self, capture: Capture, graph: fx.Graph, points: Sequence[Boundary]) -> None:
        order = {node: index for index, node in enumerate(graph.nodes)}
        nodes = boundary_nodes(capture, graph, [point.name for point in points])
        self._points = {name: order[node] for name, node in nodes.items()}
        self._sites = {call.site.name: order[call.node] for call in find_calls(capture, graph)}

    def has(self, point: Boundary) -> bool:
        return point.name in self._points

    def in_order(self, points: Sequence[Boundary]) -> bool:
        places = [self._points[point.name] for point in points]
        return places == sorted(places)

    def runs(self, site: Site) -> bool:
        return site.name in self._sites

    def before(self, point: Boundary, site: Site) -> bool:
        if not self.has(point) or not self.runs(site):
            return False
        return self._points[point.name] < self._sites[site.name]


def _can_read(site: Site, points: Sequence[Boundary], varies: bool) -> bool:
    """Whether a site can take what is written: one copy a sample needs an input split likewise."""
    if not varies or all(point.sample_axis is None for point in points):
        return True
    return site.sample_axis is not None


def _without_graph(config: AimConfig, why: str) -> Schedule:
    """Writes need a graph to be placed in."""
    if config.write_at is not None or config.carry == "state":
        asked = "write_at" if config.write_at is not None else 'carry="state"'
        reason = f" ({why})" if why else ""
        remedy = "" if why else ", or emit='graph'"
        raise PlanError(
            f"{asked}: a model that keeps its class (emit='module') has no graph to place writes "
            f"in{reason}: use write='none' there{remedy}"
        )
    why = "there is no graph to place writes in where the model keeps its class"
    return Schedule((), {}, (), (f"nothing is written: {why}",))


def _nothing_written(left_out: Sequence[Skip]) -> str:
    if left_out:
        return "nothing is written: each write point was left out, for the reasons above"
    return (
        "nothing is written: no place was found where one tensor carries all features, one entry a "
        "sample; an example of several samples may show more, and write_at names a place"
    )


def _notes(
    sites: Sequence[Site], readers: Sequence[Site], points: Sequence[Boundary]
) -> tuple[str, ...]:
    if not points:
        return ()
    apart = [site for site in sites if site not in readers]
    called = "they are inside Python calls or recurrent layers"
    groups = {
        "no samples are in them": [site.name for site in apart if not site.inside],
        called: [site.name for site in apart if site.inside],
    }
    return tuple(
        f"read the memory as it is before any write, since {why}: {listed(names, 4)}"
        for why, names in groups.items()
        if names
    )
