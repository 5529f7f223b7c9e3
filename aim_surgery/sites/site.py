"""A site as frozen data: one call of a convolution or linear weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["conv", "conv_transpose", "linear"]


@dataclass(frozen=True)
class Site:
    """One call of a convolution or linear weight.

    Attributes:
        name: Qualified name of its layer; later calls of the same layer get `@1`, `@2`, ...
        layer: Qualified name of the module, or of the weight where the call is a function.
        kind: "conv", "conv_transpose" or "linear".
        in_channels: Input channels (features).
        out_channels: Output channels (features); of a product with rows of a table, all its rows.
        groups: Groups of a convolution, 1 for a linear call.
        kernel_size: Size of a convolution's kernel, () for a linear call.
        spatial: Spatial size of the input on the example, () for a linear call.
        positions: Output positions per sample on the example (tokens, for a linear call); of a
            product with rows of a table, its outputs ÷ rows, rounded up.
        weights: Qualified names of the parameters that the weight is made of.
        widens: Whether the layer can be widened in place; otherwise its memory weights live beside.
        why_beside: Why it can't, "" where it can.
        sample_axis: Axis of its input that runs over the samples of a batch. None where there is
            none: the input is the same for all samples (Swin v2's table of position biases), is a
            single sample without that axis, or has the samples mixed into other axes.
        windows: Entries of that axis per sample on the example, neighbours in a row: 64 where
            Swin works on 64 windows of each image, the frames of a video folded into the batch.
        output_size: Spatial size of the output on the example, () for a linear call.
        inside: Path of the Python call that it is in, "." for the whole model; "" in a graph. A
            site inside reads through a hook on its layer.
    """

    name: str
    layer: str
    kind: Kind
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    spatial: tuple[int, ...]
    positions: int
    weights: tuple[str, ...]
    widens: bool
    why_beside: str = ""
    sample_axis: int | None = 0
    windows: int = 1
    output_size: tuple[int, ...] = ()
    inside: str = ""


@dataclass(frozen=True)
class Skip:
    """Weights that don't read the memory, and why.

    Attributes:
        name: The site or module.
        weights: Qualified names of its weights.
        reason: Why, as a clause.
    """

    name: str
    weights: tuple[str, ...]
    reason: str
