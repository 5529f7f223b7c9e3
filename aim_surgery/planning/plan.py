"""`Plan`: every decision of an operation, as frozen data that can be read, edited, saved, compared.

Names and integers only; no tensors, no modules. `Plan.to_json` and `Plan.from_json` are inverse to
each other.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aim_surgery.config import Init, check_memory
from aim_surgery.errors import PlanError
from aim_surgery.planning.budget import available_by_layer, available_planes
from aim_surgery.sites import Site, Skip

FORMAT_VERSION = 1

How = Literal["reshape", "pad", "features"]


@dataclass(frozen=True)
class Memory:
    """The notebook.

    Attributes:
        floats: M, its size.
        layout: Home layout (channels, *spatial), or (M,) where no convolution gives a size. It is
            where writes will keep the memory; reads don't depend on it.
    """

    floats: int
    layout: tuple[int, ...]

    @classmethod
    def of(cls, floats: int, home: tuple[int, ...]) -> Memory:
        """A memory of M floats in whole planes of a spatial size; () where there is none."""
        if not home:
            return cls(floats, (floats,))
        return cls(floats, (-(-floats // math.prod(home)), *home))

    @property
    def parameters(self) -> int:
        """Weight and bias of each float."""
        return 2 * self.floats


@dataclass(frozen=True)
class Read:
    """How one site sees the memory.

    Attributes:
        site: The site.
        available: K, the planes (features) that there are to be had.
        planes: k, the planes (features) that the site gets; averaged in k groups where k < K.
        how: "reshape" (S divides M), "pad" (zeros up to whole planes) or "features" (linear).
    """

    site: Site
    available: int
    planes: int
    how: How

    @classmethod
    def of(cls, site: Site, floats: int, planes: int) -> Read:
        """The read of k planes by a site from a memory of M floats."""
        if site.kind == "linear":
            return cls(site, floats, planes, "features")
        how = "reshape" if floats % math.prod(site.spatial) == 0 else "pad"
        return cls(site, available_planes(site, floats), planes, how)

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
            return self.parameters * inputs
        return self.parameters * site.positions


@dataclass(frozen=True)
class InputSpec:
    """The example input that a plan was made with: a nest of shapes, or None if it can't be told.

    Attributes:
        args: Positional arguments; a tensor is `("tensor", shape, dtype)`, a literal itself.
        kwargs: Keyword arguments, likewise, as pairs.
        source: Where the input came from: "given", "declared by ...", "found: ...".
    """

    args: tuple[Any, ...] | None
    kwargs: tuple[tuple[str, Any], ...]
    source: str


@dataclass(frozen=True)
class Plan:
    """What an operation will do to a model.

    Attributes:
        model: Class name of the model.
        base_parameters: Parameters before the operation (tied ones counted once).
        memory: The notebook.
        reads: One for each site that reads, in execution order.
        skips: What doesn't read, with reasons.
        init: How new weights start: "preserve" or "fresh".
        inputs: The example input.
        notes: What a reader should know.
    """

    model: str
    base_parameters: int
    memory: Memory
    reads: tuple[Read, ...]
    skips: tuple[Skip, ...]
    init: Init
    inputs: InputSpec
    notes: tuple[str, ...] = ()

    @property
    def read_parameters(self) -> int:
        """New weights of all reads; a layer with several sites is widened once."""
        return sum({read.site.layer: read.parameters for read in self.reads}.values())

    @property
    def new_parameters(self) -> int:
        """All that the operation adds: memory and reads."""
        return self.memory.parameters + self.read_parameters

    @property
    def total_parameters(self) -> int:
        """Parameters of the operated model."""
        return self.base_parameters + self.new_parameters

    @property
    def macs(self) -> int:
        """Extra multiply-accumulates per sample, on the example's size."""
        return sum(read.macs for read in self.reads)

    def with_planes(self, planes: Mapping[str, int]) -> Plan:
        """A copy in which some layers read another number of planes.

        Args:
            planes: Planes (features) by glob on site or layer names.

        Returns:
            The edited plan; this one is left unchanged.

        Raises:
            PlanError: A glob matches no read, or a number is not between 1 and what there is.
        """
        if not isinstance(planes, Mapping):
            raise PlanError(f"with_planes takes a dict such as {{'head': 3}}, got {planes!r}")
        reads = list(self.reads)
        for pattern, count in planes.items():
            chosen = [i for i, read in enumerate(reads) if _chosen(read, pattern)]
            if not chosen:
                raise PlanError(f"{pattern!r} matches no read of this plan")
            layers = {reads[i].site.layer for i in chosen}
            for i, read in enumerate(reads):
                if read.site.layer in layers:
                    reads[i] = dataclasses.replace(read, planes=count)
        return dataclasses.replace(self, reads=tuple(reads)).checked()

    def with_memory(self, floats: int) -> Plan:
        """A copy with a memory of another size.

        Args:
            floats: M. Sites read as many planes as before, or all where there are fewer now.

        Returns:
            The edited plan; this one is left unchanged.

        Raises:
            PlanError: It is no size of a memory.
        """
        check_memory(floats)
        available = available_by_layer([read.site for read in self.reads], floats)
        reads = tuple(
            Read.of(read.site, floats, min(read.planes, available[read.site.layer]))
            for read in self.reads
        )
        memory = Memory.of(floats, self.memory.layout[1:])
        return dataclasses.replace(self, memory=memory, reads=reads).checked()

    def without(self, *patterns: str) -> Plan:
        """A copy in which some sites don't read.

        Args:
            *patterns: Globs on site or layer names. A layer is left out with all its sites.

        Returns:
            The edited plan; this one is left unchanged.

        Raises:
            PlanError: A glob matches no read, or nothing is left that reads.
        """
        skips, layers = list(self.skips), set()
        for pattern in patterns:
            chosen = [read for read in self.reads if _chosen(read, pattern)]
            if not chosen:
                raise PlanError(f"{pattern!r} matches no read of this plan")
            layers |= {read.site.layer for read in chosen}
        for read in self.reads:
            if read.site.layer in layers:
                skips.append(Skip(read.site.name, read.site.weights, "left out by hand"))
        reads = tuple(read for read in self.reads if read.site.layer not in layers)
        return dataclasses.replace(self, reads=reads, skips=tuple(skips)).checked()

    def checked(self) -> Plan:
        """This plan, if it can be carried out.

        Raises:
            PlanError: A field of the wrong type, a read outside 1 … K, two widths for one layer,
                or numbers that contradict each other; the message names the field or site.
        """
        from aim_surgery.planning.check import check_plan

        check_plan(self)
        return self

    def to_json(self, indent: int | None = None) -> str:
        """The plan as JSON text, for `from_json`."""
        return json.dumps({"format": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its JSON text.

        Raises:
            PlanError: The text is no plan, one of another format version, or one that can't be
                carried out (see `checked`).
        """
        try:
            data = json.loads(text)
            version = data.pop("format")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as err:
            raise PlanError(f"this text is not a plan in JSON: {err!r}") from err
        if version != FORMAT_VERSION:
            raise PlanError(f"plan format {version!r}, this version reads {FORMAT_VERSION}")
        try:
            reads = tuple(
                Read(Site(**_tuples(read.pop("site"))), **read) for read in data.pop("reads")
            )
            memory = Memory(**_tuples(data.pop("memory")))
            skips = tuple(Skip(**_tuples(skip)) for skip in data.pop("skips"))
            inputs = InputSpec(**_tuples(data.pop("inputs")))
            plan = cls(memory=memory, reads=reads, skips=skips, inputs=inputs, **_tuples(data))
            return plan.checked()
        except (TypeError, KeyError, AttributeError, RecursionError) as err:
            raise PlanError(f"this JSON is not a plan: {err}") from err

    def __str__(self) -> str:
        from aim_surgery.planning.table import plan_text

        return plan_text(self)


def _chosen(read: Read, pattern: str) -> bool:
    if not isinstance(pattern, str):
        raise PlanError(f"expected a glob on site or layer names, got {pattern!r}")
    names = (read.site.name, read.site.layer)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value
