"""Reads of layers that no graph reaches: hooks that give a layer its view of the memory.

    conv(cat[x, m], [W_x ; W_m])        before the call, where the layer's weight was widened
    conv(x, W_x) + conv(m, W_m)         after it, where W_m lives beside

For layers inside a submodule that stays a Python call, and for a whole model that keeps its class.
The memory read here is the one that is the same for all samples, before any write: a Python call
may take samples apart and put them together as it likes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from aim_surgery.nn.memory import Memory

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class View:
    """What a layer sees of a memory: k planes of its input's size, or k features.

    Args:
        memory: The memory; the same module that lives under `aim`.
        planes: k.
        spatial: Spatial size that was planned with, () for features.
    """

    def __init__(self, memory: Memory, planes: int, spatial: tuple[int, ...]) -> None:
        self.memory, self.planes, self.spatial = memory, planes, spatial

    def for_input(self, x: Tensor) -> Tensor:
        """The view for an input: (k, *S) or (k,), of its size, dtype and device."""
        memory = self.memory().to(x)  # (1, M)
        dims, floats = len(self.spatial), memory.shape[1]
        if not dims:
            if self.planes < floats:
                memory = F.adaptive_avg_pool1d(memory, self.planes)
            return memory.reshape(self.planes)
        size = math.prod(self.spatial)
        available = -(-floats // size)
        planes = F.pad(memory, (0, available * size - floats)).reshape(1, available, size)
        if self.planes < available:
            planes = F.adaptive_avg_pool2d(planes, (self.planes, size))
        planes = planes.reshape(self.planes, *self.spatial)
        return _POOLS[dims](planes, x.shape[-dims:])


class JoinMemory:
    """A forward pre-hook: the layer is called with cat[x, m] instead of x.

    Args:
        view: What the layer sees.
        groups: Of a convolution; each group gets all planes, behind its own channels.
        name: Keyword of the layer's input.
    """

    def __init__(self, view: View, groups: int = 1, name: str = "input") -> None:
        self.view, self.groups, self.name = view, groups, name

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Join the memory to the input, which comes by position or by name."""
        if args:
            return (self._joined(args[0]), *args[1:]), dict(kwargs)
        return (), {**kwargs, self.name: self._joined(kwargs[self.name])}

    def _joined(self, x: Tensor) -> Tensor:
        view = self.view.for_input(x)
        axis = -view.ndim
        if self.groups > 1:
            x = x.unflatten(axis, (self.groups, -1))
        view = view.expand(*x.shape[:axis], *view.shape)
        joined = torch.cat([x, view], axis)
        return joined.flatten(axis - 1, axis) if self.groups > 1 else joined


class AddMemory:
    """A forward hook: conv(m, W_m) is added to what the layer gives.

    Args:
        view: What the layer sees.
        beside: The module that multiplies by W_m; the same that lives under `aim`.
        name: Keyword of the layer's input.
    """

    def __init__(self, view: View, beside: nn.Module, name: str = "input") -> None:
        self.view, self.beside, self.name = view, beside, name

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        """Add the memory's part; it has no batch and broadcasts."""
        x = args[0] if args else kwargs[self.name]
        return output + self.beside(self.view.for_input(x)).to(output.dtype)
