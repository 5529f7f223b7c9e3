"""Folds the reads of layers that no graph reaches, inside Python calls.

layer(x) + W_m m  ->  layer(x) with bias b + W_m m        linear layers
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from aim_surgery.nn.inside import AddMemory
from aim_surgery.nn.recurrent import GateMemory


def fold_hooks(root: nn.Module) -> tuple[str, ...]:
    """Put the memory's part into the bias of linear layers that read through a hook.

    Args:
        root: A model whose hooks add; changed in place.

    Returns:
        What could not be folded, a line for each layer.
    """
    notes = []
    owners = Counter(id(p) for _, p in root.named_parameters(remove_duplicate=False))
    for path, layer in root.named_modules():
        if isinstance(vars(layer).get("forward"), GateMemory):
            notes.append(
                f"{path}: a recurrent layer reads the memory at each call, one small product for "
                f"each gate"
            )
        for hook in [*layer._forward_hooks.values()]:
            if not isinstance(hook, AddMemory):
                continue
            why = _why_not(layer, owners)
            if why:
                notes.append(f"{path}: reads the memory at each call: {why}")
                continue
            bias = layer._parameters.get("bias")
            with torch.no_grad():
                added = hook.beside(hook.view.for_input(hook.view.memory.weight))
                added = added.to(layer._parameters["weight"])  # type: ignore[arg-type]
                added = added.clone() if bias is None else bias + added
            layer._parameters["bias"] = nn.Parameter(added, requires_grad=False)
            hook.detach()
    return tuple(notes)


def _why_not(layer: nn.Module, owners: Counter[int]) -> str:
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return "it is a convolution inside a Python call, whose sizes no graph shows"
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or layer.bias is not bias:
        return "its weight or bias is computed"
    if bias is not None and owners[id(bias)] > 1:
        return "its bias is shared with another layer"
    if len(layer._forward_hooks) > 1:
        return "other hooks see what it gives"
    return ""
