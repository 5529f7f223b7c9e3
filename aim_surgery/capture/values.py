"""What a node's value is on the example inputs, without doing its arithmetic.

Tensors are `FakeTensor`s: shape, dtype, device and strides, no storage. A stock layer is evaluated
once per (type, hyperparameters, shapes): deep networks repeat few geometries many times, and a
shape rule costs a hundred times what looking it up does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from aim_surgery.capture.shortcuts import Shortcuts

_empty_strided = (
    torch.empty_strided
)  # the original: while a model is traced, factories are recorded
_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device)

_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}

_MOST_OUTPUTS = 10_000

Spec = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]

_OUTPUTS: dict[tuple[Any, ...], Spec] = {}  # of all models: a rule of torch's, not of a model


class FakeValues:
    """Fake tensors for the parameters, inputs and layers of one model."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.shortcuts = Shortcuts(lambda tensor: self._fresh(_spec(tensor)))
        self._tensors: dict[int, torch.Tensor] = {}
        self._sources: list[torch.Tensor] = []  # keeps the ids above valid
        self._layers: dict[int, tuple[Any, ...] | None] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake twin of a tensor; the same one each time."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        twin = self._tensors.get(id(tensor))
        if twin is None:
            if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided:
                twin = self._fresh(
                    _spec(tensor)
                )  # what `from_tensor` gives, at a tenth of its time
            else:
                twin = self.mode.from_tensor(tensor)
            self._tensors[id(tensor)] = twin
            self._sources.append(tensor)
        return twin

    def source_of(self, twin: torch.Tensor) -> torch.Tensor | None:
        """The tensor that a fake one was made for; None where it was computed."""
        pairs = zip(self._tensors.values(), self._sources, strict=True)
        return next((source for made, source in pairs if made is twin), None)

    def of_all(self, value: Any) -> Any:
        """A nested value with every tensor in it replaced by its fake twin."""
        if isinstance(value, torch.Tensor):
            return self.of(value)
        return tree_map_only(torch.Tensor, self.of, value)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function on fake values."""
        with self.mode, self.shortcuts, torch.no_grad():
            return function(*args, **kwargs)

    def call_layer(
        self, layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Run a stock layer on fake values, or remember what such a layer gave for such values."""
        key = self._key(layer, args, kwargs)
        if key is not None and key in _OUTPUTS:
            return self._fresh(_OUTPUTS[key])
        output = self.call(forward, args, kwargs)
        if key is not None and isinstance(output, FakeTensor):
            if len(_OUTPUTS) >= _MOST_OUTPUTS:
                _OUTPUTS.clear()
            _OUTPUTS[key] = _spec(output)
        return output

    def _fresh(self, spec: Spec) -> torch.Tensor:
        size, stride, dtype, device = spec
        with no_dispatch():  # inside the fake mode it would take ten times as long
            meta = _empty_strided(size, stride, dtype=dtype, device="meta")
            return FakeTensor(self.mode, meta, device)

    def _key(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...] | None:
        """What a stock layer's output shape can depend on; None: not to be remembered."""
        if kwargs or not all(isinstance(arg, FakeTensor) for arg in args):
            return None
        if id(layer) not in self._layers:
            self._layers[id(layer)] = _hyperparameters(layer)
        hyperparameters = self._layers[id(layer)]
        if hyperparameters is None:
            return None
        return (hyperparameters, layer.training, *(_spec(arg) for arg in args))


def _spec(tensor: torch.Tensor) -> Spec:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _hyperparameters(layer: nn.Module) -> tuple[Any, ...] | None:
    state = vars(layer)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    if hooked or layer._modules or "parametrizations" in state:
        return None
    scalars = []
    for name, value in state.items():
        if name == "training":
            continue
        if isinstance(value, _SCALARS) or (
            isinstance(value, tuple) and all(isinstance(item, _SCALARS) for item in value)
        ):
            scalars.append((name, value))
        elif not name.startswith("_"):
            return None  # a hyperparameter that can't be compared
    tensors = (
        *((name, t if t is None else _spec(t)) for name, t in layer._parameters.items()),
        *((name, t if t is None else _spec(t)) for name, t in layer._buffers.items()),
    )
    return (type(layer), *scalars, *tensors)


def node_value(argument: Any) -> Any:
    """The carried value of a node's arguments, nested as they are.

    Args:
        argument: What stands in `node.args` or `node.kwargs`.

    Returns:
        The same structure with each node replaced by its value; lists and dicts are new ones, that
        functions may change, as those in a graph's code are.
    """
    if isinstance(argument, torch.fx.Node):
        return argument.meta["val"]
    if isinstance(argument, tuple):
        values = map(node_value, argument)
        return type(argument)(*values) if hasattr(argument, "_fields") else tuple(values)
    if isinstance(argument, list):
        return [node_value(item) for item in argument]
    if isinstance(argument, dict):
        return {key: node_value(item) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*map(node_value, (argument.start, argument.stop, argument.step)))
    return argument


def with_dtypes(arguments: Any) -> Any:
    """Arguments of a torch function, with Python's number types as the dtypes that they stand for.

    Args:
        arguments: Nested arguments, such as `dtype=int`.

    Returns:
        The same nest; other types stay.
    """
    return tree_map_only(type, lambda kind: _DTYPES.get(kind, kind), arguments)
