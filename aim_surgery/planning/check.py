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
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from aim_surgery.config import check_memory, check_widths
from aim_surgery.errors import PlanError
from aim_surgery.planning.parts import Memory, Read, Write, free_name
from aim_surgery.planning.plan import Plan
from aim_surgery.sites import Site

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


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
    memories = {memory.name: memory for memory in plan.memories}
    if len(memories) < len(plan.memories):
        raise PlanError("two memories of this plan have one name")
    for memory in plan.memories:
        _check_memory(memory)
    versions = _check_writes(plan, memories)
    if not plan.reads:
        raise PlanError("this plan reads nowhere: leave at least one site in it")
    # an example without samples has none anywhere, and a call may have some all the same
    batched = any(write.point.sample_axis is not None for write in plan.writes)
    widths: dict[str, int] = {}
    names: set[str] = set()
    for read in plan.reads:
        name, layer = read.site.name, read.site.layer
        _check_site(read.site)
        _check_version(name, read.memory, read.version, versions)
        _check_read(read, memories[read.memory].floats)
        split = read.site.sample_axis is not None or not batched
        if not split and plan.varies(read.memory, read.version):
            raise PlanError(
                f"{name}: version {read.version} of the memory is another for each sample, and "
                f"this site's input is not split by samples: let it read an earlier version"
            )
        if read.site.inside and read.version:
            raise PlanError(
                f"{name}: it is inside a Python call or a recurrent layer, which read the memory "
                f"as it is before any write: let it read version 0"
            )
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
    _check_module_name("memory", memory.name)
    if memory.inputs < 1 or memory.shared < 1 or floats % memory.shared:
        raise PlanError(
            f"memory {memory.name}: inputs={memory.inputs} and shared={memory.shared} must be "
            f"positive, and shared must divide {floats:,} floats"
        )
    _check_momentum(memory.name, memory.momentum)


def _check_module_name(where: str, name: str) -> None:
    if not free_name(name) or name in ("reads", "writes"):
        raise PlanError(
            f"{where}: {name!r} can't be the name of a module: letters, digits and _ that are no "
            f"attribute of nn.Module and no keyword"
        )


def _check_momentum(name: str, momentum: float) -> None:
    if not 0 < momentum <= 1:
        raise PlanError(f"{name}: momentum must be in (0, 1], got {momentum}")


def _check_writes(plan: Plan, memories: Mapping[str, Memory]) -> dict[str, int]:
    """Each write makes the next version of its memory; the number of versions by memory."""
    versions = dict.fromkeys(memories, 1)
    names: set[str] = set()
    for write in plan.writes:
        name = write.point.name
        if write.memory not in memories:
            raise PlanError(f"{name}: writes to {write.memory!r}, which is no memory of this plan")
        if write.name in names:
            raise PlanError(
                f"{name}: two writes of this plan would live under the name {write.name!r}: keep "
                f"one, or name the other"
            )
        names.add(write.name)
        _check_module_name(name, write.name)
        if write.version != versions[write.memory]:
            raise PlanError(
                f"{name}: makes version {write.version}, and the next one of memory "
                f"{write.memory!r} is {versions[write.memory]}: number writes as they are executed"
            )
        _check_version(name, write.memory, write.source, versions)
        _check_write(write, memories[write.memory])
        if write.per == "batch" and plan.varies(write.memory, write.source):
            raise PlanError(
                f"{name}: a write for the whole batch can't start from version {write.source}, "
                f"which is another for each sample: choose an earlier source"
            )
        versions[write.memory] += 1
    for memory in plan.memories:
        if memory.carry == "state" and versions[memory.name] == 1:
            raise PlanError(
                f"carry='state' of memory {memory.name!r}: nothing writes to it, so there is "
                f"nothing to carry; use carry='weights'"
            )
    return versions


def _check_write(write: Write, memory: Memory) -> None:
    name, point = write.point.name, write.point
    if min(point.channels, point.positions, *point.spatial) < 1 or len(point.spatial) > 3:
        raise PlanError(f"{name}: a size of this write point makes no sense: {point}")
    if point.channel_axis < 0 or (point.sample_axis or 0) < 0:
        raise PlanError(f"{name}: axes of a write point count from 0: {point}")
    if point.sample_axis == point.channel_axis:
        raise PlanError(f"{name}: samples and channels can't be one axis: {point}")
    check_widths(write.widths)
    fresh = write.seeing(memory)
    stale = [k for k in ("outputs", "available", "how") if getattr(write, k) != getattr(fresh, k)]
    if stale:
        raise PlanError(
            f"{name}: {', '.join(stale)} of this write are stale, a memory of {memory.floats:,} "
            f"floats gives others: change the size with Plan.with_memory, or plan again"
        )
    if not 0 <= write.planes <= write.available:
        raise PlanError(f"{name}: planes must be 0 … {write.available}, got {write.planes}")
    if write.kernel_size < 1 or write.kernel_size % 2 == 0:
        raise PlanError(f"{name}: kernel_size must be odd, got {write.kernel_size}")
    _check_momentum(name, write.momentum)


def _check_version(name: str, memory: str, version: int, versions: Mapping[str, int]) -> None:
    if memory not in versions:
        raise PlanError(f"{name}: reads {memory!r}, which is no memory of this plan")
    if not 0 <= version < versions[memory]:
        raise PlanError(
            f"{name}: reads version {version} of memory {memory!r}, which has versions 0 … "
            f"{versions[memory] - 1} there"
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
    fresh = Read.of(read.site, floats, read.planes, read.memory, read.version)
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
    elif not isinstance(value, (int, float) if expected is float else expected) or (
        expected in (int, float) and isinstance(value, bool)
    ):
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
