"""One configuration in, one row out. The only place where the test set is looked at: once a run."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import aim_surgery
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.write_block import WriteBlock
from benchmarks.evidence import data
from benchmarks.evidence.adapting import METHODS, trained_parameters
from benchmarks.evidence.arms import ARMS, base
from benchmarks.evidence.networks import Network, parameter_count
from benchmarks.evidence.recipes import FINAL, SEEDS, Adapting, Config, Recipe
from benchmarks.evidence.rows import Row, blank
from benchmarks.evidence.training import accuracy, train

_KEPT = "per-sample"  # the arm whose memory is kept for the heat maps, of the first seed


def run(config: Config, device: str = "cpu") -> Row:
    """Train and evaluate one configuration.

    Args:
        config: What to run; all random numbers come from its seed.
        device: Where.

    Returns:
        The row.
    """
    start = time.time()
    on = torch.device(device)
    found = data.load(config.data)
    row = blank(config, on)
    if config.group == "arms":
        _run_arm(config, found, on, row)
    else:
        _run_method(config, found, on, row)
    row.finished = time.time()
    row.total_seconds = row.finished - start
    return row


def _run_arm(config: Config, found: data.Data, device: torch.device, row: Row) -> None:
    arm, recipe = ARMS[config.arm], config.recipe
    network = Network(config.network, found.shape, found.classes)
    model = arm.make(network, config.seed).to(device)
    cut = data.split(found.train.labels, recipe.per_class, recipe.validation_per_class, config.seed)
    images, validation = (
        found.inputs(found.train[part], device) for part in (cut.train, cut.validation)
    )
    keep = config.arm == _KEPT and config.phase == FINAL and config.seed == SEEDS[0]
    before = _notebook(model, validation[0]) if keep else {}
    _train(config, model, images, validation, row)
    if config.phase == FINAL:
        inputs, labels = found.inputs(found.test, device)
        row.test = accuracy(model, inputs, labels)
        if arm.zeroed:
            with aim_surgery.disable(model):
                row.test_zeroed = accuracy(model, inputs, labels)
            with swapped_writes(model):
                row.test_swapped = accuracy(model, inputs, labels)
    if keep:
        layout = plan_of(model).memory.layout
        row.memory = {"layout": layout, "before": before, "after": _notebook(model, validation[0])}


@contextlib.contextmanager
def swapped_writes(model: nn.Module) -> Iterator[None]:
    """Let every image of a batch read what was written of the one before it, the first the last's.

    Args:
        model: Operated on, with writes of a copy for each sample.
    """
    handles = [
        module.register_forward_hook(lambda block, args, memory: memory.roll(1, 0))
        for module in model.modules()
        if isinstance(module, WriteBlock)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_method(config: Config, found: data.Data, device: torch.device, row: Row) -> None:
    method, recipe = METHODS[config.arm], config.recipe
    assert isinstance(recipe, Adapting)
    old, new = halves(found.classes, config.seed)
    network = Network(config.network, found.shape, len(new))
    model = base(replace(network, classes=len(old)), config.seed)
    weights = _trained_base(config.data, config.network, recipe, config.seed, str(device))
    model.load_state_dict({name: value.clone() for name, value in weights.items()})
    model = method.make(model, network, config.seed).to(device)
    images, validation = _parts(found, new, recipe, recipe.per_class, config.seed, device)
    _train(config, model, images, validation, row, training=method.training)
    if config.phase == FINAL:
        test = data.only_classes(found.test, new)
        row.test = accuracy(model, *found.inputs(test, device))


def halves(classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """The classes of the base and those to adapt to, another cut for each seed."""
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    return order[: classes // 2], order[classes // 2 :]


@functools.lru_cache(maxsize=8)
def _trained_base(
    name: str, network: str, recipe: Adapting, seed: int, device: str
) -> dict[str, Tensor]:
    """Weights of a base, trained on its half of the classes; the same for all methods."""
    found = data.load(name)
    old, _ = halves(found.classes, seed)
    model = base(Network(network, found.shape, len(old)), seed).to(device)
    wanted = min(recipe.base_per_class, _most_per_class(found, recipe))
    images, validation = _parts(found, old, recipe, wanted, seed, torch.device(device))
    schedule = Recipe(recipe.base_epochs, recipe.batch_size, evaluations=1)
    train(model, images, validation, schedule, rate=recipe.base_rate, seed=seed)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def _most_per_class(found: data.Data, recipe: Recipe) -> int:
    return int(found.train.labels.bincount().min()) - recipe.validation_per_class


def _parts(
    found: data.Data,
    classes: Tensor,
    recipe: Recipe,
    per_class: int | None,
    seed: int,
    device: torch.device,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation images of some classes."""
    cut = data.split(found.train.labels, per_class, recipe.validation_per_class, seed)
    train_images, validation = (
        data.only_classes(found.train[part], classes) for part in (cut.train, cut.validation)
    )
    return found.inputs(train_images, device), found.inputs(validation, device)


def _train(
    config: Config,
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    row: Row,
    *,
    training: bool = True,
) -> None:
    trained = train(
        model,
        images,
        validation,
        config.recipe,
        rate=config.rate,
        seed=config.seed,
        training=training,
    )
    row.parameters = parameter_count(model)
    row.trained_parameters = trained_parameters(model)
    row.curve = [list(point) for point in trained.curve]
    row.validation = trained.curve[-1][-1]
    row.train_seconds, row.steps = trained.seconds, trained.steps


def _notebook(model: nn.Module, inputs: Tensor) -> dict[str, list[float]]:
    """Mean over images of the memory before and after each write, by write point, 4 digits."""
    found = aim_surgery.read_memory(model, inputs)
    return {
        name: [round(value, 4) for value in tensor.mean(0).flatten().tolist()]
        for name, tensor in found.items()
    }
