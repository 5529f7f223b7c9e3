"""Takes widened layers apart again, in an emitted model: W_m gets a parameter of its own.

    conv(cat[x, m], [W_x ; W_m])  ->  conv(x, W_x) + conv(m, W_m)

The same function of the same numbers, in the form that surgery writes where a layer's weight is
left alone. W_x goes back to the layer under its old name, W_m to `aim.reads.<layer>.weight`: old
and new can be trained, or not, each by itself. A layer that reads through a hook (inside a Python
call, or in a model that keeps its class) gets the hook that adds for the hook that joins.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx, nn

from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.aim_modules import aim_of, plan_of
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.beside import set_input, write_beside
from aim_surgery.surgery.inside import add_instead
from aim_surgery.surgery.modules import AIM, beside_module, beside_path, beside_tree, memory_path
from aim_surgery.surgery.notes import note_site
from aim_surgery.surgery.pieces import Pieces, pieces_of, refuse_changed
from aim_surgery.surgery.tidy import erase_unused
from aim_surgery.surgery.widen import input_size, split_for, widen_layer

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def separate(gm: nn.Module, why: str) -> None:
    """Give each widened layer its own weight back, and its memory weights a place beside it.

    Parameters are new ones, without gradients; they ask for gradients where the widened weight did.
    Sites that are separate already stay as they are.

    Shapes:
        See `split_for`.

    Args:
        gm: An operated model; changed in place, graphs, modules and plan.
        why: What its plan then says about these layers, as `Site.why_beside`.

    Raises:
        AimSurgeryError: Its graph or its weights are no longer what surgery made; nothing is
            changed.
    """
    plan: Plan = plan_of(gm)
    every = {read.site.name: read for read in plan.reads if read.site.widens}
    if not every:
        return
    widened = {name: read for name, read in every.items() if not read.site.inside}
    graphs = graphs_of(gm)
    found = [pieces_of(graph, widened) for graph in graphs]
    _check_all_found(widened, found)
    layers = {read.site.layer: read for read in every.values()}
    for read in layers.values():
        _check_weight(gm, read)
    called = {
        widened[note.site].site.layer
        for pieces in found
        for node, note, *_ in pieces
        if note.site in widened and node.op == "call_module"
    }
    beside = {
        layer: _split_layer(gm, read, called=layer in called or bool(read.site.inside))
        for layer, read in layers.items()
    }
    gm.get_submodule(AIM)._modules["reads"] = _reads_tree(gm, plan, beside).train(gm.training)
    for graph, pieces in zip(graphs, found, strict=True):
        _separate_sites(graph, pieces, widened, gm)
    separated = _separated(plan, why)
    aim_of(gm).plan = separated
    for read in separated.reads:
        if read.site.inside and read.site.name in every:
            add_instead(gm, read)
    if isinstance(gm, AimGraphModule):
        gm.recompile()


# The graph ----------------------------------------------------------------------------------


def _check_all_found(widened: Mapping[str, Read], found: Iterable[list[Pieces]]) -> None:
    there = {note.site for pieces in found for _, note, *_ in pieces}
    missing = [name for name in widened if name not in there]
    if missing:
        raise AimSurgeryError(
            f"{missing[0]}: no node of this graph is noted as this site: pass a model as it came "
            f"from transform, apply or load, not one whose graph was written anew"
        )


def _separate_sites(
    graph: fx.Graph, pieces: Iterable[Pieces], widened: Mapping[str, Read], gm: nn.Module
) -> None:
    sums: dict[fx.Node, fx.Node] = {}  # a site may work right on another one's result
    for node, note, source, view, joined, _ in pieces:
        source = sums.get(source, source)
        note = note._replace(source=source.name)
        if joined is not None:
            set_input(node, note, source)
            with graph.inserting_before(node.next):
                if not _alike(gm, widened[note.site]):
                    view = graph.call_method("to", (view, source))
                    note = note._replace(view=view.name)
                beside = write_beside(graph, node, widened[note.site], note, view)
                total = graph.call_function(operator.add, (node, beside))
            node.replace_all_uses_with(
                total, delete_user_cb=lambda user, own=total: user is not own
            )
            sums[node] = total
            note = note._replace(beside=beside.name)
            erase_unused(joined, {source, view})
        note_site(node, note)


def _alike(gm: nn.Module, read: Read) -> bool:
    """Whether the memory has its W_m's dtype: a layer may have been given another since."""
    memory = gm.get_submodule(memory_path(read.memory)).weight
    return memory.dtype == gm.get_parameter(f"{beside_path(read)}.weight").dtype


# The modules --------------------------------------------------------------------------------


def _check_weight(gm: nn.Module, read: Read) -> None:
    """Make sure that a layer's weight is the widened one.

    Args:
        gm: An operated model.
        read: The read of a layer that is widened.

    Raises:
        AimSurgeryError: It is of another width, or no plain parameter.
    """
    site = read.site
    path, _, name = site.weights[0].rpartition(".")
    wide = gm.get_submodule(path)._parameters.get(name)
    axis, inputs = input_size(read, operated=True)
    if wide is None or wide.shape[axis] != inputs:
        has = "no parameter" if wide is None else tuple(wide.shape)
        raise AimSurgeryError(
            f"{site.weights[0]}: expected the widened weight with {inputs} input channels, got "
            f"{has}: do this before the layer is parametrized, pruned or sharded"
        )
    layer = gm.get_submodule(path)
    if isinstance(layer, _LAYERS) and not site.inside:
        refuse_changed(layer, path)


def _split_layer(gm: nn.Module, read: Read, *, called: bool) -> nn.Module:
    """Put W_x back into a layer; W_m in a module of its own."""
    site = read.site
    path, _, name = site.weights[0].rpartition(".")
    layer = gm.get_submodule(path)
    wide = layer._parameters[name]
    assert wide is not None
    own, beside = split_for(wide, read)
    layer._parameters[name] = nn.Parameter(own, requires_grad=wide.requires_grad)
    vars(layer._parameters[name]).update(vars(wide))  # what scripts noted on it
    if not site.inside:
        widen_layer(layer, -read.planes)
    weight = nn.Parameter(beside, requires_grad=wide.requires_grad)
    return beside_module(layer if called else None, read, weight)


def _reads_tree(gm: nn.Module, plan: Plan, beside: Mapping[str, nn.Module]) -> nn.Module:
    """All that reads beside, old and new, in the order in which surgery would have placed it."""
    modules: dict[str, nn.Module] = {}
    for read in plan.reads:
        layer = read.site.layer
        if layer not in modules:
            made = beside.get(layer)
            modules[layer] = gm.get_submodule(beside_path(read)) if made is None else made
    for module in modules.values():
        module._modules.clear()  # no own children: what is here is only on the way to others
    return beside_tree(modules.items())


def _separated(plan: Plan, why: str) -> Plan:
    reads = tuple(
        replace(read, site=replace(read.site, widens=False, why_beside=why))
        if read.site.widens
        else read
        for read in plan.reads
    )
    return replace(plan, reads=reads)
