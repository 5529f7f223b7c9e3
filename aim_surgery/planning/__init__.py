"""Planning: a captured model and a config go in, a frozen `Plan` comes out."""

from aim_surgery.planning.plan import InputSpec, Memory, Plan, Read, Skip
from aim_surgery.planning.reads import example_inputs, input_spec, plan_reads

__all__ = [
    "InputSpec",
    "Memory",
    "Plan",
    "Read",
    "Skip",
    "example_inputs",
    "input_spec",
    "plan_reads",
]
