"""Capture: a model and example inputs go in, one fx graph with example values comes out."""

from aim_surgery.capture.assumptions import Assumption
from aim_surgery.capture.capture import capture
from aim_surgery.capture.captured import Capture, Trace
from aim_surgery.capture.exported import as_module, inputs_of_program
from aim_surgery.capture.inputs import Argument, ExampleInputs, Inputs
from aim_surgery.capture.opaque import OpaqueCall
from aim_surgery.capture.whole import capture_any, capture_whole
from aim_surgery.capture.wrappers import unwrap

__all__ = [
    "Argument",
    "Assumption",
    "Capture",
    "ExampleInputs",
    "Inputs",
    "OpaqueCall",
    "Trace",
    "as_module",
    "capture",
    "capture_any",
    "capture_whole",
    "inputs_of_program",
    "unwrap",
]
