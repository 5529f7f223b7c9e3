"""The one loop that every arm and method goes through."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.evidence.recipes import Recipe

_EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Trained:
    """What one training gave.

    Attributes:
        curve: Points (epochs done, mean training loss since the point before, validation accuracy).
        seconds: Of all training steps, evaluations left out.
        steps: How many.
    """

    curve: tuple[tuple[float, float, float], ...]
    seconds: float
    steps: int


def train(
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    rate: float,
    seed: int,
    training: bool = True,
) -> Trained:
    """Train in place.

    Args:
        model: On the device of the images; parameters that ask for gradients are trained.
        images: Normalised images and labels to train on.
        validation: Likewise, for the curve.
        recipe: Epochs, batch size, points of the curve.
        rate: Learning rate at the beginning.
        seed: Of the order of images: the same for all arms.
        training: Whether modules work in training mode.

    Returns:
        Curve and time.

    Raises:
        ValueError: There are fewer images than a batch.
    """
    inputs, labels = images
    batches = len(labels) // recipe.batch_size
    if not batches:
        raise ValueError(f"{len(labels)} images are less than a batch of {recipe.batch_size}")
    steps = batches * recipe.epochs
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    points = {round(steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    curve, losses, seconds, step = [], [], 0.0, 0
    for _ in range(recipe.epochs):
        shuffled = torch.randperm(len(labels), generator=order).to(labels.device)
        for chosen in shuffled[: batches * recipe.batch_size].split(recipe.batch_size):
            start = time.perf_counter()
            model.train(training)
            loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds += time.perf_counter() - start
            step += 1
            if step in points:
                mean = sum(losses) / len(losses)
                curve.append((step / batches, mean, accuracy(model, *validation)))
                losses = []
    return Trained(tuple(curve), seconds, steps)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of images whose class gets the largest output, in evaluation mode."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(
            inputs.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True
        )
    )
    return right / len(labels)
