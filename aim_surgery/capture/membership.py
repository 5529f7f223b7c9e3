"""Membership, asked as one question: `x.dtype in (torch.float16, torch.float32)`.

Python's tuples and lists compare one entry after another, so a proxy is asked several questions,
each narrower than the model's: not float16, but float32. A graph that checks those would refuse
float64, which the model treats alike. The instruction that is running tells that the comparison
belongs to an `in`, and the source which entries it goes through.
"""

from __future__ import annotations

import ast
import dis
import linecache
from functools import lru_cache
from types import FrameType
from typing import Any

from aim_surgery.capture.where import Span, running_code

_CONTAINS = dis.opmap["CONTAINS_OP"]
_UNKNOWN = object()


def entries_asked(frame: FrameType, literals: tuple[type, ...]) -> tuple[Any, ...] | None:
    """The entries that an `in` goes through.

    Args:
        frame: Whose running instruction compares.
        literals: Types that entries may have.

    Returns:
        The entries in their order; None where no `in` is running, its source is not to be had, or
        it goes through anything but a tuple or list of literals, written there or named.
    """
    if frame.f_code.co_code[frame.f_lasti] != _CONTAINS:
        return None
    expression = _expression_at(frame.f_code.co_filename, running_code(frame))
    found = _UNKNOWN if expression is None else _look_up(expression, frame)
    if not isinstance(found, tuple | list):  # sets are asked for a hash
        return None
    entries = tuple(found)
    return entries if all(type(entry) in literals for entry in entries) else None


def _expression_at(filename: str, position: Span) -> ast.expr | None:
    """The right side of the `in` that stands there."""
    return _memberships(filename, "".join(linecache.getlines(filename))).get(position)


@lru_cache(maxsize=64)
def _memberships(filename: str, source: str) -> dict[Span, ast.expr]:
    try:
        tree = ast.parse(source, filename)
    except (SyntaxError, ValueError):
        return {}
    return {
        (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset): node.comparators[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and len(node.ops) == 1
        and isinstance(node.ops[0], ast.In | ast.NotIn)
    }


def _look_up(expression: ast.expr, frame: FrameType) -> Any:
    """Evaluate names, attributes of them and displays; nothing that computes."""
    match expression:
        case ast.Constant(value):
            return value
        case ast.Name(name):
            for scope in (frame.f_locals, frame.f_globals, frame.f_builtins):
                if name in scope:
                    return scope[name]
            return _UNKNOWN
        case ast.Attribute(owner, name):
            return getattr(_look_up(owner, frame), name, _UNKNOWN)
        case ast.Tuple(items) | ast.List(items):
            return tuple(_look_up(item, frame) for item in items)
        case _:
            return _UNKNOWN
