"""What code remembers from call to call: nothing of a trace may stay there, or come from there.

    @functools.lru_cache
    def table(length, dtype): return torch.arange(length, dtype=dtype)

Called in a trace, `table` would look its proxies up, and so freeze the size and the dtype that the
example has; it would hand a node of one graph to another graph; and the model, called after the
trace, would be given a proxy for a tensor. So functions under `functools.lru_cache` or
`functools.cache` run anew where they get tensors, modules or proxies, whatever else gives something
of the trace is forgotten at once, and so is what a `functools.cached_property`, or a dict, list or
set of the classes and files of the model, holds of it, or their names.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from aim_surgery.capture.belongings import own_homes, own_names
from aim_surgery.capture.holders import holds_proxies
from aim_surgery.capture.packages import packages_of
from aim_surgery.capture.proxy import ValueProxy

if TYPE_CHECKING:
    from aim_surgery.capture.tracer import ValueTracer

_LRU = functools._lru_cache_wrapper
_METHODS = (staticmethod, classmethod)
_MISSING = object()

# Where a cached function is held: how to put another there, what is there, and the function.
_Place = tuple[Callable[[Any], None], Any, Any]


@contextlib.contextmanager
def nothing_remembered(tracer: ValueTracer) -> Iterator[None]:
    """Keep caches out of a trace, and the trace out of caches.

    Args:
        tracer: The tracer; other threads go on using their caches.
    """
    places = list(_places(tracer.model))
    spaces = [(name, home, own_names(home)) for name, home in own_homes(tracer.model)]
    get: Any = functools.cached_property.__get__

    def get_forgotten(cached: Any, instance: Any, owner: Any = None) -> Any:
        value = get(cached, instance, owner)
        if instance is not None and not tracer.elsewhere and _is_of_a_trace(value):
            vars(instance).pop(cached.attrname, None)
        return value

    for put, held, cached in places:
        put(_in_place_of(held, _uncached(tracer, cached)))
    functools.cached_property.__get__ = get_forgotten  # type: ignore[method-assign]
    try:
        yield
    finally:
        functools.cached_property.__get__ = get  # type: ignore[method-assign]
        for put, held, _ in places:
            put(held)
        for name, home, before in spaces:
            tracer.changed |= {f"{name}.{key}" for key in _taken_back(home, before)}
        for belonging in tracer.changes.belongings.of_files:
            if belonging.has_changed and any(map(_is_of_a_trace, belonging.items)):
                belonging.put_back()
                tracer.changed.add(belonging.name)


def _uncached(tracer: ValueTracer, cached: Any) -> Callable[..., Any]:
    """The function under a cache; those that get nothing of the trace keep what they remember."""

    @functools.wraps(cached.__wrapped__)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not tracer.elsewhere and any(map(_varies, tree_leaves((args, kwargs)))):
            return cached.__wrapped__(*args, **kwargs)
        result = cached(*args, **kwargs)
        if not tracer.elsewhere and _is_of_a_trace(result):
            cached.cache_clear()
        return result

    for name in ("cache_clear", "cache_info", "cache_parameters"):
        setattr(call, name, getattr(cached, name))
    return call


def _varies(argument: Any) -> bool:
    return type(argument) is ValueProxy or isinstance(argument, torch.Tensor | nn.Module)


def _is_of_a_trace(value: Any) -> bool:
    leaves = tree_leaves(value)
    traced = any(type(leaf) is ValueProxy or isinstance(leaf, FakeTensor) for leaf in leaves)
    return traced or holds_proxies(value)


def _places(model: nn.Module) -> Iterator[_Place]:
    """All cached functions in a model and in the packages whose code it runs."""
    seen: set[int] = set()
    for module in packages_of(model):
        space, file = vars(module), module.__name__
        for name, value in tuple(space.items()):
            if not isinstance(value, type):
                if _may_hold(value):
                    yield from _places_in(space.__setitem__, name, value, seen)
            elif value.__module__ == file:
                put = functools.partial(setattr, value)
                for key, member in tuple(vars(value).items()):
                    if _may_hold(member):
                        yield from _places_in(put, key, member, seen)
    for part in model.modules():
        for name, value in tuple(vars(part).items()):
            if _may_hold(value):
                yield from _places_in(vars(part).__setitem__, name, value, seen)


def _may_hold(value: Any) -> bool:
    """Whether a value is of a kind to look into: few of the thousands in a package are."""
    kind = type(value)
    if kind is types.FunctionType:
        return value.__closure__ is not None
    return kind is _LRU or kind is property or kind in _METHODS


def _places_in(
    put: Callable[[str, Any], None], name: str, held: Any, seen: set[int]
) -> Iterator[_Place]:
    """A cached function itself, or those that decorators hold in the cells of a function."""
    function = _function_in(held)
    kind = type(function)
    if kind is _LRU:
        yield functools.partial(put, name), held, function
    elif kind is types.FunctionType and function.__closure__ and id(function) not in seen:
        seen.add(id(function))
        for cell in function.__closure__:
            with contextlib.suppress(ValueError):  # an empty cell
                into = functools.partial(setattr, cell)
                yield from _places_in(into, "cell_contents", cell.cell_contents, seen)


def _function_in(held: Any) -> Any:
    """What a descriptor of a class calls."""
    kind = type(held)
    if kind is property:
        return held.fget
    return held.__func__ if kind in _METHODS else held


def _in_place_of(held: Any, function: Callable[..., Any]) -> Any:
    kind = type(held)
    if kind is property:
        return property(function, held.fset, held.fdel, held.__doc__)
    return kind(function) if kind in _METHODS else function


def _taken_back(home: Any, before: Mapping[str, Any]) -> Iterator[str]:
    """Names that a trace changed in a class or in a file, which get back what they were.

    Other threads load files meanwhile; what stands in a class belongs to the model.
    """
    after = own_names(home)
    for name in before.keys() | after.keys():
        old, new = before.get(name, _MISSING), after.get(name, _MISSING)
        if new is old or not (isinstance(home, type) or _is_of_a_trace(new)):
            continue
        yield name
        if old is _MISSING:
            delattr(home, name)
        else:
            setattr(home, name, old)
