"""Shapes that need no rule: what batch norm and activations give is like what they get.

Fake values of these come from decompositions in Python that take milliseconds; in a small network
they are most of what capturing costs. What is out of the ordinary (other strides, an error to come)
is left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_ACTIVATIONS = frozenset(
    (F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.elu, F.leaky_relu,
     F.mish, F.softplus, F.logsigmoid, F.selu, F.dropout, F.dropout2d, F.sigmoid, F.tanh,
     torch.relu, torch.sigmoid, torch.tanh, Tensor.relu, Tensor.sigmoid, Tensor.tanh)
)  # fmt: skip
_IN_PLACE = frozenset(
    (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.hardtanh, F.elu, F.leaky_relu, F.mish,
     F.selu)
)  # fmt: skip
_PER_CHANNEL = ("running_mean", "running_var", "weight", "bias")


class Shortcuts(TorchFunctionMode):
    """While active, answers these functions by a fresh value like their input, or by that itself.

    Args:
        like: Makes a fake tensor like another.
    """

    def __init__(self, like: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._like = like

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            in_place = kwargs.get("inplace")
            if _is_plain(args) and True not in args[1:] and (not in_place or func in _IN_PLACE):
                return args[0] if in_place else self._like(args[0])
        elif func is F.batch_norm and _is_plain(args) and _fits(args, kwargs):
            return self._like(args[0])
        return func(*args, **kwargs)


def _is_plain(args: Any) -> bool:
    x = args[0] if args else None
    return type(x) is FakeTensor and x.dtype.is_floating_point and x.is_contiguous()


def _fits(args: Any, kwargs: Mapping[str, Any]) -> bool:
    x, *given = args
    values = {**dict(zip(_PER_CHANNEL, given, strict=False)), **kwargs}
    channels = x.shape[1] if x.ndim > 1 else 0
    several = x.numel() > channels  # one value a channel is an error in training
    tensors = [tensor for name in _PER_CHANNEL if (tensor := values.get(name)) is not None]
    return several and all(t.shape == (channels,) and t.dtype == x.dtype for t in tensors)
