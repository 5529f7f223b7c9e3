"""What one comparison is of, and what came of it, as frozen data; `pair.py` makes them.

    difference(a, b) = max |a - b| / max |a|

for outputs, for buffers after a run in training, and for the gradients of a random linear form of
the outputs. Modes are compared as flags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from aim_surgery.verification.samples import Samples

# dtype: (outputs and buffers, gradients); relative to the largest value of the tensor
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-5, 1e-3),
    torch.bfloat16: (3e-2, 3e-1),
    torch.float16: (1e-2, 1e-1),
}
# Gradients and buffers below this share of the largest of all are rounding in places (a bias before
# a norm, the mean of what has been centred): they are measured against that share.
TINY = 1e-3
_NAMED = 5  # offenders that a comparison names in words


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

    @classmethod
    def of(
        cls, what: str, case: Case, limit: float, differences: Mapping[str, float | str]
    ) -> Comparison:
        """Judge differences.

        Args:
            what: "outputs", "gradients" or "buffers".
            case: What they were compared on.
            limit: The largest difference that passes.
            differences: By name: a number, or why there is none to be had.
        """
        measured = {k: v if isinstance(v, float) else float("inf") for k, v in differences.items()}
        worst = sorted(measured, key=lambda name: -measured[name])
        offenders = []
        for name in worst:
            found = differences[name]
            if not measured[name] <= limit:
                size = f"{found:.1e}" if isinstance(found, float) else found
                offenders.append(f"{name} {size}")
        largest = max(measured.values(), default=0.0)
        return cls(what, str(case), case.dtype, largest, limit, tuple(offenders))

    @classmethod
    def failed(cls, what: str, case: Case, limit: float, reason: str) -> Comparison:
        """There is no difference to be had, as the operated model fails."""
        return cls(what, str(case), case.dtype, float("inf"), limit, (reason,))

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


def dtype_name(dtype: torch.dtype) -> str:
    """`float64` and the like."""
    return str(dtype).removeprefix("torch.")
