"""Weights into a model, every key accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aim_surgery.checkpoint.reading.names import QUANTIZED, misfits
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.errors import CheckpointError
from aim_surgery.surgery.state_dict import versioned


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights into a model, every key accounted for.

    A tied tensor may come under one of its names or all of them. Values are cast to the model's
    dtypes. Loading hooks of the model (conversions of older layouts) have their say.

    Args:
        model: The model; changed in place if everything fits, else left unchanged.
        state_dict: From `read_state_dict`.
        path: Where it comes from, for the message.

    Raises:
        CheckpointError: Keys are missing, left over or of another shape; the message lists them.
            Or tied names come with different values.
    """
    own = model.state_dict(keep_vars=True)
    given = _with_tied_names(own, state_dict, path)
    metadata = getattr(state_dict, "_metadata", None)
    entries = {name: entry_of(value) for name, value in given.items() if isinstance(value, Tensor)}
    problems = misfits(own, entries)
    if not problems:
        # without module versions (safetensors), a layout that fits exactly is the current one
        _load(model, given, metadata or getattr(own, "_metadata", None), path)
        return
    before = {name: _clone(value) for name, value in own.items()}
    try:  # an older layout that the model's own hooks convert
        _refuse_codes(problems, path)
        _load(model, given, metadata, path)
    except CheckpointError as err:
        with torch.no_grad():
            for name, value in before.items():
                if isinstance(value, Tensor) and not is_lazy(value):
                    own[name].copy_(value)
        raise CheckpointError(
            f"{path}: does not fit {type(model).__name__}: {'; '.join(problems)}. Check the model "
            f"and its arguments"
        ) from err


def _refuse_codes(problems: list[str], path: str | Path) -> None:
    """PyTorch would copy whole numbers into a weight without a word."""
    if any(QUANTIZED in problem for problem in problems):
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def _with_tied_names(
    own: Mapping[str, Any], given: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Fill in names that are tied to given ones; a tensor can't take two values."""
    first: dict[int, str] = {}
    filled = dict(given)
    for name in sorted(own, key=lambda name: name not in given):
        if not isinstance(own[name], Tensor):
            continue
        twin = first.setdefault(id(own[name]), name)
        if twin not in given:
            continue
        if name not in given:
            filled[name] = given[twin]
        elif not same_values(given[twin], given[name]):
            raise CheckpointError(
                f"{path}: {twin} and {name} are one tensor in the model, and have different "
                f"values in the file; untie them in the model or make them equal"
            )
    return filled


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN where the other has NaN."""
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is itself


def _load(model: nn.Module, given: dict[str, Tensor], metadata: Any, path: str | Path) -> None:
    try:
        model.load_state_dict(versioned(given, metadata))
    except Exception as err:  # load_state_dict's own, or whatever a loading hook raises
        raise CheckpointError(f"{path}: does not load into {type(model).__name__}: {err}") from err


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and not is_lazy(value) else value
