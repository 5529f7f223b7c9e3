"""A model without its weights: what a plan needs, built in no time and no memory.

Parameters go to the meta device as they are registered, so at most one of them exists at a time and
initialisers find nothing to fill. The rest of the model is real while it is built, then goes to the
meta device as well. dtypes are those of the file that is to be operated on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.reading.names import Names
from aim_surgery.checkpoint.reading.source import Entry

# In which a model computes; others (float8) only store.
COMPUTED = {"float16", "bfloat16", "float32", "float64"}


def build_skeleton(spec: str, model_args: Mapping[str, Any]) -> nn.Module:
    """Build the model that a spec names, on the meta device.

    Args:
        spec: See `build`.
        model_args: The factory's keyword arguments.

    Returns:
        The model: names, shapes, dtypes, modules and modes of the real one, no values.

    Raises:
        ModelSpecError: The spec names nothing, or its factory needs real weights.
    """
    with _without_weights():
        return build(spec, **model_args).to("meta")


@contextlib.contextmanager
def _without_weights() -> Iterator[None]:
    original = nn.Module.register_parameter
    twins: Any = WeakIdKeyDictionary()  # a parameter that is registered twice stays one

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if type(param) is nn.Parameter and param.device.type != "meta":
            if param not in twins:
                empty = param.detach().to("meta")
                twins[param] = nn.Parameter(empty, requires_grad=param.requires_grad)
            param = twins[param]
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = original


def adopt_dtypes(model: nn.Module, entries: Mapping[str, Entry], names: Names) -> None:
    """Give a model the dtypes of a file, where these are dtypes to compute in.

    Args:
        model: The model, with or without values; changed in place.
        entries: What the file holds.
        names: The file's names for the model's.
    """
    own = model.state_dict(keep_vars=True)
    told = {name: entries[key].dtype for name, key in names.keys.items() if key in entries}
    floating = {
        told[name]
        for name, value in own.items()
        if name in told and isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if len(floating) == 1 and floating <= COMPUTED:
        model.to(getattr(torch, next(iter(floating))))  # also what is not in the file
    for name, value in model.state_dict(keep_vars=True).items():
        if name not in told or not isinstance(value, torch.Tensor):
            continue
        dtype = getattr(torch, told[name])
        if told[name] in COMPUTED and value.is_floating_point() and value.dtype != dtype:
            value.data = value.data.to(dtype)
