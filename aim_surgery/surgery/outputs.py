"""By how much the outputs of two models differ, on one input, in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.capture.copies import random_state_kept
from aim_surgery.nn.eager import autocast_off
from aim_surgery.planning import Plan, inputs_of_plan


class Unmeasured(Exception):  # noqa: N818  # no failure of anybody: there is nothing to measure on
    """Why nothing could be measured."""


def difference_of(
    one: nn.Module, other: nn.Module, plan: Plan, example_inputs: Inputs | None
) -> tuple[float, str]:
    """Run both models on the same input, once each, without gradients.

    Args:
        one: An operated model; left unchanged, modes and buffers too.
        other: Its base; likewise.
        plan: Gives the example input, where there is none given.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        The largest difference of any output, relative to the largest entry of that output; and what
        it was measured on.

    Raises:
        Unmeasured: There is no input, or the models can't run on it.
    """
    if example_inputs is not None:
        inputs, where = ExampleInputs.given(example_inputs), "on the inputs given"
    else:
        inputs = inputs_of_plan(plan.inputs, one)
        where = "on noise of the sizes that it was operated with"
        if inputs is None:
            raise Unmeasured("its plan can't store its example inputs: pass example_inputs")
        args, kwargs = drawn_anew((inputs.args, dict(inputs.kwargs)), floating_dtype(one))
        inputs = ExampleInputs(args, kwargs, inputs.source)
    try:
        with random_state_kept(), autocast_off(one):
            outputs = [_outputs(model, inputs) for model in (one, other)]
    except Exception as err:
        if example_inputs is not None:
            raise
        raise Unmeasured(f"{type(err).__name__}: {err}") from err
    found = [_difference(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, Tensor)]
    if not found or any(tensor.is_meta for tensor in outputs[0] if isinstance(tensor, Tensor)):
        raise Unmeasured("the model is on the meta device" if found else "no tensors come out")
    return max(found), where


def drawn_anew(values: Any, dtype: torch.dtype | None) -> Any:
    """Nested values with all floats in them drawn anew, in another dtype if one is given."""
    generator = torch.Generator().manual_seed(0)

    def noise(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        values = torch.randn(x.shape, generator=generator, device="cpu")
        return values.to(x.device, dtype or x.dtype)

    return tree_map_only(Tensor, noise, values)


def floating_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of a model's first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: ExampleInputs) -> list[Any]:
    """Tensors that come out; what the model writes into buffers goes to copies of them."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args, kwargs = tree_map_only(Tensor, torch.clone, (inputs.args, dict(inputs.kwargs)))
    with evaluating(model):
        output = torch.func.functional_call(model, buffers, args, kwargs)
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in tree_leaves(output)]


def _difference(one: Tensor, other: Any) -> float:
    if not isinstance(other, Tensor) or one.shape != other.shape:
        return float("inf")
    if one.is_meta or not one.numel():
        return 0.0
    if not one.is_floating_point():
        return float(bool((one != other).any()))
    scale = other.abs().max().clamp_min(torch.finfo(other.dtype).tiny)
    return float((one - other).abs().max() / scale)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to every module's own."""
    modes = [(module, module.training) for module in model.modules()]
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
        for module, mode in modes:
            module.training = mode
