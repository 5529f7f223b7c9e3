"""What is checked of an operated model, in full, light or brief, and on which inputs.

Full is `verify`. Its some sixty float64 forwards need about 36 bytes a parameter, six times the
activations and 45 times the time of a training step of one image, so it runs on a smaller image
where both models take one. Where even that is too much, the light checks take its place: the
outputs of both in evaluation mode in the model's own dtype, outputs and buffers in training mode in
float64, the audit of weights on the meta device, where it costs nothing, and one backward of the
operated model. Brief are the light ones of the largest models, with nothing in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

import aim_surgery
from aim_surgery.capture import Inputs
from aim_surgery.capture.nested import named_leaves
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.verification import Verification
from aim_surgery.verification.comparison import TOLERANCES, Case, Comparison
from aim_surgery.verification.coverage import Coverage, check_coverage
from aim_surgery.verification.equivalence import convert
from aim_surgery.verification.pair import Pair
from aim_surgery.verification.samples import Samples, samples_for
from aim_surgery.verification.twins import call, copy_of, own_dtype
from benchmarks.zoo.rows import BRIEF, FULL, LIGHT, Row

_LEAST_PIXELS = (96, 128, 160)  # of images: maps of 3x3 positions where five strides halve them
_LEAST_OF_VIDEO = (64, 96)
_NOTES = 6
_FAULTS = 4


def describe(samples: Samples) -> str:
    """The shapes in words, the start of a long list of them."""
    words = samples.describe()
    return words if len(words) <= 160 else f"{words[:157]}..."


def smaller_inputs(model: nn.Module, gm: nn.Module, samples: Samples) -> tuple[torch.Tensor] | None:
    """The smallest image (clip) that both models take, in evaluation mode.

    Args:
        model: The original.
        gm: The operated one.
        samples: What it was captured with.

    Returns:
        Zeros, which `verify` takes for a shape; None where the inputs are no single image, or none
        smaller than half as large is accepted.
    """
    if len(samples.args) != 1 or samples.kwargs or not isinstance(samples.args[0], torch.Tensor):
        return None
    image = samples.args[0]
    if image.ndim not in (4, 5) or not image.is_floating_point():
        return None
    for least in _LEAST_PIXELS if image.ndim == 4 else _LEAST_OF_VIDEO:
        if 3 * least > 2 * min(image.shape[-2:]):
            return None
        smaller = torch.zeros(*image.shape[:-2], least, least, dtype=image.dtype)
        try:
            with torch.no_grad():
                model(smaller)
                gm(smaller)
        except Exception:
            continue
        return (smaller,)
    return None


def check_full(model: nn.Module, gm: nn.Module, inputs: Inputs | None, row: Row) -> None:
    """Run `verify` and note what it says.

    Args:
        model: The original.
        gm: The operated one.
        inputs: Example inputs; None for those that were found.
        row: Filled in.
    """
    result = aim_surgery.verify(model, gm, inputs)
    row.checks, row.verified = FULL, result.ok
    row.difference = _finite(result.largest_difference)
    largest = (item.difference for item in result.equivalence.comparisons)
    row.difference64 = _finite(max(largest, default=0.0))
    row.backward = result.gradients.mode if result.gradients.ok else ""
    row.notes += [_first_line(note) for note in result.notes[:_NOTES]]
    row.errors += _faults(result)
    note_coverage(result.coverage, model, row)


def check_light(
    model: nn.Module,
    gm: nn.Module,
    samples: Samples,
    audited: nn.Module,
    row: Row,
    *,
    detects: bool = False,
    brief: bool = False,
    kept: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Compare evaluation in the model's own dtype and training in float64; one backward.

    A detector is compared in training in both, as in evaluation it may find nothing.

    Args:
        model: The original; like the operated one left in float64, where both were compared in it.
        gm: The operated one.
        samples: What to run both on.
        audited: The original, on the meta device if it can be built there.
        row: Filled in.
        detects: Whether it is a detector.
        brief: Whether training is compared in the model's own dtype, too.
        kept: What the backward runs in, such as `saved_on_disk`.
    """
    row.checks = BRIEF if brief else LIGHT
    audit(audited, gm, row)
    dtype, notes = own_dtype(model), list[str]()
    pair = Pair(model, gm, plan_of(gm), TOLERANCES.get(dtype, TOLERANCES[torch.float32]))
    found = _compare_light(pair, Case(detects, samples, _batch(samples), dtype), row, notes)
    if found:
        row.difference = _finite(found[0].difference)
    with kept or contextlib.nullcontext():
        faults = _gradient_faults(gm.train(detects), samples)
    row.errors += [f"light: {name} has no finite gradient" for name in faults[:_FAULTS]]
    row.backward = "" if faults else ("training" if detects else "evaluation")
    pair.align_buffers()  # in training, they have moved
    refusal = ""
    if not brief:
        samples, dtype, refusal = _in_float64(pair, samples)
    if refusal:
        notes.append(f"training compared in {dtype}: the original {refusal} in float64")
    if not (detects and (refusal or brief)):  # else it has been compared
        found += _compare_light(pair, Case(True, samples, _batch(samples), dtype), row, notes)
    row.notes += [_first_line(note) for note in notes[:_NOTES]]
    if not any(each.judged for each in found if each.what == "outputs"):
        row.errors.append("light: in neither mode, the original gives what could be judged")
    row.verified = not row.errors


def _gradient_faults(gm: nn.Module, samples: Samples) -> list[str]:
    """New parameters without a finite gradient, of one backward."""
    with gradients_let_go(gm) as finite:
        loss = loss_of(call(gm, samples))
        if loss is not None:
            loss.backward()
    new = [name for name, _ in gm.named_parameters() if name.startswith("aim.")]
    return [name for name in new if not finite.get(name)]


def _compare_light(pair: Pair, case: Case, row: Row, notes: list[str]) -> list[Comparison]:
    answer = pair.compare(case, notes)
    if isinstance(answer, str):
        row.notes.append(_first_line(f"the original does not run, {case}: {answer}"))
        return []
    row.errors += [f"light: {each}" for each in answer if not each.ok]
    if case.dtype == torch.float64:
        row.difference64 = _finite(max(each.difference for each in answer))
    return answer


def _in_float64(pair: Pair, samples: Samples) -> tuple[Samples, torch.dtype, str]:
    """Both models and the inputs in float64, or as they were, and why the original refuses that."""
    own = own_dtype(pair.base)
    pair.base.double()
    pair.operated.double()
    converted, coarsest, refusal = convert(pair, samples, torch.float64, (True,))
    if not refusal:
        pair.limits = TOLERANCES[coarsest]
        return converted, torch.float64, ""
    pair.base.to(own)
    pair.operated.to(own)
    return samples, own, refusal


def _batch(samples: Samples) -> str:
    return f"batch {samples.batch}"


def audit(model: nn.Module, gm: nn.Module, row: Row) -> None:
    """Let the audit see the original, on any device, and note what it found.

    Args:
        model: The original; on the meta device, where branches on data stop it.
        gm: The operated one.
        row: Filled in.
    """
    samples = samples_for(model, plan_of(gm), None)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta and any(r.site.inside and not r.site.widens for r in plan_of(gm).reads):
        gm = copy_of(gm).to("meta")  # such reads are looked for in a run of it
    coverage = check_coverage(model, gm, plan_of(gm), samples)
    row.errors += [_fault_of_coverage(fault) for fault in coverage.unaccounted[:_FAULTS]]
    row.notes += [_first_line(note) for note in coverage.notes]
    note_coverage(coverage, model, row)


def note_coverage(coverage: Coverage, model: nn.Module, row: Row) -> None:
    """Count weights and their elements."""
    sizes = {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}

    def counted(names: Iterable[str]) -> list[int]:
        chosen = list(names)
        return [len(chosen), sum(sizes[name] for name in chosen)]

    left_out = [name for name, _ in coverage.skipped]
    accounted = [*coverage.covered, *left_out]
    row.reached = counted(coverage.covered)
    row.accounted = counted(accounted)
    row.audited = counted([*accounted, *(name for name, _ in coverage.unaccounted)])
    for _, reason in coverage.skipped:
        row.left_out[reason] = row.left_out.get(reason, 0) + 1


def loss_of(outputs: object) -> torch.Tensor | None:
    """The sum of all outputs that have a gradient; None where none has."""
    terms = [
        (torch.view_as_real(value) if value.is_complex() else value).sum()
        for value in named_leaves(outputs).values()
        if isinstance(value, torch.Tensor) and value.requires_grad and value.numel()
    ]
    return torch.stack([term.double() for term in terms]).sum() if terms else None


@contextlib.contextmanager
def gradients_let_go(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Let go of each gradient as soon as it is there; what is given tells which were finite."""
    finite: dict[str, bool] = {}

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def note(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if name.startswith("aim."):
                finite[name] = gradient is not None and bool(gradient.isfinite().all())

        return note

    handles = [
        parameter.register_post_accumulate_grad_hook(hook(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield finite
    finally:
        for handle in handles:
            handle.remove()


def _faults(result: Verification) -> list[str]:
    named: Mapping[str, Callable[[], Iterable[str]]] = {
        "equivalence": lambda: map(str, result.equivalence.offenders),
        "coverage": lambda: map(_fault_of_coverage, result.coverage.unaccounted),
        "gradients": lambda: (": ".join(fault) for fault in result.gradients.unreached),
    }
    found = []
    for check, faults in named.items():
        if not getattr(result, check).ok:
            lines = [_first_line(fault) for fault in faults()] or ["failed, and does not say where"]
            found += [f"{check}: {line.removeprefix(f'{check}: ')}" for line in lines[:_FAULTS]]
    return found


def _fault_of_coverage(fault: tuple[str, str]) -> str:
    return f"coverage: {fault[0]} {fault[1]}"


def _finite(number: float) -> float | None:
    """JSON has no infinity."""
    return number if math.isfinite(number) else None


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 600 else f"{line[:597]}..."
