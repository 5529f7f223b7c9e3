"""What holds proxies besides lists and tuples: other dicts, objects of the model's classes.

A graph makes them anew at each call, from the tensors in them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.errors import CaptureError
from aim_surgery.nn.rebuilt import Rebuilt

_DEEPEST = 6


def holds_proxies(value: Any, depth: int = 0) -> bool:
    """Whether a collection, or an object of a class of the model's own, has proxies in it."""
    if isinstance(value, list | tuple | set | Mapping):
        items = value.values() if isinstance(value, Mapping) else value
    elif isinstance(value, type | torch.Tensor | nn.Module) or not hasattr(value, "__dict__"):
        return False
    else:
        items = vars(value).values()
    return depth < _DEEPEST and any(
        type(item) is ValueProxy or holds_proxies(item, depth + 1) for item in items
    )


def recipe(
    holder: Any, lower: Callable[[Any], Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """How a graph makes a holder.

    Args:
        holder: A mapping (OrderedDict, ModelOutput), or an object with proxies in it.
        lower: Lowers what is in it to what an fx node can hold.

    Returns:
        A function with its arguments.

    Raises:
        CaptureError: It is a dict of a kind that can't be made so.
    """
    kind = type(holder)
    if not isinstance(holder, dict):
        attributes, constants = {}, {}
        for name, value in vars(holder).items():
            if type(value) is ValueProxy or holds_proxies(value):
                attributes[name] = lower(value)
            else:
                constants[name] = value
        return Rebuilt(kind, constants), (), attributes
    if is_dataclass(holder):
        return kind, (), {str(key): lower(value) for key, value in holder.items()}
    if kind is not OrderedDict:
        raise CaptureError(
            f"a graph can't make a {kind.__name__}: return a dict, or move that into a submodule "
            f"of its own"
        )
    return kind, ([(key, lower(value)) for key, value in holder.items()],), {}
