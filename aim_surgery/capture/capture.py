"""From a model to a graph: `capture(model, example_inputs) -> Capture`.

One trace where the model behaves alike in training and evaluation (dropout and batch norm keep
their switch inside the graph). Where Python branches on the training flag (GoogLeNet's auxiliary
heads), both modes are traced, and the emitted module changes graphs with `train()` and `eval()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from aim_surgery._garbage import collection_paused
from aim_surgery.capture.assumptions import Assumption, insert_checks
from aim_surgery.capture.inputs import (
    Argument,
    ExampleInputs,
    Inputs,
    bind_arguments,
    propose_inputs,
)
from aim_surgery.capture.opaque import OpaqueCall, first_line
from aim_surgery.capture.tracer import ValueTracer
from aim_surgery.capture.values import FakeValues
from aim_surgery.capture.where import failing_line
from aim_surgery.capture.wrappers import on_meta, refuse_uninitialised, unwrap
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
            None where the model was taken as a whole (`capture_whole`).
        notes: What a reader should know, such as a mode that could not be captured.
        findings: What was found out about it later, such as the sites of a graph, so that it need
            not be found again.
    """

    model: nn.Module
    inputs: ExampleInputs
    arguments: tuple[Argument, ...]
    traces: tuple[Trace, ...]
    notes: tuple[str, ...] = ()
    findings: dict[Any, Any] = field(default_factory=dict, repr=False)

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

    @cached_property
    def floating_parameters(self) -> frozenset[str]:
        """Qualified names of all floating parameters."""
        named = self.model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if parameter.is_floating_point())

    @property
    def whole(self) -> bool:
        """Whether the model was taken as one Python call: there is no graph then."""
        return not self.traces

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
    model, notes = unwrap(model)
    refuse_uninitialised(model)
    if example_inputs is not None:
        if not isinstance(example_inputs, ExampleInputs):
            example_inputs = ExampleInputs.given(example_inputs)
        return _capture(model, on_meta(model, example_inputs), notes)
    tried: list[str] = []
    for candidate in propose_inputs(model):
        try:
            return _capture(model, candidate, notes)
        except CaptureError as err:
            tried.append(f"({candidate.describe()}): {first_line(err)}")
    what = "; ".join(tried) if tried else "no layer suggests any"
    raise CaptureError(
        f"no example input found for {type(model).__name__}: pass example_inputs. Tried {what}"
    )


@collection_paused()
def _capture(model: nn.Module, inputs: ExampleInputs, known: tuple[str, ...]) -> Capture:
    arguments = bind_arguments(model, inputs)
    values = FakeValues()
    constants: dict[str, torch.Tensor] = {}
    shared = (model, arguments, values, constants)
    trace, dependent, notes = _trace(*shared, training=model.training)
    traces = (trace,)
    if dependent:
        try:
            other, _, more = _trace(*shared, training=not model.training)
            traces, notes = (trace, other), (*notes, *more)
        except CaptureError as err:
            if inputs.source != "given":
                raise
            mode = "evaluation" if model.training else "training"
            notes = (*notes, f"{mode} mode could not be captured: {err}")
    notes = tuple(dict.fromkeys((*known, *notes, *_hook_notes(model, traces))))
    return Capture(model, inputs, arguments, traces, notes)


def _trace(
    model: nn.Module,
    arguments: tuple[Argument, ...],
    values: FakeValues,
    constants: dict[str, torch.Tensor],
    *,
    training: bool,
) -> tuple[Trace, bool, tuple[str, ...]]:
    tracer = ValueTracer(model, training=training, values=values, constants=constants)
    try:
        graph = tracer.trace_model(arguments)
    except CaptureError:
        raise
    except Exception as err:
        raise CaptureError(_explain(model, arguments, err)) from err
    assumptions = tuple(tracer.assumptions.values())
    insert_checks(graph, assumptions)
    trace = Trace(graph, training, assumptions, tuple(tracer.opaque), constants)
    notes = tuple(
        f"{name} is set inside forward: the operated model does not set it, and computes with what "
        f"it was"
        for name in sorted(tracer.changed)
    )
    return trace, tracer.mode_dependent, (*notes, *tracer.remarks)


def _hook_notes(model: nn.Module, traces: tuple[Trace, ...]) -> Iterator[str]:
    """Hooks of modules that are traced through: fx runs them once, and keeps the arithmetic."""
    nodes = (node for trace in traces for node in trace.graph.nodes)
    called = {str(node.target) for node in nodes if node.op == "call_module"}
    for path, module in model.named_modules():
        hooks = (
            *module._forward_hooks, *module._forward_pre_hooks,
            *module._backward_hooks, *module._backward_pre_hooks,
        )  # fmt: skip
        if hooks and path not in called:
            yield (
                f"hooks of {path or 'the model'}: only the tensor arithmetic of forward hooks is "
                f"kept, not what else they do, and no backward hooks"
            )


def _explain(model: nn.Module, arguments: tuple[Argument, ...], err: Exception) -> str:
    path = getattr(err, "aim_path", "")
    where = f"in {path!r} " if path else ""
    inputs = ", ".join(
        f"{argument.name}: {ExampleInputs((argument.value,), {}, '').describe()}"
        for argument in arguments
        if not isinstance(argument.value, bool | int | float | str | None)
    )
    line = failing_line(err)
    at = f" at {line}" if line else ""
    return (
        f"{type(model).__name__} failed {where}with the example inputs ({inputs}){at}: "
        f"{type(err).__name__}: {first_line(err)}"
    )
