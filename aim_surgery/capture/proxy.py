"""The proxy that flows through a model while it is traced: a graph node with a value in its hand.

`torch.fx` proxies know nothing but their node, so Python can't branch on them. A `ValueProxy`
carries besides the value that the node has on the example input (tensors as fake tensors). What can
be recorded is recorded, as usual: tensor arithmetic, sizes, attributes. Only what Python itself
forces (`bool`, `int`, `len`, iteration, `in`, hashing, text) is answered from the value, and each
such answer is noted by the tracer as an assumption (`Answers.answer`).
"""

from __future__ import annotations

import copy
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from aim_surgery.capture.opaque import StayPython

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

# Object protocol names that must come from the proxy itself, never from the carried value.
_HIDDEN = frozenset({"_is_param", "__fx_create_arg__", "__torch_dispatch__"})


class ValueProxy(fx.Proxy):
    """A node of the graph being traced, with its value on the example inputs."""

    tracer: ValueTracer
    aim_value: Any

    def __init__(self, node: fx.Node, tracer: ValueTracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.aim_value = value

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
        # `isinstance(x.shape[0], int)` must be true. Not so for tensors: torch's C++ believes what
        # `isinstance` says and would read memory that isn't there; see `patches` for those.
        return ValueProxy if isinstance(self.aim_value, torch.Tensor) else type(self.aim_value)

    def __repr__(self) -> str:
        return self._written(repr, sys._getframe(1))

    def __str__(self) -> str:
        return self._written(str, sys._getframe(1))

    def __format__(self, spec: str) -> str:
        return self._written(lambda value: format(value, spec), sys._getframe(1))

    def _written(self, write: Callable[[Any], str], frame: FrameType) -> str:
        if isinstance(self.aim_value, torch.Tensor):
            return f"ValueProxy({self.node.name})"
        return self.tracer.answers.write(self, write, frame)

    def __copy__(self) -> Any:
        return self._copied(copy.copy)

    def __deepcopy__(self, memo: Any) -> Any:
        if isinstance(self.aim_value, torch.Tensor) and not self.tracer.evaluating:
            return self.tracer.create_proxy("call_method", "clone", (self,), {})
        return self._copied(copy.deepcopy)

    def _copied(self, function: Callable[[Any], Any]) -> Any:
        if self.tracer.evaluating:
            return function(self.aim_value)
        return self.tracer.create_proxy("call_function", function, (self,), {})

    def __getattr__(self, name: str) -> Any:
        if name in _HIDDEN:
            raise AttributeError(name)
        value = self.tracer.look(self, name)  # AttributeError, as on the value: hasattr() works
        if isinstance(self.aim_value, Mapping) and name in _MAPPING_METHODS:
            return lambda *args: _MAPPING_METHODS[name](self, *args)
        if callable(value) and not isinstance(value, torch.Tensor):
            return ValueMethod(self, name)
        return self.tracer.attribute(self, name)

    def __bool__(self) -> bool:
        if self.node.target is operator.eq:
            return self.tracer.answer_equal(self, sys._getframe(1))
        return self.tracer.answers.answer(self, "bool")

    def __int__(self) -> int:
        return self.tracer.answers.answer(self, "int")

    def __index__(self) -> int:
        return self.tracer.answers.answer(self, "index")

    def __float__(self) -> float:
        return self.tracer.answers.answer(self, "float")

    def __len__(self) -> int:
        return self.tracer.answers.answer(self, "len")

    def __contains__(self, item: object) -> bool:
        if isinstance(self.aim_value, torch.Tensor):
            return bool((self == item).any())  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(self.aim_value, Mapping):
            return item in self.keys()
        return any(element is item or bool(element == item) for element in self)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.aim_value, Mapping):
            return iter(self.keys())
        return iter([self[i] for i in range(len(self))])

    def __getitem__(self, key: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def __hash__(self) -> int:
        if isinstance(self.aim_value, torch.Tensor):
            return id(self)
        return hash(self.tracer.answers.answer(self, "value"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("aim_value", "node", "tracer"):
            raise StayPython.here(f"assigns {self.node.name}.{name}")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __round__(self, digits: int | None = None) -> Any:
        args = (self,) if digits is None else (self, digits)
        return self.tracer.create_proxy("call_function", round, args, {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __trunc__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.trunc, (self,), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def keys(self) -> Any:
        """The keys of a mapping, as Python needs them: known, and noted as an assumption."""
        return self.tracer.answers.answer(self, "keys")


class ValueMethod:
    """A method of the carried value, not called yet."""

    def __init__(self, owner: ValueProxy, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record the call."""
        owner = self._owner
        return owner.tracer.create_proxy("call_method", self._name, (owner, *args), kwargs)


def _get(proxy: ValueProxy, key: Any, default: Any = None) -> Any:
    return proxy[key] if key in proxy else default  # noqa: SIM401 - this is `get`


_MAPPING_METHODS: dict[str, Callable[..., Any]] = {
    "get": _get,
    "items": lambda proxy: [(key, proxy[key]) for key in proxy],
    "values": lambda proxy: [proxy[key] for key in proxy],
}


def _inplace_operator(name: str) -> Callable[[ValueProxy, Any], Any]:
    inplace = getattr(operator, f"i{name}")
    plain = getattr(operator, f"{name}_" if name in ("and", "or") else name)

    def method(self: ValueProxy, other: Any) -> Any:
        # fx has no in-place operators and would record `x += y` as `x = x + y`, which is another
        # function wherever `x` has a second name
        target = inplace if isinstance(self.aim_value, torch.Tensor) else plain
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    setattr(ValueProxy, f"__i{_name}__", _inplace_operator(_name))
