"""Calls of widened layers in split form: x W_x + m W_m, where [W_x ; W_m] is one parameter W.

Of several samples a convolution is the sum of two: the memory's part is computed once, and the
input is copied nowhere. Of one sample there is nothing to save, so it is the convolution of
cat[x, m], which saves slices of W and, in backward, putting their gradients together. Likewise a
linear layer of so few inputs that copying them takes less than another call.

Of more inputs, a linear layer may still have many more weights: putting two gradients of slices
together would take longer than all the rest of its backward. So the gradients of W_x and of W_m are
written right into the gradient of W. Whoever looks on (compilers, exporters, `torch.func`), other
devices and other types get slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aim_surgery.nn.add_product import add_product, is_better
from aim_surgery.nn.eager import added, are_plain, is_batched, is_watched
from aim_surgery.nn.pointwise import pointwise
from aim_surgery.nn.spatial import CONVS, channels_last_format

FEW = 2**15  # numbers: 128 KiB in float32


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None, view: Tensor) -> Tensor:
    """Call a widened linear layer on input and memory.

    Shapes:
        x (*, I), weight (O, I + k), bias (O,), view (k,) or (.., N, .., k) -> (*, O)

    Args:
        x: What the layer works on.
        weight: W.
        bias: Of the layer, if it has one.
        view: What it sees of the memory: the same for all, or broadcast against `x`.

    Returns:
        x W_x^T + (m W_m^T + b), a tensor of its own.
    """
    view = _as(view, x)
    if not x.is_nested:  # as torch makes of padded input: it has no shape
        rows = math.prod(x.shape[:-1])
        if not is_watched() and (rows == 1 or rows * weight.shape[1] <= FEW):
            return F.linear(torch.cat([x, view.expand(*x.shape[:-1], -1)], -1), weight, bias)
        if torch.is_grad_enabled() and weight.requires_grad and are_plain(x, weight, bias, view):
            found: Any = _Linear.apply(x, weight, bias, view)
            return found
    own, memory = slices(weight, view.shape[-1])
    beside = F.linear(view, memory, bias)
    return F.linear(x, own, beside) if view.ndim == 1 else added(F.linear(x, own), beside)


def widened_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    view: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Call a widened convolution on input and memory.

    Shapes:
        x (N, I, *S), weight (O, I/g + k, *K), bias (O,), view (k, *S) or (N, k, *S) ->
        (N, O, *S'); N may be missing

    Args:
        x: What the layer works on.
        weight: W.
        bias: Of the layer, if it has one.
        view: The memory as planes; with batch, where each sample has its own.
        stride: For each axis.
        padding: Zeros at both ends of each axis, or "same" or "valid".
        dilation: For each axis.
        groups: Of W_x; each sees all planes.

    Returns:
        The sum of both products, a tensor of its own.
    """
    view = _as(view, x)
    dims = len(stride)
    convolve: Any = CONVS[dims]
    options = stride, padding, dilation
    if groups == 1 and not is_watched() and x.ndim == dims + 2 and len(x) == 1:
        return convolve(joined(x, view), weight, bias, *options)
    planes = view.shape[-dims - 1]
    own, memory = slices(weight, planes)
    kernel, zeros = weight.shape[2:], None if isinstance(padding, str) else padding
    if groups == 1 and math.prod(kernel) == 1 and zeros is not None and not any(zeros):
        return pointwise(x, own, bias, view, memory, stride)
    # a convolution would copy the slice to work on it, and once more in backward
    t = convolve(x, own.clone(), bias, *options, groups)
    if zeros is not None and view.ndim == t.ndim and is_better(planes, len(weight), kernel):
        return add_product(t, view, memory, stride, zeros, dilation)
    return added(t, convolve(view, memory, None, *options))


def slices(
    weight: Tensor, planes: int, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """W_x and W_m of a widened weight.

    W_m is that of a layer with one group, because each group of W_x gets all k planes:

        conv            (C_out, C_in/g + k, *kernel)    ->  (C_out, k, *kernel)
        conv_transpose  (C_in + g·k, C_out/g, *kernel)  ->  (k, C_out, *kernel)
        linear          (out, in + k)                   ->  (out, k)

    Args:
        weight: W.
        planes: k.
        transposed: Whether it is a transposed convolution's.
        groups: g.

    Returns:
        Both; views, but of a transposed convolution with several groups.
    """
    if not transposed:
        own, memory = weight.split((weight.shape[1] - planes, planes), 1)
        return own, memory
    each = weight.unflatten(0, (groups, -1))
    own, memory = each.split((each.shape[1] - planes, planes), 1)
    return own.flatten(0, 1), memory.transpose(0, 1).flatten(1, 2)


def joined(x: Tensor, view: Tensor) -> Tensor:
    """cat[x, m], laid out as x is.

    Shapes:
        x (N, I, *S), view (k, *S) or (N, k, *S) -> (N, I + k, *S)

    Args:
        x: A map with its channels second.
        view: The memory as planes of the same size.

    Returns:
        Both, in a tensor of their own.
    """
    view = view.expand(x.shape[0], *view.shape[-x.ndim + 1 :])
    last = channels_last_format(x)
    if last is not None:
        view = view.contiguous(memory_format=last)  # or `cat` would fall back to contiguous
    return torch.cat([x, view], 1)


def _as(view: Tensor, x: Tensor) -> Tensor:
    """The memory in the input's dtype: a layer may have been given another than the memory has."""
    return view if view.dtype == x.dtype else view.to(x.dtype)


class _Linear(torch.autograd.Function):
    """The result is no view, so that what follows may change it in place."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, view: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, view)
        inputs = x.shape[-1]
        beside = F.linear(view, weight[:, inputs:], bias)
        out = x.new_empty(*x.shape[:-1], len(weight))
        rows, own = out.view(-1, len(weight)), weight[:, :inputs].t()
        if view.ndim == 1:
            torch.addmm(beside, x.reshape(-1, inputs), own, out=rows)
            return out
        torch.mm(x.reshape(-1, inputs), own, out=rows)
        return out.add_(beside)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, view = ctx.saved_tensors
        of_x, of_weight, of_bias, of_view = ctx.needs_input_grad
        inputs, outputs = x.shape[-1], len(weight)
        of_beside = grad.sum_to_size(*view.shape[:-1], outputs)
        found: list[Tensor | None] = [None] * 4
        if of_x:
            found[0] = grad @ weight[:, :inputs]
        if of_weight:
            factors = (
                (grad.reshape(-1, outputs).t(), x.reshape(-1, inputs)),
                (of_beside.reshape(-1, outputs).t(), view.reshape(-1, view.shape[-1])),
            )
            found[1] = _side_by_side(factors, weight)
        if of_bias:
            found[2] = of_beside.reshape(-1, outputs).sum(0)
        if of_view:
            found[3] = of_beside @ weight[:, inputs:]
        return tuple(found)


def _side_by_side(factors: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Products of matrices with as many rows, written into one matrix, column after column."""
    if torch.is_grad_enabled() or is_watched() or is_batched(factors[0][0]):
        return torch.cat([left @ right for left, right in factors], 1)
    found = torch.empty_like(like, memory_format=torch.contiguous_format)
    widths = [right.shape[1] for _, right in factors]
    for (left, right), columns in zip(factors, found.split(widths, 1), strict=True):
        torch.mm(left, right, out=columns)
    return found
