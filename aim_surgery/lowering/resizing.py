"""Planes that have a site's size already: whether they are pooled all the same."""

from __future__ import annotations

import torch
from torch import fx

from aim_surgery.nn.spatial import ADAPTIVE_POOLS
from aim_surgery.nn.views import resized


def resize_where_needed(view: fx.Node) -> None:
    """Let planes that have a site's size be seen as they are.

    Args:
        view: What a site sees of the memory; the graph changes in place.
    """
    node = _pool_of(view)
    if node.target in ADAPTIVE_POOLS.values() and isinstance(node.args[1], fx.Node):
        node.target = resized


def always_resize(view: fx.Node, dims: int) -> None:
    """Pool planes whatever their size, as `transform` writes it.

    Args:
        view: What a site sees of the memory; the graph changes in place.
        dims: The site's spatial axes.
    """
    node = _pool_of(view)
    if node.target is resized:
        node.target = ADAPTIVE_POOLS[dims]


def _pool_of(view: fx.Node) -> fx.Node:
    node = view
    while node.target in ("to", "reshape", torch.repeat_interleave):
        node = node.all_input_nodes[0]
    return node
