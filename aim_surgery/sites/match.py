"""From what a user names to boundaries, or to the reason why a write can't follow there."""

from __future__ import annotations

import difflib
import fnmatch

import torch
from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.errors import PlanError
from aim_surgery.sites.boundary import Boundary, analysed_trace, node_names
from aim_surgery.sites.features import Features
from aim_surgery.sites.stages import Stages

_LISTED = 5


def match_boundaries(stages: Stages, capture: Capture, pattern: str) -> tuple[Boundary, ...]:
    """The boundaries that a user means.

    Args:
        stages: The model's boundaries.
        capture: The captured model.
        pattern: A name that a boundary goes by, or a glob. A glob is tried on the `name` of each
            boundary, then on all its `names`.

    Returns:
        One boundary for a name, one or more for a glob, in execution order.

    Raises:
        PlanError: It is no boundary; the message says why, and what is.
    """
    for boundary in stages.boundaries:
        if pattern in boundary.names:
            return (boundary,)
    for names_of in (_main_name, _all_names):
        found = tuple(
            boundary
            for boundary in stages.boundaries
            if any(fnmatch.fnmatchcase(name, pattern) for name in names_of(boundary))
        )
        if found:
            return found
    raise PlanError(f"{_why_not(capture, pattern)}. {_what_is(stages, pattern)}")


def _main_name(boundary: Boundary) -> tuple[str, ...]:
    return (boundary.name,)


def _all_names(boundary: Boundary) -> tuple[str, ...]:
    return boundary.names


def _what_is(stages: Stages, pattern: str) -> str:
    names = [boundary.name for boundary in stages.boundaries]
    if not names:
        return "The model has no place for a write: use write='none'"
    close = difflib.get_close_matches(pattern, names, n=_LISTED, cutoff=0.5)
    close += [boundary.name for boundary in stages.chosen if boundary.name not in close]
    return f"Places that do: {', '.join((close or names)[:_LISTED])}"


def _why_not(capture: Capture, pattern: str) -> str:
    path = pattern.partition("@")[0]
    for trace in capture.traces:
        for call in trace.opaque:
            if path == call.path or path.startswith(f"{call.path}."):
                return (
                    f"write point {pattern!r} lies in {call.path}, which stays one Python call "
                    f"({call.reason}); a write can only follow outside"
                )
    graph = analysed_trace(capture).graph
    nodes = {name: node for node, names in node_names(capture, graph).items() for name in names}
    node = nodes.get(pattern)
    if node is None and path not in capture.modules:
        return f"write point {pattern!r} does not exist"
    if node is None or not isinstance(node.meta.get("val"), torch.Tensor):
        what = "returns no single tensor" if node is not None or path == pattern else "is no call"
        return f"write point {pattern!r} {what}"
    return _why_no_boundary(Features(capture, graph), node, pattern)


def _why_no_boundary(features: Features, node: fx.Node, pattern: str) -> str:
    flow = features.flow
    if node not in flow.edges:
        return f"write point {pattern!r} carries no features of a convolution or linear layer"
    reason = features.why_not(node)
    if reason:
        return f"write point {pattern!r} {reason}"
    around = flow.around(node)
    where = f"{around!r}" if around else "the output"
    return (
        f"write point {pattern!r} does not dominate its readers' features: features reach {where} "
        f"around it"
    )
