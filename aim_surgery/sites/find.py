"""All sites and all unread weights of a captured model: in its graphs, and inside Python calls."""

from __future__ import annotations

from aim_surgery.capture import Capture
from aim_surgery.sites.calls import find_calls
from aim_surgery.sites.inside import find_inside
from aim_surgery.sites.site import Site, Skip
from aim_surgery.sites.unread import find_unread


def find_sites(capture: Capture) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Find every convolution and linear call of a captured model.

    Args:
        capture: The captured model.

    Returns:
        The sites in execution order (those of the other mode's graph, if there is one, behind, and
        those inside Python calls last), and the weights that take part in products but are read by
        no site.
    """
    sites: dict[str, Site] = {}
    unread: dict[str, Skip] = {}
    opaque = {call.path for trace in capture.traces for call in trace.opaque}
    for trace in capture.traces:
        calls = find_calls(capture, trace.graph)
        for call in calls:
            sites.setdefault(call.site.name, call.site)
        for item in find_unread(capture, trace.graph, frozenset(call.node for call in calls)):
            if item.name not in opaque:
                unread.setdefault(item.name, item)
    inside, rest = find_inside_sites(capture)
    for site in inside:
        sites.setdefault(site.name, site)
    for item in rest:
        unread.setdefault(item.name, item)
    read = {weight for site in sites.values() for weight in site.weights}
    left = (item for item in unread.values() if not set(item.weights) <= read)
    return tuple(sites.values()), tuple(left)


def find_inside_sites(capture: Capture) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Find the sites inside Python calls, or in the whole model where there is no graph of it.

    Args:
        capture: The captured model.

    Returns:
        As `find_sites`.
    """
    if "inside" not in capture.findings:
        paths = {call.path: call.reason for trace in capture.traces for call in trace.opaque}
        calls = (call for trace in capture.traces for call in find_calls(capture, trace.graph))
        taken = frozenset(weight for call in calls for weight in call.site.weights)
        paths = {"": ""} if capture.whole else paths
        capture.findings["inside"] = find_inside(capture, paths, taken)
    return capture.findings["inside"]
