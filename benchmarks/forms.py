"""Whether all forms compute one function on real models, once memory is in use.

    python -m benchmarks.forms [--library torchvision] [--only GLOB] [--parameters 30]

The zoo compares the original with the operated model, whose memory weights begin at zero. Here all
parameters are moved away from where they start, memory weights included; then split, folded and
folded with norms are held against concat, in evaluation mode in float64. In each model memory is
set to zero once more: a comparison of functions in which it has no part would say nothing.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.errors import MissingInputsError, in_one_line
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.verification.differences import difference
from aim_surgery.verification.samples import samples_for
from benchmarks import measure
from benchmarks.measure import Report, Row, Section
from benchmarks.zoo import checks
from benchmarks.zoo.libraries import LIBRARIES, build, build_on_meta

LIMIT = 1e-9
MOVED, LEAST = 0.2, 0.02  # by how much of its deviation a parameter is moved, and by how much more
WRITES = ("none", "sample")

METHOD = (
    f"Random weights from a fixed seed; each parameter then moves by noise of {MOVED} of its own "
    f"standard deviation and {LEAST} more, the memory by 1.",
    "Evaluation mode, float64, two images of the smallest size of 96, 128, 160 pixels that the "
    "model takes, else of its own; the graph stays the one captured at the full size.",
    "Measured is the largest difference of all outputs, relative to the largest entry of each.",
    "Beside it: what memory changes at all, by the difference to the same model with its memory "
    "set to zero; at no more than the limit, the row counts as missed.",
)
FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "split": lambda gm, _: aim_surgery.lower(gm, "split"),
    "folded": lambda gm, inputs: _folded(gm, inputs, batch_norm=False),
    "folded with norms": lambda gm, inputs: _folded(gm, inputs, batch_norm=True),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, print, write."""
    command = measure.parser("forms", "Whether all forms compute one function.")
    command.add_argument(
        "--library", choices=("torchvision", "timm", "transformers"), default="torchvision"
    )
    command.add_argument("--only", default="*", help="a glob on names")
    command.add_argument("--parameters", type=float, default=30, help="the most, in millions")
    options = measure.parse(command, argv)
    settings = {name: getattr(options, name)
                for name in ("library", "only", "parameters", "threads")}  # fmt: skip
    rows: list[Row] = []
    names = fnmatch.filter(LIBRARIES[options.library].names(), options.only)
    sizes = measure.in_fresh_process(sizes_of, options.library, names)
    large = [name for name in names if sizes[name] > options.parameters * 1e6]
    left_out = [(name, f"{sizes[name] / 1e6:.0f} M parameters") for name in large]
    for name in sorted(sizes.keys() - large, key=lambda name: (sizes[name], name)):
        measure.progress(name)
        found, why = measure.in_fresh_process(rows_of, options.library, name, options.threads)
        rows += found
        left_out += [(name, why)] if why else []
        report = Report(
            name="forms",
            title="Forms of real models, with memory in use",
            method=METHOD,
            settings=settings,
            environment=measure.environment(),
            rows=tuple(rows),
            sections=(Section("Left out", ("model", "reason"), tuple(left_out)),),
            suffix=f"-{options.library}",
        )
        report.write(options.output)  # after each model: the next may take long
    for row in rows:
        print(*row.cells(), sep=" | ")


def sizes_of(library: str, names: Sequence[str]) -> dict[str, int]:
    """Count parameters by name of the model, without values where a model can be built so."""
    return {name: _size(library, name) for name in names}


def _size(library: str, name: str) -> int:
    model = build_on_meta(library, name)
    if model is None:
        model, _ = build(library, name)
    return sum(parameter.numel() for parameter in model.parameters())


def rows_of(library: str, name: str, threads: int) -> tuple[list[Row], str]:
    """Compare the forms of one model; to be called in a fresh process.

    Args:
        library: Of the zoo.
        name: Of the model.
        threads: For torch.

    Returns:
        A row for each form and each kind of write; or none, and why the model is left out.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(measure.SEED)
    model, inputs = build(library, name)
    try:
        samples = samples_for(model, aim_surgery.plan(model, inputs), inputs)
        args, kwargs = tree_map_only(torch.Tensor, _in_float64, (samples.args, samples.kwargs))
        with torch.no_grad():
            outputs = tree_leaves(copy.deepcopy(model).double().eval()(*args, **kwargs))
    except Exception as err:
        return [], f"the original does not run in float64: {in_one_line(err)}"
    if any(isinstance(out, torch.Tensor) and out.isnan().any() for out in outputs):
        return [], "the original gives no numbers in float64"
    return [row for write in WRITES for row in _compared(name, model.eval(), inputs, write)], ""


def _compared(name: str, model: nn.Module, inputs: Any, write: Any) -> Iterator[Row]:
    gm = aim_surgery.transform(model, inputs, config=AimConfig(write=write))
    samples = samples_for(model, plan_of(gm), inputs)
    smaller = checks.smaller_inputs(model, gm, samples)
    if smaller is not None:
        samples = samples_for(model, plan_of(gm), smaller)
    args, kwargs = tree_map_only(torch.Tensor, _in_float64, (samples.args, samples.kwargs))
    gm.double().eval()
    torch.manual_seed(measure.SEED + 1)

    def run(form: nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(measure.SEED + 2)
        leaves = tree_leaves(form(*args, **kwargs))
        return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]

    with torch.no_grad():
        for path, parameter in gm.named_parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs().max()
            amount = 1.0 if path.startswith("aim.memory") else MOVED * spread + LEAST
            parameter.add_(torch.randn_like(parameter) * amount)
        expected = run(gm)
        found = {form: _difference(run(lowered(gm, kwargs or args)), expected)
                 for form, lowered in FORMS.items()}  # fmt: skip
        for path, parameter in gm.named_parameters():
            if path.startswith("aim.memory"):
                parameter.zero_()
        without = _difference(run(gm), expected)
    for form, measured in found.items():
        measured = measured if without > LIMIT else float("inf")
        note = f"memory changes {without:.1e}"
        yield Row(f"{name}, write={write}: {form}", measured, LIMIT, None, note)


def _folded(gm: Any, inputs: Any, *, batch_norm: bool) -> Any:
    """On noise of the size it was captured at; on inputs where the model does not take noise."""
    try:
        return aim_surgery.fold(gm, batch_norm=batch_norm)
    except MissingInputsError:
        return aim_surgery.fold(gm, inputs, batch_norm=batch_norm)


def _in_float64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _difference(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(float(difference(e, a, 0.0)) for a, e in pairs)


if __name__ == "__main__":
    main()
