"""Buffers of both models after a run in training, held against each other.

What a state dict keeps is the same function of the data in both. Where a difference is over the
limit, what other rounding moves as far in the original alone is left out and named with the
numbers. Nothing else is, jumps too: buffers are sums over all that came in, and don't jump.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from aim_surgery.verification.comparison import TINY, Case, Comparison
from aim_surgery.verification.differences import differences_of, largest
from aim_surgery.verification.original import Original
from aim_surgery.verification.rounding import is_as_far

_NAMED = 5  # caches that a note names


def compare_buffers(
    original: Original,
    operated: nn.Module,
    case: Case,
    before: Mapping[str, torch.Tensor],
    limit: float,
    notes: list[str],
) -> Comparison | None:
    """Compare the buffers that a run left.

    Args:
        original: The original, after the run.
        operated: The operated model, likewise; it gets the original's buffers where they differ by
            rounding, or the difference would grow from case to case.
        case: What they ran on.
        before: The original's buffers before the run.
        limit: The largest difference that passes.
        notes: Told what is left out.

    Returns:
        What came of it; None where there are no buffers.
    """
    differences = _differences(original.model, operated, case, notes)
    if not differences:
        return None
    found = Comparison.of("buffers", case, limit, differences)
    if found.ok:
        return found
    moved = _moved(original, case, before, notes)
    unsure = {
        name: size
        for name, size in differences.items()
        if isinstance(size, float) and size > limit and is_as_far(size, moved.get(name, 0.0))
    }
    if unsure:
        worst = max(unsure, key=lambda name: unsure[name])
        notes.append(
            f"{case}: {len(unsure)} buffers are not judged, as {worst}: it differs by "
            f"{unsure[worst]:.1e}, and by {moved[worst]:.1e} in the original alone when it is "
            f"rounded otherwise"
        )
        align_buffers(original.model, operated)
    judged = {name: size for name, size in differences.items() if name not in unsure}
    return Comparison.of("buffers", case, limit, judged)


def align_buffers(original: nn.Module, operated: nn.Module) -> None:
    """Give the operated model the values of the original's buffers."""
    mine = dict(operated.named_buffers(remove_duplicate=False))
    for name, buffer in original.named_buffers():
        if name in mine and mine[name].shape == buffer.shape:
            mine[name].copy_(buffer)


def _differences(
    original: nn.Module, operated: nn.Module, case: Case, notes: list[str]
) -> dict[str, float | str]:
    """Of each buffer, but for caches that forward replaces: a graph computes those anew."""
    expected = dict(original.named_buffers())
    mine = dict(operated.named_buffers(remove_duplicate=False))
    kept = original.state_dict().keys()
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
    return differences_of(expected, mine, _floor(expected))


def _moved(
    original: Original, case: Case, before: Mapping[str, torch.Tensor], notes: list[str]
) -> dict[str, float]:
    """How far other rounding moves the original's buffers, of the same run."""
    after = original.buffers()
    moved = dict.fromkeys(after, 0.0)
    for _, nudged in original.nudged(case, before, notes):
        nudged = {name: value for name, value in nudged.items() if name in after}
        for name, size in differences_of(after, nudged, _floor(after)).items():
            moved[name] = max(moved[name], size if isinstance(size, float) else 0.0)
    return moved


def _floor(buffers: Mapping[str, torch.Tensor]) -> float:
    sizes = [largest(buffer) for buffer in buffers.values() if buffer.is_floating_point()]
    return TINY * max(sizes, default=0.0)
