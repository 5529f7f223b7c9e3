"""Finds the pieces of sites in an emitted graph, by what surgery noted down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx, nn
from torch.fx.node import Argument

from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.layer_types import HOOKS, LAYER_TYPES
from aim_surgery.planning import Read
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.surgery.beside import input_of
from aim_surgery.surgery.notes import SiteNote, noted_sites

_FORWARDS = frozenset(kind.forward for kind in LAYER_TYPES)


class Pieces(NamedTuple):
    """A site in the graph."""

    node: fx.Node
    note: SiteNote
    source: fx.Node  # x
    view: fx.Node  # m
    joined: fx.Node | None  # cat[x, m], where it works on that
    beside: fx.Node | None  # conv(m, W_m), where it does not; m, where that is added on the way;
    # among the inputs of `node`, where that starts from it and is the sum already

    def total(self) -> fx.Node:
        """The sum of both products.

        Raises:
            AimSurgeryError: Somebody took it out.
        """
        if self.beside in self.node.all_input_nodes:
            return self.node
        both = (self.node, self.beside)
        for user in self.node.users:
            if user.args[:2] == both:
                return user
        raise AimSurgeryError(
            f"{self.note.site}: this graph has been changed since surgery wrote it, and its sum is "
            f"no longer in it: start from what transform returned"
        )

    @property
    def output_size(self) -> Argument | None:
        """What a split call of a transposed convolution turned into an output padding."""
        transposed = CONV_FUNCTIONS.get(self.node.target) == "conv_transpose"
        added = self.node.args[5] if transposed and len(self.node.args) > 5 else None
        return added.args[1] if isinstance(added, fx.Node) else None


def pieces_of(graph: fx.Graph, widened: Mapping[str, Read]) -> list[Pieces]:
    """Find the pieces of all noted sites.

    Args:
        graph: An emitted graph.
        widened: The reads whose layers are widened, by site.

    Returns:
        The sites, in execution order.

    Raises:
        AimSurgeryError: A piece is missing.
    """
    nodes = {node.name: node for node in graph.nodes}
    pieces = []
    for node, note in noted_sites(graph):
        source, view = nodes.get(note.source), nodes.get(note.view)
        joins = note.site in widened and not note.sliced
        joined = input_of(node, note) if joins else None
        beside = None if joins else nodes.get(note.beside)
        if source is None or view is None or (joined is None and beside is None):
            raise AimSurgeryError(
                f"{note.site}: this graph has been changed since surgery wrote it, and the pieces "
                f"of this site are no longer in it: start from what transform returned"
            )
        pieces.append(Pieces(node, note, source, view, joined, beside))
    return pieces


def refuse_changed(layer: nn.Module, path: str) -> None:
    """Refuse to take a widened layer's product apart where more than a product is called by now.

    A layer that had hooks or a forward of its own when it was operated is none that was widened.

    Args:
        layer: A widened layer, called by the graph.
        path: Where it is.

    Raises:
        AimSurgeryError: Hooks would see one product only, or nothing at all.
    """
    found = next((name for name in HOOKS if getattr(layer, name)), None)
    what = f"has {found[1:].replace('_', ' ')}" if found else ""
    if type(layer).forward not in _FORWARDS or "forward" in vars(layer):
        what = f"has a forward of its own ({type(layer).__name__})"
    if what:
        raise AimSurgeryError(
            f"{path}: this layer {what} that it did not have when it was operated, and that would "
            f"see another product than now: take it off, or put it on before the operation"
        )
