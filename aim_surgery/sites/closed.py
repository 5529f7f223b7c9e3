"""Whether a Python call can reach layers at all: most that stay calls are small (drop path, norms).

A submodule is closed where no layer lies in it and what it holds (numbers, tensors, plain
functions, its own submodules) leads to none elsewhere. Then it need not be run to be known.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, torch.Tensor, torch.dtype,
          torch.device, torch.Size, torch.layout, torch.memory_format,
          types.BuiltinFunctionType)  # fmt: skip
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = tuple(name for name in _OF_EVERY_MODULE if name.endswith("hooks"))


def are_closed(modules: Iterable[nn.Module], layers: Iterable[nn.Module]) -> bool:
    """Whether calls of modules certainly call none of these layers, and use none's weights.

    Args:
        modules: Submodules that stay Python calls.
        layers: All layers of their model that could read.

    Returns:
        True where that is certain of each.
    """
    layers = set(layers)
    weights = {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}

    def is_closed(module: nn.Module) -> bool:
        parts = set(module.modules())
        if not parts.isdisjoint(layers) or not all(map(_holds_only_plain, parts)):
            return False
        return weights.isdisjoint(id(parameter) for parameter in module.parameters())

    return all(map(is_closed, modules))


def _holds_only_plain(module: nn.Module) -> bool:
    state = vars(module)
    if any(state.get(name) for name in _HOOKS):
        return False
    return all(_is_plain(value) for name, value in state.items() if name not in _OF_EVERY_MODULE)


def _is_plain(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, types.FunctionType):
        return not value.__closure__
    if type(value) in (tuple, list, set, frozenset):
        return all(map(_is_plain, value))
    return type(value) is dict and all(map(_is_plain, _items(value)))


def _items(mapping: Mapping[Any, Any]) -> Iterable[Any]:
    for key, value in mapping.items():
        yield key
        yield value
