"""A pair of models, run on the same inputs and held against each other.

Outputs that differ are looked at once more: how far does the original's own output move when its
inputs and products are rounded otherwise, as another order of its sums would do? What moves as far
can't be told apart in that precision. A detector sorts and thresholds: where two scores are as good
as equal, entries of its outputs jump. Both are left out, and named with the numbers; the entries
that don't jump are judged (`rounding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from aim_surgery.capture.nested import is_told, named_leaves
from aim_surgery.errors import in_one_line, listed
from aim_surgery.planning import Plan
from aim_surgery.verification.buffer_differences import align_buffers, compare_buffers
from aim_surgery.verification.comparison import TOLERANCES, Case, Comparison
from aim_surgery.verification.differences import detached, differences_of, is_empty
from aim_surgery.verification.gradient_differences import compare_gradients, gradients_of
from aim_surgery.verification.original import Original
from aim_surgery.verification.rounding import MISSING, Unsure, held_against
from aim_surgery.verification.twins import call, modes_of


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
    _original: Original = field(init=False)

    def __post_init__(self) -> None:
        self._original = Original(self.base)

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
            reason = f"the operated model fails: {in_one_line(err)}"
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
        return self._original.set_apart

    def align_buffers(self) -> None:
        """Give the operated model what the original's buffers took from a run that failed."""
        align_buffers(self.base, self.operated)

    def compare(self, case: Case, notes: list[str]) -> list[Comparison] | str:
        """Compare on one case; a text where the original refuses it."""
        found = self._compared(case, notes)
        if not isinstance(found, str) or case.gradients or self._original.derives:
            return found
        self._original.derives = True
        again = self._compared(case, notes)
        self._original.derives = not isinstance(again, str)
        return again if self._original.derives else found

    def _compared(self, case: Case, notes: list[str]) -> list[Comparison] | str:
        limit, gradient_limit = self.limits
        judges_buffers = case.training is not False
        before = self._original.buffers() if judges_buffers else {}
        with torch.set_grad_enabled(case.gradients or self._original.derives):
            try:
                expected = self._run(self.base, case)
            except Exception as err:
                self.align_buffers()
                return in_one_line(err)
            gradients = gradients_of(self.base, expected, notes) if case.gradients else None
            expected = detached(expected)
            try:
                got = self._run(self.operated, case)
            except Exception as err:
                reason = f"the operated model fails: {in_one_line(err)}"
                return [Comparison.failed("outputs", case, limit, reason)]
            outputs, unsure = self._compare_outputs(case, expected, detached(got), notes)
            found = [outputs]
            if gradients is not None and any(one.jumps for one in unsure.values()):
                notes.append(f"{case}: gradients are not compared, as those of jumps differ")
            elif gradients is not None:
                asked = self.base, self.operated, self.plan, case
                found.append(compare_gradients(*asked, gradients, got, gradient_limit, notes))
        if judges_buffers:
            buffers = compare_buffers(self._original, self.operated, case, before, limit, notes)
            found += [buffers] if buffers else []
        return found

    def _run(self, model: nn.Module, case: Case) -> dict[str, Any]:
        self._original.put_mode(model, case.training)
        return named_leaves(call(model, case.samples))

    def _compare_outputs(
        self, case: Case, expected: Mapping[str, Any], got: Mapping[str, Any], notes: list[str]
    ) -> tuple[Comparison, dict[str, Unsure]]:
        """Judge outputs, and those that are over the limit once more."""
        differences = differences_of(expected, got)
        found, unsure = Comparison.of("outputs", case, self.limits[0], differences), {}
        if not found.ok:
            unsure = self._unsure(case, expected, got, differences, notes)
        if unsure:
            rests = {name: one.rest for name, one in unsure.items()}
            kept = {n: v for n, v in (differences | rests).items() if v is not None}
            found = Comparison.of("outputs", case, self.limits[0], kept)
        closed = [name for name, value in expected.items() if not is_told(value)]
        if closed:
            kinds = {type(expected[name]).__name__ for name in closed}
            note = f"outputs are not compared: {listed(closed)} ({', '.join(sorted(kinds))})"
            notes += [note] if note not in notes else []
        if is_empty(expected, except_for=[n for n, one in unsure.items() if one.rest is None]):
            found = replace(found, judged=False)
            notes.append(f"{case}: no outputs are left that would say anything")
        return found, unsure

    def _unsure(
        self,
        case: Case,
        expected: Mapping[str, Any],
        got: Mapping[str, Any],
        differences: Mapping[str, float | str],
        notes: list[str],
    ) -> dict[str, Unsure]:
        """Outputs whose differences are rounding, all of them or where they jump."""
        limit, original = self.limits[0], self._original
        nudged = [outputs for outputs, _ in original.nudged(case, original.buffers(), notes)]
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
            measured = isinstance(found, float)
            size = f"differs by {found:.1e}, and" if measured else f"{found}, and differs"
            notes.append(
                f"{case}: {left} not judged: it {size} by {one.farthest:.1e} in "
                f"the original alone when it is rounded otherwise"
            )
        return unsure
