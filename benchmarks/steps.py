"""Models that are timed, and what is timed of them: a training step, a pass of inference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery

IMAGE = (3, 224, 224)
MLP = "MLP 784-512-512-512-10"


@dataclass(frozen=True)
class Case:
    """A model and its batch.

    Attributes:
        name: Of a torchvision model, or `MLP`.
        batch: Samples a step.
        size: Of one sample.
        steps: Steps that are timed together, so that a turn is not over at once.
        device: Where model and batch lie.
    """

    name: str
    batch: int
    size: tuple[int, ...] = IMAGE
    steps: int = 1
    device: str = "cpu"

    def build(self) -> nn.Module:
        """The base, in training mode."""
        if self.name == MLP:
            sizes = (784, 512, 512, 512, 10)
            layers = [
                layer
                for ins, outs in itertools.pairwise(sizes)
                for layer in (nn.Linear(ins, outs), nn.ReLU())
            ]
            return nn.Sequential(*layers[:-1]).to(self.device).train()
        return aim_surgery.build(f"torchvision:{self.name}").to(self.device).train()

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, and classes drawn evenly."""
        classes = 10 if self.name == MLP else 1000
        x, y = torch.randn(self.batch, *self.size), torch.randint(classes, (self.batch,))
        return x.to(self.device), y.to(self.device)


def training_step(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int
) -> Callable[[], None]:
    """Forward, cross entropy, backward and SGD with momentum, some times in a row.

    Args:
        model: Trained in place.
        x: Inputs.
        y: Classes.
        steps: How many.

    Returns:
        What to time.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        _wait_for(x.device)

    return run


def inference(model: nn.Module, x: torch.Tensor, passes: int) -> Callable[[], None]:
    """Forwards without gradients, some in a row.

    Args:
        model: In evaluation mode.
        x: Inputs.
        passes: How many.

    Returns:
        What to time.
    """

    def run() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                model(x)
        _wait_for(x.device)

    return run


def _wait_for(device: torch.device) -> None:
    """Return when the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
