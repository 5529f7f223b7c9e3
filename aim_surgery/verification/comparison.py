"""One comparison: a pair of models, run on the same inputs and held against each other.

    difference(a, b) = max |a - b| / max |a|

for outputs, for buffers after a run in training, and for the gradients of a random linear form of
the outputs: of widened weights the original entries. Modes are compared as flags.

Outputs that differ are looked at once more: how far does the original's own output move when its
inputs and products are rounded otherwise, as another order of its sums would do? What moves as far
can't be told apart in that precision. A detector sorts and thresholds: where two scores are as good
as equal, entries of its outputs jump. Both are left out, and named with the numbers; the entries
that don't jump are judged (`rounding.py`). Of buffers, only what moves as far is left out: they are
sums over all that came in, and don't jump.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from aim_surgery.planning import Plan, Read
from aim_surgery.verification.differences import detached, differences_of, is_empty, largest, number
from aim_surgery.verification.rounding import (
    MARGIN,
    MISSING,
    RoundedOtherwise,
    Unsure,
    held_against,
)
from aim_surgery.verification.samples import Samples, named_leaves
from aim_surgery.verification.twins import call, modes_of, put_modes, split_entries

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
_NUDGES = 8  # an entry that jumps half the time is seen to jump in all but 0.4 % of cases
_NAMED = 5  # offenders that a comparison names in words


@dataclass(frozen=True)
class Comparison:
    """One quantity of both models, held against each other.

    Attributes:
        what: "outputs", "gradients", "buffers" or "modes".
        case: Mode, inputs and dtype, in words.
        dtype: The dtype that both ran in.
        difference: The largest, relative to the largest value; infinite where there is no telling.
        limit: The largest difference that passes.
        offenders: What differs by more, the worst first, with its difference or the reason.
        judged: Whether there was anything to compare.
    """

    what: str
    case: str
    dtype: torch.dtype
    difference: float
    limit: float
    offenders: tuple[str, ...] = ()
    judged: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing differs by more than the limit."""
        return self.difference <= self.limit and not self.offenders

    def __str__(self) -> str:
        text = f"{self.what} differ by {self.difference:.1e} (limit {self.limit:.0e}), {self.case}"
        if self.what == "modes":
            text = f"modes {'agree' if self.ok else 'differ'}, {self.case}"
        named = list(self.offenders[:_NAMED])
        if len(self.offenders) > _NAMED:
            named.append(f"and {len(self.offenders) - _NAMED} more")
        return f"{text}: {'; '.join(named)}" if named else text


@dataclass(frozen=True)
class Case:
    """What to compare on.

    Attributes:
        training: The mode to ask both models for; None leaves the original's modules as they came.
        samples: The inputs.
        words: The inputs in words.
        dtype: The dtype of both models and the inputs.
        gradients: Whether to compare gradients too.
    """

    training: bool | None
    samples: Samples
    words: str
    dtype: torch.dtype
    gradients: bool = False

    def __str__(self) -> str:
        modes = {True: "training", False: "evaluation", None: "modes set by hand"}
        return f"{modes[self.training]}, {self.words}, {dtype_name(self.dtype)}"


@dataclass
class Pair:
    """Copies of both models, compared case by case.

    Attributes:
        base: The original.
        operated: The operated model.
        plan: What was done; tells original from new entries.
        limits: Tolerances of outputs (and buffers), and of gradients.
    """

    base: nn.Module
    operated: nn.Module
    plan: Plan
    limits: tuple[float, float] = TOLERANCES[torch.float64]
    _given: dict[str, bool] = field(init=False)

    def __post_init__(self) -> None:
        self._given = modes_of(self.base)

    def compare_modes(self, training: bool, dtype: torch.dtype) -> Comparison | None:
        """Compare what `train(training)` makes of every module; None where the original fails."""
        case = f"after train({training})"
        limit = self.limits[0]
        try:
            self.base.train(training)
        except Exception:
            return None
        try:
            self.operated.train(training)
        except Exception as err:
            reason = f"the operated model fails: {reason_of(err)}"
            return Comparison("modes", case, dtype, float("inf"), limit, (reason,))
        expected, mine = modes_of(self.base), modes_of(self.operated)
        words = {True: "training", False: "evaluation"}
        offenders = tuple(
            f"{name or 'the model itself'} is in {words[mine[name]]} mode, not {words[mode]}"
            for name, mode in expected.items()
            if name in mine and mine[name] != mode
        )
        return Comparison(
            "modes", case, dtype, float("inf") if offenders else 0.0, limit, offenders
        )

    @property
    def set_apart(self) -> bool:
        """Whether the original came in modes that its own `train()` would not have set."""
        try:
            self.base.train(self._given[""])
        except Exception:
            return True
        return modes_of(self.base) != self._given

    def compare(self, case: Case, notes: list[str]) -> list[Comparison] | str:
        """Compare on one case; a text where the original refuses it."""
        judges_buffers = case.training is not False
        before = self._base_buffers() if judges_buffers else {}
        with torch.set_grad_enabled(case.gradients):
            try:
                self._enter(self.base, case.training)
                expected = named_leaves(call(self.base, case.samples))
            except Exception as err:
                self.align_buffers()
                return reason_of(err)
            gradients = self._base_gradients(expected, notes) if case.gradients else None
            expected = detached(expected)
            try:
                self._enter(self.operated, case.training)
                got = named_leaves(call(self.operated, case.samples))
            except Exception as err:
                return [
                    self._failure("outputs", case, f"the operated model fails: {reason_of(err)}")
                ]
            differences = differences_of(expected, detached(got))
            found = [self._compared("outputs", case, differences)]
            unsure = {} if found[0].ok else self._unsure(case, expected, got, differences, notes)
            if unsure:
                rests = {name: one.rest for name, one in unsure.items()}
                kept = {n: v for n, v in (differences | rests).items() if v is not None}
                found = [self._compared("outputs", case, kept)]
            if gradients is not None and any(one.jumps for one in unsure.values()):
                notes.append(f"{case}: gradients are not compared, as those of jumps differ")
            elif gradients is not None:
                self._leave_out_frozen(gradients, notes)
                found.append(self._compare_gradients(case, gradients, got))
            if is_empty(expected, except_for=[n for n, one in unsure.items() if one.rest is None]):
                found[0] = replace(found[0], judged=False)
                notes.append(f"{case}: no outputs are left that would say anything")
        if judges_buffers:
            differences = self._buffer_differences(case, notes)
            if differences:
                found.append(self._compare_buffers(case, before, differences, notes))
        return found

    def _compare_buffers(
        self,
        case: Case,
        before: Mapping[str, torch.Tensor],
        differences: Mapping[str, float | str],
        notes: list[str],
    ) -> Comparison:
        """Leave out what other rounding moves as far in the original; nothing else, jumps too."""
        found = self._compared("buffers", case, differences)
        if found.ok:
            return found
        moved = self._moved_buffers(case, before, notes)
        limit, unsure = self.limits[0], dict[str, float]()
        for name, size in differences.items():
            if isinstance(size, float) and limit < size <= MARGIN * moved.get(name, 0.0):
                unsure[name] = size
        if unsure:
            worst = max(unsure, key=lambda name: unsure[name])
            notes.append(
                f"{case}: {len(unsure)} buffers are not judged, as {worst}: it differs by "
                f"{unsure[worst]:.1e}, and by {moved[worst]:.1e} in the original alone when it is "
                f"rounded otherwise"
            )
            self.align_buffers()  # or the difference would grow from case to case
        return self._compared(
            "buffers", case, {n: v for n, v in differences.items() if n not in unsure}
        )

    def _moved_buffers(
        self, case: Case, before: Mapping[str, torch.Tensor], notes: list[str]
    ) -> dict[str, float]:
        """How far other rounding moves the original's buffers, of the same run."""
        after = self._base_buffers()
        moved = dict.fromkeys(after, 0.0)
        for _, nudged in self._nudged(case, before, notes):
            nudged = {name: value for name, value in nudged.items() if name in after}
            for name, size in differences_of(after, nudged, self._floor(after)).items():
                moved[name] = max(moved[name], size if isinstance(size, float) else 0.0)
        return moved

    def _base_buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.base.named_buffers()}

    @torch.no_grad()
    def _put_buffers(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, buffer in self.base.named_buffers():  # forward may add some, or drop them
            if name in values and buffer.shape == values[name].shape:  # else a cache, replaced
                buffer.copy_(values[name])

    def _unsure(
        self,
        case: Case,
        expected: Mapping[str, Any],
        got: Mapping[str, Any],
        differences: Mapping[str, float | str],
        notes: list[str],
    ) -> dict[str, Unsure]:
        """Outputs whose differences are rounding, all of them or where they jump."""
        limit = self.limits[0]
        nudged = [outputs for outputs, _ in self._nudged(case, self._base_buffers(), notes)]
        if not nudged:
            return {}
        unsure: dict[str, Unsure] = {}
        for name, found in differences.items():
            if isinstance(found, float) and found <= limit:
                continue
            others = [run.get(name, MISSING) for run in nudged]
            one = held_against(expected.get(name, MISSING), got.get(name, MISSING), others, limit)
            if not one.is_rounding(limit):
                continue
            unsure[name] = one
            left = f"{name} is" if one.rest is None else f"{one.jumping} entries of {name} are"
            size = f"{found:.1e}" if isinstance(found, float) else found
            notes.append(
                f"{case}: {left} not judged: it differs by {size}, and by {one.farthest:.1e} in "
                f"the original alone when it is rounded otherwise"
            )
        return unsure

    def _nudged(
        self, case: Case, start: Mapping[str, torch.Tensor], notes: list[str]
    ) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
        """The original's outputs and buffers, rounded otherwise; none where it refuses that."""
        now, refusals = self._base_buffers(), list[str]()
        for seed in range(_NUDGES):
            self._put_buffers(start)
            try:
                with torch.no_grad(), RoundedOtherwise(seed):
                    self._enter(self.base, case.training)
                    outputs = named_leaves(call(self.base, case.samples.nudged(seed)))
                found = detached(outputs), self._base_buffers()
            except Exception as err:  # of a model that looks at its inputs, say
                refusals.append(reason_of(err))
                continue
            finally:
                self._put_buffers(now)
            yield found
        if len(refusals) == _NUDGES:
            notes.append(
                f"{case}: no difference is taken for rounding, as the original refuses inputs and "
                f"products that are rounded otherwise: {refusals[0]}"
            )

    def _enter(self, module: nn.Module, training: bool | None) -> None:
        if training is None:
            put_modes(module, self._given)
        else:
            module.train(training)

    def _compared(
        self, what: str, case: Case, differences: Mapping[str, float | str]
    ) -> Comparison:
        limit = self.limits[1 if what == "gradients" else 0]
        measured = {k: v if isinstance(v, float) else float("inf") for k, v in differences.items()}
        worst = sorted(measured, key=lambda name: -measured[name])
        offenders = []
        for name in worst:
            found = differences[name]
            if not measured[name] <= limit:
                size = f"{found:.1e}" if isinstance(found, float) else found
                offenders.append(f"{name} {size}")
        largest = max(measured.values(), default=0.0)
        return Comparison(what, str(case), case.dtype, largest, limit, tuple(offenders))

    def _failure(self, what: str, case: Case, reason: str) -> Comparison:
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
            self.base.zero_grad(set_to_none=True)  # what came before it failed
            note = f"gradients not compared, the original fails in backward: {reason_of(err)}"
            if note not in notes:
                notes.append(note)
            return None
        found = {}
        for name, parameter in self.base.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found

    def _leave_out_frozen(self, expected: dict[str, torch.Tensor], notes: list[str]) -> None:
        """What the operated model was told not to train has no gradient to compare."""
        operated = dict(self.operated.named_parameters(remove_duplicate=False))
        frozen = [n for n in expected if n in operated and not operated[n].requires_grad]
        for name in frozen:
            del expected[name]
        note = f"frozen in the operated model, so their gradients are not compared: {len(frozen)}"
        if frozen and note not in notes:
            notes.append(note)

    def _compare_gradients(
        self, case: Case, expected: dict[str, torch.Tensor], outputs: Mapping[str, Any]
    ) -> Comparison:
        """Subtract the operated model's gradients from the original's as they come in."""
        sizes = {name: largest(gradient) for name, gradient in expected.items()}
        floor = _TINY * max(sizes.values(), default=0.0)
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
            return self._failure("gradients", case, f"the operated model fails: {reason_of(err)}")
        finally:
            for handle in handles:
                handle.remove()
            self.operated.zero_grad(set_to_none=True)
        for name, rest in expected.items():
            scale = max(sizes.get(name, 0.0), floor) or 1.0
            differences.setdefault(name, number(largest(rest) / scale))
        return self._compared("gradients", case, differences)

    def align_buffers(self) -> None:
        """Give the operated model what the original's buffers took from a run that failed."""
        mine = dict(self.operated.named_buffers(remove_duplicate=False))
        for name, buffer in self.base.named_buffers():
            if name in mine and mine[name].shape == buffer.shape:
                mine[name].copy_(buffer)

    def _buffer_differences(self, case: Case, notes: list[str]) -> dict[str, float | str]:
        """Of each buffer, but for caches that forward replaces: a graph computes those anew."""
        expected = dict(self.base.named_buffers())
        mine = dict(self.operated.named_buffers(remove_duplicate=False))
        kept = self.base.state_dict().keys()
        caches = [
            name
            for name, value in expected.items()
            if name not in kept and name in mine and mine[name].shape != value.shape
        ]
        if caches:
            notes.append(
                f"{case}: not compared, as no state dict keeps them and the original's forward "
                f"replaces them by others of another size: {', '.join(caches[:_NAMED])}"
            )
        expected = {name: value for name, value in expected.items() if name not in caches}
        mine = {name: mine[name] for name in expected if name in mine}
        return differences_of(expected, mine, self._floor(expected))

    def _floor(self, buffers: Mapping[str, torch.Tensor]) -> float:
        sizes = [largest(buffer) for buffer in buffers.values() if buffer.is_floating_point()]
        return _TINY * max(sizes, default=0.0)


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


def dtype_name(dtype: torch.dtype) -> str:
    """`float64` and the like."""
    return str(dtype).removeprefix("torch.")


def reason_of(err: Exception) -> str:
    """An error in one line."""
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0]}" if lines else type(err).__name__
