"""Whether a plan can be carried out: each field's type, then what the numbers say together.

A plan may be written by hand or come from a file, and surgery makes no decision, so a plan that
contradicts itself has to stop here. With M floats, a site of spatial size S and a layer's width k:

    K = ceil(M / S)    1 ≤ k ≤ K    Π layout - (one plane of it) < M ≤ Π layout
"""

from __future__ import annotations

import functools
import itertools
import math
import reprlib
import types
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from aim_surgery.config import check_memory
from aim_surgery.errors import PlanError
from aim_surgery.planning.plan import Memory, Plan, Read
from aim_surgery.sites import Site

_WORDS = {int: "a whole number", str: "text", bool: "true or false"}


def check_plan(plan: Plan) -> None:
    """Refuse a plan that can't be carried out.

    Args:
        plan: Any plan.

    Raises:
        PlanError: The first thing that is wrong, by field or site.
    """
    _check_type(plan, Plan, "")
    if plan.base_parameters < 0:
        raise PlanError(f"base_parameters must not be negative, got {plan.base_parameters}")
    _check_memory(plan.memory)
    if not plan.reads:
        raise PlanError("this plan reads nowhere: leave at least one site in it")
    widths: dict[str, int] = {}
    names: set[str] = set()
    for read in plan.reads:
        _check_site(read.site)
        _check_read(read, plan.memory.floats)
        name, layer = read.site.name, read.site.layer
        if name in names:
            raise PlanError(f"{name}: two reads of this plan are at the same site, keep one")
        names.add(name)
        if widths.setdefault(layer, read.planes) != read.planes:
            raise PlanError(
                f"{name}: layer {layer} is widened once, so all its sites read the same number of "
                f"planes; got {widths[layer]} and {read.planes}"
            )
    for index, value in enumerate(plan.inputs.args or ()):
        _check_example(value, f"inputs.args[{index}]")
    for name, value in plan.inputs.kwargs:
        _check_example(value, f"inputs.kwargs[{name!r}]")


def _check_memory(memory: Memory) -> None:
    check_memory(memory.floats)
    layout, floats = memory.layout, memory.floats
    if not layout or min(layout) < 1 or not 0 <= math.prod(layout) - floats < math.prod(layout[1:]):
        raise PlanError(
            f"memory.layout {layout} doesn't hold {floats:,} floats in whole planes: "
            f"Plan.with_memory changes the size and the layout with it"
        )


def _check_site(site: Site) -> None:
    linear, rank = site.kind == "linear", len(site.spatial)
    sizes = (*site.kernel_size, *site.spatial, site.groups)
    if len(site.kernel_size) != rank or rank not in ((0,) if linear else (1, 2, 3)):
        raise PlanError(
            f"{site.name}: a {site.kind} site has "
            f"{'no spatial size and no kernel_size' if linear else 'one to three spatial sizes'}, "
            f"got spatial={site.spatial} and kernel_size={site.kernel_size}"
        )
    if min(sizes) < 1 or min(site.in_channels, site.out_channels, site.positions) < 0:
        raise PlanError(f"{site.name}: a size of this site is not positive: {site}")
    if site.in_channels % site.groups or site.out_channels % site.groups:
        raise PlanError(f"{site.name}: groups={site.groups} don't divide the channels: {site}")
    if not site.weights:
        raise PlanError(f"{site.name}: weights names no parameter to widen: leave this site out")


def _check_read(read: Read, floats: int) -> None:
    name = read.site.name
    fresh = Read.of(read.site, floats, read.planes)
    if read != fresh:
        raise PlanError(
            f"{name}: available={read.available} and how={read.how!r} are stale, a memory of "
            f"{floats:,} floats gives {fresh.available} and {fresh.how!r}: change the size with "
            f"Plan.with_memory, or plan again"
        )
    if not 1 <= read.planes <= read.available:
        raise PlanError(f"{name}: planes must be 1 … {read.available}, got {read.planes}")


# Types --------------------------------------------------------------------------------------


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_type(value: Any, expected: Any, where: str) -> None:
    """Hold a value against its annotation: a dataclass field by field, a tuple item by item."""
    origin, inner = get_origin(expected), get_args(expected)
    if expected is Any:
        return
    if origin is types.UnionType:  # `... | None`
        if value is not None:
            _check_type(value, inner[0], where)
    elif origin is Literal:
        if value not in inner:
            raise _wrong(where, f"one of {', '.join(map(repr, inner))}", value)
    elif origin is tuple:
        if not isinstance(value, tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            raise _wrong(where, "a list" if inner[-1] is ... else f"{len(inner)} items", value)
        kinds = itertools.repeat(inner[0]) if inner[-1] is ... else inner
        for index, (item, kind) in enumerate(zip(value, kinds, strict=False)):
            _check_type(item, kind, f"{where}[{index}]")
    elif not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise _wrong(where, _WORDS.get(expected, f"a {expected.__name__}"), value)
    elif is_dataclass(expected):
        for name, hint in _hints(expected).items():
            _check_type(getattr(value, name), hint, f"{where}.{name}" if where else name)


def _check_example(value: Any, where: str) -> None:
    """Hold one argument against what `input_spec` writes."""
    match value:
        case None | bool() | int() | float() | str():
            return
        case ("tensor", tuple(shape), str(dtype)):
            for index, size in enumerate(shape):
                _check_type(size, int, f"{where}[1][{index}]")
                if size < 0:
                    raise _wrong(f"{where}[1][{index}]", "a size", size)
            if not isinstance(getattr(torch, dtype, None), torch.dtype):
                raise _wrong(f"{where}[2]", "a dtype such as 'float32'", dtype)
        case ("tuple" | "list", tuple(items)):
            for index, item in enumerate(items):
                _check_example(item, f"{where}[1][{index}]")
        case ("dict", tuple(pairs)):
            _check_type(pairs, tuple[tuple[str, Any], ...], f"{where}[1]")
            for index, (_, item) in enumerate(pairs):
                _check_example(item, f"{where}[1][{index}][1]")
        case _:
            nest = "a literal, ['tensor', shape, dtype], ['tuple' or 'list', items] or ['dict', …]"
            raise _wrong(where, nest, value)


def _wrong(where: str, expected: str, value: Any) -> PlanError:
    return PlanError(f"{where or 'plan'} must be {expected}, got {reprlib.repr(value)}")
