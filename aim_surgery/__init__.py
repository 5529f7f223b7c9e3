"""aim-surgery: automatic model surgery for PyTorch.

One learned memory for a whole network, read by each of its convolution and linear layers.
"""

from aim_surgery._version import __version__
from aim_surgery.checkpoint import build, load, save
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
