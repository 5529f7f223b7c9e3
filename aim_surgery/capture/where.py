"""Where in a model's own source something happened: shown besides what went wrong."""

from __future__ import annotations

import itertools
import linecache
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch

_OURS = f"{Path(__file__).parents[1]}/"
_LIBRARIES = tuple(
    f"{Path(str(home))}/"
    for home in (
        Path(torch.__file__).parent,
        _OURS,
        Path(np.__file__).parent,
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
    )
)
# First line, last line, first column, column behind the last; None where there is no telling.
Span = tuple[int | None, int | None, int | None, int | None]

_PACKAGES = tuple(f"{sysconfig.get_path(name)}/" for name in ("purelib", "platlib"))


def calling_line() -> str:
    """The innermost line of the model's own code that is running, "" where there is none."""
    return shown(calling_place())


def calling_place() -> tuple[str, int] | None:
    """File and number of that line, to be shown later.

    The model runs inside our own call of it: what lies outside of that called us.
    """
    found: tuple[str, int] | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if found is None and is_own(filename):
            found = (filename, frame.f_lineno)
        elif found is not None and filename.startswith(_OURS):
            return found
        frame = frame.f_back
    return None


def shown(place: tuple[str, int] | None) -> str:
    """The line at a place, with its file and number; "" of none."""
    return "" if place is None else _show(*place)


def running_code(frame: FrameType) -> Span:
    """Where in its source the running instruction of a frame stands."""
    return next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))


def failing_line(err: BaseException) -> str:
    """The innermost line of the model's own code that an error went through."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if is_own(f.filename)]
    return _show(frames[-1].filename, frames[-1].lineno or 0) if frames else ""


def is_own(filename: str) -> bool:
    """Whether a file is neither torch's, nor NumPy's, nor Python's, nor ours."""
    if filename.startswith("<frozen"):
        return False
    if filename.startswith(_PACKAGES):  # they lie in the folder of Python's own
        return not filename.startswith(_LIBRARIES[:3])
    return not filename.startswith(_LIBRARIES)


def _show(filename: str, number: int) -> str:
    line = linecache.getline(filename, number).strip()
    return f"{min(_names(filename), key=len)}:{number}" + (f" `{line}`" if line else "")


def _names(filename: str) -> Iterator[str]:
    """A file's names from where Python imports: a package's file is named by its package."""
    yield filename
    for home in (*sys.path, str(Path.cwd())):
        if home and filename.startswith(f"{home}/"):
            yield filename.removeprefix(f"{home}/")
