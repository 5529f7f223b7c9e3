"""Linear layers inside Python calls, folded: W_m m goes into the bias of each of their calls.

The layer's own bias stays what it is: code around the layer may look at it, as peft's DoRA does, or
put another in its place, as `torch.func.functional_call` does.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from aim_surgery.nn.stand_in import StandIn


class Shift(nn.Module):
    """Holds W_m m of a layer, so that it is moved and saved with the model.

    Args:
        value: (out_features,)
    """

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


class ShiftedBias(StandIn):
    """The forward of a linear layer with a constant added to its bias.

    Args:
        shift: What is added.
    """

    def __init__(self, shift: Shift) -> None:
        super().__init__()
        self.shift = shift

    def call(self, layer: nn.Module, input: Tensor) -> Tensor:  # as the layer's own
        """(..., in_features) -> (..., out_features)."""
        bias, value = layer.bias, self.shift.value
        shifted = value if bias is None else bias + value.to(bias.dtype)  # type: ignore[arg-type]
        return F.linear(input, layer.weight, shifted)  # type: ignore[arg-type]
