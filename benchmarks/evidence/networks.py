"""Three small networks, and how each is widened to a number of parameters.

All convolutions are followed by batch norm and have no bias. The first layer halves the resolution
(`stride=2`); with `stride=1` all that follows works at twice the resolution, as in the article's
network with memory, whose control did not (the MLP, which has no stride, averages 2x2 pixels then).
"""

from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

WIDTHS = {"resnet": (8, 16, 32), "vgg": (12, 24, 48), "mlp": (128, 128)}
NETWORKS = tuple(WIDTHS)
_HIDDEN = 64  # of VGG's classifier


@dataclass(frozen=True)
class Network:
    """A network, as data.

    Attributes:
        name: "resnet", "vgg" or "mlp".
        shape: (C, H, W) of an image.
        classes: Outputs.
        stride: Of the first layer.
        widths: Channels of the stages (features of the hidden layers); None for the usual ones.
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    stride: int = 2
    widths: tuple[int, ...] | None = None

    def build(self) -> nn.Module:
        """The module; its weights are drawn from torch's global generator."""
        widths = self.widths or WIDTHS[self.name]
        if self.name == "mlp":
            return MLP(self.shape, self.classes, self.stride, widths)
        make = {"resnet": ResNet, "vgg": VGG}[self.name]
        return make(self.shape[0], self.classes, self.stride, widths)

    def example(self) -> Tensor:
        """Two images, for `transform`."""
        return torch.zeros(2, *self.shape)


class ResNet(nn.Module):
    """Three stages of two residual blocks.

    Shapes:
        (N, in_channels, H, W) -> (N, classes)
    """

    def __init__(self, in_channels: int, classes: int, stride: int, widths: tuple[int, ...]):
        super().__init__()
        self.conv = _conv(in_channels, widths[0], stride)
        self.norm = nn.BatchNorm2d(widths[0])
        channels, stages = widths[0], []
        for index, width in enumerate(widths):
            first = Block(channels, width, 2 if index else 1)
            stages.append(nn.Sequential(first, Block(width, width, 1)))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = self.stages(torch.relu(self.norm(self.conv(x))))
        return self.head(self.pool(x).flatten(1))


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), with 3x3 convolutions."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(in_channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 1), nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == width
            else nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class VGG(nn.Module):
    """Three stages of two convolutions, max pooling between them, a hidden layer before the head.

    Shapes:
        (N, in_channels, H, W) -> (N, classes)
    """

    def __init__(self, in_channels: int, classes: int, stride: int, widths: tuple[int, ...]):
        super().__init__()
        stages, channels = [], in_channels
        for index, width in enumerate(widths):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
            for _ in range(2):
                first = not index and not layers
                layers += [_conv(channels, width, stride if first else 1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                channels = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(channels, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        return self.head(torch.relu(self.hidden(self.pool(self.stages(x)).flatten(1))))


class MLP(nn.Module):
    """Two hidden layers.

    Shapes:
        (N, C, H, W) -> (N, classes)
    """

    def __init__(
        self, shape: tuple[int, int, int], classes: int, stride: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        features = channels * (height // stride) * (width // stride)
        self.hidden1 = nn.Linear(features, widths[0])
        self.hidden2 = nn.Linear(widths[0], widths[1])
        self.head = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Run."""
        x = torch.relu(self.hidden1(self.pool(x).flatten(1)))
        return self.head(torch.relu(self.hidden2(x)))


def parameter_count(model: nn.Module) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


@functools.lru_cache
def widened(network: Network, parameters: int) -> Network:
    """The network with more channels, all stages in about the same ratio.

    Args:
        network: With its usual widths.
        parameters: How many it shall have.

    Returns:
        The one that comes closest, of those with all widths scaled by one ratio and then rounded
        up by three channels or less.
    """
    usual = WIDTHS[network.name]

    def scaled(percent: int) -> tuple[int, ...]:
        return tuple(width * percent // 100 for width in usual)

    def off(widths: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return parameter_count(replace(network, widths=widths).build()) - parameters

    percents = range(100, 400)
    too_many = bisect.bisect_right(percents, 0, key=lambda percent: off(scaled(percent)))
    start = scaled(percents[max(too_many - 1, 0)])
    near = (
        tuple(w + more for w, more in zip(start, extra, strict=True))
        for extra in itertools.product(range(4), repeat=len(start))
    )
    return replace(network, widths=min(near, key=lambda widths: abs(off(widths))))


def _conv(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
