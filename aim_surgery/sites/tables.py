"""Products with rows of a table, which sizes may choose: relative positions.

    y = einsum("bhwc,hkc->bhwk", q, f(R))       R a parameter (rows, c)

f picks, interpolates and reshapes rows, often by sizes of the input, so its result has no fixed
size that memory weights could have. But it treats all columns alike, keeps them apart, and maps
zeros to zeros:

    f([R R_m]) = [f(R) f(R_m)]      cat[q, m] · f([R R_m]) = q · f(R) + m · f(R_m)

for R_m of the same rows and k columns. So the memory's part is the product of m with R_m taken
through the same steps, at any size that the model takes. Which steps have that property stands in
`_RULES`; a chain with any other one is none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.capture.values import node_value
from aim_surgery.sites.axis_index import place_of
from aim_surgery.sites.axis_moves import Move, aligned_right, dims_of, reshaped, same
from aim_surgery.sites.axis_rules import rule_of, spelled_operands
from aim_surgery.sites.graph import argument_of, called_name, is_call, is_float

_MATMULS = (torch.matmul, operator.matmul, torch.bmm, torch.mm)


@dataclass(frozen=True)
class Table:
    """A product of an activation with f(R).

    Attributes:
        source: The activation.
        index: Its position among the product's arguments.
        name: Its keyword.
        start: The node R: a parameter, or the look-up in an embedding.
        weight: The node f(R).
        steps: The calls between them that carry the columns, in execution order; for each the axis
            of the columns in its result.
        shape: Shape of the parameter.
        axis: Axis of its columns, those that the product sums over.
    """

    source: fx.Node
    index: int
    name: str
    start: fx.Node
    weight: fx.Node
    steps: tuple[tuple[fx.Node, int], ...]
    shape: tuple[int, ...]
    axis: int

    @property
    def columns(self) -> int:
        """c, the columns of R."""
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        """Rows of R, of all its other axes together."""
        return math.prod(self.shape) // self.columns


def find_table(
    capture: Capture, weights: Mapping[fx.Node, tuple[str, ...]], node: fx.Node
) -> Table | None:
    """Read a node as a product with rows of a table.

    Args:
        capture: The captured model.
        weights: What nodes are made of that depend on parameters and sizes alone
            (`weight_sources` with `sized`).
        node: A node of one of its graphs.

    Returns:
        The product; None where the node is another thing, or where some step from the parameter to
        the product does not keep columns whole and apart.
    """
    found = _einsum(node, weights) or _product(node, weights)
    if found is None:
        return None
    (source, index, name), weight, summed = found
    names = weights.get(weight, ())
    if len(names) != 1 or source in weights or not is_float(source):
        return None
    chain = _chain(capture, weights, weight)
    if chain is None:
        return None
    start, steps, shape = chain
    for axis in range(len(shape)):
        places = _follow(capture, start, steps, axis)
        if places is not None and places[weight] == summed % weight.meta["val"].ndim:
            carried = tuple((step, places[step]) for step in steps)
            return Table(source, index, name, start, weight, carried, shape, axis)
    return None


# Products -----------------------------------------------------------------------------------

_Operand = tuple[fx.Node, int, str]
_Found = tuple[_Operand, fx.Node, int]  # the activation, the weight, its axis that is summed over


def _einsum(node: fx.Node, weights: Mapping[fx.Node, Any]) -> _Found | None:
    if not is_call(node, (torch.einsum,), frozenset()) or len(node.args) != 3:
        return None
    operands, after = spelled_operands(node)
    first, second = node.args[1:]
    if after is None or not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return None
    place = 0 if second in weights else 1  # of the activation
    (source, x), (weight, w) = operands[place], operands[1 - place]
    plain = all(len(set(letters)) == len(letters) for letters in (x, w, after))
    gone = set(x[-1:])  # nothing else is summed, and nothing in one operand alone
    if not plain or set(x) - set(after) != gone or set(w) - set(after) != gone:
        return None
    return (source, place + 1, ""), weight, w.index(x[-1])


def _product(node: fx.Node, weights: Mapping[fx.Node, Any]) -> _Found | None:
    if is_call(node, (F.linear,), frozenset()):
        names, summed = ("weight",), -1
    elif is_call(node, _MATMULS, {"matmul", "bmm", "mm", "__matmul__"}):
        names, summed = ("other", "mat2"), -2
    else:
        return None
    source, weight = argument_of(node, 0, "input"), argument_of(node, 1, *names)
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node) or weight not in weights:
        return None
    if source.meta["val"].ndim < 2 or weight.meta["val"].ndim < 2:
        return None
    return (source, 0, "input"), weight, summed


# From a parameter to a weight ---------------------------------------------------------------


def _chain(
    capture: Capture, weights: Mapping[fx.Node, tuple[str, ...]], weight: fx.Node
) -> tuple[fx.Node, tuple[fx.Node, ...], tuple[int, ...]] | None:
    """The one way from a parameter to a weight: where it starts, its steps, the shape of R."""
    steps: list[fx.Node] = []
    node = weight
    while True:
        if not isinstance(node.meta.get("val"), torch.Tensor) or _is_changed(node):
            return None
        if node.op == "get_attr":
            return node, tuple(reversed(steps)), tuple(node.meta["val"].shape)
        if node.op == "call_module":
            table = capture.modules[str(node.target)]
            if type(table) is not nn.Embedding or table.max_norm is not None:
                return None
            return node, tuple(reversed(steps)), tuple(table.weight.shape)
        steps.append(node)
        carrying = [n for n in node.all_input_nodes if weights.get(n) and _holds_columns(n)]
        if len(carrying) != 1:
            return None
        (node,) = carrying


def _holds_columns(node: fx.Node) -> bool:
    """Whether a node made of a parameter holds entries of it: sizes, and what they make, do not."""
    if node.op in ("get_attr", "call_module"):
        return True
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(map(_holds_columns, node.all_input_nodes))


def _is_changed(node: fx.Node) -> bool:
    """Whether somebody changes a tensor in place."""
    names = [(user, called_name(user)) for user in node.users]
    return any(
        user.args[:1] == (node,)
        and (user.target is operator.setitem or (n.endswith("_") and not n.endswith("__")))
        for user, n in names
    )


def _follow(
    capture: Capture, start: fx.Node, steps: tuple[fx.Node, ...], axis: int
) -> dict[fx.Node, int] | None:
    """Where the columns are after each step, None where a step mixes or cuts them."""
    if start.op == "call_module":  # a look-up: rows are the first axis, columns the last
        if axis != 1:
            return None
        axis = start.meta["val"].ndim - 1
    places = {start: axis}
    source = start
    for step in steps:
        before, after = (tuple(n.meta["val"].shape) for n in (source, step))
        move = Move(step, source, axis, before, after, samples=0)
        rule = _rule(step)
        place = rule(capture, move) if rule is not None else None
        if place is None or not 0 <= place < len(after) or after[place] != before[axis]:
            return None
        places[step] = axis = place
        source = step
    return places


_Rule = Callable[[Capture, Move], int | None]


def _rule(step: fx.Node) -> _Rule | None:
    if step.op not in ("call_function", "call_method"):
        return None
    if step.op == "call_function" and not _is_torch(step.target):
        return None
    return _RULES.get(called_name(step))


def _is_torch(target: Any) -> bool:
    home = getattr(target, "__module__", "") or ""
    return home.partition(".")[0] in ("", "torch", "_operator", "builtins")


def _first(rule: _Rule) -> _Rule:
    """For calls whose first argument carries the columns."""
    return lambda capture, move: (
        rule(capture, move) if move.source is argument_of(move.node, 0, "input") else None
    )


def _known(capture: Capture, move: Move) -> int | None:
    """Calls whose rule says exactly where the axis goes (`axis_rules`)."""
    return rule_of(capture, move.node)(move)


def _squeezed(capture: Capture, move: Move) -> int | None:
    """Not where it is asked to squeeze the columns: R's stay, a single one of R_m would go."""
    asked = dims_of(move.argument(1, "dim"), len(move.before))
    return None if move.axis in asked else _known(capture, move)


def _attribute(capture: Capture, move: Move) -> int | None:
    return _known(capture, move) if move.argument(1) in ("T", "mT") else None


def _indexed(_: Capture, move: Move) -> int | None:
    place, entry = place_of(move.node.args[1], move.axis, move.before)
    return place if entry == slice(None) else None


def _unflattened(_: Capture, move: Move) -> int | None:
    taken = move.argument(1, "dim") % len(move.before)
    return None if taken == move.axis else reshaped(move)


def _apart(index: int) -> _Rule:
    """Calls that act along given axes: not along that of the columns."""

    def rule(_: Capture, move: Move) -> int | None:
        dims = move.argument(index, "dim", "dims")
        if called_name(move.node) == "flip" and isinstance(dims, int):
            dims = move.node.args[index:]
        if dims is None or len(move.before) != len(move.after):
            return None
        return None if move.axis in dims_of(dims, len(move.before)) else move.axis

    return rule


def _interpolated(_: Capture, move: Move) -> int | None:
    return move.axis if move.axis < 2 else None


def _padded(_: Capture, move: Move) -> int | None:
    """With zeros, or with entries of the same column."""
    widths = move.argument(1, "pad")
    constant = move.argument(2, "mode", default="constant") == "constant"
    value = move.argument(3, "value")
    behind = 2 * (len(move.before) - 1 - move.axis)
    mine = list(widths)[behind : behind + 2]
    return None if any(mine) or (constant and value not in (None, 0)) else move.axis


def _expanded(_: Capture, move: Move) -> int | None:
    return aligned_right(move)


def _scaled(_: Capture, move: Move) -> int | None:
    """Times a number, or what is the same for all columns."""
    others = [argument for argument in move.node.args[:2] if argument is not move.source]
    if len(others) != 1 or len(move.node.args) != 2 or move.node.kwargs:
        return None
    if called_name(move.node) in ("div", "truediv") and others[0] is move.node.args[0]:
        return None
    other = node_value(others[0])
    if isinstance(other, torch.Tensor):
        behind = len(move.before) - move.axis
        if other.ndim >= behind and other.shape[-behind] != 1:
            return None
        return move.axis + len(move.after) - len(move.before)
    return move.axis if isinstance(other, int | float) else None


def _looked_up(_: Capture, move: Move) -> int | None:
    plain = argument_of(move.node, 3, "max_norm") is None
    is_table = move.source is argument_of(move.node, 1, "weight")
    return len(move.after) - 1 if plain and is_table and move.axis == 1 else None


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis", "unsqueeze",
         "select"), _first(_known)),
    "squeeze": _first(_squeezed),
    **dict.fromkeys(("reshape", "view", "flatten"), _first(lambda _, move: reshaped(move))),
    "unflatten": _first(_unflattened),
    **dict.fromkeys(("contiguous", "clone", "to", "type", "type_as", "float", "double", "half",
                     "bfloat16"), _first(lambda _, move: same(move))),
    **dict.fromkeys(("index_select", "flip", "narrow"), _first(_apart(1))),
    "roll": _first(_apart(2)),
    "getattr": _first(_attribute),
    "getitem": _first(_indexed),
    "interpolate": _first(_interpolated),
    "pad": _first(_padded),
    "_pad": _first(_padded),
    "expand": _first(_expanded),
    **dict.fromkeys(("mul", "div", "truediv"), _scaled),
    "neg": _first(lambda _, move: same(move)),
    "embedding": _looked_up,
}  # fmt: skip

RESHAPES = frozenset(("reshape", "view", "expand"))  # are given the number of columns
