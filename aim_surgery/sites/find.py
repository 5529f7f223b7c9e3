"""All sites and all unread weights of a captured model: in its graphs, and inside Python calls."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.sites.calls import Call, find_calls
from aim_surgery.sites.inside import find_inside, path_of
from aim_surgery.sites.once import found_once
from aim_surgery.sites.recurrent import find_recurrent
from aim_surgery.sites.site import Site, Skip
from aim_surgery.sites.unread import find_unread

_BOTH = "it is also called inside a Python call"


def find_sites(capture: Capture) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Find every convolution and linear call of a captured model.

    Args:
        capture: The captured model.

    Returns:
        The sites in execution order (those of training alone behind those of evaluation, and those
        inside Python calls last), and the weights that take part in products but are read by
        no site. A layer that is called in a graph and inside a Python call, as where training
        alone looks at data, reads through its hook everywhere; one whose weight the graph gives to
        a function reads there.
    """
    sites: dict[str, Site] = {}
    unread: dict[str, Skip] = {}
    paths = python_calls(capture)
    inside, rest, both = _inside(capture)
    hooked = {site.layer for site in inside}
    agreed = graph_sites(capture)
    for trace in capture.evaluation_first:
        calls = find_calls(capture, trace.graph)
        found: dict[fx.Node, tuple[Site, ...]] = {}
        for call in calls:
            if call.site.layer not in hooked:
                found[call.node] = (_left_alone(agreed[call.site.name], both),)
        found |= find_recurrent(capture, trace.graph)
        for site in (s for node in trace.graph.nodes for s in found.get(node, ())):
            sites.setdefault(site.name, site)
        for item in find_unread(capture, trace.graph, frozenset(call.node for call in calls)):
            if item.name not in paths:
                unread.setdefault(item.name, item)
    for site in inside:
        sites.setdefault(site.name, site)
    for item in rest:
        unread.setdefault(item.name, item)
    read = {weight for site in sites.values() for weight in site.weights}
    left = (item for item in unread.values() if not set(item.weights) <= read)
    return tuple(sites.values()), tuple(left)


@found_once
def graph_sites(capture: Capture) -> dict[str, Site]:
    """The sites of all graphs of a captured model, whichever mode it is in.

    Args:
        capture: The captured model.

    Returns:
        Sites by name: what evaluation says of them, where both modes have them. Training may mix
        samples on the side (statistics of a batch), and so lose their axis; where it has another
        one, or another size along it, there is none.
    """
    calls: dict[str, Call] = {}
    sites: dict[str, Site] = {}
    for trace in capture.evaluation_first:
        for call in find_calls(capture, trace.graph):
            name = call.site.name
            first = calls.setdefault(name, call)
            site = sites.setdefault(name, call.site)
            if not _agree_on_samples(first, call):
                site = replace(site, sample_axis=None, windows=1)
            if site.widens and not call.site.widens:
                site = replace(site, widens=False, why_beside=call.site.why_beside)
            more = tuple(w for w in call.site.weights if w not in site.weights)
            if more:  # training may make a weight of more (noise of a learned size)
                site = replace(site, weights=(*site.weights, *more))
            sites[name] = site
    return sites


def _agree_on_samples(one: Call, two: Call) -> bool:
    axis = one.site.sample_axis
    if axis is None:
        return True
    if two.site.sample_axis is not None:
        return (axis, one.site.windows) == (two.site.sample_axis, two.site.windows)
    shape, other = one.source.meta["val"].shape, two.source.meta["val"].shape
    return len(shape) == len(other) and shape[axis] == other[axis]


def python_calls(capture: Capture) -> dict[str, str]:
    """Paths of submodules that stay Python calls, "" for the whole model, with the reasons.

    Args:
        capture: The captured model.

    Returns:
        Reasons by path.
    """
    if capture.whole:
        return {"": ""}
    return {call.path: call.reason for trace in capture.traces for call in trace.opaque}


@found_once
def _inside(capture: Capture) -> tuple[tuple[Site, ...], tuple[Skip, ...], frozenset[str]]:
    paths = python_calls(capture)
    calls = [call for trace in capture.traces for call in find_calls(capture, trace.graph)]
    functions = {call.site.layer for call in calls if call.node.op != "call_module"}
    taken = frozenset(
        weight
        for call in calls
        if call.site.layer in functions or path_of(call.site.layer, paths) is None
        for weight in call.site.weights
    )
    return find_inside(capture, paths, taken)


def _left_alone(site: Site, both: frozenset[str]) -> Site:
    """A Python call gives its layers no memory: a layer that it calls can't be wider for it."""
    if not site.widens or both.isdisjoint(site.weights):
        return site
    return replace(site, widens=False, why_beside=_BOTH)
