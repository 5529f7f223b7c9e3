"""Surgery: a captured model and a plan go in, a new `GraphModule` in concat form comes out.

For each site the graph gets, before the call, the site's view of the memory, and the call gets

    conv(cat[x, m], [W_x ; W_m])        where the layer is widened, or
    conv(x, W_x) + conv(m, W_m)         where its weight is left alone (tied, computed, hooked).

After a write point it gets the update block, and later sites view what that gives.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from aim_surgery._garbage import collection_paused
from aim_surgery.capture import Capture, Trace
from aim_surgery.errors import PlanError, UnsupportedLayerError
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.planning import Plan, Write
from aim_surgery.sites import (
    Boundary,
    Call,
    boundary_nodes,
    fault_inside,
    find_calls,
    find_stages,
    graph_sites,
    python_calls,
)
from aim_surgery.sites.layers import FROZEN
from aim_surgery.surgery.emit import GraphWriter
from aim_surgery.surgery.inside import attach_reads, operate_whole
from aim_surgery.surgery.modules import AIM, home_weight, operated_tree
from aim_surgery.surgery.tree import contrary_modules


@collection_paused()
def operate(
    capture: Capture, plan: Plan, *, copy: bool = True, device: torch.device | None = None
) -> nn.Module:
    """Build the operated model.

    Args:
        capture: The captured model; left unchanged.
        plan: What to do, made for this model.
        copy: Whether tensors that stay as they are get copied; if not, the new model shares them
            with the old one.
        device: Where what is new lives, if not with the model: on the CPU for one on the meta
            device, whose new tensors then have the values that they start with.

    Returns:
        A new module: an `AimGraphModule`, or one of the model's own class where it was taken as a
        whole. Original parameters keep their names and their leading entries; new ones live under
        `aim.`.

    Raises:
        PlanError: The plan was made for another model, or was edited into one that can't be done.
        UnsupportedLayerError: The model already has something called `aim`.
    """
    model = capture.model
    calls = {t.training: find_calls(capture, t.graph) for t in capture.traces}
    _match_reads(plan, capture)
    points = {t.training: _match_writes(capture, t.graph, plan) for t in capture.traces}
    if hasattr(model, AIM):
        raise UnsupportedLayerError(
            f"{type(model).__name__} already has an attribute 'aim', where the memory would live"
        )
    if capture.whole:
        return operate_whole(capture, plan, copy_tensors=copy, device=device)
    # Graphs first: what the compilation of their code needs is free again when tensors are copied.
    home = home_weight(model, plan)
    graphs = {
        trace.training: _rewrite(trace, calls[trace.training], points[trace.training], plan, home)
        for trace in capture.traces
    }
    gm = AimGraphModule(graphs, training=model.training, class_name=type(model).__name__)
    _refuse_shadowed(model, gm)
    gm.contrary = contrary_modules(model)
    gm.adopt(operated_tree(capture, plan, calls, copy_tensors=copy, device=device))
    attach_reads(gm, plan)
    return gm


def _refuse_shadowed(model: nn.Module, gm: AimGraphModule) -> None:
    """Refuse names at the top that mean something else in a graph module, which would win."""
    names = (*model._modules, *model._parameters, *model._buffers)
    shadowed = next((name for name in names if hasattr(gm, name)), None)
    if shadowed is not None:
        raise UnsupportedLayerError(
            f"{type(model).__name__} has something called {shadowed!r}, which in a GraphModule is "
            f"its own: rename it, or keep the class with emit='module'"
        )


def _match_reads(plan: Plan, capture: Capture) -> None:
    """Hold a plan against the sites that are really there."""
    plan.checked()
    if (plan.emit == "module") != capture.whole:
        raise PlanError(f"the plan was made with emit={plan.emit!r}: give apply that plan alone")
    sites = graph_sites(capture)
    for read in plan.reads:
        if read.site.inside:
            fault = fault_inside(capture, read.site, python_calls(capture))
            if fault:
                raise PlanError(f"{read.site.name}: {fault}: plan again")
            continue
        site = sites.get(read.site.name)
        if site is None:
            raise PlanError(f"the plan reads at {read.site.name!r}, which this model has not")
        mine, planned = vars(site), vars(read.site)
        differ = {key for key in mine if mine[key] != planned[key]} - _FREE
        if read.site.widens and not site.widens and site.why_beside != FROZEN:
            raise PlanError(
                f"{site.name}: the plan was made where its layer could be widened: "
                f"{site.why_beside}"
            )
        if differ - {"widens"}:
            made_for, has = (
                ", ".join(f"{key}={of[key]!r}" for key in mine if key in differ)
                for of in (planned, mine)
            )
            raise PlanError(
                f"{site.name}: the plan was made for {made_for}, the model has {has}: plan again"
            )
    layers = {read.site.layer for read in plan.reads if not read.site.inside}
    names = {read.site.name for read in plan.reads}
    for site in sites.values():
        if site.layer in layers and site.name not in names:
            raise PlanError(
                f"{site.name} is another call of layer {site.layer}, which the plan widens: all "
                f"calls of a layer read, or none"
            )


# of a site, what may be otherwise than planned: sizes that a call chooses, and reasons
_FREE = frozenset(("positions", "output_size", "why_beside", "windows"))


def _match_writes(capture: Capture, graph: fx.Graph, plan: Plan) -> dict[fx.Node, list[Write]]:
    """The nodes of one graph after which the plan writes."""
    if not plan.writes:
        return {}
    boundaries = {boundary.name: boundary for boundary in find_stages(capture).boundaries}
    nodes = boundary_nodes(capture, graph, [write.point.name for write in plan.writes])
    found: dict[fx.Node, list[Write]] = {}
    for write in plan.writes:
        point, name = write.point, write.point.name
        node, boundary = nodes.get(name), boundaries.get(name)
        if node is None or boundary is None:
            raise PlanError(f"the plan writes after {name!r}, which this model does not pass")
        made_for, has = _facts(point), _facts(boundary)
        if made_for != has:
            raise PlanError(
                f"{name}: the plan was made for a write point with {made_for}, the model has "
                f"{has}: plan again"
            )
        found.setdefault(node, []).append(write)
    return found


def _facts(point: Boundary) -> str:
    """What an update block is built for; sizes of maps are free."""
    return (
        f"{point.channels} channels on axis {point.channel_axis}, samples on axis "
        f"{point.sample_axis} and {len(point.spatial)} spatial axes"
    )


def _rewrite(
    trace: Trace,
    calls: tuple[Call, ...],
    points: dict[fx.Node, list[Write]],
    plan: Plan,
    home: torch.Tensor,
) -> fx.Graph:
    """Copy a captured graph, with the reads and writes in it."""
    planned = {read.site.name: read for read in plan.reads if not read.site.inside}
    reads = {
        call.node: (call, planned[call.site.name]) for call in calls if call.site.name in planned
    }
    writer = GraphWriter(plan, home, [read for _, read in reads.values()])
    copied: dict[fx.Node, fx.Node] = {}
    started = False
    for node in trace.graph.nodes:
        if node.op != "placeholder" and not started:
            writer.begin()
            started = True
        if node.op == "output":
            writer.end()
        if node in reads:
            call, read = reads[node]
            copied[node] = writer.read(node, copied, call, read)
        else:
            copied[node] = writer.copy(node, copied)
        for write in points.get(node, ()):
            writer.write(copied[node], write)
    return writer.graph
