"""What nodes hold that depend on no input and no parameter: masks made from sizes.

A captured graph carries shapes, not entries. Such nodes are few and small, so they are computed,
as far as plain functions of torch make them, on the CPU and on copies of what the model holds.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import random_state_kept
from aim_surgery.sites.features import Features
from aim_surgery.sites.graph import changes_in_place
from aim_surgery.sites.samples import holds_tensor

_MOST_ENTRIES = 2**24  # of a tensor that is computed
_MOST_CALLS = 1000
_CPU = torch.device("cpu")


def compute_constants(
    capture: Capture, features: Features, wanted: Collection[fx.Node]
) -> dict[fx.Node, torch.Tensor]:
    """Compute what nodes hold.

    Args:
        capture: The captured model that the graph belongs to.
        features: What the nodes of the graph carry.
        wanted: Nodes of the graph.

    Returns:
        Tensors by node; without those that depend on inputs or parameters, that are large, or that
        can't be computed here. The model and the state of its random numbers stay untouched.
    """
    needed = _needed(features, wanted) if wanted else []
    if not needed or len(needed) > _MOST_CALLS:
        return {}
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), random_state_kept():
        for node in needed:
            try:
                values[node] = _compute(capture, node, values)
            except Exception:
                values.pop(_changed(node), None)
    return {n: values[n] for n in wanted if isinstance(values.get(n), torch.Tensor)}


def _needed(features: Features, wanted: Collection[fx.Node]) -> list[fx.Node]:
    """What the wanted nodes are made of, with what changes it in place, in execution order."""
    needed = set(wanted)
    for node in reversed(features.graph.nodes):
        if node in needed or _changed(node) in needed:
            needed.add(node)
            if _is_made(node):
                needed.update(node.all_input_nodes)
    return [node for node in features.graph.nodes if node in needed]


def _changed(node: fx.Node) -> Any:
    return node.args[0] if changes_in_place(node) else node


def _is_made(node: fx.Node) -> bool:
    """Whether a node's value must be computed: sizes are known."""
    return changes_in_place(node) or "val" not in node.meta or holds_tensor(node.meta["val"])


def _compute(capture: Capture, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if not _is_made(node):
        return _on_cpu(node.meta["val"])
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.numel() > _MOST_ENTRIES:
        raise ValueError(node.name)
    if node.op == "get_attr":
        return _stored(capture, str(node.target))
    if node.op not in ("call_function", "call_method") or not _is_plain(node.target):
        raise ValueError(node.name)
    args = map_aggregate(node.args, lambda a: _on_cpu(values[a] if isinstance(a, fx.Node) else a))
    kwargs: Any = map_aggregate(
        node.kwargs, lambda a: _on_cpu(values[a] if isinstance(a, fx.Node) else a)
    )
    kwargs = {key: _CPU if key == "device" else value for key, value in kwargs.items()}
    arguments: Any = args
    if isinstance(node.target, str):
        return getattr(arguments[0], node.target)(*arguments[1:], **kwargs)
    return node.target(*arguments, **kwargs)


def _is_plain(target: Any) -> bool:
    """A method, or a function of torch or Python: nothing of a model's that may do other things."""
    if isinstance(target, str):
        return True
    home = getattr(target, "__module__", "") or ""
    return home.partition(".")[0] in ("", "torch", "_operator", "builtins", "math")


def _on_cpu(value: Any) -> Any:
    return _CPU if isinstance(value, torch.device) else value


def _stored(capture: Capture, name: str) -> torch.Tensor:
    constants = {k: v for trace in capture.traces for k, v in trace.constants.items()}
    path, _, attribute = name.rpartition(".")
    value = constants.get(name)
    if value is None:
        value = getattr(capture.modules[path], attribute)
    if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter) or value.is_meta:
        raise TypeError(name)
    return value.detach().cpu().clone()
