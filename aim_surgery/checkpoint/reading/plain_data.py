"""Classes of plain data that training scripts keep beside the weights: arguments, numbers, paths.

    args                 argparse.Namespace          torchvision's and timm's own scripts
    metrics, RNG states  NumPy scalars and arrays
    folders, times       pathlib, datetime

`weights_only=True` refuses them until they are named. To make one runs nothing that a file can
choose, so naming them here costs no safety, and a checkpoint of the usual scripts needs no
`trust`. Classes that hold a function (`functools.partial`) are not among them, and
`collections.defaultdict` can't be: PyTorch's reader fills no dict but its own.
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
    pathlib.PosixPath,
    pathlib.PurePosixPath,
)
_NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")  # since 2.0, before
_NUMPY_FUNCTIONS = ("scalar", "_reconstruct")
_ALLOWED_BY_TORCH = frozenset((
    "collections.Counter", "_codecs.encode", "builtins.bytearray", "builtins.complex",
    "__builtin__.bytearray", "torch.nn.parameter.Parameter",
))  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether a class or function is read without trust, by its name in the file."""
    return name in _NAMES or name in _ALLOWED_BY_TORCH or name.startswith("numpy.dtypes.")


def plain_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What `torch.serialization.safe_globals` takes: classes, some with the name in the file."""
    return [*_CLASSES, *_numpy()]


def _numpy() -> Iterator[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    try:
        import numpy as np
        from numpy._core import multiarray
    except ImportError:  # without NumPy such a file can't be read, with trust or without
        return
    yield from (np.ndarray, np.dtype)
    yield from (getattr(np.dtypes, name) for name in np.dtypes.__all__)
    for module in _NUMPY_MODULES:
        yield from ((getattr(multiarray, name), f"{module}.{name}") for name in _NUMPY_FUNCTIONS)


_NAMES = frozenset((
    *(f"{cls.__module__}.{cls.__name__}" for cls in _CLASSES),
    *(f"{module}.{name}" for module in _NUMPY_MODULES for name in _NUMPY_FUNCTIONS),
    "numpy.ndarray",
    "numpy.dtype",
))  # fmt: skip
