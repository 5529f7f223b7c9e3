"""A forward that stands in the place of a layer's own, and calls that with other tensors.

The layer's tensors and attributes are left alone: a call works on a shallow copy of it, so that
threads and replicas may call at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.hooks import RemovableHandle


class StandIn:
    """Stands in the place of a layer's forward.

    Which layer it is called for (a replica that `DataParallel` made holds the same object), a
    forward pre-hook tells.
    """

    _layer: nn.Module

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._running = threading.local()

    def attach(self, layer: nn.Module) -> None:
        """Let a layer's calls come here."""
        self._layer = layer
        vars(layer)["forward"] = self
        self._handle = layer.register_forward_pre_hook(self._note)

    def detach(self) -> None:
        """Give its layer the forward of its class back."""
        if self._handle is not None:
            self._handle.remove()
            del vars(self._layer)["forward"]
        self._handle = None

    def call(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What to do in the place of the layer's forward."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Find out which layer is called, and call it."""
        layer = self._layer
        if not torch.compiler.is_compiling():
            layer = vars(self._running).pop("layer", layer)
        return self.call(layer, *args, **kwargs)

    def _note(self, layer: nn.Module, _args: Any) -> None:
        if vars(layer).get("forward") is not self:
            raise RuntimeError(
                f"this {type(layer).__name__} was put in the place of a layer that reads the "
                f"memory, and would not read it: exchange layers before the operation"
            )
        if not torch.compiler.is_compiling():
            self._running.layer = layer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_running"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._running = threading.local()


def called_with(layer: nn.Module, tensors: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a layer's class with other tensors and attributes.

    Args:
        layer: The layer; left unchanged.
        tensors: What it has instead of its own, by name.
        args: Of the call.
        kwargs: Of the call.

    Returns:
        What the forward gives.
    """
    kind: Any = type_before_parametrizations(layer)
    twin = kind.__new__(kind)
    vars(twin).update(vars(layer))
    vars(twin).update(tensors)
    return kind.forward(twin, *args, **kwargs)
