"""A read inside a Python call in split form: conv(x, W_x) + conv(m, W_m), W one wide parameter."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from aim_surgery.nn.eager import added
from aim_surgery.nn.inside import View
from aim_surgery.nn.stand_in import StandIn, called_with
from aim_surgery.nn.widened import slices, widened_linear


class SplitMemory(StandIn):
    """The forward of a layer whose weight is widened, and whose input is not.

    Args:
        view: What the layer sees.
        groups: Of a convolution.
        name: Keyword of the layer's input.
    """

    def __init__(self, view: View, groups: int = 1, name: str = "input") -> None:
        super().__init__()
        self.view, self.groups, self.name = view, groups, name

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Both products of a call; the memory's has no batch and broadcasts."""
        x = args[0] if args else kwargs[self.name]
        if isinstance(layer, nn.Linear):
            return widened_linear(x, layer.weight, layer.bias, self.view.for_input(x))
        rest = args[1:], {key: value for key, value in kwargs.items() if key != self.name}
        own, memory = slices(
            cast("Tensor", layer.weight),
            self.view.planes,
            transposed=bool(getattr(layer, "transposed", False)),
            groups=self.groups,
        )
        product = called_with(layer, {"weight": own}, x, *rest[0], **rest[1])
        alone = {"weight": memory, "bias": None, "groups": 1}
        view = self.view.for_input(x)
        sizes = [size[-len(self.view.spatial) :] if size is not None else None for size in rest[0]]
        named = {key: size and size[-len(self.view.spatial) :] for key, size in rest[1].items()}
        return added(product, called_with(layer, alone, view, *sizes, **named))
