"""What memory costs at run time, form by form: a step of the operated model ÷ one of the base.

    python -m benchmarks.runtime [--pairs 7] [--threads 2] [--quick] [--only GLOB] [--output ...]

Training steps and passes of inference; base and all variants of a model take turns in one process.
Beside ours, what a user would pick instead: a ResNet50 with the concatenations written by hand, and
LoRA by peft on the same layers, unmerged and, for inference, merged.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import aim_surgery
from aim_surgery import AimConfig
from benchmarks import measure
from benchmarks.handwritten import with_memory_by_hand
from benchmarks.measure import Report, Row
from benchmarks.steps import MLP, Case, inference, training_step

BASE = "base"
FUSED = "base, norms folded"
WITH_NORMS = "folded with norms"
READS = AimConfig(write="none")
WRITES = AimConfig()
FLOATS = 50_176
FULL = AimConfig(budget=None, memory=FLOATS, write="none")
RANK = 8

TRAINING = (
    Case("resnet50", 1, steps=2),
    Case("resnet50", 8),
    Case("resnet50", 32),
    Case("vgg16_bn", 8),
    Case("mobilenet_v3_large", 1, steps=8),
    Case("mobilenet_v3_large", 8, steps=2),
    Case("mobilenet_v3_large", 32),
    Case("vit_b_16", 1),
    Case("vit_b_16", 8),
    Case(MLP, 1, (784,), steps=200),
    Case(MLP, 32, (784,), steps=100),
)
INFERENCE = tuple(
    replace(case, steps=case.steps if case.batch == 32 else 3 * case.steps)
    for case in (*TRAINING[:3], *TRAINING[4:8], *TRAINING[9:], Case("vgg16_bn", 1))
)
QUICK = (Case("resnet50", 2), Case(MLP, 32, (784,), steps=20))

LIMITS = {
    ("training", "resnet50", 32, "split, no writes"): 1.05,
    ("training", "resnet50", 32, "split, full reads"): 1.12,
    ("training", "resnet50", 32, "split, default"): 1.20,
    ("inference", "resnet50", 1, "folded, no writes"): 1.00,
    ("inference", "resnet50", 32, "folded, no writes"): 1.00,
    ("inference", "resnet50", 1, "folded with norms, no writes"): 1.08,
    ("inference", "resnet50", 32, "folded with norms, no writes"): 1.08,
    ("inference", "resnet50", 32, "folded with norms, full reads"): 1.10,
}

METHOD = (
    "Measured is the median over rounds of a variant's time ÷ the mean of the base's before and "
    "after it, in brackets the smallest and the largest. All variants of a model take turns in one "
    "fresh process, base first, after one round of warm-up.",
    "A training step: zero_grad, forward in training mode, cross entropy, backward, SGD with "
    "momentum. Inference: forwards in evaluation mode under `inference_mode`. float32, random "
    "weights and noise, eager.",
    "Folded: `fold(gm)` against the base as it is; folded with norms: `fold(gm, batch_norm=True)` "
    "against the base after `torch.fx.experimental.optimization.fuse`, which merges norms into "
    "convolutions, too.",
    "default: `transform(model)`; no writes: `write='none'` at the same budget (the reads get more "
    f"planes then); full reads: `budget=None, memory={FLOATS:_}, write='none'`. by hand: the same "
    "reads as full reads, written as a module around each convolution. LoRA: peft, "
    f"r={RANK}, on all convolutions and linear layers without groups; in training it learns its "
    "factors alone, the base is frozen.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    command = measure.parser("runtime", "Time of a step, form by form.")
    command.add_argument("--only", default="*", help="a glob on 'mode model batch'")
    options = measure.parse(command, argv)
    measure.require("torchvision", "peft")
    environment = measure.environment()
    rows: list[Row] = []
    modes = {"training": QUICK if options.quick else TRAINING, "inference": INFERENCE}
    if options.quick:
        modes["inference"] = QUICK
    for mode, cases in modes.items():
        for case in cases:
            name = f"{mode} {case.name} {case.batch}"
            if not fnmatch.fnmatch(name, options.only):
                continue
            measure.progress(name)
            arguments = (mode, case, options.pairs, options.threads)
            rows += measure.in_fresh_process(case_rows, *arguments)
    report = Report(
        name="runtime",
        title="Cost of memory at run time" + (" (quick run)" if options.quick else ""),
        method=METHOD,
        settings={
            "pairs": options.pairs, "threads": options.threads, "quick": options.quick,
            "only": options.only,
        },
        environment=environment,
        rows=tuple(rows),
    )  # fmt: skip
    report.print()
    print("written:", *report.write(options.output))


def case_rows(mode: str, case: Case, pairs: int, threads: int) -> list[Row]:
    """Time a model's variants in turns; to be called in a fresh process.

    Args:
        mode: "training" or "inference".
        case: The model.
        pairs: Rounds.
        threads: For torch.

    Returns:
        A row for each variant.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    base = case.build().train(mode == "training")
    x, y = case.data()
    models = {BASE: base, **dict(_variants(base, case, mode))}

    def timed(model: nn.Module) -> Callable[[], None]:
        if mode == "training":
            return training_step(model.train(), x, y, case.steps)
        return inference(model.eval(), x, case.steps)

    sides = {name: timed(model) for name, model in models.items()}
    rounds = measure.take_rounds(sides, rounds=pairs)
    rows = []
    for name in sides:
        if name == BASE:
            continue
        other = FUSED if name.startswith(WITH_NORMS) else BASE
        limit = LIMITS.get((mode, case.name, case.batch, name))
        title = f"{mode}, {case.name}, batch {case.batch}: {name} ÷ {other}"
        row = measure.ratio_row(title, rounds.pairs(name, other), limit, (name, other))
        fastest = min(rounds.seconds[name]) / min(rounds.seconds[other])
        rows.append(replace(row, note=f"{row.note}; fastest ÷ fastest {fastest:.3f}"))
    return rows


def _variants(base: nn.Module, case: Case, mode: str) -> Iterator[tuple[str, nn.Module]]:
    norms = any(isinstance(module, nn.BatchNorm2d) for module in base.modules())
    if mode == "inference" and norms:
        yield FUSED, fuse(base)
    configs = {"no writes": READS, "default": WRITES}
    if case.name == "resnet50":
        configs["full reads"] = FULL
    for words, config in configs.items():
        gm = aim_surgery.transform(base, config=config)
        yield f"concat, {words}", gm
        if mode == "training":
            yield f"split, {words}", aim_surgery.lower(copy.deepcopy(gm), "split")
            continue
        gm.eval()
        yield f"split, {words}", aim_surgery.lower(gm, "split")
        yield f"folded, {words}", aim_surgery.fold(gm)
        if norms:
            yield f"{WITH_NORMS}, {words}", aim_surgery.fold(gm, batch_norm=True)
    if case.name == "resnet50":
        yield "by hand, full reads", with_memory_by_hand(base, FLOATS, case.size)
    if case.name in ("resnet50", "vit_b_16"):
        yield "LoRA", _lora(base)
        if mode == "inference":
            yield "LoRA, merged", _lora(base).merge_and_unload()


def _lora(base: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = [
        name
        for name, layer in base.named_modules()
        if (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        or (isinstance(layer, nn.Linear) and not name.endswith("out_proj"))
    ]
    config = LoraConfig(r=RANK, target_modules=layers)
    return get_peft_model(copy.deepcopy(base), config)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
