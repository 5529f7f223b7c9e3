"""Training of the original's networks on Stanford Dogs: one run in, one line out."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

import aim_surgery
from benchmarks import measure
from benchmarks.evidence.dogs import FILE, DogsRecipe, Files, Photographs, hold_out, read_lists
from benchmarks.lunkad2021.model import KerasResNet50
from benchmarks.lunkad2021.operation import original_plan
from benchmarks.zoo.rows import source_digest

EPOCHS_KEPT = "a run's epochs are not kept: what is stopped in the middle begins anew"


def _plain(stride: int) -> Callable[[int], nn.Module]:
    return lambda classes: KerasResNet50(classes, stride=stride)


def _with_memory(stride: int) -> Callable[[int], nn.Module]:
    def make(classes: int) -> nn.Module:
        model = KerasResNet50(classes, stride=stride)
        return aim_surgery.apply(model, original_plan(model))

    return make


def _default(classes: int) -> nn.Module:
    return aim_surgery.transform(KerasResNet50(classes, stride=2))


ARMS: dict[str, Callable[[int], nn.Module]] = {
    "control": _plain(2),  # the article's
    "memory": _with_memory(1),  # the article's
    "control, twice the resolution": _plain(1),
    "memory, resolution of the control": _with_memory(2),
    "default configuration": _default,
}


def run_all(
    recipe: DogsRecipe,
    data: Path,
    folder: Path,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    device: str,
    resume: bool,
) -> None:
    """Run arms and seeds, appending a line for each.

    Args:
        recipe: How.
        data: The unpacked data set.
        folder: Where the lines go.
        arms: Of `ARMS`.
        seeds: For each arm.
        device: Where.
        resume: Whether to leave out what has a line.
    """
    path = folder / FILE
    done = set()
    if resume and path.is_file():
        done = {json.loads(line)["digest"] for line in path.read_text("utf-8").splitlines()}
    train, test = read_lists(data)
    for seed in seeds:
        for arm in arms:
            digest = _digest(recipe, arm, seed)
            if digest in done:
                continue
            row = run(recipe, arm, seed, train, test, device) | {"digest": digest}
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def run(
    recipe: DogsRecipe, arm: str, seed: int, train: Files, test: Files, device: str
) -> dict[str, Any]:
    """Train one network.

    Args:
        recipe: How.
        arm: Of `ARMS`.
        seed: Of weights, order, augmentation and what is held out.
        train: Official training images.
        test: Official test images.
        device: Where.

    Returns:
        The line, but for its digest.
    """
    start = time.time()
    steering = test
    if recipe.held_out_per_class:
        train, steering = hold_out(train, recipe.held_out_per_class, seed)
    torch.manual_seed(seed)
    model = ARMS[arm](train.classes).to(device)
    batches = _loader(train, recipe, augmented=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=recipe.factor,
        patience=recipe.plateau - 1,  # Keras acts in the epoch that torch would still wait
        threshold=recipe.plateau_gain,
        threshold_mode="abs",
    )
    curve: list[list[float]] = []
    best, best_epoch, weights, steady = -1.0, 0, {}, 0
    with Progress() as progress:
        task = progress.add_task(f"{arm}, seed {seed}", total=recipe.epochs * len(batches))
        for epoch in range(1, recipe.epochs + 1):
            loss = _epoch(model, batches, optimizer, device, lambda: progress.advance(task))
            value = _accuracy(model, _loader(steering, recipe, augmented=False), device)
            curve.append([epoch, loss, value, optimizer.param_groups[0]["lr"]])
            schedule.step(value)
            steady = 0 if value > best + recipe.stop_gain else steady + 1
            if value > best + recipe.stop_gain:
                best, best_epoch = value, epoch
                weights = {name: part.clone() for name, part in model.state_dict().items()}
            progress.update(task, description=f"{arm}, seed {seed}: {value:.2%}")
            if steady >= recipe.stop:
                break
    tested = None
    if recipe.held_out_per_class:
        model.load_state_dict(weights)
        tested = _accuracy(model, _loader(test, recipe, augmented=False), device)
    return {
        "recipe": asdict(recipe),
        "arm": arm,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "best": best,
        "best_epoch": best_epoch,
        "test": tested,
        "curve": curve,
        "seconds": time.time() - start,
        "environment": measure.environment(seeds=(seed,)),
        "source": source_digest(),
    }


def quick(recipe: DogsRecipe) -> DogsRecipe:
    """The same at a size that only shows that it runs."""
    return replace(recipe, size=64, epochs=1, batch_size=2, held_out_per_class=1)


def _digest(recipe: DogsRecipe, arm: str, seed: int) -> str:
    text = json.dumps([asdict(recipe), arm, seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _loader(files: Files, recipe: DogsRecipe, *, augmented: bool) -> DataLoader[Any]:
    return DataLoader(
        Photographs(files, recipe.size, augmented=augmented),  # pyright: ignore[reportArgumentType]
        recipe.batch_size,
        shuffle=augmented,
        drop_last=augmented,
        num_workers=0 if len(files.labels) < 1000 else min(os.cpu_count() or 1, 8),
        pin_memory=torch.cuda.is_available(),
    )


def _epoch(
    model: nn.Module,
    batches: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    device: str,
    advance: Callable[[], object],
) -> float:
    """Train on all batches once; gives the mean loss."""
    model.train()
    losses = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        advance()
    return sum(losses) / max(len(losses), 1)


@torch.no_grad()
def _accuracy(model: nn.Module, batches: DataLoader[Any], device: str) -> float:
    model.eval()
    right = total = 0
    for images, labels in batches:
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return right / total
