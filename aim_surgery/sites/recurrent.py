"""Sites of recurrent layers: each linear call that makes gates, of each layer and direction.

A recurrent layer is one call, in a graph and inside Python calls alike, so its sites read through
the layer, and their memory weights live beside. An LSTM's and a plain RNN's gates are the sum of
two products, so both weights belong to one site; a GRU's are two sites (`nn/recurrent.py` has the
algebra). Projections are listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from aim_surgery.capture import Capture
from aim_surgery.nn.recurrent import (
    is_recurrent,
    linear_calls,
    own_parameters,
    projections,
)
from aim_surgery.sites.site import Site, Skip

BESIDE = "it is inside a recurrent layer's call"
_STATE = "it projects the state that the gates make, and has no bias; the gates read"


def find_recurrent(capture: Capture, graph: fx.Graph) -> dict[fx.Node, tuple[Site, ...]]:
    """Find the sites of recurrent layers that a graph calls.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.

    Returns:
        The sites of each layer, at its first call.
    """
    first: dict[str, fx.Node] = {}
    calls: Counter[str] = Counter()
    for node in graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and is_recurrent(capture.modules[path]):
            first.setdefault(path, node)
            calls[path] += 1
    return {
        node: tuple(recurrent_sites(capture, path, path, calls[path]))
        for path, node in first.items()
    }


def recurrent_sites(capture: Capture, path: str, inside: str, calls: int) -> Iterator[Site]:
    """The sites of one recurrent layer.

    Args:
        capture: The captured model.
        path: Qualified name of the layer.
        inside: Path of the Python call that it is in; its own in a graph.
        calls: How often it is called on the example.

    Yields:
        A site for each linear call; it is called as its first weight.
    """
    layer = capture.modules[path]
    for name, names in linear_calls(layer).items():
        weights = _parameters(capture, path, names)
        if not weights:
            continue
        rows, _ = _shape(layer, name)
        columns = sum(_shape(layer, weight)[1] for weight in names)
        qualname = f"{path}.{name}".removeprefix(".")
        yield Site(
            name=qualname,
            layer=qualname,
            kind="linear",
            in_channels=columns,
            out_channels=rows,
            groups=1,
            kernel_size=(),
            spatial=(),
            positions=calls,
            weights=weights,
            widens=False,
            why_beside=BESIDE,
            sample_axis=None,
            inside=inside,
        )


def recurrent_skips(capture: Capture, path: str) -> Iterator[Skip]:
    """The weights of a recurrent layer that don't read.

    Args:
        capture: The captured model.
        path: Qualified name of the layer.

    Yields:
        One `Skip` for each.
    """
    layer = capture.modules[path]
    for name in projections(layer):
        yield Skip(f"{path}.{name}".removeprefix("."), _parameters(capture, path, (name,)), _STATE)


def fault_recurrent(capture: Capture, site: Site) -> str | None:
    """Hold a planned site of a recurrent layer against the model.

    Args:
        capture: The captured model.
        site: A site from a plan.

    Returns:
        What is wrong, as a clause, "" if it fits; None where it is no site of a recurrent layer.
    """
    path, _, name = site.layer.rpartition(".")
    layer = capture.modules.get(path)
    if layer is None or not is_recurrent(layer) or name not in linear_calls(layer):
        return None
    if not capture.whole and site.inside == path:
        nodes = (node for trace in capture.traces for node in trace.graph.nodes)
        if not any(node.op == "call_module" and node.target == path for node in nodes):
            return "it is called in no graph"
    (fresh,) = (s for s in recurrent_sites(capture, path, site.inside, 1) if s.layer == site.layer)
    for what in ("kind", "in_channels", "out_channels", "weights", "widens"):
        has, planned = getattr(fresh, what), getattr(site, what)
        if has != planned:
            return f"it has {what}={has!r}, the plan was made for {planned!r}"
    return ""


def _parameters(capture: Capture, path: str, names: Iterable[str]) -> tuple[str, ...]:
    """Parameters that weights are, or are made of, by all names."""
    layer = capture.modules[path]
    found = {}
    for own in (own for name in names for own in own_parameters(layer, name)):
        owners = capture.owners[id(layer.get_parameter(own))]
        found |= dict.fromkeys(owners)
    return tuple(found)


def _shape(layer: nn.Module, name: str) -> torch.Size:
    with torch.no_grad():  # a parametrized weight is computed
        return getattr(layer, name).shape
