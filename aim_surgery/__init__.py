"""aim-surgery: automatic model surgery for PyTorch.

One learned memory for a whole network, read by each of its convolution and linear layers.

Names are imported on first use (PEP 562): `aim-surgery --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from aim_surgery._version import __version__

if TYPE_CHECKING:
    from aim_surgery.checkpoint.load import load
    from aim_surgery.checkpoint.models import build
    from aim_surgery.checkpoint.save import save
    from aim_surgery.config import AimConfig
    from aim_surgery.errors import (
        AimSurgeryError,
        CaptureError,
        CheckpointError,
        ModelSpecError,
        PlanError,
        UnsupportedLayerError,
    )
    from aim_surgery.lowering import Restored, fold, lower, restore
    from aim_surgery.notebook import (
        disable,
        freeze_base,
        memory_parameters,
        read_memory,
        reset_memory,
    )
    from aim_surgery.operation import apply, plan, transform
    from aim_surgery.planning.plan import Plan
    from aim_surgery.verification import Verification, verify

__all__ = [
    "AimConfig",
    "AimSurgeryError",
    "CaptureError",
    "CheckpointError",
    "ModelSpecError",
    "Plan",
    "PlanError",
    "Restored",
    "UnsupportedLayerError",
    "Verification",
    "__version__",
    "apply",
    "build",
    "disable",
    "fold",
    "freeze_base",
    "load",
    "lower",
    "memory_parameters",
    "plan",
    "read_memory",
    "reset_memory",
    "restore",
    "save",
    "transform",
    "verify",
]

_MODULES = {
    "checkpoint.models": ("build",),
    "checkpoint.load": ("load",),
    "checkpoint.save": ("save",),
    "config": ("AimConfig",),
    "errors": (
        "AimSurgeryError",
        "CaptureError",
        "CheckpointError",
        "ModelSpecError",
        "PlanError",
        "UnsupportedLayerError",
    ),
    "lowering": ("Restored", "fold", "lower", "restore"),
    "notebook": ("disable", "freeze_base", "memory_parameters", "read_memory", "reset_memory"),
    "operation": ("apply", "plan", "transform"),
    "planning.plan": ("Plan",),
    "verification": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
