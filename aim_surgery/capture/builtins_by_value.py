"""Builtins that ask what a proxy is, in the packages whose code the model runs.

* `isinstance(x, torch.Tensor)`, `torch.is_tensor(x)` and `type(x)` see the proxy's value;
* `len(x)` of a tensor, which has to be an int, is a size in the graph;
* `min(h, w)` and `max(h, w)` of sizes are sizes in the graph, whichever is the less;
* `print(x.shape)` shows it, and nothing is assumed of what is only shown;
* `Variable(x)`, of old code, is x.

They are put into the packages' own files, where Python looks first: torch's C++ believes what
Python's own `isinstance` says of a tensor, and would read memory that isn't there.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.variable import VariableMeta

from aim_surgery.capture.packages import packages_of
from aim_surgery.capture.proxy import ValueProxy

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer


@contextlib.contextmanager
def builtins_by_value(tracer: ValueTracer) -> Iterator[None]:
    """Let builtins see a proxy's value.

    Args:
        tracer: The tracer, which tells what is being traced and what only computed.
    """

    def length(collection: Any) -> Any:
        known = type(collection) is ValueProxy and tracer.recording
        if known and isinstance(collection.aim_value, torch.Tensor) and collection.aim_value.ndim:
            return collection.shape[0]
        return len(collection)

    def show(*values: Any, **options: Any) -> None:
        if tracer.elsewhere:
            print(*values, **options)
            return
        with tracer.answers.only_shown(sys._getframe(1)):
            print(*values, **options)

    def chosen(choose: Callable[..., Any]) -> Callable[..., Any]:
        def choose_recorded(*values: Any, **options: Any) -> Any:
            several = values[0] if len(values) == 1 else values
            if type(several) is ValueProxy and isinstance(several.aim_value, tuple):
                several = [*several]
            is_list = type(several) in (tuple, list) and not options
            if is_list and tracer.recording and any(type(v) is ValueProxy for v in several):
                known = (v.aim_value if type(v) is ValueProxy else v for v in several)
                if all(type(value) in (int, float) for value in known):
                    return tracer.create_proxy("call_function", choose, (tuple(several),), {})
            return choose(*values, **options)

        return choose_recorded

    instead = {"isinstance": _is_instance, "type": _Type, "len": length, "print": show}
    instead |= {"min": chosen(min), "max": chosen(max)}
    spaces = [vars(file) for file in packages_of(tracer.model)]
    patched = [(space, name) for space in spaces for name in instead if name not in space]
    original = torch.is_tensor
    torch.is_tensor = _is_tensor  # type: ignore[assignment]
    VariableMeta.__call__ = _variable  # pyright: ignore[reportAttributeAccessIssue]
    for space, name in patched:
        space[name] = instead[name]
    try:
        yield
    finally:
        torch.is_tensor = original
        del VariableMeta.__call__
        for space, name in patched:
            del space[name]


def _is_instance(instance: Any, classes: Any) -> bool:
    if type(instance) is ValueProxy:
        return isinstance(instance.aim_value, classes) or isinstance(instance, classes)
    return isinstance(instance, classes)


def _is_tensor(instance: Any) -> bool:
    return _is_instance(instance, torch.Tensor)


def _variable(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
    if type(data) is ValueProxy:
        return data
    return type.__call__(cls, data, *args, **kwargs)


class _Asked(type):
    """What makes `type(x)` a question and leaves `type` the class that it is otherwise."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or type(args[0]) is not ValueProxy:
            return builtins.type(*args, **kwargs)
        value = args[0].aim_value
        if isinstance(value, torch.Tensor):  # fake ones have a class of their own
            return nn.Parameter if isinstance(value, nn.Parameter) else torch.Tensor
        return type(value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class _Type(type, metaclass=_Asked):
    pass
