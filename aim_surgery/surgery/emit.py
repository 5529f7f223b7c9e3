"""Writes the operated graph, node by node: memories, views of them, reads, update blocks.

Everything but the memory layer, the update blocks and `averaged` (average pooling, in a form that
exporters bear) is plain PyTorch: reshape, pad, expand, cat. Sizes are taken from the tensors at run
time, so batch, resolution, dtype and device stay as free as they were.

A version of the memory that is the same for all samples is a tensor (1, M), and a view of it has no
batch: (k, *spatial) or (k,). One that is another for each sample is (N, M), with views
(N, k, *spatial) or (N, k). Views are written once for all sites that want the same, right after
their version is made, so that no `no_grad` region of the model can swallow their gradient.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx

from aim_surgery.errors import PlanError, UnsupportedLayerError
from aim_surgery.nn.spatial import ADAPTIVE_POOLS, channels_last_format
from aim_surgery.nn.views import averaged, entries_of_each
from aim_surgery.planning import Plan, Read, Write
from aim_surgery.planning.parts import seen_as
from aim_surgery.sites import Call
from aim_surgery.surgery.beside import set_input, write_beside
from aim_surgery.surgery.joined import write_joined
from aim_surgery.surgery.modules import memory_path, write_path
from aim_surgery.surgery.notes import SiteNote, note_site
from aim_surgery.surgery.tables import write_table

Version = tuple[str, int]  # name of the memory, number
Size = tuple[int, ...]


class GraphWriter:
    """Copies a captured graph into one that reads and writes memories."""

    def __init__(self, plan: Plan, home: torch.Tensor, reads: Iterable[Read]) -> None:
        """Start an empty graph.

        Args:
            plan: What to do.
            home: The weight whose dtype and device the memories have.
            reads: The reads of this graph.
        """
        self.graph = fx.Graph()
        self._plan = plan
        self._home = (home.dtype, home.device)  # a mixed model's sites may work elsewhere
        self._floats = {memory.name: memory.floats for memory in plan.memories}
        self._versions: dict[Version, fx.Node] = {}
        self._views: dict[tuple[Version, Size, int], fx.Node] = {}
        self._wanted: dict[Version, dict[tuple[Size, int], None]] = {}
        reads = tuple(reads)
        self._windows = any(read.site.windows > 1 for read in reads)
        for of, version in (
            *((read, read.version) for read in reads),
            *((write, write.source) for write in plan.writes if write.planes),
        ):
            spatial = of.site.spatial if isinstance(of, Read) else of.point.spatial
            wanted = self._wanted.setdefault((of.memory, version), {})
            wanted[spatial, of.planes] = None

    def begin(self) -> None:
        """Write the memories, before anything else that computes."""
        for memory in self._plan.memories:
            self._add_version((memory.name, 0), self.graph.call_module(memory_path(memory.name)))

    def copy(self, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
        """Copy a node that neither reads nor writes."""
        twin = self.graph.node_copy(node, copied.__getitem__)
        twin.meta, twin.type = {}, None
        return twin

    def write(self, features: fx.Node, write: Write) -> None:
        """Write an update block after the node that carries its features."""
        source = (write.memory, write.source)
        if source not in self._versions:
            raise PlanError(
                f"{write.point.name}: starts from version {write.source} of memory "
                f"{write.memory!r}, which is written after it: number writes as they are executed"
            )
        view = self._views[source, write.point.spatial, write.planes] if write.planes else None
        block = self.graph.call_module(write_path(write), (features, view, self._versions[source]))
        self._add_version((write.memory, write.version), block)

    def end(self) -> None:
        """Note down what was written, where the memory carries it on; right before the output."""
        for memory in self._plan.memories:
            writes = [write for write in self._plan.writes if write.memory == memory.name]
            if memory.carry != "state" or not writes:
                continue
            written = self._versions[memory.name, writes[-1].version]
            if all(write.mode == "add" for write in writes):
                written = self._call(operator.sub, written, self._versions[memory.name, 0])
            self.graph.call_module(memory_path(memory.name), (written,))

    def read(
        self, node: fx.Node, copied: dict[fx.Node, fx.Node], call: Call, read: Read
    ) -> fx.Node:
        """Write a site that reads."""
        original = _input_of(node, call)
        source, value = copied[original], original.meta["val"]
        rows = call.weight_first and value.ndim > 1
        result = None if read.site.widens else self.copy(node, copied)
        shape, view = self._seen(source, read, value, -2 if rows else -1)
        index, name = call.input_index, call.input_name
        features = call.product.features if call.product is not None else ()
        memory_format = channels_last_format(value)
        places = (index, name, rows, features, memory_format)
        note = SiteNote(read.site.name, source.name, view.name, "", *places)
        if result is None:
            varies = self._plan.varies(read.memory, read.version)
            joined = write_joined(self.graph, source, view, shape, read, memory_format, varies)
            result = total = self.copy(node, copied)
            set_input(result, note, joined)
        elif call.table is not None:
            varies = self._plan.varies(read.memory, read.version)
            beside = write_table(self.graph, call, copied, read, view, varies=varies)
            total = self._call(operator.add, result, beside)
            note = note._replace(beside=beside.name)
        else:
            computed = call.weight is not None and call.weight.op != "get_attr"
            beside = write_beside(self.graph, result, read, note, view, computed=computed)
            total = self._call(operator.add, result, beside)
            note = note._replace(beside=beside.name)
        note_site(result, note)
        return total

    # Versions and views ---------------------------------------------------------------------

    def _add_version(self, version: Version, node: fx.Node) -> None:
        self._versions[version] = node
        for spatial, planes in self._wanted.get(version, ()):
            view = self._planes if spatial else self._features
            self._views[version, spatial, planes] = view(node, version, spatial, planes)

    def _features(self, memory: fx.Node, version: Version, _: Size, planes: int) -> fx.Node:
        if planes < self._floats[version[0]]:
            memory = self._call(averaged, memory, planes)
        return self._method("reshape", memory, (*self._batch(version), planes))

    def _planes(self, memory: fx.Node, version: Version, spatial: Size, planes: int) -> fx.Node:
        floats, size = self._floats[version[0]], math.prod(spatial)
        available, _ = seen_as(floats, spatial)
        if available * size > floats:
            memory = self._call(F.pad, memory, (0, available * size - floats))
        if planes < available:
            every = self._method("reshape", memory, (-1, available, size))
            memory = self._call(averaged, every, planes)
        return self._method("reshape", memory, (*self._batch(version), planes, *spatial))

    def _batch(self, version: Version) -> Size:
        return (-1,) if self._plan.varies(*version) else ()

    def _view(
        self, source: fx.Node, shape: fx.Node | None, read: Read, value: torch.Tensor
    ) -> fx.Node:
        """The site's view of its version, of the input's size, on its device and in its dtype."""
        site, version = read.site, (read.memory, read.version)
        if version not in self._versions:
            raise PlanError(
                f"{site.name}: reads version {read.version} of memory {read.memory!r}, which is "
                f"written after it: choose an earlier version"
            )
        view = self._views[version, site.spatial, read.planes]
        if site.spatial:
            dims = len(site.spatial)
            size = self._call(operator.getitem, shape, slice(-dims, None))
            view = self._call(ADAPTIVE_POOLS[dims], view, size)
        if (value.dtype, value.device) == self._home:
            return view
        return self._method("to", view, source)

    # Reads ----------------------------------------------------------------------------------

    def _seen(
        self, source: fx.Node, read: Read, value: torch.Tensor, features: int
    ) -> tuple[fx.Node | None, fx.Node]:
        """The input's shape, where it is needed, and the site's view of the memory."""
        varies = self._plan.varies(read.memory, read.version)
        needed = read.site.spatial or read.site.widens or varies
        shape = self._call(getattr, source, "shape") if needed else None
        view = self._view(source, shape, read, value)
        if shape is not None and varies:
            view = self._by_sample(view, shape, read, features)
        return shape, view

    def _by_sample(self, view: fx.Node, shape: fx.Node, read: Read, features: int) -> fx.Node:
        """Bring a view with one entry a sample to the input's rank; it broadcasts then.

            (N, k, *spatial) -> (*lead, k, *spatial)    (N, k) -> (1, .., N, 1, .., k)

        An input without batch comes with one copy, (1, ...), which is reshaped to it likewise.
        """
        site, axis = read.site, read.site.sample_axis or 0
        if self._windows:  # several entries a sample: its windows, its frames
            there = self._call(operator.getitem, shape, axis)
            ours = self._call(operator.getitem, self._call(getattr, view, "shape"), 0)
            times = self._call(entries_of_each, there, ours)
            view = self._call(torch.repeat_interleave, view, times, 0)
        dims = len(site.spatial)
        lead = self._call(operator.getitem, shape, slice(None, features - dims))
        if dims:
            inner = self._call(operator.getitem, shape, slice(-dims, None))
            size = self._call(operator.add, self._call(operator.add, lead, (read.planes,)), inner)
            return self._method("reshape", view, size)
        size = self._call(operator.getitem, lead, slice(axis, axis + 1))
        if axis:
            size = self._call(operator.add, (1,) * axis, size)
        rest = self._call(operator.sub, self._call(len, lead), axis + 1)
        size = self._call(operator.add, size, self._call(operator.mul, (1,), rest))
        return self._method("reshape", view, self._call(operator.add, size, (read.planes,)))

    def _call(self, function: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(function, args)

    def _method(self, name: str, *args: Any) -> fx.Node:
        return self.graph.call_method(name, args)


def _input_of(node: fx.Node, call: Call) -> fx.Node:
    index = call.input_index
    source = node.args[index] if index < len(node.args) else node.kwargs[call.input_name]
    if not isinstance(source, fx.Node):
        raise UnsupportedLayerError(f"{call.site.name}: its input is {source!r}, not a tensor")
    return source
