"""Preserve-init on real architectures: the operated model computes what the original computes.

    python -m benchmarks.models [--threads 2] [--quick] [--output benchmarks/results]

For each model: `transform(model)` alone (the example input is found), then both models on the same
random batch, in evaluation and in training mode, in float64 and in float32. The difference is the
largest over all outputs and, in training mode, running statistics, relative to the largest entry.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from benchmarks import measure
from benchmarks.measure import SEED, Report, Row, Section

FLOAT64_LIMIT = 1e-12
FLOAT32_LIMIT = 1e-5
LITERAL = AimConfig(memory=50_176, budget=None, write="none")

# The exact totals that the project promises for full reads of 50,176 floats.
TOTALS = {
    ("resnet50", 120): 54_022_392,
    ("resnet50", 1000): 99_980_392,
    ("vgg16", 1000): 604_220_328,
    ("mobilenet_v2", 1000): 94_324_424,
}
QUICK = ("resnet18", "mobilenet_v2", "squeezenet1_1")
BATCH = 2  # the least that batch norm over one position accepts in training

METHOD = (
    "Differences are relative to the largest entry of the original's output; in training also of "
    "its buffers, taken together (the same seed before each forward, so dropout draws alike).",
    "`transform(model)` without example inputs and with default options, or, in the rows 'full "
    "reads', with `memory=50_176, budget=None`; random weights; batch 2 of noise.",
    "The float32 difference comes from the other order of sums in a wider convolution: training "
    "mode normalises with batch statistics, which for random weights amplifies it.",
)


@dataclass(frozen=True)
class Found:
    """What one model gave: differences by (dtype, mode), and what the operation did to it."""

    name: str
    differences: dict[str, float]
    reads: int
    skips: int
    total: int
    ratio: float
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        figures = (f"{value:.1e}" for value in self.differences.values())
        counts = (f"{self.reads}", f"{self.skips}", f"{self.total:,}", f"{self.ratio:.2%}")
        return (self.name, *counts, *figures, f"{self.seconds:.1f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = measure.parse(measure.parser("models", "Preserve-init on real models."), argv)
    measure.require("torchvision")
    environment = measure.environment()
    rows = list(_promised(quick=options.quick))
    zoo = list(_zoo(QUICK if options.quick else _classification_models()))
    for dtype, limit in (("float64", FLOAT64_LIMIT), ("float32", FLOAT32_LIMIT)):
        for mode in ("eval", "train"):
            worst = max(zoo, key=lambda found: found.differences[f"{dtype} {mode}"])
            value = worst.differences[f"{dtype} {mode}"]
            name = f"largest of {len(zoo)} models: {dtype} {mode}"
            rows.append(Row(name, value, limit, note=worst.name))
    header = ("model", "reads", "skips", "parameters", "new", "float64 eval", "float64 train")
    header = (*header, "float32 eval", "float32 train", "s")
    report = Report(
        name="models",
        title="Preserve-init on real models" + (" (quick run)" if options.quick else ""),
        method=METHOD,
        settings={"threads": options.threads, "quick": options.quick},
        environment=environment,
        rows=tuple(rows),
        sections=(Section("Models", header, tuple(found.cells() for found in zoo)),),
    )
    report.print()
    print("written:", *report.write(options.output))


def _promised(*, quick: bool) -> Iterator[Row]:
    for (name, classes), total in TOTALS.items():
        if quick and total > 10**8:
            continue
        found = _compare(name, LITERAL, num_classes=classes)
        label = f"{name}, {classes} classes, full reads"
        off = abs(found.total - total)
        yield Row(f"{label}: parameters", off, 0, note=f"{found.total:,} of {total:,}")
        for key, value in found.differences.items():
            limit = FLOAT64_LIMIT if "64" in key else FLOAT32_LIMIT
            yield Row(f"{label}: {key}", value, limit)


def _zoo(names: Sequence[str]) -> Iterator[Found]:
    for name in names:
        yield _compare(name, AimConfig())


def _classification_models() -> tuple[str, ...]:
    models = import_torchvision().models
    return tuple(models.list_models(module=models))


def _compare(name: str, config: AimConfig, **arguments: Any) -> Found:
    measure.progress(name)
    start = time.perf_counter()
    torch.manual_seed(SEED)
    model = aim_surgery.build(f"torchvision:{name}", **arguments).eval()
    gm = aim_surgery.transform(model, config=config)
    spec = gm.plan.inputs.args[0]
    differences = {}
    for dtype in (torch.float32, torch.float64):
        model, gm = model.to(dtype), gm.to(dtype)
        x = torch.randn(BATCH, *spec[1][1:], generator=torch.Generator().manual_seed(1)).to(dtype)
        for training in (False, True):
            key = f"{str(dtype).removeprefix('torch.')} {'train' if training else 'eval'}"
            differences[key] = _difference(model, gm, x, training)
    order = ("float64 eval", "float64 train", "float32 eval", "float32 train")
    return Found(
        name=name,
        differences={key: differences[key] for key in order},
        reads=len(gm.plan.reads),
        skips=len(gm.plan.skips),
        total=gm.plan.total_parameters,
        ratio=gm.plan.new_parameters / gm.plan.base_parameters,
        seconds=time.perf_counter() - start,
    )


def _difference(model: nn.Module, gm: nn.Module, x: torch.Tensor, training: bool) -> float:
    expected, got = ([*_run(module, x, training)] for module in (model, gm))
    if len(expected) != len(got):
        return float("inf")
    return max(_relative(a, b) for a, b in zip(expected, got, strict=True))


def _run(module: nn.Module, x: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """Outputs and, in training, all buffers as they are afterwards; the module's own stay."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train(training)
    torch.manual_seed(SEED)
    with torch.no_grad():
        outputs = [leaf for leaf in tree_leaves(module(x)) if isinstance(leaf, torch.Tensor)]
    if training:
        flat = [buffer.double().flatten() for _, buffer in module.named_buffers()]
        outputs += [torch.cat(flat)] if flat else []
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return outputs


def _relative(expected: torch.Tensor, got: torch.Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    expected, got = expected.double(), got.double()
    difference = float((expected - got).abs().max()) if expected.numel() else 0.0
    return difference / max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-30)


if __name__ == "__main__":
    main()
