"""Where an axis is after entries were picked, put or sorted along some axis.

Channels only change in number or order by that. Samples in another order are no longer those of the
input: their axis is `LOST` wherever a call acts along it,

    h[perm], h.index_select(0, i), h.flip(0), h.roll(1, 0), h.sort(0), zeros.index_add(0, i, h), ...

and an axis that a call leaves alone is kept: `h[:, i]`, `h.gather(1, i)`, `h.flip(1)`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from aim_surgery.capture.values import node_value
from aim_surgery.sites.axis_moves import (
    LOST,
    Move,
    Rule,
    Shape,
    aligned_left,
    dims_of,
    resized,
    same,
    shape_of,
)
from aim_surgery.sites.graph import argument_of, called_name


def indexed(move: Move) -> int | None:
    """`x[key]`, of a tensor or of a collection."""
    key = move.node.args[1]
    if not isinstance(move.source.meta["val"], torch.Tensor):
        first = move.source.op != "call_module" or key == 0
        return resized(move) if first else None  # layers return other things behind their first
    if move.source is not move.node.args[0]:  # the index has the axis: a table look-up
        if move.node.args[0] in move.lost:
            return LOST
        return aligned_left(move) if isinstance(key, fx.Node) else None
    place, entry = place_of(key, move.axis, move.before)
    if isinstance(entry, slice):
        if not move.samples:
            return place
        return move.kept(place) if _is_whole(entry, move.before[move.axis]) else None
    if not move.samples or isinstance(entry, int):
        return None
    # x[arange(len(x)), i] takes one entry of each sample
    return move.kept(place) if _counts_up(entry, move.before[move.axis]) else LOST


def overwrites(node: fx.Node, axes: Mapping[fx.Node, int]) -> bool:
    """Whether `x[key] = y` puts a tensor's entries at places of the axis that a tensor tells."""
    if node.target is not operator.setitem or node.args[0] not in axes:
        return False
    target, key, value = node.args
    if not isinstance(value, fx.Node) or shape_of(value.meta.get("val")) in (None, ()):
        return False
    _, entry = place_of(key, axes[target], tuple(target.meta["val"].shape))  # pyright: ignore
    return not isinstance(entry, slice | int)


def place_of(key: Any, axis: int, before: Shape) -> tuple[int, Any]:
    """Where indexing puts an axis, and what it is indexed by.

    Integers and new axes come first; then the axes that tensors index become those of the tensors,
    in the place of the first one, or in front where they are no neighbours.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    taken = [_axes_taken(k) for k in keys]
    if Ellipsis not in keys:
        keys, taken = [*keys, Ellipsis], [*taken, 0]
    place = next(i for i, k in enumerate(keys) if k is Ellipsis)
    keys[place : place + 1] = [slice(None)] * (len(before) - sum(taken))
    rest: list[tuple[int | None, Any]] = []  # axis and key after integers and new axes
    source = 0
    for k in keys:
        if k is None:
            rest.append((None, slice(None)))
            continue
        for _ in range(_axes_taken(k)):
            if not _is_integer(k):
                rest.append((source, k))
            elif source == axis:
                return 0, 0
            source += 1
    picked = [i for i, (_, k) in enumerate(rest) if not isinstance(k, slice)]
    mine = next(i for i, (source, _) in enumerate(rest) if source == axis)
    if not picked:
        return mine, rest[mine][1]
    rank = max(_rank_of(rest[i][1]) for i in picked)
    neighbours = picked[-1] - picked[0] + 1 == len(picked)
    start = picked[0] if neighbours else 0
    if mine in picked:
        return start + rank - 1, rest[mine][1]
    before_mine = sum(i < mine for i in range(len(rest)) if i not in picked)
    return before_mine + (rank if not neighbours or start < mine else 0), rest[mine][1]


def _is_whole(entry: slice, size: int) -> bool:
    """Whether a slice takes all of an axis whatever its size: `[:8]` of four takes all of these."""
    stops = entry.stop is None or (
        isinstance(entry.stop, fx.Node)
        and called_name(entry.stop) in ("getitem", "size", "len")
        and node_value(entry.stop) == size
    )
    return stops and entry.start in (None, 0) and entry.step in (None, 1)


def _is_integer(key: Any) -> bool:
    return isinstance(node_value(key), int) and not isinstance(key, bool)


def _axes_taken(key: Any) -> int:
    value = node_value(key)
    if value is None or value is Ellipsis:
        return 0
    is_mask = isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)
    return value.ndim if is_mask else 1


def _rank_of(key: Any) -> int:
    value = node_value(key)
    if isinstance(value, torch.Tensor):
        return 1 if value.dtype in (torch.bool, torch.uint8) else value.ndim
    return 1


def _counts_up(key: Any, size: int) -> bool:
    if not isinstance(key, fx.Node) or key.target is not torch.arange:
        return False
    bounds = [node_value(bound) for bound in key.args]
    return bounds in ([size], [0, size]) and not {"start", "end", "step"} & key.kwargs.keys()


def reorderings() -> dict[Rule, str]:
    """The rules of calls that act along one axis, with the names of the calls."""
    return {
        _along(1, default=-1): "sort argsort",
        _along(2, default=-1): "topk diff",
        _along(1): "cumsum cumprod cummax cummin logcumsumexp flip",
        _along(2): "roll repeat_interleave",
        _along(2, default=(0, 1)): "rot90",
        _fixed(0): "flipud msort",
        _fixed(1): "fliplr",
        _picked(1, resized): "index_select",
        _picked(1, same): "gather",
        _picked(2, same): "take_along_dim",
        _put: "scatter scatter_add scatter_reduce index_add index_copy index_fill index_reduce",
        _mixed: "take put index_put masked_select masked_scatter unique unique_consecutive nonzero "
        "argwhere bincount roi_align roi_pool ps_roi_align ps_roi_pool nms batched_nms",
        _padded: "pad",
        _cut(1): "narrow",
        _cut(2): "chunk split tensor_split split_with_sizes",
    }


def _along(index: int, *, default: Any = None) -> Rule:
    """Calls that act along their `dim`, along all axes where it is None."""

    def rule(move: Move) -> int | None:
        dims = move.argument(index, "dim", "dims", "axis", default=default)
        if called_name(move.node) == "flip" and isinstance(dims, int):
            dims = move.node.args[index:] or dims  # x.flip(0, 1)
        return _unless_along(move, dims_of(dims, len(move.before)))

    return rule


def _fixed(dim: int) -> Rule:
    return lambda move: _unless_along(move, {dim})


def _unless_along(move: Move, dims: set[int]) -> int | None:
    return LOST if move.samples and move.axis in dims else same(move)


def _picked(dim_index: int, otherwise: Rule) -> Rule:
    """`gather` and its kind: entries of the first operand, picked along `dim`."""

    def rule(move: Move) -> int | None:
        data = argument_of(move.node, 0, "input")
        dims = dims_of(move.argument(dim_index, "dim"), len(shape_of(node_value(data)) or ()))
        if move.samples and (data in move.lost or (move.source is data and move.axis in dims)):
            return LOST
        if move.source is not data and otherwise is resized:
            return move.kept(*dims)  # a row of indices
        return otherwise(move)

    return rule


def _put(move: Move) -> int | None:
    """`scatter` and its kind: entries put into the first operand, along `dim`."""
    data = argument_of(move.node, 0, "input")
    dims = dims_of(move.argument(1, "dim"), len(move.after))
    if move.samples and (data in move.lost or move.axis in dims):
        return LOST
    return same(move)


def _mixed(move: Move) -> int | None:
    return LOST if move.samples else same(move)


def _padded(move: Move) -> int | None:
    """Padding of the samples may shift them: (1, -1)."""
    widths = move.argument(1, "pad")
    behind = 2 * (len(move.before) - 1 - move.axis)
    if move.samples and any(widths[behind : behind + 2]):
        return LOST
    return resized(move)


def _cut(dim_index: int) -> Rule:
    """`chunk`, `narrow` and their kind: along the samples, what they leave depends on how many."""

    def rule(move: Move) -> int | None:
        dims = dims_of(move.argument(dim_index, "dim", default=0), len(move.before))
        return None if move.samples and move.axis in dims else resized(move)

    return rule
