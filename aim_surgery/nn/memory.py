"""The memory layer: M floats, each the output of a unit that is fed with the constant 1.

    value = weight · 1 + bias

Both are learned, 2 M parameters. The article has a 1x1 convolution of a ones tensor with M output
channels, or a linear layer on ones; the two are one function, and `nn.Linear(1, M)` is its shortest
form.

Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021: "the weight + bias as a unit
of memory".
Deviation: weight and bias start as `nn.Linear` starts them, uniform in (-1, 1) at a fan-in of one.
Keras' Glorot rule, with a fan-out of M, would start the floats near ±0.01.
"""

from __future__ import annotations

import torch
from torch import nn


def memory_layer(
    floats: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Linear:
    """Build the layer whose output on a ones tensor is the memory.

    Shapes:
        (1, 1) -> (1, M)

    Args:
        floats: M, the size of the memory.
        device: Where its parameters live.
        dtype: Their type.

    Returns:
        A linear layer with 2 M parameters, drawn from torch's global generator.

    Example:
        >>> memory_layer(49)(torch.ones(1, 1)).shape
        torch.Size([1, 49])
    """
    return nn.Linear(1, floats, device=device, dtype=dtype)
