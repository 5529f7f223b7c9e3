"""From a model to a graph: `capture(model, example_inputs) -> Capture`.

One trace where the model behaves alike in training and evaluation (dropout and batch norm keep
their switch inside the graph). Where Python branches on the training flag (GoogLeNet's auxiliary
heads), both modes are traced, and the emitted module changes graphs with `train()` and `eval()`.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from aim_surgery.capture.assumptions import Assumption, insert_checks
from aim_surgery.capture.inputs import (
    Argument,
    ExampleInputs,
    Inputs,
    bind_arguments,
    propose_inputs,
)
from aim_surgery.capture.tracer import OpaqueCall, ValueTracer
from aim_surgery.capture.values import FakeValues
from aim_surgery.errors import CaptureError


@dataclass(frozen=True, eq=False)
class Trace:
    """The model in one mode.

    Attributes:
        graph: Its nodes carry their example value in `meta["val"]`.
        training: The mode that was traced.
        assumptions: What Python was told on the way; checked inside the graph.
        opaque: Submodules that stay Python calls.
        constants: Tensors that belong to no module, by the name that the graph gives them.
    """

    graph: fx.Graph
    training: bool
    assumptions: tuple[Assumption, ...]
    opaque: tuple[OpaqueCall, ...]
    constants: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Capture:
    """A model as one graph, or as two where training and evaluation part ways.

    Attributes:
        model: The model, unchanged; its tensors are what the graph's names stand for.
        inputs: The example inputs that were used.
        arguments: The parameters of the captured forward.
        traces: The trace in the model's own mode first; the other mode's only where it differs.
        notes: What a reader should know, such as a mode that could not be captured.
    """

    model: nn.Module
    inputs: ExampleInputs
    arguments: tuple[Argument, ...]
    traces: tuple[Trace, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The model's modules by qualified name; one in two places has both names."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def owners(self) -> dict[int, list[str]]:
        """All qualified names of each parameter, by identity: more than one where it is tied."""
        owners: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        return owners

    @property
    def graph(self) -> fx.Graph:
        """The graph in the model's own mode."""
        return self.traces[0].graph


def capture(model: nn.Module, example_inputs: Inputs | ExampleInputs | None = None) -> Capture:
    """Capture a model as an fx graph whose nodes carry example values.

    Args:
        model: Any module; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Without any, they are taken from what the model declares, or found by trial.

    Returns:
        The graph(s), the inputs used, and what was assumed.

    Raises:
        CaptureError: The inputs don't fit, none could be found, or the model holds something that
            a graph can't. The message names the module and what to do.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a TorchScript module has no Python forward: capture the original model")
    if example_inputs is not None:
        if not isinstance(example_inputs, ExampleInputs):
            example_inputs = ExampleInputs.given(example_inputs)
        return _capture(model, example_inputs)
    tried: list[str] = []
    for candidate in propose_inputs(model):
        try:
            return _capture(model, candidate)
        except CaptureError as err:
            tried.append(f"({candidate.describe()}): {_first_line(err)}")
    what = "; ".join(tried) if tried else "no layer suggests any"
    raise CaptureError(
        f"no example input found for {type(model).__name__}: pass example_inputs. Tried {what}"
    )


def _capture(model: nn.Module, inputs: ExampleInputs) -> Capture:
    arguments = bind_arguments(model, inputs)
    values = FakeValues()
    trace, dependent = _trace(model, arguments, inputs, values, training=model.training)
    traces, notes = (trace,), ()
    if dependent:
        try:
            other, _ = _trace(model, arguments, inputs, values, training=not model.training)
            traces = (trace, other)
        except CaptureError as err:
            if inputs.source != "given":
                raise
            mode = "evaluation" if model.training else "training"
            notes = (f"{mode} mode could not be captured: {err}",)
    return Capture(model, inputs, arguments, traces, notes)


def _trace(
    model: nn.Module,
    arguments: tuple[Argument, ...],
    inputs: ExampleInputs,
    values: FakeValues,
    *,
    training: bool,
) -> tuple[Trace, bool]:
    tracer = ValueTracer(model, training=training, values=values)
    try:
        graph = tracer.trace_model(arguments)
    except CaptureError:
        raise
    except Exception as err:
        raise CaptureError(_explain(model, arguments, err)) from err
    assumptions = tuple(tracer.assumptions.values())
    insert_checks(graph, assumptions)
    trace = Trace(graph, training, assumptions, tuple(tracer.opaque), tracer.constants)
    return trace, tracer.mode_dependent


def _explain(model: nn.Module, arguments: tuple[Argument, ...], err: Exception) -> str:
    path = getattr(err, "aim_path", "")
    where = f"in {path!r} " if path else ""
    inputs = ", ".join(
        f"{argument.name}: {ExampleInputs((argument.value,), {}, '').describe()}"
        for argument in arguments
        if not isinstance(argument.value, bool | int | float | str | None)
    )
    frames = [f for f in traceback.extract_tb(err.__traceback__) if _is_users(f.filename)]
    line = f" at {frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`" if frames else ""
    return (
        f"{type(model).__name__} failed {where}with the example inputs ({inputs}){line}: "
        f"{type(err).__name__}: {_first_line(err)}"
    )


def _is_users(filename: str) -> bool:
    return "/torch/" not in filename and "/aim_surgery/" not in filename


def _first_line(err: Exception) -> str:
    return str(err).strip().split("\n", 1)[0]
