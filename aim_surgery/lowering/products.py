"""A layer's product as a function of its weight: what a call of the layer says, with W given.

    layer(x)  ->  F.conv2d(x, W, bias, stride, padding, dilation, groups)

Options are those of the layer; modes of padding other than zeros become a call of `F.pad`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F  # noqa: N812
from torch import nn

from aim_surgery.errors import UnsupportedLayerError
from aim_surgery.nn.output_padding import output_padding
from aim_surgery.nn.spatial import CONVS


class Writer(Protocol):
    """What writes calls: an `fx.Graph`, or something that has its methods."""

    def call_function(self, the_function: Any, args: Any, kwargs: Any = None, /) -> Any:
        """Write the call of a function."""
        ...


def write_product(
    graph: Writer,
    layer: nn.Module,
    source: Any,
    weight: Any,
    bias: Any,
    *,
    groups: int,
    output_size: Any = None,
) -> Any:
    """Write a layer's product at the graph's point of insertion.

    Args:
        graph: The emitted graph, which is changed in place, or another that writes calls.
        layer: A convolution or linear layer.
        source: The node x; with or without batch.
        weight: The node W.
        bias: The node of the bias; None for none.
        groups: Of this product; 1 for the memory's.
        output_size: Of a transposed convolution, where its call has one.

    Returns:
        The node of the product.

    Raises:
        UnsupportedLayerError: The layer is none of torch's.
    """
    if isinstance(layer, nn.Linear):
        return graph.call_function(F.linear, (source, weight, bias))
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise UnsupportedLayerError(f"no function for the call of a {type(layer).__name__}")
    dims = len(layer.kernel_size)
    if layer.transposed:
        padding: Any = layer.output_padding
        if output_size is not None:
            geometry = (layer.stride, layer.padding, layer.dilation, layer.kernel_size)
            padding = graph.call_function(output_padding, (source, output_size, *geometry))
        options = (layer.stride, layer.padding, padding, groups, layer.dilation)
        function = getattr(F, f"conv_transpose{dims}d")
        return graph.call_function(function, (source, weight, bias, *options))
    (source,), padding = write_padding(graph, layer, source)
    options = (layer.stride, padding, layer.dilation, groups)
    return graph.call_function(CONVS[dims], (source, weight, bias, *options))


def write_padding(
    graph: Writer, layer: nn.modules.conv._ConvNd, *sources: Any
) -> tuple[tuple[Any, ...], Any]:
    """Pad what a convolution works on, where its mode of padding is not zeros.

    Args:
        graph: See `write_product`.
        layer: The convolution.
        sources: Nodes with its input's spatial size.

    Returns:
        The nodes to convolve, and the padding that is left for the convolution.
    """
    if layer.padding_mode == "zeros":
        return sources, layer.padding
    around = tuple(layer._reversed_padding_repeated_twice)
    mode = {"mode": layer.padding_mode}
    padded = (graph.call_function(F.pad, (source, around), mode) for source in sources)
    return tuple(padded), (0,) * len(layer.kernel_size)
