"""split -> concat: the way back, to what `transform` emits.

conv(x, W_x) + conv(m, W_m)  ->  conv(cat[x, m], [W_x ; W_m])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.errors import AimSurgeryError
from aim_surgery.lowering.resizing import always_resize
from aim_surgery.nn.spatial import CONVS
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.beside import set_input
from aim_surgery.surgery.joined import write_joined
from aim_surgery.surgery.notes import note_site
from aim_surgery.surgery.pieces import pieces_of
from aim_surgery.surgery.tidy import erase_unused


def join_sites(graph: fx.Graph, plan: Plan, reads: Mapping[str, Read]) -> bool:
    """Join the sites of one graph that `split_sites` took apart.

    Args:
        graph: The emitted graph; changed in place.
        plan: What it was operated by.
        reads: The reads whose layers are widened, by site.

    Returns:
        Whether anything changed.

    Raises:
        AimSurgeryError: The graph is no longer what `split_sites` wrote.
    """
    nodes = {node.name: node for node in graph.nodes}
    joined: dict[fx.Node, fx.Node] = {}  # what stands for a sum
    modified = False
    for pieces in pieces_of(graph, reads):
        node, note, source, view, _, _ = pieces
        if not note.sliced:
            if source in joined:
                note_site(node, note._replace(source=joined[source].name))
            continue
        read, total = reads[note.site], pieces.total()
        if note.sliced not in nodes:
            raise AimSurgeryError(
                f"{note.site}: this graph has been changed since it was split, and the slice of "
                f"its weight is no longer in it: start from what transform returned"
            )
        source = joined.get(source, source)
        varies = plan.varies(read.memory, read.version)
        with graph.inserting_before(total):
            cat = write_joined(graph, source, view, None, read, note.memory_format, varies)
            if note.called:
                size = pieces.output_size
                site = graph.call_module(note.called, (cat,) if size is None else (cat, size))
            else:
                weight = graph.get_attr(read.site.weights[0])
                if node is total:
                    site = _of_function(graph, node, cat, weight)
                    note = note._replace(input_index=0)
                else:
                    site = graph.node_copy(node)
                    site.meta = {}
                    set_input(site, note, cat)
                    site.replace_input_with(nodes[note.sliced], weight)
        total.replace_all_uses_with(site)
        joined[total] = site
        plain = note._replace(source=source.name, beside="", called="", sliced="")
        note_site(site, plain)
        erase_unused(total)
        always_resize(view, len(read.site.spatial))
        modified = True
    return modified


def _of_function(graph: fx.Graph, total: fx.Node, cat: fx.Node, weight: fx.Node) -> fx.Node:
    """The call of the function that a sum of both products stands for."""
    _, _, bias, _, *options = total.args
    function: Any = F.linear
    if options:
        strides = cast("tuple[int, ...]", options[0])
        function = CONVS[len(strides)]
    return graph.call_function(function, (cat, weight, bias, *options))
