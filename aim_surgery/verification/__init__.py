"""Verification: what an operation promises, checked on the models themselves.

Three checks, each one file: equivalence (the same function at the start), coverage (every weight
reads the memory or is listed), gradients (training reaches all that is new).
"""

from aim_surgery.verification.comparison import Comparison
from aim_surgery.verification.coverage import Coverage
from aim_surgery.verification.equivalence import Equivalence
from aim_surgery.verification.gradients import Gradients
from aim_surgery.verification.verify import Verification, verify

__all__ = ["Comparison", "Coverage", "Equivalence", "Gradients", "Verification", "verify"]
