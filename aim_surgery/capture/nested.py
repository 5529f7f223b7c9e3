"""What nests of values hold: outputs of models, in whatever containers they come."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

# What has attributes, none of which are values of its own.
_CLOSED = (
    bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.Generator, nn.Module,
    fx.Graph, fx.Node, type, types.ModuleType, types.FunctionType, types.MethodType,
)  # fmt: skip
_NO_SLOTS = ("__dict__", "__weakref__")


def named_leaves(value: Any, path: str = "output") -> dict[str, Any]:
    """What a nested output holds, by where it stands: `output['logits']`, `output[0].loss`.

    Args:
        value: Tensors in tuples, lists, mappings and dataclasses; in attributes of other objects.
        path: Where the value itself stands.

    Returns:
        Tensors (of arrays, too), literals and whatever else stands at the ends; of an object that
        holds tensors, these alone.
    """
    return _leaves(value, path, (), {})


def is_told(leaf: Any) -> bool:
    """Whether a leaf is a tensor or a literal, and no object that nobody looks into."""
    return isinstance(leaf, torch.Tensor | bool | int | float | complex | str | bytes | None)


def attributes_of(value: Any) -> dict[str, Any]:
    """What an object of a class that nobody knows holds, in its slots and its dict."""
    if isinstance(value, _CLOSED):
        return {}
    slots = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    names = [n for own in slots for n in ((own,) if isinstance(own, str) else own)]
    held = {n: getattr(value, n) for n in names if n not in _NO_SLOTS and hasattr(value, n)}
    return held | getattr(value, "__dict__", {})


def _leaves(
    value: Any, path: str, around: tuple[Any, ...], opened: dict[int, Any]
) -> dict[str, Any]:
    """Of a value inside of others; each object is opened once, as they may hold one another."""
    parts = _parts(value, path)
    if parts is None:
        if id(value) in opened:
            return {}
        attributes = {f"{path}.{name}": item for name, item in attributes_of(value).items()}
        opened |= {id(value): value} if attributes else {}
        found = _leaves_of(attributes, around, opened)
        tensors = {name: leaf for name, leaf in found.items() if isinstance(leaf, torch.Tensor)}
        return tensors or {path: _as_tensor(value)}
    if any(value is other for other in around):
        return {}  # a list that holds itself
    return _leaves_of(parts, (*around, value), opened)


def _leaves_of(
    parts: Mapping[str, Any], around: tuple[Any, ...], opened: dict[int, Any]
) -> dict[str, Any]:
    return {
        name: leaf
        for at, part in parts.items()
        for name, leaf in _leaves(part, at, around, opened).items()
    }


def _parts(value: Any, path: str) -> dict[str, Any] | None:
    """What a container holds; None of anything else."""
    if isinstance(value, Mapping):
        return {f"{path}[{key!r}]": item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return {f"{path}.{name}": getattr(value, name) for name in names}
    if isinstance(value, tuple | list):
        return {f"{path}[{index}]": item for index, item in enumerate(value)}
    return None


def _as_tensor(value: Any) -> Any:
    """The numbers of an array, which nothing else can be told of."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        return torch.as_tensor(np.array(value))
    return value
