"""What another order of sums would do to a model: its products, rounded otherwise.

With e an output of the original, n_i what it becomes when rounded otherwise, g the operated model's
and s = max |e|, entry by entry:

    moved = max_i |n_i - e| / s        jumps = moved > 1/100        differs = |g - e| / s

A difference is rounding where differs <= 2 max moved, both over the entries that don't jump, and
the others hold values of the range of e and n_i. Twice, as the operated model is one more draw of
the same kind: one in nine passes the largest of eight. Where some entries jump, those that move
by more than 1/1000 count as jumping, too: they were lucky in few draws. Sorting, thresholds and
indices make entries jump where two numbers are as good as equal; no smooth function would. A shape
or a literal that differs is rounding where it changes in n_i, too: a shape in the same axes, a
dtype to the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aim_surgery.verification.differences import as_tensor, largest
from aim_surgery.verification.kernels import SUMS

_ERROR = 2  # of products, in last bits of their usual size; measured: 1.2 to 2.4 for 64 to 12,544
MARGIN = 2  # between the largest of some draws and one more
_JUMP = 1e-2  # of what a nudge by rounding changes: a smooth function would not do that
_NEAR = 1e-3  # where some jump, what else does


class RoundedOtherwise(TorchDispatchMode):
    """Adds to products what their rounding error usually is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.rpartition("::")[2] in SUMS:
            self._nudge(result[0] if isinstance(result, tuple | list) else result)
        return result

    def _nudge(self, total: Any) -> None:
        if not isinstance(total, torch.Tensor) or not total.is_floating_point():
            return
        if total.numel():
            # squares leave the range of float16 soon, and infinite entries have no last bits
            wide = torch.promote_types(total.dtype, torch.float32)
            values = torch.nan_to_num(total.to(wide), nan=0.0, posinf=0.0, neginf=0.0)
            size = values.square().mean().sqrt() * (_ERROR * torch.finfo(total.dtype).eps)
            noise = torch.randn(total.shape, generator=self._generator, device="cpu").to(values)
            total.add_((noise * size).to(total.dtype))


def is_as_far(difference: float, moved: float) -> bool:
    """Whether a difference can't be told from what rounding moved, at most, in some draws."""
    return difference <= MARGIN * moved


MISSING = object()  # an output that isn't there


@dataclass(frozen=True)
class Unsure:
    """A difference over the limit, held against what rounding does.

    Attributes:
        differs: The largest difference of entries that don't jump; infinite where there are none
            to compare, as shapes or literals differ.
        moved: How far rounding moves those entries; infinite where it changes shape or literal in
            the same way.
        farthest: How far rounding moves any entry.
        jumping: Entries that jump.
        sound: Whether what jumps in the operated model may come of rounding.
        rest: What is to be judged: the difference of the entries that don't jump; None where
            nothing of it is.
    """

    differs: float
    moved: float
    farthest: float
    jumping: int
    sound: bool
    rest: float | None = None

    @property
    def jumps(self) -> bool:
        """Whether more than last bits change."""
        return self.farthest > _JUMP

    def is_rounding(self, limit: float) -> bool:
        """Whether what is over the limit can't be told from rounding."""
        return self.sound and (self.differs <= limit or is_as_far(self.differs, self.moved))


def held_against(expected: Any, got: Any, nudged: Sequence[Any], limit: float) -> Unsure:
    """Hold an output of both models against what rounding does to the original's.

    Args:
        expected: The original's; `MISSING` where it has none.
        got: The operated model's, likewise.
        nudged: The original's when it is rounded otherwise, once each, likewise.
        limit: The largest difference that passes.

    Returns:
        What came of it.
    """
    every = tuple(map(as_tensor, (expected, got, *nudged)))
    if not all(isinstance(value, torch.Tensor) for value in every):
        return _changed(any(_alike(value, got) and not _alike(value, expected) for value in nudged))
    e, g, *others = (value.detach().to_dense() for value in every)
    if g.dtype != e.dtype:  # whatever the numbers are
        return _changed(any(value.dtype == g.dtype for value in others))
    within = _within(g, [e, *others])
    if any(value.shape != e.shape for value in (g, *others)):
        same = all(value.ndim == e.ndim for value in (g, *others))
        axes = [axis for axis in range(e.ndim) if same and g.shape[axis] != e.shape[axis]]
        changes = all(any(n.shape[axis] != e.shape[axis] for n in others) for axis in axes)
        return _changed(within and same and changes and any(n.shape != e.shape for n in others))
    wide = torch.complex128 if e.is_complex() else torch.float64
    e, g, *others = (value.to(wide) for value in (e, g, *others))
    scale = largest(torch.where(e.isfinite(), e, 0)) or 1.0
    moves = torch.stack([_apart(e, n, scale) for n in others]).amax(0)
    jumps, apart = moves > _JUMP, _apart(e, g, scale)
    if jumps.any():  # of those near to it some were lucky in a few draws
        jumps = moves > _NEAR
    differs, moved = (largest(torch.where(jumps, 0, value)) for value in (apart, moves))
    count = int(jumps.sum())
    rest = differs if differs <= limit and count < e.numel() else None
    return Unsure(differs, moved, largest(moves), count, within or not count, rest)


def _changed(in_rounding_too: bool) -> Unsure:
    endless = float("inf")
    return Unsure(endless, endless if in_rounding_too else 0.0, endless, 0, in_rounding_too)


def _alike(value: Any, other: Any) -> bool:
    """Whether both are one literal, both tensors, or of one kind of other things."""
    if isinstance(value, bool | int | float | str | None):
        return type(value) is type(other) and value == other
    return type(value) is type(other) and (value is MISSING) == (other is MISSING)


def _apart(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.nan_to_num(torch.where(same, 0, a - b).abs() / scale, nan=float("inf"))


def _within(got: torch.Tensor, known: Sequence[torch.Tensor]) -> bool:
    """Whether values are of a range that the original gives, NaN only where it gives some."""
    if got.dtype in (torch.bool, torch.complex64, torch.complex128) or not got.numel():
        return True
    values = torch.cat([value.flatten().double() for value in known])
    if not values.numel():
        return False
    mine = got.flatten().double()
    if mine.isnan().any() and not values.isnan().any():
        return False
    mine, values = mine[~mine.isnan()], values[~values.isnan()]
    if not mine.numel() or not values.numel():
        return not mine.numel()
    room = _JUMP * float(values.abs().max())
    return bool(mine.min() >= values.min() - room and mine.max() <= values.max() + room)
