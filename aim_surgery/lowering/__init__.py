"""Forms: the same function of the same parameters, with less work; and the way back."""

from aim_surgery.lowering.fold import fold
from aim_surgery.lowering.forms import lower
from aim_surgery.lowering.restore import Restored, restore

__all__ = ["Restored", "fold", "lower", "restore"]
