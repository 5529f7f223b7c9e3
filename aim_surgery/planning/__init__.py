"""Planning: a captured model and a config go in, a frozen `Plan` comes out."""

from aim_surgery.planning.plan import InputSpec, Memory, Plan, Read
from aim_surgery.planning.reads import input_spec, inputs_of_plan, plan_reads
from aim_surgery.sites import Skip

__all__ = [
    "InputSpec",
    "Memory",
    "Plan",
    "Read",
    "Skip",
    "input_spec",
    "inputs_of_plan",
    "plan_reads",
]
