"""What is changed in `nn.Module` while a model is traced: its flag, its attributes, its parameters.

* The training flag, a plain attribute that a trace would freeze, becomes a node;
* attributes, buffers, collections and hooks that a forward changes are put back, and noted (a table
  that is rebuilt for the input's size does no harm);
* `next(self.parameters()).dtype`, a constant to fx, is asked of a proxy, so that it stays free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import fx, nn

from aim_surgery.capture.opaque import StayPython
from aim_surgery.capture.proxy import ValueProxy
from aim_surgery.errors import CaptureError

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer


@contextlib.contextmanager
def symbolic_training_flag(tracer: ValueTracer) -> Iterator[None]:
    """Let `module.training` be a node, and refuse that a forward changes it."""

    def get(module: nn.Module) -> Any:
        return tracer.training_flag(module)

    def put(module: nn.Module, value: bool) -> None:
        known = tracer.path_of(module) is not None and not tracer.elsewhere
        if known and value != tracer.mode_of(module):
            raise StayPython.here("changes a training mode")
        module.__dict__["training"] = value

    # a data descriptor on the class goes before the instance's own attribute
    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextlib.contextmanager
def undone_changes(tracer: ValueTracer) -> Iterator[None]:
    """Attributes, collections and hooks are put back, and noted where a graph will not set them."""
    original = nn.Module.__setattr__
    start = tracer.changes.mark()

    def note(module: nn.Module, path: str, name: str) -> None:
        tracer.changes.note(module, name)
        if name != "training" and not tracer.evaluating:
            tracer.changed.add(f"{path}.{name}".removeprefix("."))

    def guarded(module: nn.Module, name: str, value: Any) -> None:
        path = tracer.path_of(module)
        if tracer.elsewhere or path is None:
            original(module, name, value)
            return
        is_proxy = type(value) is ValueProxy
        registered = (module._parameters, module._buffers, module._modules)
        if is_proxy and any(name in home for home in registered):
            if tracer.is_in_place(value, of=(module, name)):
                return  # `self.steps += 1`: the buffer itself has been changed
            moved = _is_moved(value, f"{path}.{name}".removeprefix("."))
            if not moved and tracer.holds_data(value, of=(module, name)):
                raise CaptureError(_rebound(f"{path}.{name}".removeprefix(".")))
        note(module, path, name)
        if isinstance(module, nn.RNNBase) and name in module._flat_weights_names:
            # its own `__setattr__` has put the value into this list already
            tracer.changes.note_item(
                module, "_flat_weights", module._flat_weights_names.index(name)
            )
        if is_proxy:
            module.__dict__[name] = value
        else:
            original(module, name, cast(Any, value))

    delete, register = nn.Module.__delattr__, nn.Module.register_buffer

    def deleted(module: nn.Module, name: str) -> None:
        path = None if tracer.elsewhere else tracer.path_of(module)
        if path is not None:
            note(module, path, name)
        delete(module, name)

    @functools.wraps(register)
    def registered_buffer(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
        path = None if tracer.elsewhere else tracer.path_of(module)
        if path is not None and isinstance(name, str):
            note(module, path, name)
        register(module, name, *args, **kwargs)

    nn.Module.__setattr__ = guarded  # type: ignore[method-assign]
    nn.Module.__delattr__ = deleted  # type: ignore[method-assign]
    nn.Module.register_buffer = registered_buffer  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
        nn.Module.__delattr__ = delete  # type: ignore[method-assign]
        nn.Module.register_buffer = register  # type: ignore[method-assign]
        tracer.changed |= {*tracer.changes.undo(start, tracer.model)}


def _is_moved(proxy: ValueProxy, name: str) -> bool:
    """Whether a value is that very attribute on another device: `self.table.to(x.device)`."""
    node = proxy.node
    source = node.args[0] if node.op == "call_method" and node.target == "to" else None
    return isinstance(source, fx.Node) and source.op == "get_attr" and source.target == name


def _rebound(name: str) -> str:
    return (
        f"{name} is replaced inside forward(), by something that depends on the input or on what "
        f"it was. A graph can't rebind a registered buffer or parameter: write "
        f"`self.{name.rpartition('.')[2]}.copy_(...)` instead, which can be captured."
    )


@contextlib.contextmanager
def parameters_by_proxy(tracer: ValueTracer) -> Iterator[None]:
    """What a forward asks of its parameters by going through them is asked of proxies."""
    original = nn.Module.named_parameters

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for name, parameter in original(module, *args, **kwargs):
            recorded = tracer.recording
            yield name, tracer.getattr(name, parameter, None) if recorded else parameter

    nn.Module.named_parameters = named_parameters  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.named_parameters = original  # type: ignore[method-assign]
