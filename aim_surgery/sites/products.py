"""Products with a weight that is no plain matrix: einsum, and stacks of matrices.

    einsum("tbc,chd->tbhd", x, W)    one product over c, whose features (h, d) are two axes
    bmm(x, W), x @ W, (E, C, D)      a matrix for each entry of an axis (experts)
    grouped_mm(x, W, offs)           a matrix for each run of rows

The memory's part is a vector of features, W_m · m, for all rows alike, whichever matrix of a stack
they are multiplied by:

    y + (W_m · m).reshape(features)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.sites.axis_rules import spelled_operands
from aim_surgery.sites.graph import argument_of, is_call

GROUPED = tuple(
    function
    for home, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if (function := getattr(home, name, None)) is not None
)


@dataclass(frozen=True)
class Product:
    """A product x · W.

    Attributes:
        source: The node x.
        weight: The node W.
        index: Position of x among the node's arguments.
        name: Its keyword.
        inputs: How many numbers of x make one of y.
        features: Sizes of the last axes of y, which come from W.
        aligned: Whether all other axes of y are those of x but its last, in their order.
    """

    source: fx.Node
    weight: fx.Node
    index: int
    name: str
    inputs: int
    features: tuple[int, ...]
    aligned: bool


def find_product(node: fx.Node) -> Product | None:
    """Read a node as a product with a weight that is no plain matrix.

    Args:
        node: A node of a captured graph.

    Returns:
        Its operands; None where it is another thing. Whether W is a weight is not asked.
    """
    if is_call(node, (torch.einsum,), frozenset()):
        return _einsum(node)
    if is_call(node, (torch.baddbmm,), {"baddbmm"}):
        return _stack(node, (1, ("batch1",)), (2, ("batch2",)))
    if is_call(node, (torch.bmm, torch.matmul, operator.matmul), {"bmm", "matmul"}):
        return _stack(node, (0, ("input",)), (1, ("mat2", "other")))
    if is_call(node, GROUPED, frozenset()):
        return _stack(node, (0, ("mat_a", "self")), (1, ("mat_b", "mat2")))
    return None


def _einsum(node: fx.Node) -> Product | None:
    operands, after = spelled_operands(node)
    if len(operands) != 2 or len(node.args) != 3 or after is None:
        return None
    (source, x), (weight, w) = operands
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    new = [letter for letter in after if letter not in x]
    gone = [letter for letter in x if letter not in after]
    plain = all(len(set(letters)) == len(letters) for letters in (x, w, after))
    from_weight = set(new) <= set(w) and after[len(after) - len(new) :] == new
    contracts = set(w) - set(after) == set(gone)  # nothing is summed in one operand alone
    if not (plain and new and gone and from_weight and contracts):
        return None
    sizes = dict(zip(w, weight.meta["val"].shape, strict=True))
    inputs = 1
    for letter in gone:
        inputs *= int(sizes[letter])
    features = tuple(int(sizes[letter]) for letter in new)
    aligned = x[:-1] == after[: len(after) - len(new)]
    return Product(source, weight, 1, "", inputs, features, aligned)


Place = tuple[int, tuple[str, ...]]


def _stack(node: fx.Node, first: Place, second: Place) -> Product | None:
    source = argument_of(node, first[0], *first[1])
    weight = argument_of(node, second[0], *second[1])
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    x, w, y = (n.meta["val"].shape for n in (source, weight, node))
    if len(w) < 3 or len(x) < 2 or y[-1] != w[-1]:
        return None
    name = next((name for name in first[1] if name in node.kwargs), first[1][0])
    return Product(source, weight, first[0], name, int(w[-2]), (int(w[-1]),), len(x) == len(y))
