"""Forms: the same function of the same parameters, with less work."""

from aim_surgery.lower.fold import fold
from aim_surgery.lower.forms import lower

__all__ = ["fold", "lower"]
