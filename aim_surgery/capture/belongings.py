"""What hangs on a model besides the attributes of its modules, as it is before a trace.

    self.cache["t"] = x        self.state.last = x        self.seen.append(x)        self.n += 1

Collections, arrays, plain objects and sources of random numbers, as deep as they lie, of modules,
classes and files. A forward may change any of them in place, and what a trace puts there is of no
use to anybody.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from aim_surgery.capture.random_sources import GLOBAL, SOURCES, put_state, state_of

_REGISTRIES = ("_parameters", "_buffers", "_modules")  # set as attributes are
# Objects of these packages lead to much that no forward changes; of these of Python's, nowhere.
_FOREIGN = frozenset({"torch", "numpy", "builtins", *sys.stdlib_module_names})
_PLAIN = frozenset({"types", "argparse", "collections", "dataclasses"})
_MOST = 100_000  # things looked at for one root, the nearest first
_OPAQUE = (np.ndarray, *SOURCES)
_COLLECTIONS = (list, OrderedDict, dict, set, deque)
_WAYS = (tuple, types.MethodType, types.BuiltinMethodType, types.FunctionType)
_LEAVES = (type, torch.Tensor, frozenset, types.ModuleType)
_PASSED_BY = frozenset(  # most of what there is
    (type(None), bool, int, float, complex, str, bytes, type, torch.Tensor, nn.Parameter,
     torch.dtype, torch.device, types.ModuleType, property)
)  # fmt: skip


@dataclass(frozen=True)
class Belonging:
    """One collection, array, object or source of random numbers.

    Attributes:
        name: Where it was found, in words.
        owner: Itself.
        before: What was in it.
    """

    name: str
    owner: Any
    before: Any

    @property
    def has_changed(self) -> bool:
        """Whether there is anything else in it now."""
        if self.is_source:
            return state_of(self.owner) != self.before
        if isinstance(self.owner, np.ndarray):
            has_nan = self.owner.dtype.kind in "fc"
            return not np.array_equal(self.owner, self.before, equal_nan=has_nan)
        now, before = self.items, _items(self.before)
        return len(now) != len(before) or not all(map(operator.is_, now, before))

    @property
    def is_source(self) -> bool:
        """Whether it gives random numbers."""
        return isinstance(self.owner, SOURCES)

    @property
    def items(self) -> list[Any]:
        """What is in it now; nothing that could be looked at in arrays and sources of numbers."""
        return [] if isinstance(self.owner, _OPAQUE) else _items(_state(self.owner))

    def put_back(self) -> bool:
        """Give it its former items again; whether it had others."""
        if not self.has_changed:
            return False
        if self.is_source:
            put_state(self.owner, self.before)
            return True
        if isinstance(self.owner, np.ndarray):
            self.owner[...] = self.before
            return True
        is_collection = isinstance(self.owner, _COLLECTIONS)
        items = self.owner if is_collection else vars(self.owner)
        kind: Any = next(kind for kind in _COLLECTIONS if isinstance(items, kind))
        kind.clear(items)
        put: Any = kind.extend if kind in (list, deque) else kind.update
        put(items, self.before)
        return True


def own_homes(model: nn.Module) -> list[tuple[str, Any]]:
    """The model's classes and their files, with their names."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    own = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")]
    files = {kind.__module__: sys.modules.get(kind.__module__) for kind in own}
    found = [(kind.__qualname__, kind) for kind in own]
    return [*found, *((name, file) for name, file in files.items() if file is not None)]


def own_names(home: Any) -> dict[str, Any]:
    """What a class or file holds by name, but for what Python itself put there."""
    return {name: value for name, value in vars(home).items() if not name.startswith("__")}


@dataclass(frozen=True, eq=False)
class Belongings:
    """All that hangs on a model, as it was when it was looked for.

    Attributes:
        of_modules: What its modules lead to, by the module.
        of_files: What its classes and their files lead to besides.
        hooks: The tables of hooks of its modules, themselves.
    """

    of_modules: Mapping[nn.Module, tuple[Belonging, ...]]
    of_files: tuple[Belonging, ...]
    hooks: tuple[dict[Any, Any], ...]

    @classmethod
    def of(cls, model: nn.Module) -> Belongings:
        """Look for them."""
        seen = {id(module) for module in model.modules()}
        of_modules: dict[nn.Module, tuple[Belonging, ...]] = {}
        hooks: list[dict[Any, Any]] = []
        for path, module in model.named_modules():
            space = {name: value for name, value in vars(module).items() if name not in _REGISTRIES}
            for name in [name for name in space if "_hooks" in name]:
                if isinstance(space[name], dict):
                    hooks.append(space[name])
                    space[name] = (*space[name].values(),)
            of_modules[module] = (*belongings_of(path, space, seen),)
        homes = [(name, own_names(home)) for name, home in own_homes(model)]
        of_files = [b for name, names in homes for b in belongings_of(name, names, seen)]
        return cls(of_modules, tuple(of_files), tuple(hooks))

    @cached_property
    def sources(self) -> tuple[Belonging, ...]:
        """The sources of random numbers among them."""
        every = chain(*self.of_modules.values(), self.of_files)
        return tuple(belonging for belonging in every if belonging.is_source)


def belongings_of(name: str, space: Mapping[str, Any], seen: set[int]) -> Iterator[Belonging]:
    """What attributes lead to.

    Args:
        name: Of whose attributes they are.
        space: The attributes by name; they themselves are not looked after.
        seen: What has been found, by identity, and the model's own modules; filled in.

    Yields:
        Each collection, array and object, the nearest first.
    """
    pending = deque(
        (f"{name}.{key}".removeprefix("."), value)
        for key, value in space.items()
        if type(value) not in _PASSED_BY
    )
    looked_at = 0
    while pending and looked_at < _MOST:
        looked_at += 1
        where, value = pending.popleft()
        if id(value) in seen:
            continue
        if isinstance(value, _WAYS):
            seen.add(id(value))
            pending.extend((where, item) for item in _passed_through(value))
            continue
        if not _is_looked_after(value):
            continue
        seen.add(id(value))
        state = _state(value)
        yield Belonging(where, value, state)
        if not isinstance(value, _OPAQUE):
            items = state.values() if isinstance(state, dict) else state
            pending.extend((where, item) for item in items if type(item) not in _PASSED_BY)


def _passed_through(value: Any) -> Iterator[Any]:
    """What a value leads to that can't itself be changed: tuples, methods, closures."""
    if isinstance(value, tuple):
        yield from value
    elif isinstance(value, types.MethodType | types.BuiltinMethodType):
        yield value.__self__
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                yield cell.cell_contents


def _is_looked_after(value: Any) -> bool:
    if isinstance(value, _LEAVES):
        return False
    if isinstance(value, SOURCES):
        return all(value is not source for source in GLOBAL.values())
    if isinstance(value, (*_COLLECTIONS, nn.Module)):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype != object and value.flags.writeable
    home = type(value).__module__.partition(".")[0]
    if home in _FOREIGN and home not in _PLAIN:
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


def _state(owner: Any) -> Any:
    """A copy of what is in it, whatever methods its class has."""
    if isinstance(owner, SOURCES):
        return state_of(owner)
    if isinstance(owner, np.ndarray):
        return owner.copy()
    if isinstance(owner, dict):
        return dict(dict.items(owner))
    if isinstance(owner, set):
        return set(set.__iter__(owner))
    if isinstance(owner, list | deque):
        kind: Any = list if isinstance(owner, list) else deque
        return list(kind.__iter__(owner))
    return dict(vars(owner))


def _items(state: Any) -> list[Any]:
    if isinstance(state, set):
        return sorted(state, key=id)  # a copy may have another order
    return [*state, *state.values()] if isinstance(state, dict) else list(state)
