"""Folds the reads of layers that no graph reaches, inside Python calls.

layer(x) + W_m m  ->  W x + (b + W_m m)        linear layers (`nn.shifted_bias`)
"""

from __future__ import annotations

import torch
from torch import nn

from aim_surgery.nn.aim_modules import aim_of
from aim_surgery.nn.inside import AddMemory
from aim_surgery.nn.recurrent import GateMemory
from aim_surgery.nn.shifted_bias import Shift, ShiftedBias


def fold_hooks(root: nn.Module) -> tuple[str, ...]:
    """Let linear layers that read through a hook add what they read to their biases.

    Args:
        root: An operated model whose hooks add; changed in place.

    Returns:
        What could not be folded, a line for each layer.
    """
    notes = []
    shifts = nn.Module()
    for path, layer in root.named_modules():
        if isinstance(vars(layer).get("forward"), GateMemory):
            notes.append(
                f"{path}: a recurrent layer reads the memory at each call, one small product for "
                f"each gate"
            )
        for hook in [*layer._forward_hooks.values()]:
            if not isinstance(hook, AddMemory):
                continue
            why = _why_not(layer)
            if why:
                notes.append(f"{path}: reads the memory at each call: {why}")
                continue
            with torch.no_grad():
                value = hook.beside(hook.view_for(hook.view.memory.weight))
            shift = Shift(value.to(layer.weight).flatten())  # type: ignore[arg-type]
            shifts.add_module(f"shift_{len(shifts._modules)}", shift)
            hook.detach()
            ShiftedBias(shift).attach(layer)
    if shifts._modules:
        aim_of(root).add_module("shifts", shifts)
    return tuple(notes)


def _why_not(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return "it is a convolution inside a Python call, whose sizes no graph shows"
    if len(layer._forward_hooks) > 1:
        return "other hooks see what it gives"
    return ""
