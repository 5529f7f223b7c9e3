"""What stays one Python call, why, and by which line of the model's own code.

A submodule that asks for tensor data, or that tracing stops for any other reason, is called as it
is. It has to work so: its call is evaluated like any other. Where it doesn't, the module around it
is tried, and so on up to the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from aim_surgery.capture.where import calling_line, failing_line
from aim_surgery.errors import CaptureError, in_one_line


@dataclass(frozen=True)
class OpaqueCall:
    """A submodule that stays one Python call in the graph, and why."""

    path: str
    reason: str


class StayPython(BaseException):
    """Raised inside a traced module that must stay one Python call.

    The model's own `except Exception` must not take it for an error of the model's.
    """

    @classmethod
    def here(cls, reason: str) -> StayPython:
        """With the line of the model's own code that is running."""
        line = calling_line()
        return cls(f"{reason} at {line}" if line else reason)


# What may stop a trace inside a module.
STOPS = (Exception, StayPython)


def reason_of(err: BaseException) -> str:
    """Why a module can't be traced through, in one line.

    Args:
        err: What stopped the trace inside it.

    Returns:
        The error, and the line of the model's own code that it came from.
    """
    if isinstance(err, StayPython):
        return str(err)
    words = first_line(err)
    if not isinstance(err, CaptureError):
        words = f"tracing stops with {in_one_line(err)}"
    line = failing_line(err)
    return f"{words} at {line}" if line else words


def mark_final(err: Exception) -> None:
    """Mark what torch refuses for real, too: no Python call would change it."""
    err.aim_final = True  # type: ignore[attr-defined]


def is_final(err: BaseException) -> bool:
    """Whether an error is one of the model or its inputs, and none of tracing."""
    return getattr(err, "aim_final", False)


def failed(err: Exception) -> str:
    """An error of a model that was run for real, in one line."""
    line = failing_line(err)
    return f"{in_one_line(err)} at {line}" if line else in_one_line(err)


def first_line(err: BaseException) -> str:
    """The first line of an error's message."""
    return str(err).strip().split("\n", 1)[0]


def holds_data(node: fx.Node, attribute: str) -> bool:
    """Whether a value depends on input data or on an attribute (on sizes, it may).

    Args:
        node: A tensor's node.
        attribute: Qualified name of the attribute.

    Returns:
        Whether any path of tensors leads from either to the node.
    """
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node in seen or not isinstance(node.meta["val"], torch.Tensor):
            continue
        if node.op == "placeholder" or (node.op == "get_attr" and node.target == attribute):
            return True
        seen.add(node)
        pending.extend(node.all_input_nodes)
    return False
