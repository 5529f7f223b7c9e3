"""What a plan is made of: memories, reads and writes, as frozen data.

A memory has versions: version 0 is what its layer gives, each write makes the next one from an
earlier one. A site reads one version.
"""

from __future__ import annotations

import itertools
import keyword
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from aim_surgery.config import Activation, Carry, Mode, Norm, Per
from aim_surgery.nn.write_block import block_parameters
from aim_surgery.planning.budget import available_planes
from aim_surgery.sites import Boundary, Site

How = Literal["reshape", "pad", "features"]
MEMORY = "memory"


@dataclass(frozen=True)
class Memory:
    """A notebook.

    Attributes:
        floats: M, its size.
        layout: Home layout (channels, *spatial), or (M,) where no convolution gives a size. It is
            where writes keep the memory; reads don't depend on it.
        name: Its name under `aim.`.
        inputs: Ones that each of its units is fed with.
        shared: Floats that share one unit, next to each other.
        carry: What of it survives a batch.
        momentum: Share of the newest batch in the carried state.
    """

    floats: int
    layout: tuple[int, ...]
    name: str = MEMORY
    inputs: int = 1
    shared: int = 1
    carry: Carry = "weights"
    momentum: float = 0.1

    @classmethod
    def of(cls, floats: int, home: tuple[int, ...], **options: Any) -> Memory:
        """A memory of M floats in whole planes of a spatial size; () where there is none."""
        if not home:
            return cls(floats, (floats,), **options)
        return cls(floats, (-(-floats // math.prod(home)), *home), **options)

    @property
    def parameters(self) -> int:
        """Weights and bias of each unit."""
        return (self.inputs + 1) * (self.floats // self.shared)


@dataclass(frozen=True)
class Read:
    """How one site sees the memory.

    Attributes:
        site: The site.
        available: K, the planes (features) that there are to be had.
        planes: k, the planes (features) that the site gets; averaged in k groups where k < K.
        how: "reshape" (S divides M), "pad" (zeros up to whole planes) or "features" (linear).
        memory: Name of the memory.
        version: Which version of it: 0 before the first write, 1 after it, ...
    """

    site: Site
    available: int
    planes: int
    how: How
    memory: str = MEMORY
    version: int = 0

    @classmethod
    def of(
        cls, site: Site, floats: int, planes: int, memory: str = MEMORY, version: int = 0
    ) -> Read:
        """The read of k planes by a site from a memory of M floats."""
        available, how = seen_as(floats, site.spatial)
        return cls(site, available, planes, how, memory, version)

    @property
    def averaged(self) -> bool:
        """Whether planes are averaged: each of the k is the mean of a group of the K."""
        return self.planes < self.available

    @property
    def parameters(self) -> int:
        """New weights that this read needs (counted once a layer, see `Plan.new_parameters`)."""
        return self.planes * self.site.out_channels * math.prod(self.site.kernel_size)

    @property
    def macs(self) -> int:
        """Extra multiply-accumulates per sample, on the example's size."""
        site = self.site
        if site.kind == "conv_transpose":
            inputs = math.prod(site.spatial)
            return self.parameters * inputs * site.windows
        return self.parameters * site.positions * site.windows


@dataclass(frozen=True)
class Write:
    """An update block: memory' = memory + out(pool(block([features, view]))).

    Attributes:
        name: Its name under `aim.writes`.
        point: The boundary after which it writes; its features go in.
        outputs: Channels that `out` gives: those of the memory's home layout.
        available: K, the planes (features) of memory that there are to be had at that size.
        planes: k, the planes (features) that the block reads.
        how: As for a read.
        version: The version that it makes.
        source: The version that it reads and starts from.
        memory: Name of the memory.
        per: "sample" (each its own copy) or "batch" (one copy, from the average).
        mode: "add" to the source or "replace" it.
        widths: Channels of the block's layers.
        kernel_size: Of its convolutions; linear layers on tokens have none.
        norm: "layer", "batch" or "none".
        activation: Name of the activation.
        momentum: Share of the newest batch in the running average (`per="batch"`).
    """

    name: str
    point: Boundary
    outputs: int
    available: int
    planes: int
    how: How
    version: int
    source: int
    memory: str = MEMORY
    per: Per = "sample"
    mode: Mode = "add"
    widths: tuple[int, ...] = (16,)
    kernel_size: int = 1
    norm: Norm = "layer"
    activation: Activation = "relu"
    momentum: float = 0.1

    @classmethod
    def of(
        cls, point: Boundary, memory: Memory, planes: int, version: int, **options: Any
    ) -> Write:
        """The write of a memory's version at a point, from the version before it."""
        available, how = seen_as(memory.floats, point.spatial)
        options = {
            "name": module_name(point.name),
            "source": version - 1,
            "memory": memory.name,
            "version": version,
            **options,
        }
        return cls(
            point=point,
            outputs=memory.layout[0],
            available=available,
            planes=planes,
            how=how,
            **options,
        )

    def seeing(self, memory: Memory) -> Write:
        """This write with a memory of another size or layout."""
        available, how = seen_as(memory.floats, self.point.spatial)
        planes = min(self.planes, available)
        return replace(
            self,
            outputs=memory.layout[0],
            available=available,
            planes=planes,
            how=how,
            memory=memory.name,
        )

    @property
    def parameters(self) -> int:
        """Parameters of the block."""
        return block_parameters(
            self.point.channels,
            self.planes,
            outputs=self.outputs,
            dims=len(self.point.spatial),
            widths=self.widths,
            kernel_size=self.kernel_size,
            norm=self.norm,
        )

    def macs(self, layout: tuple[int, ...]) -> int:
        """Multiply-accumulates per sample, on the example's size, for a memory of this layout."""
        point, rank = self.point, len(self.point.spatial)
        joined, total = point.channels + self.planes, 0
        for width in self.widths:
            total += joined * width * self.kernel_size**rank * point.positions
            joined = width
        places = math.prod(layout[1:]) if len(layout[1:]) == rank else 1  # pooled to
        return total + joined * self.outputs * places


def seen_as(floats: int, spatial: tuple[int, ...]) -> tuple[int, How]:
    """K and how a memory of M floats is seen at a spatial size; () for features."""
    if not spatial:
        return floats, "features"
    how: How = "reshape" if floats % math.prod(spatial) == 0 else "pad"
    return available_planes(floats, spatial), how


def free_name(name: str) -> bool:
    """Whether a module may have a child of this name."""
    plain = re.fullmatch(r"\w+", name) is not None and not keyword.iskeyword(name)
    return plain and not hasattr(nn.Module(), name)


def module_name(point: str, taken: Collection[str] = ()) -> str:
    """A name for the module that belongs to a write point: "layer1.0" -> "layer1_0"."""
    base = re.sub(r"\W", "_", point)
    candidates = itertools.chain((base,), (f"{base}_{count}" for count in itertools.count(2)))
    return next(name for name in candidates if free_name(name) and name not in taken)
