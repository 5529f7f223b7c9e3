"""Forms: the same function of the same parameters, with less work."""

from aim_surgery.lowering.fold import fold
from aim_surgery.lowering.forms import lower

__all__ = ["fold", "lower"]
