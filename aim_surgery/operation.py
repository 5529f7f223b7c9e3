"""The operation: look (`plan`), do what was planned (`apply`), or both (`transform`).

transform = apply ∘ plan
"""

from __future__ import annotations

import torch
from torch import nn

from aim_surgery.capture import Capture, ExampleInputs, Inputs, capture
from aim_surgery.config import AimConfig
from aim_surgery.errors import CaptureError, PlanError
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.planning import Plan, inputs_of_plan, make_plan
from aim_surgery.surgery.rewrite import operate


def plan(
    model: nn.Module, example_inputs: Inputs | None = None, *, config: AimConfig | None = None
) -> Plan:
    """Decide what an operation would do, without doing it.

    Args:
        model: Any module; left unchanged. It may live on the meta device.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments;
            shapes and dtypes count, values don't. Without any, they are taken from what the model
            declares, or found by trial.
        config: What to operate and how much it may cost.

    Returns:
        The plan: print it, edit it, save it, give it to `apply`.

    Raises:
        CaptureError: The model can't be captured with these inputs.
        PlanError: There is nothing to read with, or the budget is too small.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> len(plan(model).reads)
        2
    """
    config = _checked_config(config)
    return make_plan(_captured(model, example_inputs), config)


def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Inputs | None = None,
    *,
    copy: bool = True,
) -> AimGraphModule:
    """Carry out a plan.

    Args:
        model: The model that the plan was made for, or one like it; left unchanged.
        plan: From `plan`, edited or read from JSON.
        example_inputs: Needed only where the plan could not hold the example inputs (dataclasses
            and other objects).
        copy: Whether unchanged tensors are copied; if not, both models share them.

    Returns:
        A new `GraphModule` with a memory.

    Raises:
        PlanError: This is no plan, or it doesn't fit the model.
        CaptureError: The model can't be captured.
    """
    if not isinstance(plan, Plan):
        source = "Plan.from_json(text)" if isinstance(plan, str) else "aim_surgery.plan(model)"
        raise PlanError(f"expected a Plan, got {type(plan).__name__}: {source} gives one")
    plan.checked()
    inputs: Inputs | ExampleInputs | None = example_inputs
    if inputs is None and isinstance(model, nn.Module):  # what is no model, capture refuses
        inputs = inputs_of_plan(plan.inputs, model)
        if inputs is None:
            raise PlanError(
                "this plan's example inputs hold objects that a plan can't store: pass "
                "example_inputs"
            )
    with torch.inference_mode(False):  # tensors made inside it could never be trained
        return operate(_captured(model, inputs), plan, copy=copy)


def transform(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    config: AimConfig | None = None,
    copy: bool = True,
) -> AimGraphModule:
    """Give a model a memory that every convolution and linear call reads.

    A layer with weight (C_out, C_in/g, *kernel) comes back as (C_out, C_in/g + k, *kernel), a
    linear one (out, in) as (out, in + k).

    Args:
        model: Any module; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments;
            shapes and dtypes count, values don't. Without any, they are taken from what the model
            declares, or found by trial.
        config: What to operate and how much it may cost.
        copy: Whether unchanged tensors are copied; if not, both models share them.

    Returns:
        A new `GraphModule`. Original parameters keep their names and their leading entries, new
        ones live under `aim.`. With `init="preserve"` it computes what the model computes.

    Raises:
        CaptureError: The model can't be captured with these inputs.
        PlanError: There is nothing to read with, or the budget is too small.

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
    with torch.inference_mode(False):  # tensors made inside it could never be trained
        captured = _captured(model, example_inputs)
        return operate(captured, make_plan(captured, config), copy=copy)


def _checked_config(config: AimConfig | None) -> AimConfig:
    if config is None:
        return AimConfig()
    if not isinstance(config, AimConfig):
        remedy = "AimConfig(**config)" if isinstance(config, dict) else "AimConfig(budget=0.015)"
        raise PlanError(f"config: AimConfig expected, got {type(config).__name__}; use {remedy}")
    return config


def _captured(model: nn.Module, inputs: Inputs | ExampleInputs | None) -> Capture:
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            if isinstance(module, AimGraphModule):
                where = f"its submodule {path!r}" if path else "it"
                raise CaptureError(
                    f"this model has been operated on: {where} has a memory already. Operate the "
                    f"original model"
                )
    return capture(model, inputs)
