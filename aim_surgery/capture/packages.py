"""Whose code runs in a forward: the packages of a model's classes, and those that these call.

A forward that calls `einops.rearrange` runs einops's own Python, which must see what the model's
code sees. What code calls is read from the names that it loads:

    class Block(nn.Module):                                  globals of its file
        def forward(self, x): return rearrange(x, ...)       rearrange -> einops

From `forward` on, functions of the model's own package are followed; others are taken with their
whole package.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_ENTRIES = ("forward", "__call__", "__init__")
# torch is patched by name; numpy has no Python that would run on proxies; we are no part of models
_OURS = __name__.partition(".")[0]
_LEFT_OUT = frozenset({"torch", "numpy", "builtins", _OURS, *sys.stdlib_module_names})


def packages_of(model: nn.Module) -> list[types.ModuleType]:
    """The loaded files of all packages whose code may run in a model's forward; torch's are none.

    Args:
        model: Any module.

    Returns:
        Python modules.
    """
    kinds = {type(module) for module in model.modules()}
    packages = {name for kind in kinds for name in _packages_of_class(kind)}
    inside = tuple(f"{package}." for package in packages)
    return [m for n, m in list(sys.modules.items()) if n in packages or n.startswith(inside)]


@functools.lru_cache(maxsize=4096)
def _packages_of_class(kind: type) -> frozenset[str]:
    own = {_package(base.__module__) for base in kind.__mro__} - _LEFT_OUT
    homes = [vars(base) for base in kind.__mro__ if _package(base.__module__) in own]
    found, seen = set(own), set[Any]()
    pending: list[Any] = [space[name] for space in homes for name in _ENTRIES if name in space]
    while pending:
        function = _function_in(pending.pop())
        if function is None or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        names = {*_names_in(function.__code__)}
        pending += [space[name] for space in homes for name in names if name in space]  # self.name
        for called in _called(function.__globals__, names, own):
            package = _package(_home(called))
            if package not in own:
                found.add(package)
            elif isinstance(called, type):
                pending += [vars(called)[name] for name in _ENTRIES if name in vars(called)]
            else:
                pending.append(called)
    return frozenset(found - _LEFT_OUT)


def _called(space: dict[str, Any], names: set[str], own: set[str]) -> Iterator[Any]:
    """What names stand for in a file, and in files of the model's own package: `ops.flat`."""
    spaces, seen = [space], set[int]()
    while spaces:
        space = spaces.pop()
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, types.ModuleType) and _package(_home(value)) in own:
                if id(value) not in seen:
                    seen.add(id(value))
                    spaces.append(vars(value))
            elif isinstance(value, types.ModuleType | types.FunctionType | type):
                yield value


def _function_in(held: Any) -> types.FunctionType | None:
    """The Python function under a method, a property or decorators."""
    function = getattr(held, "__func__", getattr(held, "fget", held))
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function if isinstance(function, types.FunctionType) else None


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _home(value: Any) -> str:
    return value.__name__ if isinstance(value, types.ModuleType) else value.__module__ or ""


def _package(module: str) -> str:
    return module.partition(".")[0]
