"""What the operation itself costs: time next to PEFT and Torch-Pruning, memory, and growth.

    python -m benchmarks.surgery [--pairs 7] [--threads 2] [--quick] [--output benchmarks/results]

LoRA by PEFT does about the same job, wrapping each layer of a copied model; Torch-Pruning's
dependency graph is what a comparable tool pays for only looking at the model. That the operation is
linear in the number of layers is seen on chains: time per block must stay what it is.
"""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.capture import capture
from aim_surgery.checkpoint.models import build
from aim_surgery.planning import make_plan
from aim_surgery.surgery.rewrite import operate
from benchmarks import measure
from benchmarks.measure import Report, Row, Section

PEFT_LIMIT = 1.0
PRUNING_LIMIT = 0.35
MEMORY_LIMIT = 1.10
CHAIN_LIMIT = 1.5

LITERAL = AimConfig(memory=50_176, budget=None, write="none")
MEMORY_CASES = {"resnet50": AimConfig(), "vgg16": LITERAL}

CHAIN_CONFIG = AimConfig(memory=256, budget=None)
CHAIN_RUNS = {100: 3, 300: 3, 1000: 3, 3000: 2, 10_000: 2}  # blocks: repetitions
QUICK_BLOCKS = 1000
STAGES = ("capture", "plan", "surgery")

METHOD = (
    "Rows 1 and 2: both sides take turns in one process, A B A B ..., one warm-up each; measured "
    "is the median of the ratios of neighbours, in brackets the smallest and the largest. Garbage "
    "is collected before each timing; results are let go of after it.",
    "resnet50 is torchvision's, 1000 classes, evaluation mode, random weights. `transform` has "
    "default options, copies the model and finds its example input itself; PEFT is "
    "`get_peft_model(deepcopy(model), LoraConfig(r=8, target_modules=...))` on the same 54 layers; "
    "Torch-Pruning is `DependencyGraph().build_dependency(model, example_inputs)`, with the input "
    "made beforehand and nothing copied.",
    "Memory: a fresh process each, warmed up on a tiny model; growth of the resident set from "
    "before `transform` to its peak ÷ bytes of copied parameters and buffers plus new parameters.",
    "Chain: N blocks of 3x3 convolution (8 channels), batch norm and ReLU, input (2, 8, 16, 16), "
    "memory=256, budget=None; the fastest repetition counts; measured is the largest ÷ the "
    "smallest total time per block.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    command = measure.parser("surgery", "Time and memory of the operation.")
    options = measure.parse(command, argv)
    measure.require("torchvision", "peft", "torch_pruning")
    found = measure.environment()
    rows = list(_time_rows(options.pairs))
    for name in MEMORY_CASES:
        measure.progress(f"peak memory on {name}")
        rows.append(measure.in_fresh_process(memory_row, name, options.threads))
    chain, section = _chain(QUICK_BLOCKS if options.quick else max(CHAIN_RUNS))
    report = Report(
        name="surgery",
        title="Cost of the operation" + (" (quick run)" if options.quick else ""),
        method=METHOD,
        settings={"pairs": options.pairs, "threads": options.threads, "quick": options.quick},
        environment=found,
        rows=(*rows, chain),
        sections=(section,),
    )
    report.print()
    print("written:", *report.write(options.output))


# Time ---------------------------------------------------------------------------------------


def _time_rows(pairs: int) -> tuple[Row, Row]:
    torch.manual_seed(measure.SEED)
    model = build("torchvision:resnet50").eval()
    sides = {"peft": (_lora(model), PEFT_LIMIT), "torch-pruning": (_look(model), PRUNING_LIMIT)}
    rows = []
    for name, (other, limit) in sides.items():
        measure.progress(f"transform against {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both libraries', about this use of them
            turns = measure.take_turns(lambda: aim_surgery.transform(model), other, pairs=pairs)
        what = f"time of transform(resnet50) ÷ {name}"
        rows.append(measure.ratio_row(what, turns, limit, ("transform", name)))
    return rows[0], rows[1]


def _lora(model: nn.Module) -> Callable[[], object]:
    from peft import LoraConfig, get_peft_model  # optional: extra `benchmarks`  # pyright: ignore[reportMissingImports]

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    def wrap() -> object:
        twin: Any = copy.deepcopy(model)  # annotated as a transformers model, but any module does
        return get_peft_model(twin, LoraConfig(r=8, target_modules=names))

    return wrap


def _look(model: nn.Module) -> Callable[[], object]:
    import torch_pruning  # optional: extra `benchmarks`  # pyright: ignore[reportMissingImports]

    twin = copy.deepcopy(model)  # it hooks the model: `transform`'s stays clean
    image = torch.randn(1, 3, 224, 224)
    return lambda: torch_pruning.DependencyGraph().build_dependency(twin, example_inputs=image)


# Memory -------------------------------------------------------------------------------------


def memory_row(name: str, threads: int) -> Row:
    """Measure peak extra memory of `transform`; to be called in a fresh process.

    Args:
        name: One of `MEMORY_CASES`, a torchvision model.
        threads: For torch.

    Returns:
        The row.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    config = MEMORY_CASES[name]
    # so that what Python imports on first use is not counted
    aim_surgery.transform(_chain_model(2), torch.zeros(2, 8, 16, 16), config=CHAIN_CONFIG)
    aim_surgery.transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    model = build(f"torchvision:{name}").eval()
    old = _bytes(model.parameters())
    copied = old + _bytes(model.buffers())
    gm, growth, how = measure.peak_growth(lambda: aim_surgery.transform(model, config=config))
    new = _bytes(gm.parameters()) - old
    options = "defaults" if config == AimConfig() else "memory=50_176, budget=None"
    note = f"{growth / 1e6:.1f} MB ÷ ({copied / 1e6:.1f} MB copied + {new / 1e6:.1f} MB new); {how}"
    details = {"growth_bytes": growth, "copied_bytes": copied, "new_bytes": new, "how": how}
    what = f"peak memory of transform({name}), {options} ÷ its result"
    return Row(what, growth / (copied + new), MEMORY_LIMIT, note=note, details=details)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# Growth -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainRun:
    """Seconds of one operation on a chain."""

    blocks: int
    capture: float
    plan: float
    surgery: float

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return self.capture + self.plan + self.surgery

    def per_block(self) -> dict[str, float]:
        """Milliseconds per block, by stage."""
        stages = {name: getattr(self, name) for name in (*STAGES, "total")}
        return {name: 1e3 * value / self.blocks for name, value in stages.items()}


def _chain(most: int) -> tuple[Row, Section]:
    _run_chain(10)  # warm-up
    runs: list[ChainRun] = []
    for blocks, repetitions in CHAIN_RUNS.items():
        if blocks <= most:
            measure.progress(f"a chain of {blocks} blocks")
            runs += [_run_chain(blocks) for _ in range(repetitions)]
    lengths = sorted({run.blocks for run in runs})
    best = [min((r for r in runs if r.blocks == n), key=lambda run: run.total) for n in lengths]
    totals = [run.per_block()["total"] for run in best]
    per_block = {run.blocks: run.per_block() for run in best}
    row = Row(
        f"chain of {lengths[0]} to {lengths[-1]:,} blocks: largest ÷ smallest time per block",
        max(totals) / min(totals),
        CHAIN_LIMIT,
        note=f"{min(totals):.2f} to {max(totals):.2f} ms per block",
        details={"milliseconds_per_block": per_block, "runs": [asdict(run) for run in runs]},
    )
    header = ("blocks", *(f"{name}, ms" for name in (*STAGES, "total")), "total, s")
    table = tuple(
        (f"{r.blocks:,}", *(f"{ms:.3f}" for ms in r.per_block().values()), f"{r.total:.2f}")
        for r in best
    )
    return row, Section("Chain: time per block", header, table)


def _run_chain(blocks: int) -> ChainRun:
    torch.manual_seed(measure.SEED)
    model, image = _chain_model(blocks), torch.zeros(2, 8, 16, 16)
    gc.collect()
    start = time.perf_counter()
    captured = capture(model, image)
    after_capture = time.perf_counter()
    plan = make_plan(captured, CHAIN_CONFIG)
    after_plan = time.perf_counter()
    gm = operate(captured, plan)
    end = time.perf_counter()
    del gm
    return ChainRun(blocks, after_capture - start, after_plan - after_capture, end - after_plan)


def _chain_model(blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers).eval()


if __name__ == "__main__":
    main()
