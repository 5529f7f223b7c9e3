"""One run of the graph to be folded, to see the sizes, layouts and storages of what it computes.

Besides, it tells which nodes are constant (made of the model's tensors alone, and nobody changes
them while others look), which have the same sizes whatever comes in (all behind a global pooling),
and which tensors somebody changes in place while others still look at them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from aim_surgery.capture.copies import random_state_kept
from aim_surgery.capture.leaves import is_plain
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.spatial import ADAPTIVE_POOLS, channels_last_format
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of, called_name

_POOL_TYPES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
# an output of the input's sizes, or of some that follow from those without the batch
_KEEPING = frozenset(
    ("add", "sub", "mul", "div", "truediv", "iadd", "imul", "relu", "relu6", "hardswish", "silu",
     "gelu", "sigmoid", "hardsigmoid", "tanh", "dropout", "conv1d", "conv2d", "conv3d", "linear",
     "batch_norm", "leaky_relu", "mish", "elu", "hardtanh")
)  # fmt: skip
_KEEPING_MODULES = frozenset(
    ("conv", "linear", "batchnorm", "activation", "pooling", "dropout", "normalization")
)


@dataclass(frozen=True)
class Seen:
    """What the run saw of a node.

    Attributes:
        shape: Of a tensor; None for anything else.
        dtype: Of a tensor.
        channels_last: Whether the tensor is in a channels-last format, and in no other.
        peak: The largest absolute value of a tensor of floating numbers; else 0.
        plain: Whether there is no tensor in it.
        value: Of a constant, as it was when it was made, and of what is plain; else None.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    channels_last: bool
    peak: float
    plain: bool
    value: Any


@dataclass
class Watched:
    """What the run saw of a graph."""

    seen: dict[fx.Node, Seen] = field(default_factory=dict)
    constant: set[fx.Node] = field(default_factory=set)
    fixed: set[fx.Node] = field(default_factory=set)
    shared: set[fx.Node] = field(default_factory=set)  # changed in place, and looked at after
    changing: set[fx.Node] = field(default_factory=set)  # what changes them
    touched: set[fx.Node] = field(default_factory=set)  # changed in place, looked at after or not


def watch(graph: fx.Graph, root: nn.Module, inputs: tuple[Any, ...]) -> Watched:
    """Run a graph.

    Args:
        graph: The graph; left unchanged.
        root: The module that it belongs to; buffers that the run changes are put back.
        inputs: One value for each placeholder.

    Returns:
        What there was to see.
    """
    watched = Watched()
    before = [(buffer, buffer.clone()) for buffer in root.buffers()]
    with torch.inference_mode(False), torch.no_grad(), random_state_kept():
        try:
            copies = tree_map_only(Tensor, torch.clone, inputs)  # a forward may write into them
            _Watching(root, graph, watched).run(*copies)
        finally:
            for buffer, value in before:
                if buffer.shape != value.shape:  # an observer's, at its first call
                    buffer.resize_(value.shape)
                buffer.copy_(value)
    _forget_changing(watched, graph)
    return watched


def _forget_changing(watched: Watched, graph: fx.Graph) -> None:
    """Take what others see changing, and what is made of it, out of the constants."""
    changed = set(watched.shared)
    for node in graph.nodes:
        if node in changed or not changed.isdisjoint(node.all_input_nodes):
            changed.add(node)
            watched.constant.discard(node)


class _Watching(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph, watched: Watched) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self._watched = watched
        self._apart: set[fx.Node] = set()
        self._holders: dict[int, list[fx.Node]] = {}
        self._order = {node: index for index, node in enumerate(graph.nodes)}

    def run_node(self, n: fx.Node) -> Any:
        changed = changed_argument(n, self.submodules.get(str(n.target)))
        storages = {*_storages(self.env[changed])} if changed is not None else set()
        watched = self._watched
        of_constants = (
            n.op.startswith("call_")
            and bool(n.all_input_nodes)
            and changed is None
            and watched.constant.issuperset(n.all_input_nodes)
        )
        drawn = torch.get_rng_state() if of_constants else None
        result = super().run_node(n)
        if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
            of_constants = False  # noise of a constant's shape is none
        if n.op == "get_attr" or of_constants:
            watched.constant.add(n)
        if self._is_fixed(n, result):
            watched.fixed.add(n)
        tensor = isinstance(result, Tensor)
        strided = tensor and result.layout is torch.strided
        floating = strided and result.is_floating_point()
        plain = not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        watched.seen[n] = Seen(
            tuple(result.shape) if tensor else None,
            result.dtype if tensor else None,
            tensor and channels_last_format(result) is not None,
            float(result.abs().max()) if floating and result.numel() else 0.0,
            plain,
            _kept(n, result) if plain or n in watched.constant else None,
        )
        for storage in storages:
            self._note_change(n, storage)
        for storage in _storages(result):
            holders = self._holders.get(storage, [])
            alive = any(h in self.env and storage in _storages(self.env[h]) for h in holders)
            self._holders[storage] = [*holders, n] if alive else [n]
        return result

    def _note_change(self, node: fx.Node, storage: int) -> None:
        now = self._order[node]
        holders = self._holders.get(storage, [])
        self._watched.touched.update(holders)
        if any(self._order[user] > now for holder in holders for user in holder.users):
            self._watched.shared.update(holders)
            self._watched.changing.add(node)

    def _is_fixed(self, node: fx.Node, result: Any) -> bool:
        """Whether its sizes are the same whatever comes in, but for the first axis of tensors."""
        fixed, seen = self._watched.fixed, self._watched.seen
        sources = [n for n in node.all_input_nodes if n not in self._watched.constant]
        layer = self.submodules.get(str(node.target)) if node.op == "call_module" else None
        alone = isinstance(layer, Memory) and not node.args
        if isinstance(layer, WriteBlock) and layer.per == "batch":
            sources = [cast(fx.Node, node.args[2])]  # in evaluation, it looks at no features
        if alone or (sources and all(n in self._apart or seen[n].plain for n in sources)):
            self._apart.add(node)  # made of the memory and of sizes
            return fixed.issuperset(sources)
        if _pools_to_numbers(node, layer, result):
            # a convolution fixes the channels; without one, this may be the length of a sequence
            return any(self._convolves(user) for user in node.users)
        if layer is not None:
            return _keeps_size(layer) and bool(sources) and fixed.issuperset(sources)
        if not sources or not fixed.issuperset(sources):
            return False
        if node.target is getattr and node.args[1] == "shape":
            return True
        if node.target is operator.getitem and isinstance(self.env[sources[0]], torch.Size):
            return _without_first(node.args[1], len(self.env[sources[0]]))
        return isinstance(result, Tensor) and called_name(node) in _KEEPING

    def _convolves(self, node: fx.Node) -> bool:
        layer = self.submodules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(layer, nn.modules.conv._ConvNd) or node.target in CONV_FUNCTIONS


def _kept(node: fx.Node, result: Any) -> Any:
    """A value that stays what it is, whoever changes the tensors that the run computed."""
    return result if node.op == "get_attr" else tree_map_only(Tensor, torch.clone, result)


def _pools_to_numbers(node: fx.Node, layer: nn.Module | None, result: Any) -> bool:
    """Whether all positions are averaged to a number of them that is given."""
    if isinstance(layer, _POOL_TYPES):
        return _all_numbers(layer.output_size)
    if node.target in ADAPTIVE_POOLS.values():
        return _all_numbers(argument_of(node, 1, "output_size"))
    if called_name(node) != "mean" or not isinstance(result, Tensor):
        return False
    axes: Any = argument_of(node, 1, "dim")
    axes = (axes,) if isinstance(axes, int) else axes
    kept = argument_of(node, 2, "keepdim", default=False) is True
    if not kept or not isinstance(axes, tuple | list) or not _all_numbers(axes):
        return False
    return result.ndim > 2 and {axis % result.ndim for axis in axes} == {*range(2, result.ndim)}


def changed_argument(node: fx.Node, layer: nn.Module | None) -> fx.Node | None:
    """The argument that a node changes in place, where it does."""
    if not node.op.startswith("call_") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        changes = getattr(layer, "inplace", False) is True
    else:
        name = called_name(node)
        spelled = name.endswith("_") and not name.endswith("__")
        changes = spelled and getattr(node.target, "__module__", "") != "_operator"  # and_, not_
        changes |= node.target is operator.setitem or node.target in _IN_PLACE
        changes |= argument_of(node, _WITH_FLAG.get(node.target, 99), "inplace") is True
    return node.args[0] if changes else None


_IN_PLACE = frozenset(
    getattr(operator, f"i{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or",
                 "xor", "lshift", "rshift")
)  # fmt: skip
_WITH_FLAG: dict[Any, int] = {
    **dict.fromkeys((F.relu, F.relu6, F.hardswish, F.silu, F.hardsigmoid, F.mish), 1),
    **dict.fromkeys((F.leaky_relu, F.elu), 2),
    **dict.fromkeys((F.hardtanh, F.dropout), 3),
}


def _storages(value: Any) -> Iterator[int]:
    for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.numel():
            yield leaf.untyped_storage().data_ptr()


def _all_numbers(sizes: Any) -> bool:
    sizes = (sizes,) if not isinstance(sizes, tuple | list) else sizes
    return all(isinstance(size, int) for size in sizes)


def _keeps_size(layer: nn.Module) -> bool:
    module = type(layer).__module__.removeprefix("torch.nn.modules.")
    return module in _KEEPING_MODULES and is_plain(layer)


def _without_first(index: Any, ndim: int) -> bool:
    """Whether an index into a shape leaves out its first entry."""
    if isinstance(index, int):
        return index % ndim != 0
    whole = isinstance(index, slice) and isinstance(index.start, int) and index.step is None
    return whole and index.start % ndim != 0 and -ndim < index.start
