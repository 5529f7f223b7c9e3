"""The layers of a write block, and their count without building them.

layer(x) = activation(norm(weight · x + bias))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from aim_surgery.nn.layer_types import CONV_TYPES

ACTIVATIONS = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# Not `nn.SyncBatchNorm`, which they may be converted to: it sees other ranks' values too.
SINGLE_VALUE_NORMS = frozenset(_BATCH_NORMS.values())


def block_layers(
    inputs: int,
    *,
    dims: int,
    widths: Sequence[int],
    kernel_size: int,
    norm: str,
    activation: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build a row of layers that keep the positions.

    Shapes:
        (N, inputs, *S) -> (N, widths[-1], *S); without spatial axes (N, inputs) -> (N, widths[-1])

    Args:
        inputs: Channels that come in.
        dims: Spatial axes; 0 for linear layers.
        widths: Output channels of each layer.
        kernel_size: Of convolutions, odd; linear layers have none.
        norm: "layer" (all channels and positions of a sample; of a token, its channels), "batch"
            or "none". At a width of one "layer" is left out: one value alone would become zero.
        activation: One of `ACTIVATIONS`.
        device: Where parameters live.
        dtype: Their type.

    Returns:
        Convolution or linear layer, norm and activation of each in turn.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    layers: list[nn.Module] = []
    for width in widths:
        if dims:
            layers.append(
                CONV_TYPES[dims - 1](
                    inputs, width, kernel_size, padding=kernel_size // 2, **factory
                )
            )
        else:
            layers.append(nn.Linear(inputs, width, **factory))
        if norm == "batch":
            layers.append(_BATCH_NORMS[dims](width, **factory))
        elif norm == "layer" and width > 1:
            layers.append(
                nn.GroupNorm(1, width, **factory) if dims else nn.LayerNorm(width, **factory)
            )
        layers.append(ACTIVATIONS[activation]())
        inputs = width
    return nn.Sequential(*layers)


def block_parameters(
    channels: int,
    planes: int,
    *,
    outputs: int,
    dims: int,
    widths: Sequence[int],
    kernel_size: int = 1,
    norm: str = "layer",
) -> int:
    """Count the trainable parameters of a write block without building it.

    Args:
        channels: C, of the features.
        planes: k, read of the memory.
        outputs: C_m, the first entry of the home layout.
        dims: Spatial axes of the features; 0 for tokens.
        widths: Output channels of each layer.
        kernel_size: Of its convolutions.
        norm: "layer", "batch" or "none".

    Returns:
        Weights, biases and norms, `out` included; batch norm's statistics are none of them.

    Example:
        >>> block_parameters(256, 4, outputs=1024, dims=2, widths=(16, 16, 32), kernel_size=3,
        ...                  norm="batch")
        78336
    """
    total, inputs = 0, channels + planes
    for width in widths:
        total += inputs * width * kernel_size**dims + width
        if norm == "batch" or (norm == "layer" and width > 1):
            total += 2 * width
        inputs = width
    return total + inputs * outputs + outputs
