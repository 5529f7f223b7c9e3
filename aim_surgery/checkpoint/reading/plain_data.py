"""Classes of plain data that training scripts keep beside the weights: arguments, numbers, paths.

    args                 argparse.Namespace          torchvision's and timm's own scripts
    metrics, RNG states  NumPy scalars and arrays
    folders, times       pathlib, datetime

`weights_only=True` refuses them until they are named. To make one calls nothing that a file can
choose, so a checkpoint of the usual scripts needs no `trust`; but it rests on NumPy's own reader,
which takes a dtype's flags from the file. So dtypes whose values are pointers (objects, text of any
length) or may hold some (fields) are left out: with the flags cleared, bytes of the file could be
taken for pointers. Classes that hold a function (`functools.partial`) are not among them, and
`collections.defaultdict` can't be: PyTorch's reader fills no dict but its own.

Files hold the writer's name of a class: Python 3.13 calls `pathlib.PosixPath` by another one.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

_CLASSES: tuple[Callable[..., Any], ...] = (
    argparse.Namespace,
    types.SimpleNamespace,
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    datetime.timezone,
)
_PATHS = (pathlib.PosixPath, pathlib.PurePosixPath)
_PATH_MODULES = ("pathlib", "pathlib._local")  # the second in Python 3.13
_NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")  # since 2.0, before
_NUMPY_FUNCTIONS = ("scalar", "_reconstruct")
_POINTERS = {"O": "ObjectDType", "V": "VoidDType", "T": "StringDType"}  # by NumPy's letters
_ALLOWED_BY_TORCH = frozenset((
    "collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.complex",
    "__builtin__.bytearray", "torch.nn.parameter.Parameter",
))  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether a class or function is read without trust, by its name in the file."""
    module, _, last = name.rpartition(".")
    if module == "numpy.dtypes":
        return last not in _POINTERS.values()
    return name in _NAMES or name in _ALLOWED_BY_TORCH


def pointer_dtype(args: tuple[Any, ...]) -> str | None:
    """The class of a dtype that is not read without trust.

    Args:
        args: What a file calls `numpy.dtype` with.

    Returns:
        Its name; None for plain ones.
    """
    letter = args[0].lstrip("<>=|")[:1] if args and isinstance(args[0], str) else ""
    return f"numpy.dtypes.{_POINTERS[letter]}" if letter in _POINTERS else None


def plain_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What `torch.serialization.safe_globals` takes: classes, some with the name in the file."""
    return [*_CLASSES, *_paths(), *_numpy()]


def _paths() -> Iterator[tuple[Callable[..., Any], str]]:
    for module in _PATH_MODULES:
        yield from ((cls, f"{module}.{cls.__name__}") for cls in _PATHS)


def _numpy() -> Iterator[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    try:
        import numpy as np
        from numpy._core import multiarray
    except ImportError:  # without NumPy such a file can't be read, with trust or without
        return
    yield from (np.ndarray, np.dtype)
    plain = (name for name in np.dtypes.__all__ if name not in _POINTERS.values())
    yield from (getattr(np.dtypes, name) for name in plain)
    for module in _NUMPY_MODULES:
        yield from ((getattr(multiarray, name), f"{module}.{name}") for name in _NUMPY_FUNCTIONS)


_NAMES = frozenset((
    *(f"{cls.__module__}.{cls.__name__}" for cls in _CLASSES),
    *(name for _, name in _paths()),
    *(f"{module}.{name}" for module in _NUMPY_MODULES for name in _NUMPY_FUNCTIONS),
    "numpy.ndarray",
    "numpy.dtype",
))  # fmt: skip
