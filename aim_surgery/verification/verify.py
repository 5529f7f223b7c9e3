"""All checks in one call: `verify(model, gm) -> Verification`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import ExportedProgram

from aim_surgery.capture import Inputs, inputs_of_program, unwrap
from aim_surgery.capture.belongings import Belongings
from aim_surgery.capture.copies import has_values, random_state_kept
from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.aim_modules import is_folded, plan_of, unwrapped
from aim_surgery.verification.coverage import Coverage, check_coverage
from aim_surgery.verification.equivalence import Equivalence, check_equivalence
from aim_surgery.verification.gradients import Gradients, check_gradients
from aim_surgery.verification.samples import samples_for
from aim_surgery.verification.twins import switches_kept

_LISTED = 8


@dataclass(frozen=True)
class Verification:
    """What came of the three checks.

    Attributes:
        equivalence: Whether both models compute the same.
        coverage: Whether every weight reads the memory or is listed as left out.
        gradients: Whether training reaches all that is new.
    """

    equivalence: Equivalence
    coverage: Coverage
    gradients: Gradients

    @property
    def ok(self) -> bool:
        """Whether all three checks pass."""
        return self.equivalence.ok and self.coverage.ok and self.gradients.ok

    @property
    def largest_difference(self) -> float:
        """Of the outputs in the model's own dtype, relative to the largest output."""
        return self.equivalence.own.difference

    @property
    def notes(self) -> tuple[str, ...]:
        """What the checks could not judge."""
        notes = (*self.equivalence.notes, *self.coverage.notes, *self.gradients.notes)
        return tuple(dict.fromkeys(notes))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        faults = {
            "equivalence": [str(comparison) for comparison in self.equivalence.offenders],
            "coverage": [" ".join(fault) for fault in self.coverage.unaccounted],
            "gradients": [": ".join(fault) for fault in self.gradients.unreached],
        }
        for name, offenders in faults.items():
            check = getattr(self, name)
            yield f"{name:<12} {'ok' if check.ok else 'FAILED':<7} {check}"
            yield from (f"{'':<13}{offender}" for offender in offenders[:_LISTED])
            if len(offenders) > _LISTED:
                yield f"{'':<13}and {len(offenders) - _LISTED} more"
        yield from (f"{'note':<13}{note}" for note in self.notes)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without torch's fast path for attention, which gives zeros at padded positions."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def verify(
    model: nn.Module | ExportedProgram, gm: nn.Module, example_inputs: Inputs | None = None
) -> Verification:
    """Check an operated model against the original.

    Runs on copies, in float64 where the model allows it, in the modes that `train()` and `eval()`
    of each give; where submodules of the original were set apart by hand, also as they were set.
    An operated model that was trained since, or that was made with `init="fresh"`, is another
    function than the original, and the equivalence check says so.

    Args:
        model: The original, a module or an exported program; left unchanged.
        gm: What `transform` or `apply` made of it; left unchanged.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Without any, what a program was exported with, else noise of the shapes that the plan
            was made with, and zeros for integers.

    Returns:
        The three results; print it, or look at `ok`.

    Raises:
        AimSurgeryError: `gm` was not made by this package or is folded, there are no example
            inputs, or the original does not run on them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from aim_surgery import transform
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> verify(model, transform(model)).ok
        True
    """
    gm = unwrapped(gm)
    plan = plan_of(gm)
    if plan is None:
        raise AimSurgeryError(
            f"verify needs an operated model as its second argument, got {type(gm).__name__}: pass "
            f"what transform, apply or load returned"
        )
    if is_folded(gm):
        raise AimSurgeryError(
            "verify trains a copy of the operated model, and this one is folded, for inference "
            "alone: verify the model that was given to fold, and compare both on your inputs"
        )
    model, _ = unwrap(model)
    inputs = inputs_of_program(model) if example_inputs is None else example_inputs
    if not (has_values(model) and has_values(gm)):
        raise AimSurgeryError(
            "a model on the meta device has no values to verify: load its weights"
        )
    with (
        switches_kept(),
        random_state_kept(Belongings.of(model).sources),
        _plain_attention(),
        torch.inference_mode(False),
    ):
        samples = samples_for(model, plan, inputs)
        return Verification(
            equivalence=check_equivalence(model, gm, plan, samples),
            coverage=check_coverage(model, gm, plan, samples),
            gradients=check_gradients(model, gm, plan, samples),
        )
