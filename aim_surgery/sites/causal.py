"""Whether attention in a graph is causal: earlier tokens must not see later ones.

A write pools over all tokens, and so would tell each token of those that come after it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.capture import Capture
from aim_surgery.capture.values import node_value
from aim_surgery.sites.graph import argument_of, is_call

_COMPARISONS = (
    operator.ge, operator.gt, operator.le, operator.lt, torch.ge, torch.gt, torch.le, torch.lt,
)  # fmt: skip
_MOST_ENTRIES = 2**26  # of a mask that is looked at


def find_causal(capture: Capture, graph: fx.Graph) -> str:
    """Find a sign of causal attention.

    Not seen: a mask that is an input of the model, causality by shifts or by padding on one side
    (WaveNet), recurrent layers, masks made inside an opaque module.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.

    Returns:
        What shows it, as a noun; "" where nothing does.
    """
    for node in graph.nodes:
        if _is_causal(capture, node):
            if node.op == "call_module" or node.op == "get_attr":
                return str(node.target)
            return node.name
    return ""


def _is_causal(capture: Capture, node: fx.Node) -> bool:
    if node.op == "get_attr":
        return _is_causal_table(capture, str(node.target))
    if node.op == "call_module":
        return bool(node_value(node.kwargs.get("is_causal", False)))
    if is_call(node, (F.scaled_dot_product_attention,), frozenset()):
        return bool(node_value(argument_of(node, 5, "is_causal", default=False)))
    if is_call(node, (torch.tril, torch.triu), {"tril", "triu", "tril_", "triu_"}):
        return _is_square(node)
    if is_call(node, _COMPARISONS, {"ge", "gt", "le", "lt"}):  # arange[:, None] >= arange
        values = [source.meta["val"] for source in node.all_input_nodes]
        shapes = [tuple(v.shape) for v in values if _is_integer(v)]
        return _is_square(node) and len(shapes) == 2 and _are_row_and_column(*shapes)
    return False


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _is_square(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return False
    return value.shape[-1] == value.shape[-2] > 1


def _are_row_and_column(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    column, row = (one, two) if one[-1:] == (1,) else (two, one)
    is_row = bool(row) and row[-1] > 1 and row[-2:-1] in ((), (1,))
    return is_row and len(column) > 1 and column[-1] == 1 < column[-2]


def _is_causal_table(capture: Capture, name: str) -> bool:
    """Whether a buffer or constant is a triangle: nothing, or -inf, above the diagonal alone."""
    constants = {k: v for trace in capture.traces for k, v in trace.constants.items()}
    table = constants.get(name)
    if table is None:
        path, _, attribute = name.rpartition(".")
        table = getattr(capture.modules.get(path), attribute, None)
    if not isinstance(table, torch.Tensor) or isinstance(table, torch.nn.Parameter):
        return False
    if table.is_meta or table.ndim < 2 or not table.shape[-1] == table.shape[-2] > 1:
        return False
    if table.numel() > _MOST_ENTRIES:
        return False
    table = table.detach().reshape(-1, *table.shape[-2:])[0]
    above = torch.ones(table.shape, dtype=torch.bool, device=table.device).triu(1)
    upper, lower = table[above].to(torch.float32), table[~above].to(torch.float32)
    if bool((upper == 0).all()):
        return bool((lower == lower[0]).all() & (lower[0] != 0))
    return bool((lower == 0).all() & ((upper < -1e3) | (table.dtype == torch.bool)).all())
