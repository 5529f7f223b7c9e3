"""Where an axis is in the result of a call whose arguments tell it; which rule is for which call.

Most names are those of functions and methods alike (`torch.permute`, `x.permute`); in-place ones
(`x.squeeze_`) go by the name without underscore.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.capture.values import node_value
from aim_surgery.sites.axis_index import indexed, reorderings
from aim_surgery.sites.axis_moves import (
    Move,
    Rule,
    aligned_left,
    aligned_right,
    batched,
    dims_of,
    product_with_weight,
    reshaped,
    resized,
    same,
    shape_of,
)
from aim_surgery.sites.graph import argument_of, called_name


def rule_of(capture: Capture, node: fx.Node) -> Rule:
    """The rule for a call; where there is no special one, the axis of the same place and size."""
    if node.op == "call_module":
        return _layer_rule(type(capture.modules[str(node.target)]))
    name = called_name(node)
    return _RULES.get(name) or _RULES.get(name.rstrip("_"), same)


@cache
def _layer_rule(kind: type[nn.Module]) -> Rule:
    stock = (base for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
    return next((_LAYER_RULES[base.__name__] for base in stock if base.__name__ in _LAYER_RULES),
                same)  # fmt: skip


def _permuted(move: Move) -> int | None:
    dims = move.argument(1, "dims")
    if isinstance(dims, int):
        dims = [node_value(dim) for dim in move.node.args[1:]]
    return [int(dim) % len(move.before) for dim in dims].index(move.axis)


def _swapped(move: Move) -> int | None:
    rank = len(move.before)
    first = move.argument(1, "dim0", "axis0", default=0) % rank
    second = move.argument(2, "dim1", "axis1", default=rank - 1) % rank
    return {first: second, second: first}.get(move.axis, move.axis)


def _last_two_swapped(move: Move) -> int | None:
    rank = len(move.before)
    return {rank - 1: rank - 2, rank - 2: rank - 1}.get(move.axis, move.axis)


def _moved(move: Move) -> int | None:
    rank = len(move.before)
    sources, places = move.argument(1, "source"), move.argument(2, "destination")
    sources = [dim % rank for dim in ((sources,) if isinstance(sources, int) else sources)]
    places = [dim % rank for dim in ((places,) if isinstance(places, int) else places)]
    order = [dim for dim in range(rank) if dim not in sources]
    for place, source in sorted(zip(places, sources, strict=True)):
        order.insert(place, source)
    return order.index(move.axis)


def _unsqueezed(move: Move) -> int | None:
    return move.axis + (move.argument(1, "dim", default=0) % len(move.after) <= move.axis)


def _squeezed(move: Move) -> int | None:
    gone = {axis for axis, size in enumerate(move.before) if size == 1}
    gone &= dims_of(move.argument(1, "dim"), len(move.before))
    return _without(move.axis, gone)


def _unbound(move: Move) -> int | None:
    return _without(move.axis, dims_of(move.argument(1, "dim", default=0), len(move.before)))


def _stacked(move: Move) -> int | None:
    return move.axis + (move.argument(1, "dim", default=0) % len(move.after) <= move.axis)


def _without(axis: int, gone: set[int]) -> int | None:
    return None if axis in gone else axis - sum(other < axis for other in gone)


def _reduced(index: int) -> Rule:
    def rule(move: Move) -> int | None:
        dims = move.argument(index, "dim", "axis")
        if isinstance(dims, torch.Tensor):  # torch.max(a, b)
            return same(move)
        if isinstance(dims, bool):  # torch.var(x, unbiased)
            return None
        gone = dims_of(dims, len(move.before))
        if len(move.after) == len(move.before):
            return None if move.axis in gone else move.axis
        return _without(move.axis, gone)

    return rule


def _attribute(move: Move) -> int | None:
    name = move.argument(1)
    if name == "T":
        return len(move.before) - 1 - move.axis
    return _last_two_swapped(move) if name in ("mT", "mH", "H") else same(move)


def _multiplied(first_index: int) -> Rule:
    """A matrix product: the last axis of the first and the last but one of the second are gone."""

    def rule(move: Move) -> int | None:
        first = argument_of(move.node, first_index, "input", "mat1", "batch1")
        second = argument_of(move.node, first_index + 1, "other", "mat2", "batch2")
        is_first = move.source is first
        if first is second or not (is_first or move.source is second):
            return same(move)
        rank, axis = len(move.before), move.axis
        summed = rank - 1 if is_first else max(rank - 2, 0)
        if axis == summed:
            return None
        partner = shape_of((second if is_first else first).meta["val"])
        ending = (2 if rank > 1 else 1) - (partner is not None and len(partner) == 1)
        if axis < rank - 2:
            return move.kept(axis - (rank - 2) + len(move.after) - ending)
        return move.kept(len(move.after) - (ending if is_first else 1))

    return rule


def _contracted(move: Move) -> int | None:
    """`einsum` with its output written out."""
    operands, letters = spelled_operands(move.node)
    if letters is None:
        return None
    letter = next(own[move.axis] for source, own in operands if source is move.source)
    return letters.index(letter) if letter in letters else None


def spelled_operands(node: fx.Node) -> tuple[list[tuple[Any, list[str]]], list[str] | None]:
    """What `einsum` works on, with the letter of each axis, and the letters of its result.

    Args:
        node: A call of it.

    Returns:
        No operands where the equation is no text, and no letters of the result where they are not
        written out.
    """
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return [], None
    left, arrow, right = equation.replace(" ", "").replace("...", ".").partition("->")
    spelled = []
    for operand, term in zip(operands, left.split(","), strict=True):
        shape = shape_of(node_value(operand)) or ()
        spelled.append((operand, _spelled(term, len(shape))))
    after = shape_of(node.meta["val"])
    return spelled, _spelled(right, len(after or ())) if arrow else None


def _spelled(term: str, rank: int) -> list[str]:
    """The letters of each axis; those of an ellipsis are numbered from the right."""
    dots = range(rank - len(term) + ("." in term), 0, -1)
    return [name for c in term for name in ([str(i) for i in dots] if c == "." else [c])]


def _attended(move: Move) -> int | None:
    """Attention: positions come from the query, channels from the value."""
    behind = len(move.before) - move.axis
    kept = {"query": behind >= 2, "key": behind > 2, "value": behind != 2}
    for place, (name, is_kept) in enumerate(kept.items()):
        if is_kept and argument_of(move.node, place, name) is move.source:
            return move.kept(move.axis)
    return None


def _table() -> dict[str, Rule]:
    rules: dict[Rule, str] = {
        _permuted: "permute",
        _swapped: "transpose swapaxes swapdims t",
        _last_two_swapped: "adjoint",
        _moved: "movedim moveaxis",
        _unsqueezed: "unsqueeze",
        _squeezed: "squeeze",
        _unbound: "unbind select",
        _stacked: "stack",
        reshaped: "view reshape flatten unflatten view_as reshape_as",
        resized: "cat concat concatenate glu pixel_shuffle pixel_unshuffle",
        aligned_right: "expand expand_as broadcast_to repeat tile",
        aligned_left: "embedding one_hot",
        batched: "unfold fold conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
        "conv_transpose3d",
        product_with_weight: "linear bilinear",
        indexed: operator.getitem.__name__,
        **reorderings(),
        _attribute: "getattr",
        _multiplied(0): "matmul imatmul mm bmm mv",
        _multiplied(1): "addmm baddbmm",
        _contracted: "einsum",
        _attended: "scaled_dot_product_attention",
        _reduced(
            1
        ): "mean sum amax amin max min prod std var logsumexp argmax argmin any all median"
        " nanmean nansum mode count_nonzero std_mean var_mean kthvalue",
        _reduced(2): "norm vector_norm quantile",
    }
    return {name: rule for rule, names in rules.items() for name in names.split()}


_RULES = _table()
_LAYER_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Flatten", "Unflatten"), reshaped),
    **dict.fromkeys(("GLU", "PixelShuffle", "PixelUnshuffle"), resized),
    **dict.fromkeys(("Linear", "Bilinear"), product_with_weight),
    **dict.fromkeys(("_ConvNd", "Unfold", "Fold"), batched),
    "Embedding": aligned_left,
}
