"""All sites and all unread weights of a captured model, over its graphs."""

from __future__ import annotations

from aim_surgery.capture import Capture
from aim_surgery.sites.calls import find_calls
from aim_surgery.sites.site import Site, Skip
from aim_surgery.sites.unread import find_unread


def find_sites(capture: Capture) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Find every convolution and linear call of a captured model.

    Args:
        capture: The captured model.

    Returns:
        The sites in execution order (those of the other mode's graph, if there is one, behind),
        and the weights that take part in products but are read by no site.
    """
    sites: dict[str, Site] = {}
    unread: dict[str, Skip] = {}
    for trace in capture.traces:
        calls = find_calls(capture, trace.graph)
        for call in calls:
            sites.setdefault(call.site.name, call.site)
        for item in find_unread(capture, trace.graph, frozenset(call.node for call in calls)):
            unread.setdefault(item.name, item)
    read = {weight for site in sites.values() for weight in site.weights}
    rest = (item for item in unread.values() if not set(item.weights) <= read)
    return tuple(sites.values()), tuple(rest)
