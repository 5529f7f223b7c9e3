"""Traces of one model, until both modes agree on what stays a Python call.

One trace where the model behaves alike in training and evaluation (dropout and batch norm keep
their switch inside the graph). Where Python branches on the training flag (GoogLeNet's auxiliary
heads), both modes are traced, and the emitted module changes graphs with `train()` and `eval()`.
"""

from __future__ import annotations

import keyword
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from aim_surgery._garbage import collection_paused
from aim_surgery.capture.assumptions import Assumption, insert_checks
from aim_surgery.capture.belongings import Belongings
from aim_surgery.capture.captured import Capture, Trace
from aim_surgery.capture.copies import random_state_kept, why_not_run
from aim_surgery.capture.inputs import Argument, ExampleInputs, bind_arguments
from aim_surgery.capture.opaque import StayPython, mark_final
from aim_surgery.capture.pinned import find_pinned
from aim_surgery.capture.random_sources import MayHaveDrawn
from aim_surgery.capture.tracer import ValueTracer
from aim_surgery.capture.values import FakeValues
from aim_surgery.capture.where import failing_line
from aim_surgery.errors import CaptureError, in_one_line, listed
from aim_surgery.nn.recurrent import is_recurrent

_NAMED = 4  # submodules that a note names


@collection_paused()
def capture_graphs(
    model: nn.Module,
    inputs: ExampleInputs,
    notes: tuple[str, ...] = (),
    *,
    one_mode_will_do: bool = True,
) -> Capture:
    """Trace until both modes, and all calls of a module, agree on what stays a Python call.

    Args:
        model: The model, out of its wrappers.
        inputs: Example inputs.
        notes: What a reader should know already.
        one_mode_will_do: Whether graphs are of use where one mode has none; if not, nothing more is
            found out about them.

    Returns:
        The graphs; `missing` says why the other mode has none, where it needs one, and `pinned`
        why they hold for one batch size only.

    Raises:
        CaptureError: The model's own mode can't be captured, or the model is a recurrent layer,
            which is one call of a graph.
    """
    arguments = bind_arguments(model, inputs)
    if is_recurrent(model):
        raise CaptureError(
            f"the linear calls of {type(model).__name__} stand inside torch's kernel: use "
            f'emit="module", or operate a model that holds the layer (nn.Sequential(layer))'
        )
    belongings = Belongings.of(model)
    tracing = _Tracing(model, inputs, arguments, belongings, FakeValues(), {})
    with random_state_kept(belongings.sources):
        while True:
            try:
                found = tracing.in_all_modes()
            except _StaysPython as err:
                tracing.python |= err.paths
                continue
            opaque = {call.path: call.reason for one in found.traced for call in one.trace.opaque}
            entered = {path for one in found.traced for path in one.entered}
            python = {path: why for path, why in opaque.items() if path in entered}
            in_vain = found.missing and not one_mode_will_do
            pinned = {} if python or in_vain else tracing.pinned(found, inputs)
            if not python and ("" in pinned or not pinned):
                break
            tracing.python |= python | pinned
    words = [*notes, *(note for one in found.traced for note in one.notes)]
    words += [found.missing] if found.missing else []
    why = pinned.get("", "")
    words += [f"the graph is one of {type(model).__name__}'s own forward, and {why}"] if why else []
    words += _opaque_notes(opaque)
    traces = tuple(one.trace for one in found.traced)
    _refuse_keywords(traces)
    called = _called(traces)
    words += [*_hook_notes(model, called), *_state_notes(model, called)]
    notes = tuple(dict.fromkeys(words))
    return Capture(model, inputs, arguments, traces, notes, found.missing, why)


def _opaque_notes(opaque: Mapping[str, str]) -> Iterator[str]:
    """One note a reason; a network of 50 activations with one reason is one note."""
    paths: defaultdict[str, list[str]] = defaultdict(list)
    for path, why in opaque.items():
        paths[why].append(path)
    for why, same in paths.items():
        if len(same) == 1:
            yield f"{same[0]} stays a Python call: {why}"
        else:
            yield f"{listed(same, _NAMED)} stay Python calls: {why}"


@dataclass(frozen=True)
class _Traced:
    """A trace, and what only matters while traces are made.

    Attributes:
        trace: The trace.
        checked: Its assumptions that the graph checks.
        dependent: Whether the model branched on its training flag.
        entered: Submodules that were traced through.
        notes: What a reader should know.
    """

    trace: Trace
    checked: tuple[Assumption, ...]
    dependent: bool
    entered: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """The traces of one or both modes, and why the other mode has none where it needs one."""

    traced: tuple[_Traced, ...]
    missing: str = ""


class _StaysPython(Exception):  # noqa: N818 - control flow, not an error
    """A trace failed after it had found modules that stay Python: they may have been the cause."""

    def __init__(self, paths: dict[str, str]) -> None:
        super().__init__(*paths)
        self.paths = paths


@dataclass
class _Tracing:
    """Makes the traces of one model.

    Attributes:
        python: Submodules that are not to be traced through, with the reason.
    """

    model: nn.Module
    inputs: ExampleInputs
    arguments: tuple[Argument, ...]
    belongings: Belongings
    values: FakeValues
    constants: dict[str, torch.Tensor]
    python: dict[str, str] = field(default_factory=dict)

    def in_all_modes(self) -> _Found:
        """Trace in the model's own mode and, where it differs, in the other (if it can be)."""
        first = self.in_mode(self.model.training)
        if not first.dependent:
            return _Found((first,))
        try:
            return _Found((first, self.in_mode(not self.model.training)))
        except CaptureError as err:
            mode = "evaluation" if self.model.training else "training"
            return _Found((first,), f"{mode} mode could not be captured: {err}")

    def pinned(self, found: _Found, inputs: ExampleInputs) -> dict[str, str]:
        """Submodules that narrow the batch, with the reason; "" where the model itself does."""
        pinned: dict[str, str] = {}
        for one in found.traced:
            pinned |= find_pinned(
                self.model,
                inputs,
                self.arguments,
                one.trace.graph,
                one.checked,
                training=one.trace.training,
                constants=self.constants,
            )
        return pinned

    def in_mode(self, training: bool, *, watches_draws: bool = False) -> _Traced:
        """Trace in one mode."""
        tracer = ValueTracer(
            self.model,
            training=training,
            belongings=self.belongings,
            values=self.values,
            constants=self.constants,
            python=self.python,
            watches_draws=watches_draws,
        )
        try:
            graph = tracer.trace_model(self.arguments)
        except MayHaveDrawn:
            return self.in_mode(training, watches_draws=True)
        except StayPython as stop:
            raise CaptureError(
                f"the model itself can't be captured as a graph: {stop}. Move that code into a "
                f"submodule of its own, which then stays one Python call."
            ) from stop
        except Exception as err:
            found = {call.path: call.reason for call in tracer.opaque}
            if tracer.complete and not found.keys() <= self.python.keys():
                raise _StaysPython(found) from err
            if isinstance(err, CaptureError):
                raise
            raise self._explained(err) from err
        answers = tracer.answers
        assumptions = tuple(answers.assumptions.values())
        checked = insert_checks(graph, assumptions)
        opaque = tuple(tracer.opaque)
        trace = Trace(graph, training, assumptions, opaque, self.constants)
        inside = tuple(f"{call.path}." for call in opaque)
        notes = [
            f"{name} is set inside forward: the operated model does not set it, and computes with "
            f"what it was"
            for name in sorted(tracer.changed)
            if not name.startswith(inside)
        ]
        entered = frozenset(tracer.entered)
        return _Traced(trace, checked, answers.mode_dependent, entered, (*notes, *tracer.remarks))

    def _explained(self, err: Exception) -> CaptureError:
        """What failed: only the trace, or (which is final) the model with these inputs."""
        path, line = getattr(err, "aim_path", ""), failing_line(err)
        at = f" at {line}" if line else ""
        where = f"in {path!r} " if path else ""
        if not why_not_run(self.model, self.inputs):
            return CaptureError(
                f"the model itself can't be captured as a graph: tracing stops {where}with "
                f"{in_one_line(err)}{at}. The model by itself runs: emit='module' keeps its class, "
                f"or move that code into a submodule of its own, which then stays one Python call."
            )
        inputs = ", ".join(
            f"{argument.name}: {ExampleInputs((argument.value,), {}, '').describe()}"
            for argument in self.arguments
            if not isinstance(argument.value, bool | int | float | str | None)
        )
        name = type(self.model).__name__
        found = CaptureError(
            f"{name} failed {where}with the example inputs ({inputs}){at}: {in_one_line(err)}"
        )
        mark_final(found)
        return found


def _refuse_keywords(traces: tuple[Trace, ...]) -> None:
    """A graph's code names modules and parameters; a keyword can't be a name in it."""
    for trace in traces:
        for node in trace.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            word = next(filter(keyword.iskeyword, str(node.target).split(".")), None)
            if word is not None:
                raise CaptureError(
                    f"{node.target}: {word!r} is a word of Python's own, and the code of a graph "
                    f"can't have it for a name: rename it, or keep the class with emit='module'"
                )


def _called(traces: tuple[Trace, ...]) -> set[str]:
    """Paths of the modules that stay calls."""
    nodes = (node for trace in traces for node in trace.graph.nodes)
    return {str(node.target) for node in nodes if node.op == "call_module"}


def _state_notes(model: nn.Module, called: set[str]) -> Iterator[str]:
    """What a module keeps besides parameters and buffers, and what hangs on parameters."""
    odd = [
        path or "the model"
        for path, module in model.named_modules()
        if path not in called and _has_other_state(module)
    ]
    if odd:
        yield (
            f"{listed(odd, _NAMED)}: only parameters and buffers are kept in the state dict, "
            f"nothing that the class itself puts there (get_extra_state and the like)"
        )
    hooked = [name for name, p in model.named_parameters() if p._backward_hooks]
    if hooked:
        yield f"hooks on gradients of parameters are not kept: {listed(hooked, _NAMED)}"


def _has_other_state(module: nn.Module) -> bool:
    kind = type(module)
    own = (kind.get_extra_state, kind._save_to_state_dict)
    return bool(module._state_dict_hooks) or own != (
        nn.Module.get_extra_state,
        nn.Module._save_to_state_dict,
    )


def _hook_notes(model: nn.Module, called: set[str]) -> Iterator[str]:
    """Hooks of modules that are traced through: fx runs them once, and keeps the arithmetic."""
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
