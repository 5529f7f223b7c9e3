"""What memory costs at run time, form by form: a step of the operated model ÷ one of the base.

    python -m benchmarks.runtime [--pairs 7] [--threads 2] [--quick] [--only GLOB]
                                 [--variants 'GLOB|GLOB'] [--merge] [--device cuda] [--output ...]

Training steps, passes of inference, and these compiled; base and all variants of a model take turns
in one process. Beside ours, what a user would pick instead: a ResNet50 with the concatenations
written by hand, and LoRA by peft on the same layers, unmerged and, for inference, merged. Besides,
the memory of a training step, and how many nodes a folded graph has. What an accelerator gives is
written to files of its own, `runtime-cuda.json` and `.md`.

The whole table takes hours; with `--merge` it is measured in pieces: rows that were measured before
and are not now stay, each with the piece that it came from.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from benchmarks import measure
from benchmarks.footprint import memory_row, nodes_row
from benchmarks.handwritten import with_memory_by_hand
from benchmarks.measure import Report, Row, Section
from benchmarks.steps import IMAGE, MLP, Case, inference, training_step

BASE = "base"
FUSED = "base, norms folded"
WITH_NORMS = "folded with norms"
READS = AimConfig(write="none")
WRITES = AimConfig()
FLOATS = 50_176
FULL = AimConfig(budget=None, memory=FLOATS, write="none")
RANK = 8

STEPS = {
    "resnet50": {1: 2, 8: 1, 32: 1},
    "vgg16_bn": {1: 1, 8: 1, 32: 1},
    "mobilenet_v3_large": {1: 8, 8: 2, 32: 1},
    "vit_b_16": {1: 1, 8: 1, 32: 1},
    MLP: {1: 200, 8: 100, 32: 100},
}  # by model and batch, how many training steps are timed together
TRAINING = tuple(
    Case(name, batch, (784,) if name == MLP else IMAGE, steps)
    for name, batches in STEPS.items()
    for batch, steps in batches.items()
)
INFERENCE = tuple(
    case if case.batch == 32 else replace(case, steps=3 * case.steps) for case in TRAINING
)
COMPILED = (Case("resnet50", 1, steps=6), Case("resnet50", 8), Case("resnet50", 32))
QUICK = (Case("resnet50", 2), Case(MLP, 32, (784,), steps=20))

LIMITS = {
    "training, resnet50, batch 32: split, no writes ÷ base": 1.05,
    "training, resnet50, batch 32: split, full reads ÷ base": 1.12,
    "training, resnet50, batch 32: split, default ÷ base": 1.20,
    "inference, resnet50, batch 1: folded, no writes ÷ base": 1.00,
    "inference, resnet50, batch 32: folded, no writes ÷ base": 1.00,
    "inference, resnet50, batch 1: folded with norms, no writes ÷ base": 1.00,
    "inference, resnet50, batch 32: folded with norms, no writes ÷ base": 1.00,
    "inference, resnet50, batch 1: folded with norms, no writes ÷ base, norms folded": 1.08,
    "inference, resnet50, batch 32: folded with norms, no writes ÷ base, norms folded": 1.08,
    "inference, resnet50, batch 32: folded with norms, full reads ÷ base, norms folded": 1.10,
    "compiled, resnet50, batch 1: folded with norms, no writes ÷ base, norms folded": 1.03,
    "compiled, resnet50, batch 32: folded with norms, no writes ÷ base, norms folded": 1.03,
}  # by the name of a row
MEMORY_LIMIT = 0.10
NODES_LIMIT = 1.10

METHOD = (
    "Measured in pieces, each listed below with its command, its commit and the machine's load "
    "before it.",
    "Measured is the median over rounds of a variant's time ÷ the mean of the base's before and "
    "after it, in brackets the smallest and the largest. All variants of a model take turns in one "
    "fresh process, base first, after one round of warm-up.",
    "A training step: zero_grad, forward in training mode, cross entropy, backward, SGD with "
    "momentum. Inference: forwards in evaluation mode under `inference_mode`. float32, random "
    "weights and noise, eager; compiled: the same under `torch.compile`, compiled before the clock "
    "starts.",
    "Folded: `fold(gm)` against the base as it is; folded with norms: `fold(gm, batch_norm=True)`, "
    "against the base as it is and against the base after "
    "`torch.fx.experimental.optimization.fuse`, which merges norms into convolutions, too. Before "
    "`torch.compile`, it is folded on a channels-last example: that is the layout in which "
    "inductor's convolutions hand on what they give; maps are stored likewise.",
    "default: `transform(model)`; no writes: `write='none'` at the same budget (the reads get more "
    f"planes then); full reads: `budget=None, memory={FLOATS:_}, write='none'`. by hand: the same "
    "reads as full reads, written as a module around each convolution. LoRA: peft, "
    f"r={RANK}, on all convolutions and linear layers without groups; in training it learns its "
    "factors alone, the base is frozen.",
    "Memory: bytes of the parameters and growth of the resident set over two steps of plain SGD, "
    "in a fresh process for each side; on an accelerator, the peak of what torch allocates there. "
    "Nodes: ÷ those of the captured graph of the base, in which "
    "packed attention is opened into its linear calls.",
)


MODES = ("training", "inference", "compiled", "memory", "graph nodes")
_TITLE = re.compile(r"([^,]+), ([^,:]+)(?:, batch (\d+))?:")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    command = measure.parser("runtime", "Time of a step, form by form.")
    command.add_argument("--only", default="*", help="a glob on 'mode model batch'")
    command.add_argument("--variants", default="*", help="globs on 'form, configuration', by |")
    command.add_argument("--merge", action="store_true", help="keep other rows measured before")
    command.add_argument("--device", default="cpu", help="as torch names it, such as cuda")
    options = measure.parse(command, argv)
    measure.require("torchvision", "peft")
    environment = measure.environment(options.device)
    suffix = "" if options.device == "cpu" else f"-{options.device.partition(':')[0]}"
    piece = {
        "only": options.only, "variants": options.variants, "pairs": options.pairs,
        "threads": options.threads, "quick": options.quick, "device": options.device,
        "date": environment["date"],
        "commit": environment["commit"], "load average": environment["load average"],
    }  # fmt: skip
    rows = _stored(options.output / f"runtime{suffix}.json") if options.merge else []
    for name, measured in _pieces(options):
        if not fnmatch.fnmatch(name, options.only):
            continue
        measure.progress(name)
        found = [replace(row, details={**row.details, "piece": piece}) for row in measured()]
        rows = _with(rows, found)
        report = Report(
            name="runtime",
            title="Cost of memory at run time" + (" (quick run)" if options.quick else ""),
            method=METHOD,
            settings={
                "pairs": options.pairs, "threads": options.threads, "quick": options.quick,
                "merge": options.merge, "device": options.device,
            },
            environment=environment,
            rows=tuple(rows),
            sections=(_pieces_section(rows),),
            suffix=suffix,
        )  # fmt: skip
        written = report.write(options.output)  # each piece at once: the next may take long
        report.print()
        print("written:", *written)


def _pieces(options: Any) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """All that there is to measure, by what `--only` knows it as."""
    timed = {"training": TRAINING, "inference": INFERENCE, "compiled": COMPILED}
    if options.quick:
        timed = {"training": QUICK, "inference": QUICK}
    for mode, cases in timed.items():
        for each in cases:
            case = replace(each, device=options.device)
            arguments = (mode, case, options.pairs, options.threads, options.variants)
            yield (
                f"{mode} {case.name} {case.batch}",
                functools.partial(measure.in_fresh_process, case_rows, *arguments),
            )
    for batch in (2,) if options.quick else (8, 32):
        for words, config in {"no writes": READS, "full reads": FULL}.items():
            limit = MEMORY_LIMIT if words == "full reads" else None
            case = Case("resnet50", batch, device=options.device)
            wanted = (case, words, config, options.threads, limit)
            yield f"memory resnet50 {batch}", lambda wanted=wanted: [memory_row(*wanted)]
    for case in TRAINING:
        if case.batch == 8:
            wanted = (case, "no writes", READS, NODES_LIMIT)
            yield f"nodes {case.name}", lambda wanted=wanted: [nodes_row(*wanted)]


def _stored(path: Path) -> list[Row]:
    """The rows of a file, if there is one."""
    known = {field.name for field in dataclasses.fields(Row)}
    stored = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = [Row(**{key: row[key] for key in known}) for row in stored]
    return [replace(row, spread=row.spread and tuple(row.spread)) for row in rows]


def _with(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Rows measured before, but for those measured anew, by mode, model and batch."""
    found = {row.name: row for row in (*before, *rows)}
    return sorted(found.values(), key=_place)


def _place(row: Row) -> tuple[int, int, int]:
    mode, model, batch = _TITLE.match(row.name).groups(default="0")  # type: ignore[union-attr]
    return MODES.index(mode), list(STEPS).index(model), int(batch)


def _pieces_section(rows: Sequence[Row]) -> Section:
    counts = Counter(json.dumps(row.details["piece"]) for row in rows)
    lines = []
    for text, count in counts.items():
        piece = json.loads(text)
        wanted = (
            f"--only {piece['only']!r} --variants {piece['variants']!r} --pairs {piece['pairs']}"
        )
        lines.append((wanted, piece["date"], piece["commit"], piece["load average"], str(count)))
    header = ("measured with", "at", "commit", "load average before", "rows")
    return Section("Pieces", header, tuple(lines))


def case_rows(mode: str, case: Case, pairs: int, threads: int, variants: str = "*") -> list[Row]:
    """Time a model's variants in turns; to be called in a fresh process.

    Args:
        mode: "training", "inference" or "compiled".
        case: The model.
        pairs: Rounds.
        threads: For torch.
        variants: Globs on the names of variants, divided by "|".

    Returns:
        A row for each variant.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    base = case.build().train(mode == "training")
    x, y = case.data()

    def wanted(name: str) -> bool:
        return name == FUSED or any(fnmatch.fnmatch(name, glob) for glob in variants.split("|"))

    models = {BASE: base, **dict(_variants(base, case, mode, wanted))}

    def timed(model: nn.Module) -> Callable[[], None]:
        if mode == "training":
            return training_step(model.train(), x, y, case.steps)
        model.eval()
        if mode == "compiled":
            model = torch.compile(model)  # type: ignore[assignment]
        return inference(model, x, case.steps)

    sides = {name: timed(model) for name, model in models.items()}
    rounds = measure.take_rounds(sides, rounds=pairs)
    rows = []
    for name in sides:
        if name in (BASE, FUSED):
            continue
        others = [BASE]
        if name.startswith(WITH_NORMS):
            others = [FUSED] if mode == "compiled" else [BASE, FUSED]
        for other in others:
            title = f"{mode}, {case.name}, batch {case.batch}: {name} ÷ {other}"
            limit = LIMITS.get(title)
            row = measure.ratio_row(title, rounds.pairs(name, other), limit, (name, other))
            fastest = min(rounds.seconds[name]) / min(rounds.seconds[other])
            rows.append(replace(row, note=f"{row.note}; fastest ÷ fastest {fastest:.3f}"))
    return rows


def _variants(
    base: nn.Module, case: Case, mode: str, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, nn.Module]]:
    norms = any(isinstance(module, nn.BatchNorm2d) for module in base.modules())
    if mode != "training" and norms:
        yield FUSED, fuse(base)
    configs = {"no writes": READS, "default": WRITES}
    if case.name == "resnet50":
        configs["full reads"] = FULL
    forms = {
        "concat": lambda gm: gm,
        "split": lambda gm: aim_surgery.lower(copy.deepcopy(gm), "split"),
    }
    if mode != "training":
        forms["folded"] = aim_surgery.fold
        if norms:
            example = case.data()[0] if mode == "compiled" else None
            if example is not None and example.ndim == 4:
                example = example.to(memory_format=torch.channels_last)
            forms[WITH_NORMS] = lambda gm: aim_surgery.fold(gm, example, batch_norm=True)
    for words, config in configs.items():
        names = {form: f"{form}, {words}" for form in forms}
        if not any(map(wanted, names.values())):
            continue
        gm = aim_surgery.transform(base, config=config)
        gm.train(mode == "training")
        for form, name in names.items():
            if wanted(name):
                yield name, forms[form](gm)
    if mode == "compiled":
        return
    if case.name == "resnet50" and wanted("by hand, full reads"):
        yield "by hand, full reads", with_memory_by_hand(base, FLOATS, case.size)
    if wanted("LoRA"):
        yield "LoRA", _lora(base)
    if mode == "inference" and wanted("LoRA, merged"):
        yield "LoRA, merged", _lora(base).merge_and_unload()


def _lora(base: nn.Module) -> Any:
    import_torchvision()  # peft imports it, too, by way of transformers
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
