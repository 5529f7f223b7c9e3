"""Views of the memory in forms that save what need not be done."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def resized(view: Tensor, size: Sequence[int]) -> Tensor:
    """Bring planes to a spatial size; they are given back themselves where they have it.

    Shapes:
        (.., k, *S) -> (.., k, *size)

    Args:
        view: Planes, with or without batch.
        size: The spatial size.

    Returns:
        The planes, averaged or repeated as `adaptive_avg_pool` does.
    """
    if not torch.compiler.is_exporting() and view.shape[-len(size) :] == tuple(size):
        return view
    return _POOLS[len(size)](view, size)
