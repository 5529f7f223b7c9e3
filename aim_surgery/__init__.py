"""aim-surgery: automatic model surgery for PyTorch.

One learned memory for a whole network, read by each of its convolution and linear layers.

Names are imported on first use (PEP 562): `aim-surgery --help` needs no torch.
"""

import importlib
import sys
from types import ModuleType
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
    from aim_surgery.lower import fold, lower
    from aim_surgery.notebook import (
        disable,
        freeze_base,
        memory_parameters,
        read_memory,
        reset_memory,
    )
    from aim_surgery.operation import apply, plan, transform
    from aim_surgery.planning.plan import Plan
    from aim_surgery.surgery.restore import Restored, restore
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
    "lower": ("fold", "lower"),
    "notebook": ("disable", "freeze_base", "memory_parameters", "read_memory", "reset_memory"),
    "operation": ("apply", "plan", "transform"),
    "planning.plan": ("Plan",),
    "surgery.restore": ("Restored", "restore"),
    "verification": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """This package; a public name stays what it is when a subpackage has the same (`lower`)."""

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # what the import system does to the parent of every submodule that it has imported
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
