"""`Plan`: every decision of an operation, as frozen data that can be read, edited, saved, compared.

Names and integers only; no tensors, no modules. `Plan.to_json` and `Plan.from_json` are inverse to
each other.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aim_surgery.config import Emit, Init, check_memory
from aim_surgery.errors import PlanError
from aim_surgery.planning.budget import available_by_layer
from aim_surgery.planning.parts import Memory, Read, Write
from aim_surgery.sites import Boundary, Site, Skip

PLAN_FORMAT = 2
UNREAD = "no later site would read it"


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
        init: How new weights of reads start: "preserve" or "fresh".
        inputs: The example input.
        notes: What a reader should know.
        writes: Update blocks, in execution order.
        unwritten: Points where a write was left out, with reasons.
        further: Memories besides the first; only a plan made by hand has some.
        emit: "graph" for a `GraphModule`, "module" for the model's own class.
    """

    model: str
    base_parameters: int
    memory: Memory
    reads: tuple[Read, ...]
    skips: tuple[Skip, ...]
    init: Init
    inputs: InputSpec
    notes: tuple[str, ...] = ()
    writes: tuple[Write, ...] = ()
    unwritten: tuple[Skip, ...] = ()
    further: tuple[Memory, ...] = ()
    emit: Emit = "graph"

    @property
    def memories(self) -> tuple[Memory, ...]:
        """All memories."""
        return (self.memory, *self.further)

    @property
    def read_parameters(self) -> int:
        """New weights of all reads; a layer with several sites is widened once."""
        return sum({read.site.layer: read.parameters for read in self.reads}.values())

    @property
    def write_parameters(self) -> int:
        """Parameters of all update blocks."""
        return sum(write.parameters for write in self.writes)

    @property
    def memory_parameters(self) -> int:
        """Weights and biases of all memories."""
        return sum(memory.parameters for memory in self.memories)

    @property
    def new_parameters(self) -> int:
        """All that the operation adds: memories, reads and writes."""
        return self.memory_parameters + self.read_parameters + self.write_parameters

    @property
    def total_parameters(self) -> int:
        """Parameters of the operated model."""
        return self.base_parameters + self.new_parameters

    @property
    def macs(self) -> int:
        """Extra multiply-accumulates per sample, on the example's size."""
        return sum(read.macs for read in self.reads) + sum(map(self.macs_of, self.writes))

    def macs_of(self, write: Write) -> int:
        """Those of one write."""
        memory = next(memory for memory in self.memories if memory.name == write.memory)
        return write.macs(memory.layout)

    def varies(self, memory: str, version: int) -> bool:
        """Whether a version of a memory is another for each sample: some write made it so."""
        while version:
            write = next(w for w in self.writes if (w.memory, w.version) == (memory, version))
            if write.per == "sample":
                return True
            if write.mode == "replace":
                return False
            version = write.source
        return False

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
            layers = {reads[i].site.layer for i in _chosen(reads, pattern)}
            for i, read in enumerate(reads):
                if read.site.layer in layers:
                    reads[i] = dataclasses.replace(read, planes=count)
        return dataclasses.replace(self, reads=tuple(reads)).checked()

    def with_memory(self, memory: int | Memory) -> Plan:
        """A copy with another memory in the place of the first.

        Args:
            memory: M, or a memory with all its options. Sites read as many planes as before, or all
                where there are fewer now.

        Returns:
            The edited plan; this one is left unchanged.

        Raises:
            PlanError: It is no size of a memory, or no layout for it.
        """
        old = self.memory
        if not isinstance(memory, Memory):
            check_memory(memory)
            layout = Memory.of(memory, old.layout[1:]).layout
            memory = dataclasses.replace(old, floats=memory, layout=layout)
        floats, name = memory.floats, memory.name
        mine = [read.site for read in self.reads if read.memory == old.name]
        available = available_by_layer(mine, floats)
        reads = tuple(
            read
            if read.memory != old.name
            else Read.of(
                read.site, floats, min(read.planes, available[read.site.layer]), name, read.version
            )
            for read in self.reads
        )
        writes = tuple(
            write.seeing(memory) if write.memory == old.name else write for write in self.writes
        )
        return dataclasses.replace(self, memory=memory, reads=reads, writes=writes).checked()

    def with_versions(self, versions: Mapping[str, int]) -> Plan:
        """A copy in which some sites read another version of their memory.

        Args:
            versions: Versions by glob on site or layer names: 0 for the memory before any write, 1
                after the first write, ... A site can't read what is written after it.

        Returns:
            The edited plan; this one is left unchanged. A write that nobody reads any more is left
            out, and the versions after it are renumbered.

        Raises:
            PlanError: A glob matches no read, or there is no such version.
        """
        if not isinstance(versions, Mapping):
            raise PlanError(f"with_versions takes a dict such as {{'head': 0}}, got {versions!r}")
        reads = list(self.reads)
        for pattern, version in versions.items():
            for i in _chosen(reads, pattern):
                reads[i] = dataclasses.replace(reads[i], version=version)
        plan = dataclasses.replace(self, reads=tuple(reads)).checked()
        return plan._without_unread_writes().checked()

    def without_writes(self, *patterns: str) -> Plan:
        """A copy without some writes; who read what they made reads the version before.

        Args:
            *patterns: Globs on the names of write points.

        Returns:
            The edited plan; this one is left unchanged.

        Raises:
            PlanError: A glob matches no write.
        """
        plan = self
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise PlanError(f"expected a glob on names of write points, got {pattern!r}")
            chosen = [w for w in plan.writes if fnmatch.fnmatchcase(w.point.name, pattern)]
            if not chosen:
                raise PlanError(f"{pattern!r} matches no write of this plan")
            for write in reversed(chosen):
                plan = plan._without_write(write, "left out by hand")
        return plan.checked()

    def _without_unread_writes(self) -> Plan:
        """Leave out writes whose version nobody reads, neither a site nor a write that is read."""
        plan = self
        for write in reversed(self.writes):
            parts = (*((r.memory, r.version) for r in plan.reads),
                     *((w.memory, w.source) for w in plan.writes))  # fmt: skip
            if (write.memory, write.version) not in parts:
                plan = plan._without_write(write, UNREAD)
        return plan

    def _without_write(self, gone: Write, reason: str) -> Plan:
        def renumbered(memory: str, version: int) -> int:
            if memory != gone.memory or version < gone.version:
                return version
            return gone.source if version == gone.version else version - 1

        writes = tuple(
            dataclasses.replace(
                write,
                version=renumbered(write.memory, write.version),
                source=renumbered(write.memory, write.source),
            )
            for write in self.writes
            if write != gone
        )
        reads = tuple(
            dataclasses.replace(read, version=renumbered(read.memory, read.version))
            for read in self.reads
        )
        unwritten = (*self.unwritten, Skip(gone.point.name, (), reason))
        return dataclasses.replace(self, writes=writes, reads=reads, unwritten=unwritten)

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
            layers |= {self.reads[i].site.layer for i in _chosen(self.reads, pattern)}
        for read in self.reads:
            if read.site.layer in layers:
                skips.append(Skip(read.site.name, read.site.weights, "left out by hand"))
        reads = tuple(read for read in self.reads if read.site.layer not in layers)
        plan = dataclasses.replace(self, reads=reads, skips=tuple(skips))
        return plan._without_unread_writes().checked()

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
        return json.dumps({"format": PLAN_FORMAT, **dataclasses.asdict(self)}, indent=indent)

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
        if version != PLAN_FORMAT:
            raise PlanError(f"plan format {version!r}, this version reads {PLAN_FORMAT}")
        try:
            reads = tuple(
                Read(Site(**_tuples(read.pop("site"))), **read) for read in data.pop("reads")
            )
            writes = tuple(
                Write(point=Boundary(**_tuples(write.pop("point"))), **_tuples(write))
                for write in data.pop("writes")
            )
            memory = Memory(**_tuples(data.pop("memory")))
            further = tuple(Memory(**_tuples(memory)) for memory in data.pop("further"))
            skips = tuple(Skip(**_tuples(skip)) for skip in data.pop("skips"))
            unwritten = tuple(Skip(**_tuples(skip)) for skip in data.pop("unwritten"))
            inputs = InputSpec(**_tuples(data.pop("inputs")))
            plan = cls(
                memory=memory,
                reads=reads,
                skips=skips,
                inputs=inputs,
                writes=writes,
                unwritten=unwritten,
                further=further,
                **_tuples(data),
            )
            return plan.checked()
        except (TypeError, KeyError, AttributeError, RecursionError) as err:
            raise PlanError(f"this JSON is not a plan: {err}") from err

    def __str__(self) -> str:
        from aim_surgery.planning.table import plan_text

        return plan_text(self)


def _chosen(reads: Sequence[Read], pattern: str) -> list[int]:
    """Which reads a glob chooses: at least one."""
    if not isinstance(pattern, str):
        raise PlanError(f"expected a glob on site or layer names, got {pattern!r}")
    chosen = [
        index
        for index, read in enumerate(reads)
        if any(fnmatch.fnmatchcase(n, pattern) for n in (read.site.name, read.site.layer))
    ]
    if not chosen:
        raise PlanError(f"{pattern!r} matches no read of this plan")
    return chosen


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value
