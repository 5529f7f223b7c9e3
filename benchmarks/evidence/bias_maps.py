"""What constant memory could express at most: a free, learned map added to each layer's output.

Without writes the memory is the same for all samples, so

    conv(cat[x, m], [W_x ; W_m]) = conv(x, W_x) + conv(m, W_m) = conv(x, W_x) + map

and `map` is one tensor (C_out, H, W) a layer; of a linear layer it is one more bias. Here each map
is a parameter of its own: whatever memory without writes can learn, this can, with nothing between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WithMap(nn.Module):
    """layer(x) + map, the map starting at zero."""

    def __init__(self, layer: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.layer = layer
        self.map = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.layer(x) + self.map


def add_bias_maps(model: nn.Module, example: Tensor) -> nn.Module:
    """Give every convolution and linear layer a map.

    Args:
        model: Changed in place.
        example: Images of the size that the model will work at.

    Returns:
        The same model; it computes what it computed.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    shapes: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _args, output: shapes.update({name: output.shape[1:]})

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    training = model.training
    with torch.no_grad():
        model.eval()(example)  # evaluation: no running average moves
    model.train(training)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        model.set_submodule(name, WithMap(layer, shapes[name]))
    return model
