"""The operated model's modules: its own tree with wide weights, and what is new under `aim`.

aim.memory                 the memory layer
aim.reads.<layer>.weight   W_m of a layer that is left alone
aim.writes.<point>         the update block after a boundary
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import Capture
from aim_surgery.errors import UnsupportedLayerError
from aim_surgery.nn.aim_modules import AimModules
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.recurrent import is_recurrent, linear_calls
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.planning import Memory as PlannedMemory
from aim_surgery.planning import Plan, Read, Write
from aim_surgery.sites import Call
from aim_surgery.surgery.tree import build_tree
from aim_surgery.surgery.widen import beside_weight, widen_for, widen_layer

AIM = "aim"
READS = f"{AIM}.reads"
WRITES = f"{AIM}.writes"

Calls = Mapping[bool, tuple[Call, ...]]
Device = torch.device | None


def operated_tree(
    capture: Capture, plan: Plan, calls: Calls, *, copy_tensors: bool, device: Device = None
) -> nn.Module:
    """Build the model's tree with wide weights in it, and what is new under `aim`.

    Args:
        capture: The captured model; left unchanged.
        plan: What to do.
        calls: The sites of each graph, by mode.
        copy_tensors: Whether tensors that stay as they are get copied or shared.
        device: Where what is new lives; with the first read's weight if None.

    Returns:
        The tree whose names the emitted graphs use.
    """
    root = build_tree(capture, widened_weights(capture.model, plan), copy_tensors=copy_tensors)
    for name, read in widened_reads(plan).items():
        if not read.site.inside:  # there, callers may ask how wide the layer's input is
            widen_layer(root.get_submodule(name.rpartition(".")[0]), read.planes)
    add_aim(root, capture.model, plan, calls, device)
    return root


def widened_weights(model: nn.Module, plan: Plan) -> dict[int, torch.Tensor]:
    """Make the wide weights of a plan.

    Args:
        model: The original model; left unchanged.
        plan: What to do.

    Returns:
        New parameters, by the identity of those that they stand for.
    """
    replaced: dict[int, torch.Tensor] = {}
    for name, read in widened_reads(plan).items():
        weight = model.get_parameter(name)
        wide = widen_for(weight, read, plan.init)
        replaced[id(weight)] = nn.Parameter(wide, requires_grad=weight.requires_grad)
    return replaced


def widened_reads(plan: Plan) -> dict[str, Read]:
    """The reads of layers that are widened, by the qualified name of the weight."""
    return {read.site.weights[0]: read for read in plan.reads if read.site.widens}


def home_weight(model: nn.Module, plan: Plan) -> torch.Tensor:
    """The weight whose dtype and device the memory takes: that of the first read."""
    return model.get_parameter(plan.reads[0].site.weights[0])


def memory_path(name: str) -> str:
    """Qualified name of a memory's layer."""
    return f"{AIM}.{name}"


def write_path(write: Write) -> str:
    """Qualified name of an update block."""
    return f"{WRITES}.{write.name}"


def beside_path(read: Read) -> str:
    """Qualified name of what holds W_m of a layer that is left alone."""
    return f"{READS}.{read.site.layer}"


def beside_tree(modules: Iterable[tuple[str, nn.Module]]) -> nn.Module:
    """Build `aim.reads`.

    Args:
        modules: What holds each W_m (see `beside_module`), by its layer's name; in the order that
            the parameters get.

    Returns:
        The tree, with plain modules on the way to nested ones.
    """
    tree = nn.Module()
    for layer, module in modules:
        _place(tree, layer, module)
    return tree


def beside_module(layer: nn.Module | None, read: Read, weight: nn.Parameter) -> nn.Module:
    """Put a W_m into a module.

    Args:
        layer: The layer, where it is called as one; a twin of it is made, of the same geometry,
            from k planes to the same outputs, without bias. None where functions use its weight.
        read: The read of one of its sites.
        weight: W_m.

    Returns:
        A new module whose `weight` it is.
    """
    module = nn.Module() if layer is None else _twin_layer(layer, read)
    module.register_parameter("weight", weight)
    return module


def add_aim(
    root: nn.Module, model: nn.Module, plan: Plan, calls: Calls, device: Device = None
) -> AimModules:
    """Add what is new: memories, weights that live beside their layers, update blocks.

    Args:
        root: The operated tree; gets `aim`.
        model: The original model; left unchanged.
        plan: What to do.
        calls: The sites of each graph, by mode.
        device: Where it lives; with the first read's weight if None.

    Returns:
        The tree under `aim`.
    """
    home = home_weight(model, plan)
    where = {"device": device or home.device, "dtype": home.dtype}
    aim, writes = AimModules(), nn.Module()
    aim.plan = plan
    for memory in plan.memories:
        aim.add_module(memory.name, _memory_layer(memory, where))
    planned = {read.site.name: read for read in plan.reads if not read.site.inside}
    beside: dict[str, list[Call]] = {}
    for call in (call for found in calls.values() for call in found):
        read = planned.get(call.site.name)
        if read is not None and not read.site.widens:
            beside.setdefault(call.site.layer, []).append(call)
    reads = [
        (layer, _beside(model, found, planned, plan, device)) for layer, found in beside.items()
    ]
    reads += [
        (read.site.layer, _beside_inside(model, read, plan, device))
        for read in plan.reads
        if read.site.inside and not read.site.widens
    ]
    aim.add_module("reads", beside_tree(reads))
    aim.add_module("writes", writes)
    layouts = {memory.name: memory for memory in plan.memories}
    for write in plan.writes:
        writes.add_module(write.name, _write_block(write, layouts[write.memory], where))
    aim.train(model.training)
    root.add_module(AIM, aim)
    return aim


def _memory_layer(memory: PlannedMemory, where: dict[str, Any]) -> Memory:
    return Memory(
        memory.floats,
        inputs=memory.inputs,
        shared=memory.shared,
        carry_state=memory.carry == "state",
        momentum=memory.momentum,
        **where,
    )


def _write_block(write: Write, memory: PlannedMemory, where: dict[str, Any]) -> WriteBlock:
    return WriteBlock(
        write.point.channels,
        write.planes,
        floats=memory.floats,
        layout=memory.layout,
        dims=len(write.point.spatial),
        channel_axis=write.point.channel_axis,
        sample_axis=write.point.sample_axis,
        widths=write.widths,
        kernel_size=write.kernel_size,
        norm=write.norm,
        activation=write.activation,
        mode=write.mode,
        per=write.per,
        momentum=write.momentum,
        **where,
    )


def _beside(
    model: nn.Module, calls: list[Call], reads: dict[str, Read], plan: Plan, device: Device
) -> nn.Module:
    """W_m of a layer that is left alone: in a twin of the layer where it is called as one."""
    read = reads[calls[0].site.name]
    called = any(call.node.op == "call_module" for call in calls)
    layer = model.get_submodule(read.site.layer) if called else None
    return beside_module(layer, read, _beside_weight(model, read, plan, device))


def _beside_inside(model: nn.Module, read: Read, plan: Plan, device: Device) -> nn.Module:
    """W_m of a layer inside a Python call, in a layer that can be called by a hook."""
    layer = called_layer(model, read)
    fan_in = layer.hidden_size if is_recurrent(layer) else None  # what torch starts it by
    assert fan_in is None or isinstance(fan_in, int)
    if read.site.kind == "linear":
        layer = nn.Linear(read.planes, read.site.out_channels, bias=False, device="meta")
    return beside_module(layer, read, _beside_weight(model, read, plan, device, fan_in))


def called_layer(root: nn.Module, read: Read) -> nn.Module:
    """The layer that is called for a site inside: its own, or the recurrent one of its weight.

    Args:
        root: The model, operated or not.
        read: The read of the site.

    Returns:
        The module in the tree.

    Raises:
        AttributeError: There is none.
    """
    path, _, name = read.site.layer.rpartition(".")
    owner = root.get_submodule(path)
    if is_recurrent(owner) and name in linear_calls(owner):
        return owner
    return root.get_submodule(read.site.layer)


def _beside_weight(
    model: nn.Module, read: Read, plan: Plan, device: Device, fan_in: int | None = None
) -> nn.Parameter:
    site = read.site
    shape = (site.out_channels, read.planes, *site.kernel_size)
    if site.kind == "conv_transpose":
        shape = (read.planes, site.out_channels, *site.kernel_size)
    if fan_in is None and site.kind == "conv_transpose":  # as torch takes it
        fan_in = site.out_channels // site.groups * math.prod(site.kernel_size)
    elif fan_in is None:
        fan_in = (site.in_channels // site.groups + read.planes) * math.prod(site.kernel_size)
    weight = model.get_parameter(site.weights[0])
    return beside_weight(weight, shape, fan_in=fan_in, init=plan.init, device=device)


def _place(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with plain modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in tree._modules:
            tree.add_module(parent, nn.Module())
        tree = tree.get_submodule(parent)
    if name in tree._modules:  # the way to a module placed before
        for child, inner in tree.get_submodule(name).named_children():
            module.add_module(child, inner)
    tree.add_module(name, module)


def _twin_layer(layer: nn.Module, read: Read) -> nn.Module:
    """A layer of the same geometry, from k planes to the same outputs, without bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(read.planes, layer.out_features, bias=False, device="meta")
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise UnsupportedLayerError(f"{read.site.name}: no twin for a {type(layer).__name__}")
    dims = len(layer.kernel_size)
    name = f"ConvTranspose{dims}d" if layer.transposed else f"Conv{dims}d"
    options: dict[str, Any] = {"output_padding": layer.output_padding} if layer.transposed else {}
    return getattr(nn, name)(
        read.planes,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
        device="meta",
        **options,
    )
