"""What a transposed convolution adds at one side to give an output of a certain size."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def output_padding(
    x: Tensor,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
) -> list[int]:
    """Compute the output padding that gives an output size.

    Args:
        x: The input, (.., C, *S).
        output_size: The output's sizes; the last as many as there are spatial axes count.
        stride: Of the convolution, as the others.
        padding: Zeros at both sides.
        dilation: Distance of the kernel's taps.
        kernel_size: The kernel.

    Returns:
        One number for each spatial axis.

    Raises:
        ValueError: No such output is possible.
    """
    dims = len(stride)
    added = []
    geometry = zip(x.shape[-dims:], output_size[-dims:], stride, padding, dilation, kernel_size,
                   strict=True)  # fmt: skip
    for size, wanted, step, zeros, distance, kernel in geometry:
        least = (size - 1) * step - 2 * zeros + distance * (kernel - 1) + 1
        if not least <= wanted < least + step:
            raise ValueError(
                f"a transposed convolution gives {least} to {least + step - 1} positions here, "
                f"not {wanted}"
            )
        added.append(wanted - least)
    return added
