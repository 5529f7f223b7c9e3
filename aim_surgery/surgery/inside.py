"""Hooks on layers that no graph reaches: inside Python calls, or in a model that keeps its class.

conv(cat[x, m], [W_x ; W_m])  by a pre-hook, where the layer is widened
conv(x, W_x) + conv(m, W_m)   by a hook, where its weight is left alone
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from aim_surgery.capture import Capture
from aim_surgery.errors import UnsupportedLayerError
from aim_surgery.nn.inside import AddMemory, JoinMemory, View
from aim_surgery.nn.memory import Memory
from aim_surgery.planning import Plan
from aim_surgery.surgery.modules import add_aim, beside_path, memory_path, widened_weights
from aim_surgery.surgery.widen import widen_layer


def operate_whole(capture: Capture, plan: Plan, *, copy_tensors: bool) -> nn.Module:
    """Build an operated model of the same class, whose layers read through hooks.

    Args:
        capture: The model, taken as it is; left unchanged.
        plan: What to do.
        copy_tensors: Whether tensors that stay as they are get copied or shared.

    Returns:
        A copy of the model with a memory under `aim`; its plan is `aim.plan`.
    """
    model = capture.model
    memo: dict[int, Any] = dict(widened_weights(model, plan))
    if not copy_tensors:
        for tensor in (*model.parameters(), *model.buffers()):
            memo.setdefault(id(tensor), tensor)
    try:
        root = copy.deepcopy(model, memo)
    except Exception as err:
        raise UnsupportedLayerError(
            f"{type(model).__name__} can't be copied: {type(err).__name__}: {err}"
        ) from err
    for read in plan.reads:
        if read.site.widens:
            widen_layer(root.get_submodule(read.site.layer), read.planes)
    add_aim(root, model, plan, {}).plan = plan
    attach_reads(root, plan)
    return root


def attach_reads(root: nn.Module, plan: Plan) -> None:
    """Give the layers that read inside Python calls their hooks.

    Args:
        root: The operated tree, with wide weights and `aim` in it; changed in place.
        plan: What to do.
    """
    for read in plan.reads:
        site = read.site
        if not site.inside:
            continue
        layer = root.get_submodule(site.layer)
        memory = root.get_submodule(memory_path(read.memory))
        assert isinstance(memory, Memory)
        view = View(memory, read.planes, site.spatial)
        if site.widens:
            hook = JoinMemory(view, site.groups)
            layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=False)
        else:
            beside = root.get_submodule(beside_path(read))
            layer.register_forward_hook(AddMemory(view, beside), with_kwargs=True)
