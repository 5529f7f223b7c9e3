"""The operation: look (`plan`), do what was planned (`apply`), or both (`transform`).

transform = apply ∘ plan

A model that can't be a graph as a whole (see `capture_any`) keeps its class by default, as it does
with `emit="module"`; the plan's notes say why, and its `emit` what came of it.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar, cast, get_args, overload

import torch
from torch import nn
from torch.export import ExportedProgram

from aim_surgery.capture import (
    Capture,
    ExampleInputs,
    Inputs,
    as_module,
    capture,
    capture_any,
    capture_whole,
)
from aim_surgery.capture.opaque import is_final
from aim_surgery.config import AimConfig, Form
from aim_surgery.errors import CaptureError, MissingInputsError, PlanError
from aim_surgery.lowering import lower
from aim_surgery.lowering.forms import check_form
from aim_surgery.nn.aim_modules import AimModules, plan_of
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.planning import Plan, inputs_of_plan, make_plan
from aim_surgery.surgery.rewrite import operate

_Model = TypeVar("_Model", bound=nn.Module)

Wanted = Literal["auto", "graph", "module"]

_CAPTURES = {"auto": capture_any, "graph": capture, "module": capture_whole}


def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Wanted = "auto",
) -> Plan:
    """Decide what an operation would do, without doing it.

    Args:
        model: Any module or exported program; left unchanged. It may live on the meta device.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments;
            shapes and dtypes count, and values where the model's Python looks at them. Without any,
            they are taken from what the model declares, or found by trial.
        config: What to operate and how much it may cost.
        emit: What `apply` will return: see `transform`.

    Returns:
        The plan: print it, edit it, save it, give it to `apply`.

    Raises:
        CaptureError: The model fails with these inputs, or can't be a graph where one is wanted.
        PlanError: There is nothing to read with, or the budget is too small.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> len(plan(model).reads)
        2
    """
    return planned(model, example_inputs, config, emit)[1]


def planned(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None,
    config: AimConfig | None,
    emit: Wanted,
) -> tuple[Capture, Plan]:
    """`plan`, and the captured model that it was made from; `applied` takes that in turn."""
    config = _checked_config(config)
    captured = _captured(model, example_inputs, _checked_emit(emit))
    return captured, make_plan(captured, config)


def apply(
    model: nn.Module | ExportedProgram,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    form: Form = "concat",
    copy: bool = True,
) -> Any:
    """Carry out a plan.

    Args:
        model: The model that the plan was made for, or one like it; left unchanged.
        plan: From `plan`, edited or read from JSON.
        example_inputs: Needed only where the plan could not hold the example inputs (dataclasses
            and other objects), or the model takes no zeros of their shapes (lengths).
        form: How sites are written: see `lower`.
        copy: Whether unchanged tensors are copied; if not, both models share them.

    Returns:
        A new model with a memory: a `GraphModule`, or one of the same class where the plan says
        `emit="module"`.

    Raises:
        PlanError: This is no plan, or it doesn't fit the model.
        MissingInputsError: What stands for the plan's example inputs does not serve.
        CaptureError: The model can't be captured.
        AimSurgeryError: There is no such form.
    """
    check_form(form)
    gm = applied(model, plan, example_inputs, copy=copy)
    return gm if form == "concat" else lower(gm, form)


def applied(
    model: nn.Module | ExportedProgram | Capture,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    copy: bool = True,
    device: torch.device | None = None,
) -> Any:
    """`apply` in the form "concat", also to what is captured; `device` is that of what is new."""
    if not isinstance(plan, Plan):
        source = "Plan.from_json(text)" if isinstance(plan, str) else "aim_surgery.plan(model)"
        raise PlanError(f"expected a Plan, got {type(plan).__name__}: {source} gives one")
    plan.checked()
    if isinstance(model, Capture):
        with torch.inference_mode(False):
            return operate(model, plan, copy=copy, device=device)
    inputs: Inputs | ExampleInputs | None = example_inputs
    base = as_module(model)
    if inputs is None and isinstance(base, nn.Module):  # what is no model, capture refuses
        inputs = inputs_of_plan(plan.inputs, base)
        if inputs is None:
            raise PlanError(
                "this plan's example inputs hold objects that a plan can't store: pass "
                "example_inputs"
            )
    with torch.inference_mode(False):  # tensors made inside it could never be trained
        try:
            captured = _captured(base, inputs, plan.emit)
        except CaptureError as err:
            if example_inputs is not None or not is_final(err):
                raise
            raise MissingInputsError(
                f"{err}. These inputs stand for the plan's, which holds their shapes alone: pass "
                f"example_inputs"
            ) from err
        return operate(captured, plan, copy=copy, device=device)


@overload
def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Literal["auto"] = "auto",
    form: Form = "concat",
    copy: bool = True,
) -> Any: ...


@overload
def transform(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Literal["graph"],
    form: Form = "concat",
    copy: bool = True,
) -> AimGraphModule: ...


@overload
def transform(
    model: _Model,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Literal["module"],
    form: Form = "concat",
    copy: bool = True,
) -> _Model: ...


@overload
def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Wanted,
    form: Form = "concat",
    copy: bool = True,
) -> nn.Module: ...


def transform(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    emit: Wanted = "auto",
    form: Form = "concat",
    copy: bool = True,
) -> Any:
    """Give a model a memory that every convolution and linear call reads.

    A layer with weight (C_out, C_in/g, *kernel) comes back as (C_out, C_in/g + k, *kernel), a
    linear one (out, in) as (out, in + k).

    Args:
        model: Any module or exported program; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments;
            shapes and dtypes count, and values where the model's Python looks at them. Without any,
            they are taken from what the model declares, or found by trial.
        config: What to operate and how much it may cost.
        emit: "graph" gives a `GraphModule`: reads, writes, compilation, export. "module" gives a
            model of the same class with all its methods (`generate`, `forward_features`): nothing
            is traced, layers read the memory through hooks, and nothing is written. "auto" gives
            the first where all of the model's own forward can be a graph, in both modes, and else
            the second.
        form: "concat" joins the memory to each layer's input, "split" computes its part apart and
            adds it: the same function with less work. `lower` changes it later.
        copy: Whether unchanged tensors are copied; if not, both models share them.

    Returns:
        A new model. Original parameters keep their names and their leading entries, new
        ones live under `aim.`. With `init="preserve"` it computes what the model computes.

    Raises:
        CaptureError: The model fails with these inputs, or can't be a graph where one is wanted.
        PlanError: There is nothing to read with, or the budget is too small.
        AimSurgeryError: There is no such form.

    Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021.
    Deviation: every convolution and linear call reads, not only the first of each residual block.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
        >>> transform(model)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 64, 28, 28])
    """
    config = _checked_config(config)
    check_form(form)
    with torch.inference_mode(False):  # tensors made inside it could never be trained
        captured = _captured(model, example_inputs, _checked_emit(emit))
        gm = operate(captured, make_plan(captured, config), copy=copy)
    return gm if form == "concat" else lower(gm, form)


def _checked_config(config: AimConfig | None) -> AimConfig:
    if config is None:
        return AimConfig()
    if not isinstance(config, AimConfig):
        remedy = "AimConfig(**config)" if isinstance(config, dict) else "AimConfig(budget=0.015)"
        raise PlanError(f"config: AimConfig expected, got {type(config).__name__}; use {remedy}")
    return config


def _checked_emit(emit: object) -> Wanted:
    if emit not in get_args(Wanted):
        raise PlanError(f"emit must be 'auto', 'graph' or 'module', got {emit!r}")
    return cast(Wanted, emit)


def _captured(
    model: nn.Module | ExportedProgram, inputs: Inputs | ExampleInputs | None, emit: Wanted
) -> Capture:
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, AimModules) or plan_of(module) is not None:
                path = path.removesuffix("aim").removesuffix(".")
                where = f"its submodule {path!r}" if path else "it"
                raise CaptureError(
                    f"this model has been operated on: {where} has a memory already. Operate the "
                    f"original model"
                )
    return _CAPTURES[emit](model, inputs)
