"""What is left of reads in a folded graph: sums with products of a memory that each sample wrote.

    t += conv(m, W_m)        ->        add_product(t, m, W_m)

As in the split form, the product is added as it is computed, and never written out.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from aim_surgery.nn.add_product import add_product, is_better
from aim_surgery.nn.layer_types import CONV_TYPES, is_its_product
from aim_surgery.surgery.modules import READS


def add_products(graph: fx.Graph, root: nn.Module) -> bool:
    """Add products of memories in place of their sums.

    Args:
        graph: A folded graph; changed in place.
        root: The module that it belongs to.

    Returns:
        Whether anything changed.
    """
    modified = False
    for node in graph.nodes:
        beside = node.args[1] if node.target is operator.iadd else None
        if not isinstance(beside, fx.Node) or beside.op != "call_module" or len(beside.users) > 1:
            continue
        if not str(beside.target).startswith(f"{READS}."):
            continue  # a sum of the model's own may broadcast
        layer = root.get_submodule(str(beside.target))
        if not _fits(layer) or len(beside.args) != 1 or beside.kwargs:
            continue
        assert isinstance(layer, CONV_TYPES)
        options = (layer.stride, layer.padding, layer.dilation)
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{beside.target}.weight")
            total = graph.call_function(
                add_product, (node.args[0], beside.args[0], weight, *options)
            )
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        graph.erase_node(beside)
        modified = True
    return modified


def _fits(layer: nn.Module) -> bool:
    """Whether it is a plain convolution that `add_product` can stand for, and better."""
    if not isinstance(layer, CONV_TYPES) or not is_its_product(layer):
        return False
    plain = layer.groups == 1 and layer.bias is None and layer.padding_mode == "zeros"
    numbers = not isinstance(layer.padding, str)
    return plain and numbers and is_better(layer.in_channels, layer.out_channels, layer.kernel_size)
