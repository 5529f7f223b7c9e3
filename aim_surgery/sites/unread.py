"""Weights that are multiplied with activations at no site, with the reason.

Attention packed into one kernel, recurrent weights, einsum, weights made from the input, layers in
a Python call: no weight goes unmentioned.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torch._ops import OpOverload

from aim_surgery.capture import Capture
from aim_surgery.nn.layer_types import LAYER_TYPES
from aim_surgery.nn.recurrent import is_recurrent
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of, attribute, called_name, is_call, weight_sources
from aim_surgery.sites.products import GROUPED
from aim_surgery.sites.recurrent import recurrent_skips
from aim_surgery.sites.site import Skip

_WEIGHT_SECOND = (*CONV_FUNCTIONS, F.linear)
_PRODUCTS = (
    torch.matmul,
    operator.matmul,
    torch.mm,
    *_WEIGHT_SECOND,
    torch.addmm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    *GROUPED,
    torch.tensordot,
    torch.mv,
    torch.inner,
    torch.outer,
    torch.chain_matmul,
    torch.linalg.matmul,
    torch.linalg.multi_dot,
    torch.linalg.vecdot,
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell),
)
_PRODUCT_METHODS = frozenset({"addmm", "matmul", "mm", "bmm", "mv", "baddbmm", "__matmul__"})
_PICKS = frozenset({"getitem", "index_select", "gather", "take_along_dim"})
_VIEWS = frozenset({"view", "reshape", "transpose", "permute", "flatten", "unsqueeze", "squeeze"})
_COMPLEX = "its weights are complex numbers, and the memory is real"
NOT_PRODUCTS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.Embedding, nn.EmbeddingBag, nn.PReLU,
)  # fmt: skip


def find_unread(capture: Capture, graph: fx.Graph, sites: frozenset[fx.Node]) -> Iterator[Skip]:
    """Find weights that take part in products in calls that are no sites.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.
        sites: The nodes of it that are sites.

    Yields:
        One `Skip` for each call; a site elsewhere may read some of its weights.
    """
    reasons = {call.path: call.reason for trace in capture.traces for call in trace.opaque}
    weights = weight_sources(capture, graph, sized=True)
    for node in graph.nodes:
        if node in sites:
            continue
        if node.op == "call_module":
            path = str(node.target)
            layer = capture.modules[path]
            if is_recurrent(layer):
                yield from recurrent_skips(capture, path)
                continue
            names = _matrices(layer, path)
            if names:
                why = reasons.get(path) or _why_packed(layer)
                yield Skip(path, names, unless_complex(capture, names, why))
        elif is_call(node, _PRODUCTS, _PRODUCT_METHODS) or _takes_weights(node):
            names = {name for source in node.all_input_nodes for name in weights.get(source, ())}
            target = getattr(node.target, "__name__", node.target)
            why = f"used by a call of {target} that is no site"
            mixed = {*_mixed_in(node, weights)} - names
            for found, ending in ((names, ""), (mixed, ": its weight is made from the input")):
                matrices = tuple(sorted(n for n in found if is_matrix(attribute(capture, n))))
                if matrices:
                    reason = unless_complex(capture, matrices, why + ending)
                    yield Skip(matrices[0], matrices, reason)


def _mixed_in(node: fx.Node, weights: Mapping[fx.Node, tuple[str, ...]]) -> Iterator[str]:
    """Parameters that a call's weight is made of together with the input, or chosen from by it.

    Which operand is the weight is known of convolutions and `linear`; of other products, one that
    picks matrices from a stack (experts).
    """
    pending: list[fx.Node] = []
    if node.target in _WEIGHT_SECOND:
        weight = argument_of(node, 1, "weight")
        pending += [weight] if isinstance(weight, fx.Node) else []
    elif is_call(node, _PRODUCTS, _PRODUCT_METHODS):
        pending = [pick for n in node.all_input_nodes for pick in _picks(n)]
    seen: set[fx.Node] = set()
    while pending:  # back to parameters, layers, and results of other products
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if source in weights:
            yield from weights[source]
        elif source.op.startswith("call_") and source.op != "call_module":
            product = is_call(source, _PRODUCTS, _PRODUCT_METHODS)
            pending += [] if product else source.all_input_nodes


def _picks(node: fx.Node) -> Iterator[fx.Node]:
    """The stack of matrices that an operand is picked from, behind views."""
    while called_name(node) in _VIEWS and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if called_name(node) not in _PICKS:
        return
    stack = argument_of(node, 0, "input")
    if isinstance(stack, fx.Node) and getattr(stack.meta.get("val"), "ndim", 0) >= 3:
        yield stack


def _why_packed(layer: nn.Module) -> str:
    if isinstance(layer, LAYER_TYPES):
        return "its hooks change the shape of its input or output"
    return f"{type(layer).__name__} computes with its weights inside one call"


def _matrices(layer: nn.Module, path: str) -> tuple[str, ...]:
    names = []
    for prefix, module in layer.named_modules(prefix=path):
        if not isinstance(module, NOT_PRODUCTS):
            names += [f"{prefix}.{n}" for n, p in module._parameters.items() if is_matrix(p)]
    return tuple(names)


def is_matrix(parameter: torch.Tensor | None) -> bool:
    """Whether a parameter may be what activations are multiplied with."""
    if parameter is None or parameter.ndim < 2:
        return False
    return parameter.is_floating_point() or parameter.is_complex()


def unless_complex(capture: Capture, names: tuple[str, ...], why: str) -> str:
    """A reason for which weights don't read; of complex ones, that they are."""
    return _COMPLEX if all(attribute(capture, name).is_complex() for name in names) else why


def _takes_weights(node: fx.Node) -> bool:
    """Functions that stay one call and get weights as arguments (packed attention)."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):  # of torch, those that are no products
        return node.target.namespace not in ("aten", "prims")
    home = getattr(node.target, "__module__", "") or ""
    own = bool(home) and home.partition(".")[0] not in ("torch", "_operator", "builtins", "math")
    return own or node.target in (F.multi_head_attention_forward, F.bilinear)
