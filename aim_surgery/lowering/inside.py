"""Reads inside Python calls, from one form to the other: another hook on the same layer."""

from __future__ import annotations

from torch import nn

from aim_surgery.config import Form
from aim_surgery.nn.inside import JoinMemory
from aim_surgery.nn.split_memory import SplitMemory


def change_hooks(root: nn.Module, form: Form) -> bool:
    """Give the layers that read inside Python calls, and are widened, the hook of a form.

    Args:
        root: The operated model; changed in place.
        form: "concat" or "split".

    Returns:
        Whether anything changed.
    """
    modified = False
    for layer in root.modules():
        if form == "split":
            for hook in [*layer._forward_pre_hooks.values()]:
                if isinstance(hook, JoinMemory):
                    hook.detach()
                    SplitMemory(hook.view, hook.groups, hook.name).attach(layer)
                    modified = True
        else:
            forward = vars(layer).get("forward")
            if isinstance(forward, SplitMemory):
                forward.detach()
                JoinMemory(forward.view, forward.groups, forward.name).attach(layer)
                modified = True
    return modified
