"""Gradients of both models, held against each other: of a random linear form of the outputs.

Of widened weights the original entries are compared, and of frozen parameters nothing. The operated
model's gradients are taken off the original's as they come in, so that no second set of them is
held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from aim_surgery.errors import in_one_line
from aim_surgery.planning import Plan, Read
from aim_surgery.verification.comparison import TINY, Case, Comparison
from aim_surgery.verification.differences import largest, number
from aim_surgery.verification.twins import split_entries


def gradients_of(
    original: nn.Module, outputs: Mapping[str, Any], notes: list[str]
) -> dict[str, torch.Tensor] | None:
    """The original's gradients by name; None where it has none.

    Args:
        original: Left without gradients.
        outputs: Of a run with gradients.
        notes: Told where its backward fails.
    """
    loss = _random_loss(outputs)
    if loss is None:
        return None
    try:
        loss.backward()
    except Exception as err:
        original.zero_grad(set_to_none=True)  # what came before it failed
        note = f"gradients not compared, the original fails in backward: {in_one_line(err)}"
        if note not in notes:
            notes.append(note)
        return None
    found = {}
    for name, parameter in original.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def compare_gradients(
    original: nn.Module,
    operated: nn.Module,
    plan: Plan,
    case: Case,
    expected: dict[str, torch.Tensor],
    outputs: Mapping[str, Any],
    limit: float,
    notes: list[str],
) -> Comparison:
    """Run the operated model's backward and compare.

    Args:
        original: Tells the shapes of parameters.
        operated: Left without gradients.
        plan: Tells which weights are widened, and where.
        case: What both ran on.
        expected: The original's gradients; used up.
        outputs: The operated model's, of a run with gradients.
        limit: The largest difference that passes.
        notes: Told of frozen parameters, which have no gradient to compare.

    Returns:
        What came of it.
    """
    _leave_out_frozen(operated, expected, notes)
    sizes = {name: largest(gradient) for name, gradient in expected.items()}
    floor = TINY * max(sizes.values(), default=0.0)
    differences: dict[str, float | str] = {}
    shapes = {name: parameter.shape for name, parameter in original.named_parameters()}
    reads = {name: read for read in plan.reads for name in read.site.weights}
    handles = []
    for name, parameter in operated.named_parameters(remove_duplicate=False):
        hook = _Subtract(name, shapes.get(name), reads.get(name), expected, differences)
        if name in shapes and _gets_gradient(parameter):
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
    loss = _random_loss(outputs)
    try:
        if loss is None:
            reason = "no output of the operated model has any"
            return Comparison.failed("gradients", case, limit, reason)
        loss.backward()
    except Exception as err:
        reason = f"the operated model fails: {in_one_line(err)}"
        return Comparison.failed("gradients", case, limit, reason)
    finally:
        for handle in handles:
            handle.remove()
        operated.zero_grad(set_to_none=True)
    for name, rest in expected.items():
        scale = max(sizes.get(name, 0.0), floor) or 1.0
        differences.setdefault(name, number(largest(rest) / scale))
    return Comparison.of("gradients", case, limit, differences)


def _gets_gradient(parameter: torch.Tensor) -> bool:
    """Whether it is trained; a copy of TorchScript's is computed, and no leaf."""
    return parameter.requires_grad and parameter.is_leaf


def _leave_out_frozen(
    operated: nn.Module, expected: dict[str, torch.Tensor], notes: list[str]
) -> None:
    parameters = dict(operated.named_parameters(remove_duplicate=False))
    frozen = [n for n in expected if n in parameters and not _gets_gradient(parameters[n])]
    for name in frozen:
        del expected[name]
    note = f"frozen in the operated model, so their gradients are not compared: {len(frozen)}"
    if frozen and note not in notes:
        notes.append(note)


@dataclass(frozen=True)
class _Subtract:
    """Hook on a parameter of the operated model: takes its original entries off the expectation."""

    name: str
    shape: torch.Size | None
    read: Read | None
    expected: dict[str, torch.Tensor]
    differences: dict[str, float | str]

    def __call__(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or self.shape is None:
            return
        if gradient.shape != self.shape and self.read is not None:
            gradient = split_entries(gradient, self.read)[0]
            gradient = (
                gradient.reshape(self.shape) if gradient.numel() == self.shape.numel() else gradient
            )
        if gradient.shape != self.shape:
            self.differences[self.name] = (
                f"has shape {tuple(gradient.shape)}, not {tuple(self.shape)}"
            )
        elif self.name in self.expected:
            self.expected[self.name].sub_(gradient)
        else:
            self.expected[self.name] = -gradient


def _random_loss(outputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Σ output · noise over everything that has a gradient; the same noise for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    terms = []
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value = torch.view_as_real(value) if value.is_complex() else value
            noise = torch.randn(value.shape, generator=generator, device="cpu").to(value)
            terms.append((torch.where(value.isfinite(), value, 0) * noise).sum())
    return torch.stack([term.double() for term in terms]).sum() if terms else None
