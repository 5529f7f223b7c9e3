"""Equivalence: the operated model computes what the original computes.

With W_m = 0, conv(cat[x, m], [W_x ; W_m]) = conv(x, W_x): outputs are the same, and so are the
gradients of every original entry. Both are held against each other in float64, where only the
order of sums can differ, in both modes, for several batches and sizes; outputs once more in the
model's own dtype.
After training, or with init="fresh", the two are different functions, and the check says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery.errors import AimSurgeryError
from aim_surgery.planning import Plan, Read
from aim_surgery.verification.samples import Samples, named_leaves
from aim_surgery.verification.twins import (
    call,
    convert,
    copy_of,
    own_dtype,
    random_state_kept,
    set_modes,
    split_entries,
)

# dtype: (outputs and buffers, gradients); relative to the largest value of the tensor
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-3),
    torch.bfloat16: (3e-2, 3e-1),
    torch.float16: (1e-2, 1e-1),
}
# Gradients and buffers below this share of the largest of all are rounding in places (a bias before
# a norm, the mean of what has been centred): they are measured against that share.
_TINY = 1e-3
_REFUSAL = "this input breaks what the graph was captured with"
_GRADIENT_BATCH = 2
_OTHER_BATCHES = (3, 1)
_NAMED = 5  # offenders that a comparison names


@dataclass(frozen=True)
class Comparison:
    """One quantity of both models, held against each other.

    Attributes:
        what: "outputs", "gradients" or "buffers".
        case: Mode, inputs and dtype, in words.
        dtype: The dtype that both ran in.
        difference: The largest, relative to the largest value; infinite where there is no telling.
        limit: The largest difference that passes.
        offenders: What differs by more, the worst first, with its difference or the reason.
    """

    what: str
    case: str
    dtype: torch.dtype
    difference: float
    limit: float
    offenders: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing differs by more than the limit."""
        return self.difference <= self.limit and not self.offenders

    def __str__(self) -> str:
        text = f"{self.what} differ by {self.difference:.1e} (limit {self.limit:.0e}), {self.case}"
        return f"{text}: {'; '.join(self.offenders)}" if self.offenders else text


@dataclass(frozen=True)
class Equivalence:
    """What came of comparing the original with the operated model.

    Attributes:
        comparisons: One for each mode, batch, size and quantity.
        own: Outputs in the model's own dtype, in evaluation mode.
        notes: What could not be compared, and why.
    """

    comparisons: tuple[Comparison, ...]
    own: Comparison
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return not self.offenders

    @property
    def offenders(self) -> tuple[Comparison, ...]:
        """The comparisons that fail."""
        return tuple(found for found in (self.own, *self.comparisons) if not found.ok)

    def largest(self, what: str) -> float | None:
        """The largest relative difference of one quantity, None where it was not compared."""
        found = [item.difference for item in self.comparisons if item.what == what]
        return max(found, default=None)

    def __str__(self) -> str:
        parts = [
            f"{what} {largest:.1e}"
            for what in ("outputs", "gradients", "buffers")
            if (largest := self.largest(what)) is not None
        ]
        cases = len({item.case for item in self.comparisons})
        dtype = _name(self.comparisons[0].dtype) if self.comparisons else ""
        own = f"outputs {self.own.difference:.1e} in {_name(self.own.dtype)}"
        return f"largest relative difference: {', '.join(parts)} in {dtype} ({cases} cases); {own}"


def check_equivalence(model: nn.Module, gm: nn.Module, plan: Plan, samples: Samples) -> Equivalence:
    """Run both models side by side, on copies.

    Args:
        model: The original; left unchanged.
        gm: The operated model; left unchanged.
        plan: What was done; tells original from new entries.
        samples: The inputs.

    Returns:
        Every comparison that was made.

    Raises:
        AimSurgeryError: The original itself does not run on these inputs.
    """
    with random_state_kept(model):
        pair = _Pair(copy_of(model), copy_of(gm), plan)
        own = _compare_own(pair, samples)
        notes = []
        dtype = torch.float64
        for twin in (pair.base, pair.operated):
            convert(twin, dtype)
        coarsest = _coarsest_dtype(pair, samples.to(dtype))
        if coarsest is None:
            dtype = coarsest = own_dtype(model)
            notes.append(f"the original does not run in float64: compared in {_name(dtype)}")
            del pair
            pair = _Pair(copy_of(model), copy_of(gm), plan)
        elif coarsest != dtype:
            notes.append(f"the original computes partly in {_name(coarsest)} by itself")
        pair.limits = TOLERANCES[coarsest]
        converted = samples if dtype == own_dtype(model) else samples.to(dtype)
        comparisons = _run_cases(pair, converted, dtype, notes)
    return Equivalence(tuple(comparisons), own, tuple(notes))


# Cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    training: bool
    samples: Samples
    words: str
    dtype: torch.dtype
    gradients: bool = False

    def __str__(self) -> str:
        return f"{'training' if self.training else 'evaluation'}, {self.words}, {_name(self.dtype)}"


def _run_cases(
    pair: _Pair, samples: Samples, dtype: torch.dtype, notes: list[str]
) -> list[Comparison]:
    """Gradients on a small batch in both modes; outputs on other batches and another size."""
    comparisons: list[Comparison] = []

    def run(samples: Samples, words: str, *, training: bool, gradients: bool = False) -> str:
        case = _Case(training, samples, words, dtype, gradients)
        found = pair.compare(case, notes)
        if isinstance(found, str):
            return found
        comparisons.extend(found)
        return ""

    small = _small(samples)
    for training in (False, True):
        refused = run(small, f"batch {small.batch}", training=training, gradients=True)
        if refused and small is not samples:
            words = f"batch {samples.batch}"
            refused = run(samples, words, training=training, gradients=True)
        elif small is not samples:
            run(samples, f"batch {samples.batch}", training=training)
        if refused:
            mode = "training" if training else "evaluation"
            notes.append(f"the original does not run in {mode} mode: {refused}")
            continue
        for batch in _OTHER_BATCHES if samples.batch else ():
            if batch not in (small.batch, samples.batch):
                run(samples.take(batch), f"batch {batch}", training=training)
    for size, other in small.resized():
        if run(other, f"size {size}", training=False):
            continue
        offenders = comparisons[-1].offenders
        if offenders and _REFUSAL in offenders[0]:
            comparisons.pop()
            notes.append(f"size {size}, which the original takes, is refused: {offenders[0]}")
        break
    return comparisons


def _small(samples: Samples) -> Samples:
    return samples.take(_GRADIENT_BATCH) if samples.batch > _GRADIENT_BATCH else samples


def _compare_own(pair: _Pair, samples: Samples) -> Comparison:
    """Outputs in the model's own dtype, in evaluation mode or, if it has none, in training."""
    dtype = own_dtype(pair.base)
    pair.limits = TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    refusals = []
    for training in (False, True):
        case = _Case(training, samples, f"batch {samples.batch}", dtype)
        found = pair.compare(case, [])
        if not isinstance(found, str):
            return found[0]
        refusals.append(found)
    raise AimSurgeryError(
        f"the original model does not run on the example inputs ({samples.describe()}): "
        f"{refusals[0]}. Pass example_inputs that it accepts"
    )


class _LowestDtype(TorchDispatchMode):
    """Notes the coarsest floating type that comes up."""

    lowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            dtype = getattr(value, "dtype", None)
            if dtype in TOLERANCES and torch.finfo(dtype).eps > torch.finfo(self.lowest).eps:
                self.lowest = dtype
        return result


def _coarsest_dtype(pair: _Pair, samples: Samples) -> torch.dtype | None:
    """The precision that the original has when all of it is float64; None: it doesn't run."""
    watch = _LowestDtype()
    for training in (False, True):
        set_modes(pair.base, pair.operated, training)
        try:
            with torch.no_grad(), watch:
                call(pair.base, _small(samples))
        except Exception:
            pair.align_buffers()
            continue
        return watch.lowest
    return None


# One comparison -----------------------------------------------------------------------------


@dataclass
class _Pair:
    """Copies of both models, compared case by case."""

    base: nn.Module
    operated: nn.Module
    plan: Plan
    limits: tuple[float, float] = TOLERANCES[torch.float64]

    def compare(self, case: _Case, notes: list[str]) -> list[Comparison] | str:
        """Compare on one case; a text where the original refuses it."""
        set_modes(self.base, self.operated, case.training)
        with torch.set_grad_enabled(case.gradients):
            try:
                expected = named_leaves(call(self.base, case.samples))
            except Exception as err:
                self.align_buffers()
                return _reason(err)
            gradients = self._base_gradients(expected, notes) if case.gradients else None
            expected = _detached(expected)
            try:
                got = named_leaves(call(self.operated, case.samples))
            except Exception as err:
                return [self._failure("outputs", case, f"the operated model fails: {_reason(err)}")]
            found = [self._compared("outputs", case, _differences(expected, _detached(got)))]
            if gradients is not None:
                found.append(self._compare_gradients(case, gradients, got))
        if case.training:
            differences = self._buffer_differences()
            if differences:
                found.append(self._compared("buffers", case, differences))
        return found

    def _compared(
        self, what: str, case: _Case, differences: Mapping[str, float | str]
    ) -> Comparison:
        limit = self.limits[1 if what == "gradients" else 0]
        measured = {k: v if isinstance(v, float) else float("inf") for k, v in differences.items()}
        worst = sorted(measured, key=lambda name: -measured[name])
        beyond = [name for name in worst if not measured[name] <= limit]
        offenders = []
        for name in beyond[:_NAMED]:
            found = differences[name]
            offenders.append(
                f"{name} {found:.1e}" if isinstance(found, float) else f"{name} {found}"
            )
        if len(beyond) > _NAMED:
            offenders.append(f"and {len(beyond) - _NAMED} more")
        largest = max(measured.values(), default=0.0)
        return Comparison(what, str(case), case.dtype, largest, limit, tuple(offenders))

    def _failure(self, what: str, case: _Case, reason: str) -> Comparison:
        limit = self.limits[1 if what == "gradients" else 0]
        return Comparison(what, str(case), case.dtype, float("inf"), limit, (reason,))

    def _base_gradients(
        self, outputs: Mapping[str, Any], notes: list[str]
    ) -> dict[str, torch.Tensor] | None:
        """Gradients of the original; None where it has none."""
        loss = _random_loss(outputs)
        if loss is None:
            return None
        try:
            loss.backward()
        except Exception as err:
            note = f"gradients not compared, the original fails in backward: {_reason(err)}"
            if note not in notes:
                notes.append(note)
            return None
        found = {}
        for name, parameter in self.base.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found

    def _compare_gradients(
        self, case: _Case, expected: dict[str, torch.Tensor], outputs: Mapping[str, Any]
    ) -> Comparison:
        """Subtract the operated model's gradients from the original's as they come in."""
        largest = {name: _largest(gradient) for name, gradient in expected.items()}
        floor = _TINY * max(largest.values(), default=0.0)
        differences: dict[str, float | str] = {}
        shapes = {name: parameter.shape for name, parameter in self.base.named_parameters()}
        reads = {name: read for read in self.plan.reads for name in read.site.weights}
        handles = []
        for name, parameter in self.operated.named_parameters(remove_duplicate=False):
            hook = _Subtract(name, shapes.get(name), reads.get(name), expected, differences)
            if name in shapes and parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        loss = _random_loss(outputs)
        try:
            if loss is None:
                return self._failure("gradients", case, "no output of the operated model has any")
            loss.backward()
        except Exception as err:
            return self._failure("gradients", case, f"the operated model fails: {_reason(err)}")
        finally:
            for handle in handles:
                handle.remove()
            self.operated.zero_grad(set_to_none=True)
        for name, rest in expected.items():
            scale = max(largest.get(name, 0.0), floor) or 1.0
            differences.setdefault(name, _number(_largest(rest) / scale))
        return self._compared("gradients", case, differences)

    def align_buffers(self) -> None:
        """Give the operated model what the original's buffers took from a run that failed."""
        mine = dict(self.operated.named_buffers(remove_duplicate=False))
        for name, buffer in self.base.named_buffers():
            if name in mine and mine[name].shape == buffer.shape:
                mine[name].copy_(buffer)

    def _buffer_differences(self) -> dict[str, float | str]:
        expected = dict(self.base.named_buffers())
        mine = dict(self.operated.named_buffers(remove_duplicate=False))
        mine = {name: mine[name] for name in expected if name in mine}
        sizes = [_largest(b) for b in expected.values() if b.is_floating_point()]
        return _differences(expected, mine, floor=_TINY * max(sizes, default=0.0))


@dataclass(frozen=True)
class _Subtract:
    """Hook on a parameter of the operated model: takes its original entries off the expectation."""

    name: str
    shape: torch.Size | None
    read: Read | None
    expected: dict[str, torch.Tensor]
    differences: dict[str, float | str]

    def __call__(self, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or self.shape is None:
            return
        if gradient.shape != self.shape and self.read is not None:
            gradient = split_entries(gradient, self.read)[0]
            gradient = (
                gradient.reshape(self.shape) if gradient.numel() == self.shape.numel() else gradient
            )
        if gradient.shape != self.shape:
            self.differences[self.name] = (
                f"has shape {tuple(gradient.shape)}, not {tuple(self.shape)}"
            )
        elif self.name in self.expected:
            self.expected[self.name].sub_(gradient)
        else:
            self.expected[self.name] = -gradient


def _random_loss(outputs: Mapping[str, Any]) -> torch.Tensor | None:
    """Σ output · noise over everything that has a gradient; the same noise for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    terms = []
    for value in outputs.values():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            value = torch.view_as_real(value) if value.is_complex() else value
            noise = torch.randn(value.shape, generator=generator).to(value)
            terms.append((torch.where(value.isfinite(), value, 0) * noise).sum())
    return torch.stack([term.double() for term in terms]).sum() if terms else None


def _detached(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in outputs.items()}


def _differences(
    expected: Mapping[str, Any], got: Mapping[str, Any], floor: float = 0.0
) -> dict[str, float | str]:
    """Relative difference of each pair, or why it can't be told."""
    found: dict[str, float | str] = {}
    for name, value in expected.items():
        found[name] = _difference(value, got[name], floor) if name in got else "is missing"
    found.update({name: "is new" for name in got if name not in expected})
    return found


def _difference(expected: Any, got: Any, floor: float) -> float | str:
    if not isinstance(expected, torch.Tensor):
        if isinstance(expected, bool | int | float | str | None):
            same = expected == got or (expected != expected and got != got)
            return 0.0 if same else f"is {got!r}, not {expected!r}"
        return 0.0 if type(expected) is type(got) else f"is a {type(got).__name__}"
    if not isinstance(got, torch.Tensor):
        return f"is a {type(got).__name__}, not a tensor"
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"is {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), got.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    scale = max(_largest(torch.where(a.isfinite(), a, 0)), floor) or 1.0
    return _number(_largest(torch.where(same, 0, a - b)) / scale)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _number(value: float) -> float:
    """NaN, which no limit catches, as infinity."""
    return float("inf") if value != value else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reason(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0]}" if lines else type(err).__name__
