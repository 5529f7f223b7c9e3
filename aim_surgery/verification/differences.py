"""How far two results of one model are apart, leaf by leaf.

difference(a, b) = max |a - b| / max |a|        of tensors and Python's floats; of other values
                                                whether they are equal, or of one type
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from aim_surgery.capture.nested import is_told


def detached(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same without gradients."""
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in outputs.items()}


def differences_of(
    expected: Mapping[str, Any], got: Mapping[str, Any], floor: float = 0.0
) -> dict[str, float | str]:
    """Relative difference of each pair, or why it can't be told."""
    found: dict[str, float | str] = {}
    for name, value in expected.items():
        found[name] = difference(value, got[name], floor) if name in got else "is missing"
    found.update({name: "is new" for name in got if name not in expected})
    return found


def difference(expected: Any, got: Any, floor: float) -> float | str:
    """Of one pair; tensors against their largest value, or `floor` where that is larger."""
    expected, got = as_tensor(expected), as_tensor(got)
    if not isinstance(expected, torch.Tensor):
        if is_told(expected):
            return 0.0 if expected == got else f"is {got!r}, not {expected!r}"
        return 0.0 if type(expected) is type(got) else f"is a {type(got).__name__}"
    if not isinstance(got, torch.Tensor):
        return f"is a {type(got).__name__}, not a tensor"
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"is {got.dtype} {tuple(got.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (value.to_dense().to(wide) for value in (expected, got))  # sparse ones have no `max`
    same = (a == b) | (a.isnan() & b.isnan())
    scale = max(largest(torch.where(a.isfinite(), a, 0)), floor) or 1.0
    return number(largest(torch.where(same, 0, a - b)) / scale)


def as_tensor(value: Any) -> Any:
    """A computed number of Python's as a tensor; anything else as it is."""
    if isinstance(value, float | complex):
        wide = torch.complex128 if isinstance(value, complex) else torch.float64
        return torch.tensor(value, dtype=wide)
    return value


def is_empty(outputs: Mapping[str, Any], *, except_for: Collection[str]) -> bool:
    """Whether outputs say nothing: tensors without entries, and what nobody looks into."""
    rest = [value for name, value in outputs.items() if name not in except_for]
    tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
    if tensors:
        return not any(isinstance(value, torch.Tensor) and value.numel() for value in rest)
    return not any(is_told(value) and value is not None for value in rest)


def largest(tensor: torch.Tensor) -> float:
    """Largest absolute value, 0 of nothing."""
    return float(tensor.to_dense().abs().max()) if tensor.numel() else 0.0


def number(value: float) -> float:
    """NaN, which no limit catches, as infinity."""
    return float("inf") if value != value else value
