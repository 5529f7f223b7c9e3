"""The operation done by hand, as a user would write it: a module around each convolution."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class ConcatConv(nn.Module):
    """conv(cat[x, m], W): all planes of the memory that its input's size has room for.

    Args:
        conv: The convolution to widen.
        memory: The whole network's memory, (1, M).
        size: Spatial size of its input.
    """

    def __init__(self, conv: nn.Conv2d, memory: nn.Parameter, size: tuple[int, int]) -> None:
        super().__init__()
        self.memory, self.size = memory, size
        self.planes = -(-memory.shape[1] // (size[0] * size[1]))
        self.conv = copy.deepcopy(conv)
        self.conv.in_channels += self.planes
        zeros = conv.weight.new_zeros(conv.out_channels, self.planes, *conv.kernel_size)
        self.conv.weight = nn.Parameter(torch.cat([conv.weight.detach(), zeros], 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *size) -> (N, C_out, ...)."""
        room = self.planes * self.size[0] * self.size[1]
        view = F.pad(self.memory, (0, room - self.memory.shape[1]))
        view = view.view(1, self.planes, *self.size).expand(x.shape[0], -1, -1, -1)
        return self.conv(torch.cat([x, view], 1))


def with_memory_by_hand(base: nn.Module, floats: int, size: tuple[int, ...]) -> nn.Module:
    """Give each convolution of a network a memory, with full reads.

    Args:
        base: The network; left unchanged. Its convolutions have no groups.
        floats: M.
        size: Of one sample.

    Returns:
        A network that computes the same until it is trained.
    """
    network = copy.deepcopy(base)
    sizes: dict[nn.Module, tuple[int, int]] = {}
    convolutions = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}

    def note(conv: nn.Module, args: Any) -> None:
        height, width = args[0].shape[-2:]
        sizes[conv] = height, width

    hooks = [conv.register_forward_pre_hook(note) for conv in convolutions.values()]
    training, device = network.training, next(network.parameters()).device
    with torch.no_grad():
        network.eval()(torch.zeros(1, *size, device=device))
    for hook in hooks:
        hook.remove()
    memory = nn.Parameter(torch.rand(1, floats, device=device) * 2 - 1)
    network.register_parameter("memory", memory)
    for name, conv in convolutions.items():
        network.set_submodule(name, ConcatConv(conv, memory, sizes[conv]))
    return network.train(training)
