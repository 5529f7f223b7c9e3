"""Where an axis of an operand is in the result of a call, as far as shapes tell it.

A rule takes one operand's axis (`Move`) and gives the axis of the result that runs over the same
entries, or None where there is none. `LOST` is for samples that a call puts in another order
(`h[perm]`, `flip`, `sort`): their axis may look the same and isn't. The prefix rule is for all that
reshapes:

    (p, c, r) -> (p', c, r')    with p entries before it, an axis of size c stays what it was

For samples besides: (p, B, n, r) -> (p, B·n, r) and back, the axis still runs over samples, with n
entries to each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aim_surgery.capture.values import node_value
from aim_surgery.sites.graph import argument_of

Shape = tuple[int, ...]

LOST = -1  # the samples are in another order or mixed, whatever the other operands say


def shape_of(value: Any) -> Shape | None:
    """The shape of a tensor, or of the first tensor of a sequence; None where there is none."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        return next((shape for shape in map(shape_of, value) if shape is not None), None)
    return None


def dims_of(dims: Any, rank: int) -> set[int]:
    """Dimensions as a set; None stands for all."""
    if dims is None:
        return set(range(rank))
    return {int(dim) % rank for dim in ((dims,) if isinstance(dims, int) else dims)}


@dataclass(frozen=True)
class Move:
    """One operand's axis on its way through a call."""

    node: fx.Node
    source: fx.Node
    axis: int
    before: Shape
    after: Shape
    samples: int
    lost: AbstractSet[fx.Node] = frozenset()  # depend on samples, with no axis over them

    def argument(self, index: int, *names: str, default: Any = None) -> Any:
        """The value of an argument of the call."""
        return node_value(argument_of(self.node, index, *names, default=default))

    def kept(self, axis: int | None) -> int | None:
        """The axis, if it is there with the same size."""
        if axis is None or not 0 <= axis < len(self.after):
            return None
        return axis if self.after[axis] == self.before[self.axis] else None


Rule = Callable[[Move], int | None]


def same(move: Move) -> int | None:
    """All calls without a rule of their own: same place and size, or as broadcasting aligns it."""
    if len(move.after) == len(move.before):
        return move.kept(move.axis)
    shapes = [shape_of(source.meta.get("val")) for source in move.node.all_input_nodes]
    try:
        if torch.broadcast_shapes(*(shape for shape in shapes if shape is not None)) != move.after:
            return None
    except RuntimeError:
        return None
    return aligned_right(move)


def aligned_right(move: Move) -> int | None:
    """`expand`: new axes come first."""
    return move.kept(move.axis + len(move.after) - len(move.before))


def aligned_left(move: Move) -> int | None:
    """Tables looked up by index: new axes come last."""
    return move.kept(move.axis)


def resized(move: Move) -> int | None:
    """Calls that may change the number of channels, never of samples."""
    if move.samples:
        return move.kept(move.axis)
    return move.axis if len(move.after) == len(move.before) else None


def reshaped(move: Move) -> int | None:
    """`view` and all that only reshapes."""
    return reshaped_axis(move.before, move.axis, move.after, samples=move.samples)


def reshaped_axis(before: Shape, axis: int, after: Shape, *, samples: int = 0) -> int | None:
    """The prefix rule: where a reshape puts an axis.

    Args:
        before: Shape that is reshaped.
        axis: An axis of it.
        after: Shape that comes out.
        samples: The number of samples where the axis runs over them, 0 for other axes.

    Returns:
        The axis that runs over the same entries; for samples also one that holds several entries
        of each in a row. None where there is none.
    """
    prefix = math.prod(before[:axis])
    passed = 1
    for place, size in enumerate(after):
        if passed == prefix and (size % samples == 0 if samples else size == before[axis]):
            # (T, 1, h, d) -> (T, h·d): the axis of a single sample is gone, these are channels
            gone = samples == 1 < prefix and before[axis] < size == math.prod(before[axis:])
            return None if gone else place
        passed *= size
    return None


def regrouped(
    before: Shape, axis: int, outer: int, after: Shape, *, samples: int
) -> tuple[int, int] | None:
    """Where a reshape puts samples, in front of an axis or behind others in it.

        (T, B, r) -> (T·B, r)   the axis runs over T entries of each sample, not in a row
        (T·B, r) -> (T, B, r)   and that is undone

    Args:
        before: Shape that is reshaped.
        axis: The axis that runs over samples.
        outer: Times that it runs over them: T.
        after: Shape that comes out.
        samples: The number of samples.

    Returns:
        The axis that runs over samples, and how often.
    """
    if outer > 1:
        before = (*before[:axis], outer, before[axis] // outer, *before[axis + 1 :])
        axis += 1
    place = reshaped_axis(before, axis, after, samples=samples)
    if place is not None:
        return place, 1
    prefix = math.prod(before[:axis])
    passed = 1
    for place, size in enumerate(after):
        times, rest = divmod(prefix, max(passed, 1))
        if not rest and times and size % (times * samples) == 0:
            return place, times
        passed *= size
    return None


def batched(move: Move) -> int | None:
    """Convolutions and patches: only the first axis is sure to stay."""
    return 0 if move.axis == 0 else None


def product_with_weight(move: Move) -> int | None:
    """A linear layer: its last axis is summed over."""
    return None if move.axis == len(move.before) - 1 else move.kept(move.axis)
