"""A model as it is, without a graph: for an operation that keeps the model's class.

Nothing is traced; that the model runs on the example inputs is all that is asked of it.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from aim_surgery.capture.capture import Capture
from aim_surgery.capture.inputs import ExampleInputs, Inputs, bind_arguments, propose_inputs
from aim_surgery.capture.wrappers import on_meta, refuse_uninitialised, unwrap
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
        CaptureError: The inputs don't fit the model's forward, or none could be found.
    """
    if isinstance(model, ExportedProgram):
        raise CaptureError('an exported program has no methods to keep: use emit="graph"')
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward: take the original model")
    model, notes = unwrap(model)
    refuse_uninitialised(model)
    if example_inputs is not None:
        if not isinstance(example_inputs, ExampleInputs):
            example_inputs = ExampleInputs.given(example_inputs)
        example_inputs = on_meta(model, example_inputs)
        return Capture(model, example_inputs, bind_arguments(model, example_inputs), (), notes)
    tried: list[str] = []
    for candidate in propose_inputs(model):
        try:
            arguments = bind_arguments(model, candidate)
            _run(model, candidate)
        except Exception as err:
            tried.append(f"({candidate.describe()}): {type(err).__name__}: {err}".splitlines()[0])
            continue
        return Capture(model, candidate, arguments, (), notes)
    what = "; ".join(tried) if tried else "no layer suggests any"
    raise CaptureError(
        f"no example input found for {type(model).__name__}: pass example_inputs. Tried {what}"
    )


def _run(model: nn.Module, inputs: ExampleInputs) -> None:
    twin = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        zeros = tree_map_only(torch.Tensor, torch.zeros_like, (inputs.args, dict(inputs.kwargs)))
        twin(*zeros[0], **zeros[1])
