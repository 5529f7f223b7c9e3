"""Hooks on layers that no graph reaches: inside Python calls, or in a model that keeps its class.

conv(cat[x, m], [W_x ; W_m])  by a pre-hook, where the layer is widened
conv(x, W_x) + conv(m, W_m)   by a hook, where its weight is left alone
b_ih + W_m m                  for b_ih, in a recurrent layer
"""

from __future__ import annotations

from typing import Any

from torch import nn

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import deep_copy
from aim_surgery.errors import UnsupportedLayerError
from aim_surgery.nn.inside import AddMemory, JoinMemory, SharedViews, View
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.recurrent import GateMemory, is_recurrent
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.modules import (
    Device,
    add_aim,
    beside_path,
    called_layer,
    memory_path,
    widened_weights,
)


def operate_whole(
    capture: Capture, plan: Plan, *, copy_tensors: bool, device: Device = None
) -> nn.Module:
    """Build an operated model of the same class, whose layers read through hooks.

    Args:
        capture: The model, taken as it is; left unchanged.
        plan: What to do.
        copy_tensors: Whether tensors that stay as they are get copied or shared.
        device: Where what is new lives; with the first read's weight if None.

    Returns:
        A copy of the model with a memory under `aim`; its plan is `aim.plan`.
    """
    model = capture.model
    memo: dict[int, Any] = {**widened_weights(model, plan)}
    if not copy_tensors:
        for tensor in (*model.parameters(), *model.buffers()):
            memo.setdefault(id(tensor), tensor)
    try:
        root = deep_copy(model, memo)
    except Exception as err:
        raise UnsupportedLayerError(
            f"{type(model).__name__} can't be copied, and the original is not to be changed: "
            f"{type(err).__name__}: {err}"
        ) from err
    _check_copied(model, root, plan)
    add_aim(root, model, plan, {}, device)
    attach_reads(root, plan)
    return root


def attach_reads(root: nn.Module, plan: Plan) -> None:
    """Give the layers that read inside Python calls their hooks.

    Args:
        root: The operated tree, with wide weights and `aim` in it; changed in place.
        plan: What to do.
    """
    shared = SharedViews()
    inside = [read for read in plan.reads if read.site.inside]
    for path in dict.fromkeys(read.site.inside for read in inside if not _in_graph(read)):
        shared.attach(root if path == "." else root.get_submodule(path))
    gates: dict[str, GateMemory] = {}
    for read in inside:
        site = read.site
        memory = root.get_submodule(memory_path(read.memory))
        assert isinstance(memory, Memory)
        view = View(memory, read.planes, site.spatial, None if _in_graph(read) else shared)
        layer = called_layer(root, read)
        if site.widens:
            JoinMemory(view, site.groups).attach(layer)
            continue
        beside = root.get_submodule(beside_path(read))
        path, _, name = site.layer.rpartition(".")
        if not is_recurrent(layer):
            AddMemory(view, beside).attach(layer)
            continue
        assert isinstance(beside, nn.Linear)
        if path in gates:
            gates[path].reads[name] = (view, beside)
        else:
            gates[path] = GateMemory({name: (view, beside)})
    for path, gate in gates.items():
        gate.attach(root.get_submodule(path))


def _in_graph(read: Read) -> bool:
    """Whether it is a graph that calls the layer: a recurrent one is in no other call than its own.

    Views are not shared then: what ends the sharing is a hook that no compiler takes in.
    """
    layer, _, name = read.site.layer.rpartition(".")
    return name.startswith(("weight_ih", "weight_hh")) and layer == read.site.inside


def add_instead(root: nn.Module, read: Read) -> None:
    """Let a layer that is no longer wide read by adding, where it read by joining.

    Args:
        root: The operated tree, with W_m beside; its layer gets the other hook.
        read: The read of a site inside a Python call.
    """
    layer = root.get_submodule(read.site.layer)
    for hook in [*layer._forward_pre_hooks.values()]:
        if isinstance(hook, JoinMemory):
            hook.detach()
            AddMemory(hook.view, root.get_submodule(beside_path(read))).attach(layer)


def _check_copied(model: nn.Module, root: nn.Module, plan: Plan) -> None:
    """A class may copy itself as it likes; what comes of it has to be a model of its own."""
    shared = {id(module) for module in model.modules()}
    for read in plan.reads:
        try:
            layer = called_layer(root, read)
        except AttributeError:
            layer = None
        own = layer is not None and id(layer) not in shared
        if own and read.site.widens:
            layer_path, _, name = read.site.weights[0].rpartition(".")
            old, new = (m.get_submodule(layer_path)._parameters[name] for m in (model, root))
            own = old is not None and new is not None and old.shape != new.shape
        if not own:
            raise UnsupportedLayerError(
                f"{type(model).__name__} defines its own way of being copied (__deepcopy__, "
                f"__reduce__), and a copy of {read.site.layer} did not come of it as its weights "
                f"are: let it copy what it holds, or use emit='graph'"
            )
