"""Spatial axes, one to three of them: convolutions, pools, and memory formats."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# By the number of spatial axes.
ADAPTIVE_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def channels_last_format(tensor: Tensor) -> torch.memory_format | None:
    """The channels-last format that a tensor (N, C, *S) is in, None where it is in another."""
    layout = CHANNELS_LAST.get(tensor.ndim - 2)
    if layout is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=layout):
        return None
    return layout
