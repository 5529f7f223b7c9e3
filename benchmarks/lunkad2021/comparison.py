"""The original next to what the operation gives, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import aim_surgery
from aim_surgery import Plan
from aim_surgery.nn.memory import Memory
from aim_surgery.planning import Read
from benchmarks.lunkad2021.model import SIZE, KerasResNet50, keras_count
from benchmarks.lunkad2021.operation import IDENTITY, MEMORY, original_plan, reference

NAMES = {MEMORY.name: "A", IDENTITY: "B"}
MISSING = "-"
_WRITE_FIELDS = ("features", "planes_read", "parameters", "counted")


@dataclass(frozen=True)
class Line:
    """One figure of both sides, as text."""

    what: str
    original: str
    ours: str

    @property
    def same(self) -> bool:
        """Whether they agree."""
        return self.original == self.ours


def compare() -> tuple[Line, ...]:
    """Build everything on the meta device and hold it against the original.

    Returns:
        Base, memories, each read, each write, and the total.
    """
    original = reference()
    with torch.device("meta"):
        base = KerasResNet50(original["classes"])
    plan = original_plan(base)
    operated = aim_surgery.apply(base, plan)
    with_last = original_plan(base, last_write=True)
    more = aim_surgery.apply(base, with_last)
    height, width, channels = original["last_feature_map"]
    return (
        _line("base: parameters", original["base_parameters"], keras_count(base)),
        Line("base: last feature map", f"{(channels, height, width)}", f"{_last_map(base)}"),
        _line("memory: floats", original["memory_floats"], plan.memory.floats),
        _line("memory: different floats", original["memory_layout"][-1], _different_floats()),
        *(
            _line(
                f"memory {name}: parameters",
                original["memory_layer_parameters"],
                keras_count(operated.get_submodule(f"aim.{ours}")),
            )
            for ours, name in NAMES.items()
        ),
        *compare_reads(plan, original),
        _line("reads: parameters", original["reads_parameters"], plan.read_parameters),
        *_compare_writes((plan, operated), (with_last, more), original),
        _line("total: parameters", original["total_parameters"], keras_count(operated)),
    )


def compare_reads(plan: Plan, original: Mapping[str, Any]) -> Iterator[Line]:
    """Hold each read against the original's of that name.

    Args:
        plan: Any plan of a `KerasResNet50`.
        original: From `reference`.

    Yields:
        A line for each read that either has.
    """
    theirs = {
        read["site"]: _read_text(
            read["planes"],
            read["spatial"],
            read["out_channels"],
            read["extra_parameters"],
            f"{read['memory']} version {read['version']}",
        )
        for read in original["reads"]
    }
    ours = {read.site.name.replace(".", "_"): _our_read(read) for read in plan.reads}
    for name in dict.fromkeys((*theirs, *ours)):
        yield Line(f"read {name}", theirs.get(name, MISSING), ours.get(name, MISSING))


def _our_read(read: Read) -> str:
    version = f"{NAMES.get(read.memory, read.memory)} version {read.version}"
    site = read.site
    return _read_text(read.planes, site.spatial, site.out_channels, read.parameters, version)


def _read_text(planes: int, spatial: Any, outputs: int, parameters: int, version: str) -> str:
    size = " x ".join(map(str, spatial))
    return f"{planes} planes of {size}, {parameters:,} weights to {outputs} channels, {version}"


def _compare_writes(
    ours: tuple[Plan, nn.Module], more: tuple[Plan, nn.Module], original: Mapping[str, Any]
) -> Iterator[Line]:
    """Each write; the one that is left out is counted in the network that has it."""
    kept = {write.point.name for write in ours[0].writes}
    planned = {write.point.name: write for write in more[0].writes}
    for theirs in original["writes"]:
        name = f"res{theirs['after'].split()[1]}a"
        write, counted = planned[name], name in kept
        block = (ours if counted else more)[1].get_submodule(f"aim.writes.{name}")
        features = (write.point.channels, *write.point.spatial)
        yield Line(
            f"write after {theirs['after']}",
            _write_text(*(theirs[key] for key in _WRITE_FIELDS)),
            _write_text(features, write.planes, keras_count(block), counted),
        )
    parameters = keras_count(ours[1].get_submodule("aim.writes"))
    yield _line("writes: parameters", original["writes_parameters"], parameters)


def _write_text(features: Any, planes: int, parameters: int, counted: bool) -> str:
    size = " x ".join(map(str, features))
    rest = "" if counted else "; left out: no reader"
    return f"{size} features and {planes} planes, {parameters:,} parameters{rest}"


def _last_map(base: KerasResNet50) -> tuple[int, ...]:
    return tuple(base.features(torch.zeros(1, 3, SIZE, SIZE, device="meta")).shape[1:])


def _different_floats() -> int:
    layer = Memory(
        MEMORY.floats,
        inputs=MEMORY.inputs,
        shared=MEMORY.shared,
        dtype=torch.float64,  # no two are equal by chance
    )
    value = layer()
    return 0 if value is None else value.unique().numel()


def _line(what: str, original: int, ours: int) -> Line:
    return Line(what, f"{original:,}", f"{ours:,}")
