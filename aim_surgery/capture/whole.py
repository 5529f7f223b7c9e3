"""A model as it is, without a graph: for an operation that keeps the model's class.

That is what `capture_whole` gives. `capture_any` gives graphs where all of the model's forward can
be one, and the whole model where it can't: where the model's own top-level forward asks for data,
or where only one of two modes can be traced (a detector's training wants targets). A graph with one
call of the whole model in it would be no better: it could place no writes, would have lost the
model's methods, and would put a prefix before the names of its parameters.
"""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from aim_surgery.capture.capture import taken, with_inputs
from aim_surgery.capture.captured import Capture
from aim_surgery.capture.copies import has_values, why_not_run
from aim_surgery.capture.inputs import ExampleInputs, Inputs, bind_arguments
from aim_surgery.capture.modes import capture_graphs
from aim_surgery.capture.opaque import first_line, is_final, mark_final
from aim_surgery.errors import CaptureError


def capture_whole(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | ExampleInputs | None = None
) -> Capture:
    """Take a model as one Python call.

    Args:
        model: Any module; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Without any, they are taken from what the model declares, or found by trial.

    Returns:
        A capture without traces.

    Raises:
        CaptureError: The model fails with these inputs, or none could be found.
    """
    if isinstance(model, ExportedProgram):
        raise CaptureError('an exported program has no methods to keep: use emit="graph"')
    model, notes = taken(model)

    def take(inputs: ExampleInputs) -> Capture:
        arguments = bind_arguments(model, inputs)
        given = example_inputs is not None
        # without values, a model may fail that would not with them
        fault = "" if given and not has_values(model) else why_not_run(model, inputs)
        if fault:
            asked = f"{type(model).__name__} failed with the example inputs ({inputs.describe()}): "
            err = CaptureError(asked + fault if given else fault)
            mark_final(err)
            raise err
        return Capture(model, inputs, arguments, (), notes)

    return with_inputs(model, example_inputs, take)


def capture_any(
    model: nn.Module | ExportedProgram, example_inputs: Inputs | ExampleInputs | None = None
) -> Capture:
    """Capture a model as graphs or, where that can't be, as one Python call.

    Args:
        model: Any module; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Without any, they are taken from what the model declares, or found by trial.

    Returns:
        Graphs, or a capture without traces, whose `why_whole` says why.

    Raises:
        CaptureError: The inputs don't fit the model, or none could be found: the model itself fails
            with them.
    """
    model, notes = taken(model)

    def take(inputs: ExampleInputs) -> Capture:
        try:
            found = capture_graphs(model, inputs, notes, one_mode_will_do=False)
        except CaptureError as err:
            arguments = bind_arguments(model, inputs)
            if is_final(err) or why_not_run(model, inputs):
                raise
            why = first_line(err)
        else:
            if not (found.missing or found.pinned):
                return found
            arguments = found.arguments
            why = f"in one mode it could be a graph (emit='graph'), but {found.missing}"
            if found.pinned:
                why = f"it could be a graph (emit='graph'), but {found.pinned}"
        note = f"the model's own forward stays a Python call: {why}"
        return Capture(model, inputs, arguments, (), (*notes, note), why_whole=why)

    return with_inputs(model, example_inputs, take)
