"""Whether an input of the model hides some of its tokens (padding), which a write would not know.

A write pools over all positions of a sample. Where an attention mask or a padding mask is among the
inputs, that is more than the model looks at: the same sample, padded further, would write something
else.

    mask    a tensor that features are joined with (added, multiplied, masked_fill, attn_mask=...),
            that comes from the input by no site or embedding, with several entries per sample, and
            that is made of integers or booleans, or of an input that holds nothing else
"""

from __future__ import annotations

import torch
from torch import fx

from aim_surgery.sites.features import Features
from aim_surgery.sites.flow import ROOT
from aim_surgery.sites.graph import argument_of, called_name
from aim_surgery.sites.samples import input_tensors

# what stands beside features here is a part of them, or says where something is
_PLACING = frozenset(
    {"cat", "concat", "concatenate", "stack", "gather", "take_along_dim", "index_select"}
    | {"index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce", "embedding"}
)
_ELEMENTWISE = frozenset(("add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "rsub"))


def find_input_mask(features: Features) -> str:
    """Find a mask among the inputs of a graph.

    Args:
        features: What its nodes carry.

    Returns:
        What it is and where it is used, as a clause; "" where there is none.
    """
    origins = _Origins(features)
    ways = set(features.flow.reaching)
    for node in features.graph.nodes:
        if node not in ways and not _writes_into(node, ways):
            continue
        if not any(source in features.flow.edges for source in node.all_input_nodes):
            continue
        for source in node.all_input_nodes:
            if source not in features.flow.edges and _is_mask(features, origins, node, source):
                inputs = ", ".join(sorted(place.name for place in origins.of(source)))
                where = node.target if node.op == "call_module" else node.name
                return f"the input {inputs} acts as a mask in {where}"
    return ""


def _writes_into(node: fx.Node, ways: set[fx.Node]) -> bool:
    """`x[mask] = 0`, `x.masked_fill_(mask, 0)`."""
    return node.op.startswith("call") and bool(node.args) and node.args[0] in ways


def _is_mask(features: Features, origins: _Origins, node: fx.Node, source: fx.Node) -> bool:
    value, name = source.meta.get("val"), called_name(node).rstrip("_")
    if not isinstance(value, torch.Tensor) or value.numel() <= max(features.samples.count, 1):
        return False
    inputs = origins.of(source)
    if not inputs or name in _PLACING:
        return False
    if name in ("getitem", "setitem") and value.dtype is not torch.bool:
        return False
    if source in origins.counted:
        return True
    # a float mask is an input of its own, and no second signal like the features
    return inputs.isdisjoint(origins.signals) and not _is_signal(features, node, source, name)


def _is_signal(features: Features, node: fx.Node, source: fx.Node, name: str) -> bool:
    value, result = source.meta["val"], node.meta.get("val")
    if source is argument_of(node, 3, "attn_mask") and name == "scaled_dot_product_attention":
        return False
    if any(source is argument and "mask" in key for key, argument in node.kwargs.items()):
        return False
    added = name in ("baddbmm", "addmm") and source is argument_of(node, 0, "input")
    if added or name in _ELEMENTWISE:
        if any(_is_softmax(user) for user in node.users):  # attention's scores
            return False
        return isinstance(result, torch.Tensor) and result.shape == value.shape
    others = (n.meta.get("val") for n in node.all_input_nodes if n in features.flow.edges)
    return any(
        isinstance(other, torch.Tensor)
        and (other.ndim, other.shape[-1]) == (value.ndim, value.shape[-1])
        for other in others
    )


def _is_softmax(node: fx.Node) -> bool:
    return node.op != "call_module" and called_name(node) == "softmax"


class _Origins:
    """Of what tensors are made that come from the input but are no features.

    Attributes:
        counted: Those made of integers or booleans on the way.
        signals: Inputs that features are made of.
    """

    def __init__(self, features: Features) -> None:
        self._inputs: dict[fx.Node, frozenset[fx.Node]] = {}
        self.counted: set[fx.Node] = set()
        edges = features.flow.edges
        given = set(input_tensors(features.graph))
        for node in features.graph.nodes:
            if node in edges or node not in features.samples.dependent or _is_blank(node):
                continue
            made_of = [source for source in node.all_input_nodes if source in self._inputs]
            if node in given:
                self._inputs[node] = frozenset((node,))
            else:
                self._inputs[node] = frozenset().union(*(self._inputs[n] for n in made_of))
            value = node.meta.get("val")
            whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
            if whole or any(source in self.counted for source in made_of):
                self.counted.add(node)
        first = (node for _, node in edges.out_edges(ROOT) if isinstance(node, fx.Node))
        self.signals = frozenset[fx.Node]().union(
            *(self.of(source) for node in first for source in node.all_input_nodes)
        )

    def of(self, node: fx.Node) -> frozenset[fx.Node]:
        """The inputs that a node which holds no features is made of."""
        return self._inputs.get(node, frozenset())


def _is_blank(node: fx.Node) -> bool:
    """`ones_like(x)`, `x.new_zeros(...)`: made of its shape alone."""
    name = called_name(node)
    return node.op.startswith("call_") and (name.endswith("_like") or name.startswith("new_"))
