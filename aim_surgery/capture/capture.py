"""From a model to a graph: `capture(model, example_inputs) -> Capture`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.export import ExportedProgram

from aim_surgery.capture.captured import Capture
from aim_surgery.capture.exported import inputs_of_program
from aim_surgery.capture.inputs import ExampleInputs, Inputs, propose_inputs
from aim_surgery.capture.modes import capture_graphs
from aim_surgery.capture.opaque import first_line
from aim_surgery.capture.patches import refuse_nested
from aim_surgery.capture.wrappers import on_meta, refuse_uninitialised, unwrap
from aim_surgery.errors import CaptureError


def capture(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | ExampleInputs | None = None
) -> Capture:
    """Capture a model as an fx graph whose nodes carry example values.

    Args:
        model: Any module or exported program; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Without any, they are taken from what the model declares, or found by trial.

    Returns:
        The graph(s), the inputs used, and what was assumed.

    Raises:
        CaptureError: The inputs don't fit, none could be found, or the model holds something that
            a graph can't. The message names the module and what to do.
    """
    model, notes = taken(model)

    def take(inputs: ExampleInputs) -> Capture:
        found = capture_graphs(model, inputs, notes)
        if found.missing and inputs.source != "given":
            raise CaptureError(found.missing)
        return found

    return with_inputs(model, example_inputs, take)


def taken(model: nn.Module | ExportedProgram) -> tuple[nn.Module, tuple[str, ...]]:
    """Take a model out of its wrappers.

    Args:
        model: What a user passed.

    Returns:
        The model to capture, and notes on what was taken off.

    Raises:
        CaptureError: It is no model, or one that can't be captured.
    """
    refuse_nested()
    model, notes = unwrap(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward: capture the original model")
    refuse_uninitialised(model)
    return model, notes


def with_inputs(
    model: nn.Module,
    example_inputs: Inputs | ExampleInputs | None,
    take: Callable[[ExampleInputs], Capture],
) -> Capture:
    """Capture with the inputs that were given, or with the first proposal that fits.

    Args:
        model: The model, out of its wrappers.
        example_inputs: What a user passed.
        take: Captures, or raises CaptureError.

    Returns:
        What `take` returns.

    Raises:
        CaptureError: From `take`, or no proposal fits.
    """
    if example_inputs is None:
        example_inputs = inputs_of_program(model)
    if example_inputs is not None:
        if not isinstance(example_inputs, ExampleInputs):
            example_inputs = ExampleInputs.given(example_inputs)
        try:
            return take(on_meta(model, example_inputs))
        except CaptureError as err:
            if [type(value) for value in example_inputs.args] == [list]:
                err.add_note("a list of example inputs is one argument: several are a tuple")
            raise
    tried: list[str] = []
    for candidate in propose_inputs(model):
        try:
            return take(candidate)
        except CaptureError as err:
            tried.append(f"({candidate.describe()}): {first_line(err)}")
    what = "; ".join(tried) if tried else "no layer suggests any"
    raise CaptureError(
        f"no example input found for {type(model).__name__}: pass example_inputs. Tried {what}"
    )
