"""Planning: a captured model and a config go in, a frozen `Plan` comes out."""

from aim_surgery.planning.inputs import input_spec, inputs_of_plan, one_floating_dtype
from aim_surgery.planning.make import make_plan
from aim_surgery.planning.parts import Memory, Read, Write
from aim_surgery.planning.plan import InputSpec, Plan
from aim_surgery.sites import Boundary, Skip

__all__ = [
    "Boundary",
    "InputSpec",
    "Memory",
    "Plan",
    "Read",
    "Skip",
    "Write",
    "input_spec",
    "inputs_of_plan",
    "make_plan",
    "one_floating_dtype",
]
