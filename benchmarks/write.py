"""What memory costs in training: a step of the operated model ÷ a step of the base.

    python -m benchmarks.write [--pairs 7] [--threads 2] [--quick] [--output benchmarks/results]

A step is forward, backward and SGD. Base, write="sample" (the default), "batch" and "none" of one
model take turns in one process: base, sample, batch, none, base, ... Then a profile of the ResNet50
says where the extra time goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

import aim_surgery
from aim_surgery import AimConfig
from benchmarks import measure
from benchmarks.breakdown import least, parts_of, profiled
from benchmarks.lunkad2021.model import CLASSES, KerasResNet50
from benchmarks.lunkad2021.operation import original_plan, reference
from benchmarks.measure import Report, Rounds, Row, Section
from benchmarks.steps import IMAGE, MLP, Case, training_step

BASE = "base"
WRITES = ("sample", "batch", "none")
LIMITS = {("resnet50", 8, "sample"): 1.35, ("resnet50", 8, "batch"): 1.25}
PROFILED = "resnet50"
PROFILES = 8


CASES = (
    Case("resnet50", 8),
    Case("vgg16_bn", 8),
    Case("mobilenet_v3_large", 8),
    Case("vit_b_16", 8),
    Case(MLP, 256, (784,), steps=20),
)
QUICK = (Case("resnet50", 2), Case(MLP, 256, (784,), steps=5))
LUNKAD_BATCH = 2

METHOD = (
    "Measured is the median over rounds of a step of the operated model ÷ the mean of the base's "
    "steps before and after it, in brackets the smallest and the largest. All variants of a model "
    "take turns in one fresh process, base first, after one round of warm-up; garbage is collected "
    "before each timing. Fastest ÷ fastest, beside it, hides what other programs took.",
    "A step: zero_grad, forward in training mode, cross entropy, backward, SGD with momentum; "
    "float32, random weights and noise, the same batch each time. `transform` has default options "
    "but for `write`; each variant keeps to the same budget, so without writes the reads get more "
    "planes.",
    "lunkad2021: the original's network rebuilt (`python -m benchmarks.lunkad2021`) against its "
    "base at the same resolution (its first convolution has stride 1), and against the control "
    "that the notebook compared it with (stride 2, half the resolution).",
    "The author's own ratio is quoted, not measured: 328 s against 164 s an epoch, for networks "
    "that work at different resolutions.",
    f"The profile: self time of operators, forward and backward, of one step each; of each part "
    f"the least of {PROFILES} alternated profiles, so the sums hide what other programs took.",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    command = measure.parser("write", "Training-step time with memory.")
    options = measure.parse(command, argv)
    measure.require("torchvision")
    environment = measure.environment()
    rows: list[Row] = []
    for case in QUICK if options.quick else CASES:
        measure.progress(f"{case.name}, batch {case.batch}")
        rows += measure.in_fresh_process(case_rows, case, options.pairs, options.threads)
    measure.progress(f"lunkad2021, batch {LUNKAD_BATCH}")
    rows += measure.in_fresh_process(lunkad_rows, options.pairs, options.threads)
    measure.progress(f"profiles of {PROFILED}")
    case = (QUICK if options.quick else CASES)[0]
    profiles = measure.QUICK_PAIRS if options.quick else PROFILES
    section = measure.in_fresh_process(profile_section, case, profiles, options.threads)
    report = Report(
        name="write",
        title="Cost of memory in training" + (" (quick run)" if options.quick else ""),
        method=METHOD,
        settings={"pairs": options.pairs, "threads": options.threads, "quick": options.quick},
        environment=environment,
        rows=(*rows, _quoted()),
        sections=(section,),
    )
    report.print()
    print("written:", *report.write(options.output))


# Ratios -------------------------------------------------------------------------------------


def case_rows(case: Case, pairs: int, threads: int) -> list[Row]:
    """Time a model's variants in turns; to be called in a fresh process.

    Args:
        case: The model.
        pairs: Rounds.
        threads: For torch.

    Returns:
        A row for each of `WRITES`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    base = case.build()
    models = {BASE: base}
    for write in WRITES:
        config = AimConfig(write=write)
        models[write] = aim_surgery.transform(base, config=config).train()
    x, y = case.data()
    steps = {name: training_step(model, x, y, case.steps) for name, model in models.items()}
    rounds = measure.take_rounds(steps, rounds=pairs)
    return [
        _row(
            f"{case.name}, batch {case.batch}, write={write!r} ÷ base",
            rounds,
            (write, BASE),
            LIMITS.get((case.name, case.batch, write)),
        )
        for write in WRITES
    ]


def lunkad_rows(pairs: int, threads: int) -> list[Row]:
    """Time the original's network next to its base and to its control; in a fresh process.

    Args:
        pairs: Rounds.
        threads: For torch.

    Returns:
        Two rows.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    base, control = KerasResNet50().train(), KerasResNet50(stride=2).train()
    operated = aim_surgery.apply(base, original_plan(base)).train()
    x, y = torch.randn(LUNKAD_BATCH, *IMAGE), torch.randint(CLASSES, (LUNKAD_BATCH,))
    models = {BASE: base, "lunkad2021": operated, "control": control}
    steps = {name: training_step(model, x, y, 1) for name, model in models.items()}
    rounds = measure.take_rounds(steps, rounds=pairs)
    names = {BASE: "its base, same resolution", "control": "its control, half the resolution"}
    return [
        _row(f"lunkad2021, batch {LUNKAD_BATCH} ÷ {name}", rounds, ("lunkad2021", side))
        for side, name in names.items()
    ]


def _row(name: str, rounds: Rounds, sides: tuple[str, str], limit: float | None = None) -> Row:
    row = measure.ratio_row(name, rounds.pairs(*sides), limit, sides)
    fastest = min(rounds.seconds[sides[0]]) / min(rounds.seconds[sides[1]])
    note = f"{row.note}; fastest ÷ fastest {fastest:.3f}"
    return replace(row, note=note, details={**row.details, "fastest_ratio": fastest})


def _quoted() -> Row:
    seconds = reference()["epoch_seconds"]
    ratio = seconds["aim"] / seconds["base"]
    note = f"quoted, not measured: {seconds['aim']} s ÷ {seconds['base']} s an epoch"
    return Row("the author's own: AiM-ResNet50 ÷ control", ratio, None, note=note)


# Profile ------------------------------------------------------------------------------------


def profile_section(case: Case, profiles: int, threads: int) -> Section:
    """Say where a ResNet's extra time goes; to be called in a fresh process.

    Args:
        case: A ResNet.
        profiles: How often each side is profiled, in turns.
        threads: For torch.

    Returns:
        A table: a part, its milliseconds in both, and its share of the extra time.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    base = case.build()
    models = {BASE: base, "default": aim_surgery.transform(base).train()}
    x, y = case.data()
    steps = {name: training_step(model, x, y, 1) for name, model in models.items()}
    parts = {name: parts_of(m, m.get_submodule("conv1")) for name, m in models.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for step in steps.values():
        step()  # warm-up
    for _ in range(profiles):
        for name, step in steps.items():
            found[name].append(profiled(step, parts[name]))
    return _section(case, least(found[BASE]), least(found["default"]))


def _section(case: Case, before: Mapping[str, float], after: Mapping[str, float]) -> Section:
    total = sum(after.values()) - sum(before.values())
    extra = {part: after[part] - before.get(part, 0.0) for part in after}
    rows: list[tuple[str, ...]] = []
    for part in sorted(extra, key=lambda part: -extra[part]):
        times = (before.get(part, 0.0), after[part], extra[part])
        rows.append((part, *(f"{time:.1f}" for time in times), f"{extra[part] / total:.0%}"))
    sums = (sum(before.values()), sum(after.values()), total)
    ratio = f"{sums[1] / sums[0]:.3f} of base"
    rows.append(("sum", *(f"{time:.1f}" for time in sums), ratio))
    header = ("part", "base, ms", "default, ms", "extra, ms", "share of the extra time")
    return Section(
        f"Where the extra time goes: {case.name}, batch {case.batch}", header, tuple(rows)
    )


if __name__ == "__main__":
    main()
