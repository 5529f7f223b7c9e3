"""conv(x, W_x) + conv(m, W_m) with kernels of one position, as products of matrices.

    out[n] = (W_m m + b) + W_x x[n]        W_x (O, I), x[n] (I, P), W_m (O, k), m (k, P)

At each of P positions a pointwise convolution is the same product. A product of matrices can start
from an addend (`baddbmm`), so the memory's part costs no pass of its own; and where matrices are
wide, P more than the harmonic mean of I and O, it is no slower than a convolution and often several
times as fast: tensors are read and written where they are, without a detour through the blocked
formats that convolutions like. Narrow ones, other formats and types, other devices, and whoever
looks on (compilers, exporters, `torch.func`) get the plain convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aim_surgery.nn.add_product import add_product, positions_last
from aim_surgery.nn.eager import added, are_plain
from aim_surgery.nn.layer_types import CONV_TYPES
from aim_surgery.nn.spatial import CONVS

_TYPES = (torch.float32, torch.float64)


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    view: Tensor | None,
    beside: Tensor | None,
    stride: Sequence[int],
) -> Tensor:
    """Convolve input and memory with kernels of one position, and add.

    Shapes:
        x (N, I, *S), weight (O, I, 1, ..), bias (O,), view (k, *S) or (N, k, *S), beside
        (O, k, 1, ..) -> (N, O, *S'); N may be missing

    Args:
        x: What the layer works on.
        weight: W_x.
        bias: Of the layer, if it has one.
        view: The memory as planes; with batch, where each sample has its own; None for nothing.
        beside: W_m; None for nothing.
        stride: Of the convolution, for each axis.

    Returns:
        The sum, a tensor of its own.
    """
    if _as_matrices(x, weight, (bias, view, beside), stride):
        found: Any = _AsMatrices.apply(x, weight, bias, view, beside, tuple(stride))
        return found
    dims = len(stride)
    # of a slice, a convolution would make a copy, and another one in backward
    t = CONVS[dims](x, weight.contiguous(), bias, stride)
    if view is None or beside is None:
        return t
    if view.ndim == t.ndim == dims + 2:
        return add_product(t, view, beside, stride, (0,) * dims, (1,) * dims)
    return added(t, CONVS[dims](view, beside, None, stride))


def wide(samples: int, inputs: int, outputs: int, positions: int) -> bool:
    """Whether a product of matrices is the better one: of several samples, P ≥ 2 I·O ÷ (I + O).

    Then the gradients of W_x, one for each sample before they are added up, are no more numbers
    than inputs and outputs are. A convolution of one sample is as fast or faster.
    """
    return samples > 1 and positions * (inputs + outputs) >= 2 * inputs * outputs


class _Pointwise(nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        """As the convolution's own."""
        return pointwise(input, self.weight, self.bias, None, None, self.stride)


class Pointwise1d(_Pointwise, nn.Conv1d):
    """A convolution with a kernel of one position, as a product of matrices where that is wide."""


class Pointwise2d(_Pointwise, nn.Conv2d):
    """A convolution with a kernel of one position, as a product of matrices where that is wide."""


class Pointwise3d(_Pointwise, nn.Conv3d):
    """A convolution with a kernel of one position, as a product of matrices where that is wide."""


_KINDS = {nn.Conv1d: Pointwise1d, nn.Conv2d: Pointwise2d, nn.Conv3d: Pointwise3d}


def sees_one_position(layer: nn.Module | None) -> bool:
    """Whether a layer is a convolution, in groups or not, that neither mixes positions nor pads."""
    if not isinstance(layer, CONV_TYPES):
        return False
    padded = isinstance(layer.padding, str) or any(layer.padding)
    return {*layer.kernel_size} == {1} and not padded


def is_pointwise(layer: nn.Module | None) -> bool:
    """Whether a layer is a convolution that `pointwise` can stand for."""
    return sees_one_position(layer) and layer.groups == 1  # type: ignore[union-attr]


def use_matrices(layer: nn.Module | None) -> bool:
    """Let a convolution of torch's own be a product of matrices, if it is pointwise.

    Args:
        layer: Any module; changed in place: its class. Parameters, hooks and modes stay.

    Returns:
        Whether it was changed.
    """
    wanted = type(layer) in _KINDS and is_pointwise(layer)
    if wanted and "forward" not in vars(layer):
        layer.__class__ = _KINDS[type(layer)]  # type: ignore[index]
        return True
    return False


def _as_matrices(
    x: Tensor, weight: Tensor, others: Sequence[Tensor | None], stride: Sequence[int]
) -> bool:
    if x.ndim != len(stride) + 2 or not are_plain(x, weight, *others):
        return False
    if len(x) == 1 or not x.is_contiguous() or x.dtype not in _TYPES:
        return False
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return False  # rounded, as a convolution would not be
    positions = math.prod(-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
    return wide(len(x), x.shape[1], len(weight), positions)


def _columns(x: Tensor, stride: Sequence[int]) -> Tensor:
    """What each position of the result sees, (.., channels, P)."""
    if any(step > 1 for step in stride):
        x = x[(..., *(slice(None, None, step) for step in stride))]
    return x.flatten(-len(stride))


class _AsMatrices(torch.autograd.Function):
    """The result is no view, so that what follows may change it in place without a copy."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        view: Tensor | None,
        beside: Tensor | None,
        stride: tuple[int, ...],
    ) -> Tensor:
        # a convolution whose weight is frozen does not hold its input either
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, view, beside)
        ctx.stride, ctx.shape = stride, x.shape
        seen, own = _columns(x, stride), weight.flatten(1)
        samples, positions = len(x), seen.shape[-1]
        sizes = (-(-size // step) for size, step in zip(x.shape[2:], stride, strict=True))
        out = x.new_empty(samples, len(own), *sizes)
        whole = out.view(samples, len(own), positions)
        each = own.expand(samples, -1, -1)
        addend = None if bias is None else bias.unsqueeze(1)
        memory = planes = None
        if view is not None and beside is not None:
            memory, planes = beside.flatten(1), _columns(view, stride)
        if memory is not None and planes is not None and planes.ndim == 2:
            addend = memory @ planes if addend is None else torch.addmm(addend, memory, planes)
        if addend is None:
            torch.bmm(each, seen, out=whole)
        else:
            torch.baddbmm(addend.unsqueeze(0), each, seen, out=whole)
        if memory is not None and planes is not None and planes.ndim == 3:
            whole.baddbmm_(memory.expand(samples, -1, -1), planes)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, view, beside = ctx.saved_tensors
        of_x, of_weight, of_bias, of_view, of_beside, _ = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 6
        whole = positions_last(grad)
        if of_x:
            found[0] = _spread(_from_left(weight, whole), ctx.shape, ctx.stride)
        if of_weight:
            seen = _columns(x, ctx.stride)
            found[1] = torch.bmm(whole, seen.mT).sum(0).view_as(weight)
        shared = view is not None and view.ndim < len(ctx.shape)
        summed = whole.sum(0) if shared and (of_bias or of_view or of_beside) else whole
        if of_bias:
            found[2] = summed.sum(1) if shared else summed.sum((0, 2))
        if of_view and view is not None:
            found[3] = _spread(_from_left(beside, summed), view.shape, ctx.stride)
        if of_beside and view is not None:
            product = summed @ _columns(view, ctx.stride).mT
            found[4] = (product if shared else product.sum(0)).view_as(beside)
        return tuple(found)


def _from_left(weight: Tensor, grad: Tensor) -> Tensor:
    """W^T · gradient, of all samples or of none."""
    turned = weight.flatten(1).mT
    return turned @ grad if grad.ndim == 2 else torch.bmm(turned.expand(len(grad), -1, -1), grad)


def _spread(columns: Tensor, shape: torch.Size, stride: Sequence[int]) -> Tensor:
    """Columns at the positions that they came from; zeros where none did."""
    if all(step == 1 for step in stride):
        return columns.view(shape)
    steps = (..., *(slice(None, None, step) for step in stride))
    found = columns.new_zeros(shape)
    found[steps] = columns.view(found[steps].shape)
    return found
