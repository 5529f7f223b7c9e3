"""What is found out about a captured model need not be found again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from aim_surgery.capture import Capture

P = ParamSpec("P")
R = TypeVar("R")


def found_once(find: Callable[Concatenate[Capture, P], R]) -> Callable[Concatenate[Capture, P], R]:
    """Let a capture remember what a function finds out about it, or about one of its graphs.

    Args:
        find: A function of a capture and of hashable arguments.

    Returns:
        The function, which runs once for each capture and arguments.
    """

    @functools.wraps(find)
    def found(capture: Capture, /, *args: P.args, **kwargs: P.kwargs) -> R:
        key = (find, args, tuple(kwargs.items()))
        if key not in capture.findings:
            capture.findings[key] = find(capture, *args, **kwargs)
        return capture.findings[key]

    return found
