"""What is noted down on the nodes of an emitted graph, for passes that change it later.

A site's node, the call that multiplies by W_x, carries a `SiteNote` under `node.meta["aim"]`; no
other node carries one, and there is no other key. It names nodes, not the nodes themselves, so it
is plain data that survives copies of the graph and its pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from aim_surgery.nn.graph_state import NOTE


class SiteNote(NamedTuple):
    """Where the pieces of a site are that reads the memory.

    Attributes:
        site: Name of the site, as in the plan: `Read.site.name`.
        source: Name of the node x, what the site works on.
        view: Name of the node m: what the site sees of the memory, of the input's size, dtype and
            device. (k, *S) where it is the same for all samples, else (*lead, k, *S); of a linear
            site (k,), or (.., N, .., k), which broadcasts against the input.
        beside: Name of the node conv(m, W_m), whose sum with the site's node is what others use;
            of m itself, where the site's node is that sum; "" where it works on cat[x, m].
        input_index: Position of the input among the node's arguments.
        input_name: Its keyword.
        rows: Whether it is a product W @ x of more than one column: features are rows.
        features: Sizes of the last axes of its output, where features are several; else ().
        memory_format: The channels-last format of x, None where it is in another.
        called: Path of the layer whose call the node stands for, where it is a function that
            `split` wrote; "" elsewhere.
        sliced: Name of the node that the site's is given by `split` for a weight: W_x, a slice, or
            W, where it takes that apart itself; "" elsewhere.
    """

    site: str
    source: str
    view: str
    beside: str
    input_index: int
    input_name: str
    rows: bool
    features: tuple[int, ...] = ()
    memory_format: torch.memory_format | None = None
    called: str = ""
    sliced: str = ""


def note_site(node: fx.Node, note: SiteNote) -> None:
    """Note down a site at its node; an older note goes."""
    node.meta[NOTE] = note


def noted_sites(graph: fx.Graph) -> Iterator[tuple[fx.Node, SiteNote]]:
    """The sites of an emitted graph that read, in execution order."""
    for node in graph.nodes:
        note = node.meta.get(NOTE)
        if isinstance(note, SiteNote):
            yield node, note
