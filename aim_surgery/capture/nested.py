"""What nests of values hold: outputs of models, in whatever containers they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def named_leaves(value: Any, path: str = "output") -> dict[str, Any]:
    """What a nested output holds, by where it stands: `output['logits']`, `output[0].loss`.

    Args:
        value: Tensors in tuples, lists, mappings and dataclasses.
        path: Where the value itself stands.

    Returns:
        Tensors, literals and whatever else stands at the ends.
    """
    if isinstance(value, Mapping):
        parts = {f"{path}[{key!r}]": item for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        parts = {f"{path}.{name}": getattr(value, name) for name in names}
    elif isinstance(value, tuple | list):
        parts = {f"{path}[{index}]": item for index, item in enumerate(value)}
    else:
        return {path: value}
    return {
        name: leaf for at, part in parts.items() for name, leaf in named_leaves(part, at).items()
    }
