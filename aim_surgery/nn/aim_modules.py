"""What an operation adds to a model: the tree under `aim`, with the plan that made it."""

from __future__ import annotations

from typing import Any

from torch import nn

from aim_surgery.nn.graph_module import AimGraphModule


class AimModules(nn.Module):
    """Memories, memory weights that live beside their layers (`reads`), update blocks (`writes`).

    Attributes:
        plan: The plan of a model that keeps its own class; a `GraphModule` holds it itself.
    """

    plan: Any = None

    def forward(self, *args: Any) -> Any:
        """Give back what comes in: an `nn.Sequential` that keeps its class calls all it holds."""
        return args[0] if len(args) == 1 else args


def plan_of(module: Any) -> Any:
    """The plan of an operated model; None for anything else."""
    if isinstance(module, AimGraphModule):
        return module.plan
    added = module._modules.get("aim") if isinstance(module, nn.Module) else None
    return added.plan if isinstance(added, AimModules) else None


def put_plan(module: nn.Module, plan: Any) -> None:
    """Note down in an operated model what was done to it."""
    if isinstance(module, AimGraphModule):
        module.plan = plan
        return
    added = module._modules["aim"]
    assert isinstance(added, AimModules)
    added.plan = plan
