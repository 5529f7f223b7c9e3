"""Example inputs as plain data in a plan, and back.

inputs_of_plan(input_spec(inputs), model) has the shapes and dtypes of inputs, or the floating dtype
that the model has been moved to since
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import ExampleInputs
from aim_surgery.errors import PlanError
from aim_surgery.planning.plan import InputSpec

_LITERALS = (bool, int, float, str, type(None))


def input_spec(inputs: ExampleInputs) -> InputSpec:
    """Example inputs as plain data.

    Args:
        inputs: The inputs that a model was captured with.

    Returns:
        Their shapes; with `args=None` where they hold something other than tensors, literals,
        tuples, lists and dicts.
    """
    try:
        args = tuple(_spec(value) for value in inputs.args)
        kwargs = tuple((name, _spec(value)) for name, value in inputs.kwargs.items())
    except TypeError:
        return InputSpec(None, (), inputs.source)
    return InputSpec(args, kwargs, inputs.source)


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return ("tensor", tuple(int(size) for size in value.shape), dtype)
    if isinstance(value, _LITERALS):
        return value
    if type(value) in (tuple, list):
        return (type(value).__name__, tuple(_spec(item) for item in value))
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return ("dict", tuple((key, _spec(item)) for key, item in value.items()))
    raise TypeError(type(value).__name__)


def inputs_of_plan(spec: InputSpec, model: nn.Module) -> ExampleInputs | None:
    """The inverse of `input_spec`: tensors of zeros, on the model's device.

    Args:
        spec: The plan's input.
        model: Its first parameter's device is used; and its floating dtype, where all of its
            floating parameters have one.

    Returns:
        The inputs, or None where the plan could not tell them.

    Raises:
        PlanError: No tensor has the shapes that the plan tells.
    """
    if spec.args is None:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    floating = one_floating_dtype(model)
    try:
        args = tuple(_example(value, device, floating) for value in spec.args)
        kwargs = {name: _example(value, device, floating) for name, value in spec.kwargs}
    except (RuntimeError, TypeError, ValueError, OverflowError) as err:
        raise PlanError(
            f"the example inputs of this plan can't be made: {err}. Pass example_inputs"
        ) from err
    return ExampleInputs(args, kwargs, spec.source)


def one_floating_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of all floating parameters; None where there is none, or more than one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def _example(spec: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    if not isinstance(spec, tuple):
        return spec
    kind, content, *rest = spec
    if kind == "tensor":
        dtype = getattr(torch, rest[0])
        dtype = floating if floating is not None and dtype.is_floating_point else dtype
        return torch.zeros(content, dtype=dtype, device=device)
    if kind == "dict":
        return {key: _example(value, device, floating) for key, value in content}
    items = (_example(value, device, floating) for value in content)
    return (tuple if kind == "tuple" else list)(items)
