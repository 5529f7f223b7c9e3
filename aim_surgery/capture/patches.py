"""What is changed in torch while a model is traced, and put back afterwards whatever happens.

Four things escape `torch.fx`:

* the training flag, a plain attribute, which a trace would freeze;
* tensor factories: `torch.arange(n)` has no tensor argument that could record it, and a traced
  `torch.rand` would become a constant;
* attributes that a forward sets on its module: they would leave the input model changed (a table
  that is rebuilt for the input's size does no harm);
* `isinstance(x, torch.Tensor)`, which is false for a proxy.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._device import _device_constructors

from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.errors import CaptureError

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

FACTORIES = frozenset(_device_constructors())

_MISSING = object()


@contextlib.contextmanager
def tracing_patches(tracer: ValueTracer) -> Iterator[None]:
    """Make training flags, factories and attribute assignment visible to the tracer."""
    with (
        _symbolic_training_flag(tracer),
        _recorded_factories(tracer),
        _restored_attributes(tracer),
        _instances_by_value(tracer.model),
        torch.enable_grad(),
    ):
        yield


@contextlib.contextmanager
def _symbolic_training_flag(tracer: ValueTracer) -> Iterator[None]:
    def get(module: nn.Module) -> Any:
        return tracer.training_flag(module)

    def put(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    # a data descriptor on the class goes before the instance's own attribute
    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextlib.contextmanager
def _recorded_factories(tracer: ValueTracer) -> Iterator[None]:

    def record(factory: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if tracer.evaluating or not tracer.can_record((args, kwargs)):
            return factory(*args, **kwargs)
        return tracer.create_proxy("call_function", factory, args, kwargs)

    def wrapper(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            return record(factory, args, kwargs)

        return recorded

    # By name and not by a TorchFunctionMode: torch's parser would ask proxies for their int
    # before the mode is asked. `from torch import arange` is covered by fx's autowrap.
    originals = {
        name: value
        for name, value in vars(torch).items()
        if callable(value) and isinstance(value, type(torch.arange)) and value in FACTORIES
    }
    originals |= {"finfo": torch.finfo, "iinfo": torch.iinfo}  # these ask a dtype, maybe a proxy's
    for name, value in originals.items():
        setattr(torch, name, wrapper(value))
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(torch, name, value)


@contextlib.contextmanager
def _instances_by_value(model: nn.Module) -> Iterator[None]:
    """Let `isinstance` see a proxy's value, in the packages that the model's classes come from."""

    def by_value(instance: Any, classes: Any) -> bool:
        if type(instance) is ValueProxy:
            return isinstance(instance.aim_value, classes) or isinstance(instance, classes)
        return isinstance(instance, classes)

    def is_tensor(instance: Any) -> bool:
        return by_value(instance, torch.Tensor)

    kinds = {type(module) for module in model.modules()}
    packages = {kind.__module__.partition(".")[0] for kind in kinds} - {"torch", "builtins"}
    inside = tuple(f"{package}." for package in packages)
    modules = [m for n, m in list(sys.modules.items()) if n in packages or n.startswith(inside)]
    spaces = [vars(module) for module in modules if "isinstance" not in vars(module)]
    original = torch.is_tensor
    torch.is_tensor = is_tensor  # type: ignore[assignment]
    for space in spaces:
        space["isinstance"] = by_value
    try:
        yield
    finally:
        torch.is_tensor = original
        for space in spaces:
            del space["isinstance"]


@contextlib.contextmanager
def _restored_attributes(tracer: ValueTracer) -> Iterator[None]:
    original = nn.Module.__setattr__
    changed: dict[tuple[int, str], tuple[nn.Module, str, dict[str, Any] | None, Any]] = {}

    def guarded(module: nn.Module, name: str, value: Any) -> None:
        homes = (module._parameters, module._buffers, module._modules, module.__dict__)
        home = next((home for home in homes if name in home), None)
        is_proxy = type(value) is ValueProxy
        if is_proxy and home in homes[:3] and tracer.holds_data(value, of=(module, name)):
            raise CaptureError(
                f"{tracer.path_of(module) or 'the model'}.{name} is replaced inside forward(), by "
                f"something that depends on the input or on what it was. A graph can't rebind a "
                f"registered buffer or parameter: write `self.{name}.copy_(...)` instead, which "
                f"can be captured."
            )
        old = _MISSING if home is None else home[name]
        changed.setdefault((id(module), name), (module, name, home, old))
        if is_proxy:
            module.__dict__[name] = value
        else:
            original(module, name, cast(Any, value))

    nn.Module.__setattr__ = guarded  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
        for module, name, home, old in changed.values():
            homes = (module.__dict__, module._parameters, module._buffers, module._modules)
            for other in homes:
                if other is not home:
                    other.pop(name, None)
            if home is not None:
                home[name] = old
