"""Adds conv(m, W_m) to a convolution's result, where each sample has its own memory m.

    t[n] <- t[n] + W_m · columns(m[n])        W_m (O, k·K), columns (k·K, positions)

m has few channels and the result has many: as a convolution it would be written out whole and then
added, and backward would bring the gradient to formats that a convolution likes. As a product of
matrices that is added (`baddbmm_`) it is one pass over the result, and one for each gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aim_surgery.nn.eager import added, is_watched
from aim_surgery.nn.spatial import CONVS


def is_better(planes: int, outputs: int, kernel: Sequence[int]) -> bool:
    """Whether a product is better added as it is computed than written out as a convolution.

    Its columns (k·K numbers a position) are no more than its result then, and there is a way to lay
    them out.
    """
    taps = math.prod(kernel)
    return planes * taps <= outputs and (len(kernel) < 3 or taps == 1)


def add_product(
    t: Tensor,
    view: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Add conv(view, weight) in place.

    Shapes:
        t (N, O, *S'), view (N, k, *S), weight (O, k, *kernel) -> (N, O, *S'); N may be missing

    Args:
        t: A result that nobody else looks at; changed.
        view: The memory as planes, one copy a sample.
        weight: W_m.
        stride: Of the convolution, for each axis.
        padding: Zeros at both ends of each axis.
        dilation: For each axis.

    Returns:
        `t`.
    """
    dims = weight.ndim - 2
    pointwise = set(weight.shape[2:]) == {1} and not any(padding)
    if t.ndim != dims + 2 or (dims == 3 and not pointwise) or is_watched():
        return added(t, CONVS[dims](view, weight, None, stride, padding, dilation))
    columns = _columns(view, weight, stride, padding, dilation, pointwise=pointwise).to(t.dtype)
    matrix = weight.flatten(1).to(t.dtype)
    if not torch.is_grad_enabled():
        return _add_in_place(t, matrix, columns)
    found: Any = _AddProduct.apply(t, matrix, columns)
    return found


def _columns(
    view: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    pointwise: bool,
) -> Tensor:
    """What each position of the result sees, (N, k·K, positions)."""
    if pointwise:
        steps = (slice(None, None, step) for step in stride)
        return view[(..., *steps)].flatten(2)
    kernel = weight.shape[2:]
    if len(kernel) == 1:
        view, kernel = view.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    return F.unfold(view, (*kernel,), (*dilation,), (*padding,), (*stride,))


def positions_last(grad: Tensor) -> Tensor:
    """A gradient (N, O, *S) as (N, O, positions)."""
    # not by `flatten`, which gradients that stand for several do not know
    return grad.reshape(*grad.shape[:2], math.prod(grad.shape[2:]))


def _add_in_place(t: Tensor, matrix: Tensor, columns: Tensor) -> Tensor:
    whole = t.view(*t.shape[:2], math.prod(t.shape[2:]))  # never a copy
    whole.baddbmm_(matrix.expand(len(columns), -1, -1), columns)
    return t


class _AddProduct(torch.autograd.Function):
    """In place without a copy: of a view that is changed in place, autograd copies the gradient."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, weight: Tensor, columns: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight, columns)
        ctx.mark_dirty(t)
        return _add_in_place(t, weight, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, columns = ctx.saved_tensors
        whole, of_weight, of_columns = positions_last(grad), None, None
        if ctx.needs_input_grad[1]:
            of_weight = torch.bmm(whole, columns.mT).sum(0)
        if ctx.needs_input_grad[2]:
            of_columns = torch.bmm(weight.mT.expand(len(columns), -1, -1), whole)
        return grad, of_weight, of_columns
