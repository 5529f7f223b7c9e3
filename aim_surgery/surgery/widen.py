"""Widening tensors and layers: no graph here.

    conv(cat[x, m], [W_x ; W_m]) = conv(x, W_x) + conv(m, W_m)

    conv            (C_out, C_in/g, *kernel)  ->  (C_out, C_in/g + k, *kernel)
    conv_transpose  (C_in, C_out/g, *kernel)  ->  (C_in + g·k, C_out/g, *kernel)
    linear          (out, in)                 ->  (out, in + k)

Each of g groups gets all k planes, placed behind its own channels. The old entries keep their
values and their order.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from aim_surgery.config import Init
from aim_surgery.nn.spatial import channels_last_format
from aim_surgery.nn.widened import slices
from aim_surgery.planning import Read
from aim_surgery.sites import Kind


def widen_weight(
    weight: torch.Tensor, planes: int, *, kind: Kind, groups: int, init: Init
) -> torch.Tensor:
    """Widen a weight by input channels for the memory.

    Shapes:
        See the table at the top of this file.

    Args:
        weight: The layer's weight; left unchanged.
        planes: k, the planes (features) of memory that each group gets.
        kind: The layer's kind.
        groups: g, 1 for a linear layer.
        init: "preserve" for zeros, "fresh" for the layer's own initialiser at the new fan-in.

    Returns:
        A new tensor of the weight's dtype, device and memory format.

    Example:
        >>> weight = torch.randn(8, 3, 5, 5)
        >>> widen_weight(weight, 2, kind="conv", groups=1, init="preserve").shape
        torch.Size([8, 5, 5, 5])
    """
    first, second, *kernel = weight.shape
    if kind == "conv_transpose":
        first += groups * planes
    else:
        second += planes
    with torch.no_grad():
        wide = _empty_like(weight, (first, second, *kernel))
        old, new = _parts(wide, planes, kind=kind, groups=groups)
        old.copy_(weight.unflatten(0, (groups, -1)) if kind == "conv_transpose" else weight)
        initialize(new, init, fan_in=math.prod(wide.shape[1:]))
    return wide


def split_weight(
    weight: torch.Tensor, planes: int, *, kind: Kind, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a widened weight apart: [W_x ; W_m] -> W_x, W_m. The inverse of `widen_weight`.

    Shapes:
        See `slices`.

    Args:
        weight: The widened weight; left unchanged.
        planes: k.
        kind: The layer's kind.
        groups: g, 1 for a linear layer.

    Returns:
        Two new tensors: the layer's own weight, in the memory format of the widened one, and the
        memory's, contiguous.

    Example:
        >>> own, beside = split_weight(torch.randn(8, 3 + 2, 5, 5), 2, kind="conv", groups=4)
        >>> own.shape, beside.shape
        (torch.Size([8, 3, 5, 5]), torch.Size([8, 2, 5, 5]))
    """
    with torch.no_grad():
        old, new = slices(weight, planes, transposed=kind == "conv_transpose", groups=groups)
        own = _empty_like(weight, tuple(old.shape)).copy_(old)
        return own, new.clone(memory_format=torch.contiguous_format)


def widen_for(weight: torch.Tensor, read: Read, init: Init) -> torch.Tensor:
    """Widen a weight for a read of its layer: see `widen_weight`."""
    site = read.site
    return widen_weight(weight, read.planes, kind=site.kind, groups=site.groups, init=init)


def split_for(weight: torch.Tensor, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a weight apart that was widened for a read: see `split_weight`."""
    site = read.site
    return split_weight(weight, read.planes, kind=site.kind, groups=site.groups)


def fill_memory(wide: torch.Tensor, memory: torch.Tensor, *, kind: Kind, groups: int) -> None:
    """Put a memory weight into a widened weight, in place.

    Args:
        wide: The widened weight.
        memory: W_m, as `split_weight` gives it.
        kind: The layer's kind.
        groups: g, 1 for a linear layer.
    """
    transposed = kind == "conv_transpose"
    with torch.no_grad():
        _, new = _parts(wide, memory.shape[0 if transposed else 1], kind=kind, groups=groups)
        new.copy_(memory.unflatten(1, (groups, -1)).transpose(0, 1) if transposed else memory)


def _parts(
    wide: torch.Tensor, planes: int, *, kind: Kind, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a widened weight, of the old entries and the new; transposed: (g, inputs, …)."""
    each = wide.unflatten(0, (groups, -1)) if kind == "conv_transpose" else wide
    old, new = each.split((each.shape[1] - planes, planes), dim=1)
    return old, new


def input_size(read: Read, *, operated: bool) -> tuple[int, int]:
    """Where the memory comes into a widened weight, and how wide that axis is.

    Args:
        read: The read of a layer that is widened.
        operated: Whether the size after the operation is meant, or the one before.

    Returns:
        The weight's axis, and its size.
    """
    site, planes = read.site, read.planes if operated else 0
    if site.kind == "conv_transpose":
        return 0, site.in_channels + site.groups * planes
    return 1, site.in_channels // site.groups + planes


def beside_weight(
    weight: torch.Tensor,
    shape: tuple[int, ...],
    *,
    fan_in: int,
    init: Init,
    device: torch.device | None = None,
) -> nn.Parameter:
    """Make the memory weight W_m of a layer whose own weight is left alone.

    Args:
        weight: The layer's weight; gives dtype and device.
        shape: Shape of W_m: (C_out, k, *kernel), (k, C_out, *kernel) transposed, or (out, k).
        fan_in: Fan-in that the widened layer would have.
        init: As in `widen_weight`.
        device: Another device than the weight's.

    Returns:
        A new parameter.
    """
    with torch.no_grad():
        new = torch.empty(shape, dtype=weight.dtype, device=device or weight.device)
        initialize(new, init, fan_in=fan_in)
    return nn.Parameter(new)


def initialize(new: torch.Tensor, init: Init, *, fan_in: int) -> None:
    """Fill new weights in place: with zeros, or as `reset_parameters` draws them.

    Args:
        new: The new entries.
        init: "preserve" or "fresh".
        fan_in: Inputs of one output unit, old and new.

    Source: `torch.nn.modules.conv._ConvNd.reset_parameters`; Kaiming uniform with a = √5 is uniform
    in ±1/√fan_in.
    """
    if init == "preserve":
        new.zero_()
    else:
        bound = 1 / math.sqrt(fan_in)
        new.uniform_(-bound, bound)


def widen_layer(layer: nn.Module, planes: int) -> None:
    """Tell a layer, whose weight has been exchanged already, of its new input width.

    Args:
        layer: A convolution or linear layer; changed in place.
        planes: k; negative where a weight has been split again.
    """
    if isinstance(layer, nn.Linear):
        layer.in_features += planes
    elif isinstance(layer, nn.modules.conv._ConvNd):
        layer.in_channels += planes * layer.groups


def _empty_like(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    layout = channels_last_format(weight) or torch.contiguous_format
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=layout)
