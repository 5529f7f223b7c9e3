"""What an operation adds to a model: the tree under `aim`, with the plan that made it."""

from __future__ import annotations

from typing import Any

from torch import nn


class AimModules(nn.Module):
    """Memories, memory weights that live beside their layers (`reads`), update blocks (`writes`).

    Attributes:
        plan: The plan of a model that keeps its own class; a `GraphModule` holds it itself.
    """

    plan: Any = None


def plan_of(module: nn.Module) -> Any:
    """The plan of a model that was operated and keeps its own class; None for any other."""
    added = module._modules.get("aim")
    return added.plan if isinstance(added, AimModules) else None
