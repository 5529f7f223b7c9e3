"""Whether a graph is causal: earlier tokens must not see later ones.

A write pools over all tokens, and so would tell each token of those that come after it. Signs of it
are what calls say (`is_causal=True`), layers that go one way (an LSTM), and masks

    triangle    0 or -inf above the diagonal alone, or True on one side of it alone

which are looked at where they are stored, and computed where they are made from sizes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.capture.values import node_value
from aim_surgery.sites.constants import compute_constants
from aim_surgery.sites.features import Features
from aim_surgery.sites.graph import argument_of, is_call

_COMPARISONS = (
    operator.ge, operator.gt, operator.le, operator.lt, torch.ge, torch.gt, torch.le, torch.lt,
)  # fmt: skip
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_SCANS = ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
_MOST_ENTRIES = 2**26  # of a mask that is looked at
_MOST_MASKS = 16  # that are computed


def find_causal(capture: Capture, features: Features) -> str:
    """Find a sign that a graph is causal.

    Not seen: a mask that is an input of the model, causality by shifts or by padding on one side
    (WaveNet), recurrent cells and states that Python carries from step to step, masks made inside
    an opaque module.

    Args:
        capture: The captured model that the graph belongs to.
        features: What the nodes of the graph carry.

    Returns:
        What shows it, as a noun; "" where nothing does.
    """
    for node in features.graph.nodes:
        if (
            _is_causal(capture, node)
            or _goes_one_way(capture, node)
            or (node in features.samples.dependent and _accumulates(node))
        ):
            if node.op == "call_module" or node.op == "get_attr":
                return str(node.target)
            return node.name
    candidates = [node for node in features.graph.nodes if _may_be_a_mask(features, node)]
    for node, value in compute_constants(capture, features, candidates[:_MOST_MASKS]).items():
        if _is_triangle(value):
            return node.name
    return ""


def has_unseen_tables(capture: Capture, graph: fx.Graph) -> bool:
    """Whether a graph takes tables that may be masks, and whose entries are not there to be seen.

    Args:
        capture: The captured model that the graph belongs to.
        graph: The graph.

    Returns:
        True where one is on the meta device.
    """
    names = (str(node.target) for node in graph.nodes if node.op == "get_attr")
    tables = (_stored_table(capture, name) for name in names)
    return any(table is not None and table.is_meta for table in tables)


def _may_be_a_mask(features: Features, node: fx.Node) -> bool:
    """Tables, as wide as high or wider, that are not of the input and are joined with what is."""
    dependent = features.samples.dependent
    if not node.op.startswith("call_f") and node.op != "call_method":
        return False
    return (
        node not in dependent
        and any(user in dependent for user in node.users)
        and _is_table(node.meta.get("val"))
        and node.meta["val"].numel() <= _MOST_ENTRIES
    )


def _goes_one_way(capture: Capture, node: fx.Node) -> bool:
    """Recurrent layers of one direction whose steps are used, not their final state alone."""
    if node.target in _RECURRENT:
        # (x, hx, weights, .., bidirectional, batch_first), or (x, batch_sizes, hx, weights, ..)
        is_packed = not isinstance(node.args[2], list | tuple)
        both_ways = node.args[8 if is_packed else 7]
        return not both_ways and any(user.args[1] == 0 for user in node.users)
    if node.op != "call_module":
        return False
    inside = capture.modules[str(node.target)].modules()
    if not any(isinstance(layer, nn.RNNBase) and not layer.bidirectional for layer in inside):
        return False
    taken = [user.args[1] for user in node.users if user.target is operator.getitem]
    return len(taken) < len(node.users) or any(key not in (1, -1) for key in taken)


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


def _accumulates(node: fx.Node) -> bool:
    """A scan: `v.cumsum(1)` of features gives each token the sum of those before it."""
    if not is_call(node, tuple(getattr(torch, name) for name in _SCANS), {*_SCANS}):
        return False
    value = argument_of(node, 0, "input").meta["val"]
    return value.is_floating_point() and value.ndim > 2


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def _is_square(node: fx.Node) -> bool:
    value: Any = node.meta.get("val")
    return _is_table(value) and value.shape[-1] == value.shape[-2]


def _is_table(value: Any) -> bool:
    """Whether it has rows and columns, and no fewer of these."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return False
    return value.shape[-1] >= value.shape[-2] > 1


def _are_row_and_column(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    column, row = (one, two) if one[-1:] == (1,) else (two, one)
    is_row = bool(row) and row[-1] > 1 and row[-2:-1] in ((), (1,))
    return is_row and len(column) > 1 and column[-1] == 1 < column[-2]


def _is_causal_table(capture: Capture, name: str) -> bool:
    table = _stored_table(capture, name)
    return table is not None and not table.is_meta and _is_triangle(table)


def _stored_table(capture: Capture, name: str) -> torch.Tensor | None:
    """A table that a graph takes by name and that is not learned."""
    constants = {k: v for trace in capture.traces for k, v in trace.constants.items()}
    table = constants.get(name)
    if table is None:
        path, _, attribute = name.rpartition(".")
        table = getattr(capture.modules.get(path), attribute, None)
    return table if _is_table(table) and not isinstance(table, nn.Parameter) else None


def _is_triangle(table: torch.Tensor) -> bool:
    """Whether a table says one thing above the diagonal, and another on it.

    Below it may say either: a sliding window hides what is long past.
    """
    if not _is_table(table):
        return False
    if not 0 < table.numel() <= _MOST_ENTRIES or table.is_complex():
        return False
    table = table.detach().reshape(-1, *table.shape[-2:])[0]
    before = table.shape[1] - table.shape[0]  # tokens of a prefix, which all others see
    above = torch.ones(table.shape, dtype=torch.bool, device=table.device).triu(1 + before)
    upper, lower = table[above].to(torch.float32), table[~above].to(torch.float32)
    on = table.diagonal(before).to(torch.float32)
    if bool((upper == 0).all()):  # 1 where a token looks
        return bool((on == on[0]).all() & (on[0] != 0) & ((lower == 0) | (lower == on[0])).all())
    hidden = upper[0]
    masks = table.dtype == torch.bool or bool(hidden < -1e3)
    seen = (lower == 0) | (lower == hidden)
    return masks and bool((upper == hidden).all() & (on == 0).all() & seen.all())
