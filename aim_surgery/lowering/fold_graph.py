"""Writes the folded graph: every tensor stands for itself plus an offset.

    T = t + o        o a part (`fold_parts`): a map without batch, or nothing

`FoldWriter` goes through the graph once. What is made of the memory alone becomes a part. A call
that has a rule (`fold_rules`) carries offsets on; before any other, the offset is added. Which it
will be is known before a node is written, so an offset is added as soon as one of those who use it
needs the sum, once. Offsets that grow beyond the values themselves are added, too: their sum would
have fewer digits than the original.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from aim_surgery.lowering.fold_parts import Part, Parts
from aim_surgery.lowering.fold_watch import Watched, changed_argument
from aim_surgery.lowering.ownership import Ownership
from aim_surgery.nn.folded import at_least, chosen, plus, spread, within
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.sites.calls import CONV_FUNCTIONS
from aim_surgery.sites.graph import argument_of, called_by

_LARGEST = 4.0  # times the value itself: t = T - o has as many digits less than T


@dataclass(frozen=True, eq=False)
class Live:
    """What a node of the original graph became.

    Attributes:
        t: The node that carries it.
        offset: What is missing to the original's value; None for nothing. Of the same rank as the
            original's value, with a size of one where it is the same all along an axis.
    """

    t: fx.Node
    offset: Part | None = None


@dataclass(frozen=True)
class Map:
    """A part that the folded graph uses.

    Attributes:
        name: Name of the node that uses it.
        part: The map.
        channels_last: Whether it is wanted in a channels-last format.
    """

    name: str
    part: Part
    channels_last: bool


Rule = Callable[["FoldWriter", fx.Node], Live]


class FoldWriter:
    """Writes a folded graph.

    Attributes:
        source: The graph to fold.
        graph: What is written: a complete graph, in which maps are computed where they are used.
        parts: Writes the parts.
        maps: All maps, in the order of their first use.
        mapped: The nodes that use maps, with the positions of these in `maps`.
        biases: New biases of functional calls, by path.
        copies: The nodes copied, with those that they were copied from.
        aside: Nodes of the original that are made of the memory, constants and sizes alone.
    """

    def __init__(
        self,
        root: nn.Module,
        source: fx.Graph,
        watched: Watched,
        rule_of: Callable[[FoldWriter, fx.Node], Rule | None],
        home: str,
    ) -> None:
        """Start an empty graph.

        Args:
            root: The module that the graph belongs to; biases of its layers change.
            source: The graph to fold, in which each read is a sum of two products.
            watched: What a run of it saw.
            rule_of: Finds the rule of a node; None where offsets have to be added first.
            home: Path of the module under which new tensors will be found.
        """
        self.root, self.watched, self.source = root, watched, source
        self.graph = fx.Graph()
        self.parts = Parts(self.graph, root, f"{home}.given")
        self.maps: list[Map] = []
        self.mapped: dict[fx.Node, tuple[int, ...]] = {}
        self.biases: dict[str, Tensor] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.env: dict[fx.Node, Live | Part | None] = {}
        self._uses: Counter[fx.Node] = Counter()
        self._home, self._rule_of = home, rule_of
        self._rules: dict[fx.Node, Rule | None] = {}
        self._owned = Ownership(source, root)
        self.aside = self._beside()

    def write(self) -> fx.Graph:
        """Write the graph."""
        for node in self.source.nodes:
            self.env[node] = self._written(node)
        return self.graph

    # What rules ask ---------------------------------------------------------------------------

    def layer_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return called_by(node, self.root)

    def offset(self, node: Any) -> Part | None:
        """The offset of what an argument became; None where there is none."""
        entry = self.env.get(node) if isinstance(node, fx.Node) else None
        return entry.offset if isinstance(entry, Live) else entry

    def known(self, node: fx.Node) -> bool:
        """Whether a node, not yet written maybe, can be a part: a constant, or no tensor."""
        return node in self.watched.constant or self.watched.seen[node].plain

    def as_part(self, argument: Any) -> Any:
        """An argument with its nodes as parts; they are all known, or parts."""
        part: Any = self._part
        return map_arg(argument, part)

    def spread(self, offset: Part, node: fx.Node) -> Part:
        """An offset of a node, repeated along all axes but that of the samples."""
        if node in self.watched.fixed:
            shape: Any = self.watched.seen[node].shape
        else:
            entry = self.env[node]
            assert isinstance(entry, Live)
            shape = Part(
                torch.Size(self.watched.seen[node].shape or ()),
                self.graph.call_function(getattr, (entry.t, "shape")),
            )
            self.parts.made.add(shape.node)  # type: ignore[arg-type]
        return self.parts.call_function(spread, (offset, shape))

    def copy(self, node: fx.Node) -> fx.Node:
        """Copy a node as it is, with what its arguments became, offsets left aside."""
        twin = self.graph.node_copy(node, self._node)
        twin.meta = {}
        self.copies[twin] = node
        return twin

    def use(
        self, node: fx.Node, function: Any, t: fx.Node | None, parts: list[Part], *rest: Any
    ) -> Live:
        """Write the call of a function that uses maps.

        Args:
            node: The original node, whose value it gives.
            function: Of `nn.folded`.
            t: Its first argument; None for a function of maps alone.
            parts: The maps; it is told their positions.
            *rest: Further arguments.

        Returns:
            What the node became, without an offset.
        """
        first = len(self.maps)
        for part in parts:
            self._uses[node] += 1
            name = node.name if self._uses[node] == 1 else f"{node.name}__{self._uses[node]}"
            self.maps.append(Map(name, part, self.watched.seen[node].channels_last))
        places = range(len(parts))
        values = tuple(self.parts.lifted(part) for part in parts)
        head = () if t is None else (t,)
        made = self.graph.call_function(function, (*head, values, *places, *rest))
        self.mapped[made] = tuple(first + place for place in places)
        return Live(made)

    def wants_sum(self, node: fx.Node) -> bool:
        """Whether somebody who uses a node needs its offset added."""
        if node in self.watched.shared:
            return True
        return any(self.rule(user) is None for user in node.users)

    def rule(self, node: fx.Node) -> Rule | None:
        """The rule of a node."""
        if node not in self._rules:
            refused = node in self.watched.changing  # what it changes holds the value itself
            self._rules[node] = None if refused else self._rule_of(self, node)
        return self._rules[node]

    def is_new(self, t: fx.Node) -> bool:
        """Whether a node gives a tensor of its own that nobody has looked at."""
        given = t.target in (at_least, within, operator.add)
        return _is_product(self, t) or (given and not t.users)

    # One node ---------------------------------------------------------------------------------

    def _written(self, node: fx.Node) -> Live | Part | None:
        if node.op in ("placeholder", "get_attr"):
            return Live(self.copy(node))
        layer = self.layer_of(node)
        if isinstance(layer, Memory):
            return None if node.args else Part(_without_gradient(layer))
        sources = node.all_input_nodes
        seen_changing = node in self.watched.shared or node in self.watched.changing
        if not seen_changing and any(isinstance(self.env[source], Part) for source in sources):
            part = self._made_of_memory(node, layer)
            if part is not None:
                return part
        rule = self.rule(node)
        carried = any(self.offset(source) is not None for source in sources)
        if rule is not None and carried:
            return self._settled(node, rule(self, node))
        return Live(self.copy(node))

    def _made_of_memory(self, node: fx.Node, layer: nn.Module | None) -> Part | None:
        """What a node gives that needs the memory, and no input but its sizes."""
        if isinstance(layer, WriteBlock):
            memory = self.env[node.args[2]] if layer.per == "batch" else None  # type: ignore[index]
            if not isinstance(memory, Part) or memory.node is not None:
                return None
            return Part(_without_gradient(layer, None, None, memory.value))
        if _is_cast(node):
            first, like = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
            if first not in self.aside and first not in self.watched.constant:
                return None
            own = self._part(first)
            if own.node is None:
                return Part(own.value.to(self.watched.seen[like].dtype))
            return own  # maps are cast where they are used
        sources = node.all_input_nodes
        if not all(isinstance(self.env[s], Part) or self.known(s) for s in sources):
            return None
        args, kwargs = self.as_part(node.args), self.as_part(node.kwargs)
        if changed_argument(node, layer) is not None:  # maps in use stay what they are
            args = (self.parts.call_method("clone", args[:1]), *args[1:])
        if node.op == "call_function":
            return self.parts.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        call = self.parts.call_method if node.op == "call_method" else self.parts.call_module
        return call(str(node.target), args, kwargs)

    def _settled(self, node: fx.Node, live: Live) -> Live:
        """Add the offset of a node where it costs nothing, or where somebody needs the sum."""
        offset = live.offset
        if offset is None:
            return live
        ndim = len(self.watched.seen[node].shape or ())
        while offset.value.ndim < ndim:
            offset = self.parts.call_method("unsqueeze", (offset, 0))
        if self._goes_into_bias(live.t, offset):
            return Live(live.t)
        peak = float(offset.value.abs().max()) if offset.value.numel() else 0.0
        if self.wants_sum(node) or not peak <= _LARGEST * self.watched.seen[node].peak:
            return self.use(node, plus, live.t, [offset], self.is_new(live.t))
        return Live(live.t, offset)

    def _goes_into_bias(self, t: fx.Node, offset: Part) -> bool:
        """Add an offset that is the same at all positions to a bias, where there may be one."""
        if offset.node is not None or not _is_product(self, t):
            return False
        layer, value = self.layer_of(t), offset.value
        linear = isinstance(layer, nn.Linear) or t.target is F.linear
        dims = 0 if linear else _dims(t, layer)
        channels = value.shape[value.ndim - 1 - dims]
        if value.numel() != channels:
            return False
        if layer is None:
            return self._functional_bias(t, value.flatten())
        if not self._owned.is_alone(t, "bias"):
            return False
        bias = layer._parameters.get("bias")
        added = value.flatten() if bias is None else bias.detach() + value.flatten()
        layer._parameters["bias"] = nn.Parameter(added, requires_grad=False)
        return True

    def _functional_bias(self, t: fx.Node, value: Tensor) -> bool:
        bias = argument_of(t, 2, "bias")
        if isinstance(bias, fx.Node):
            source = self.copies.get(bias)
            if source not in self.watched.constant:
                return bias.target in self.biases and self._add_again(bias, value)
            value = value + self.watched.seen[source].value
        path = f"{self._home}.biases.{t.name}"
        self.biases[path] = value.detach().clone()
        with self.graph.inserting_before(t):
            node = self.graph.get_attr(path)
        if len(t.args) > 2:
            t.update_arg(2, node)
        elif "bias" in t.kwargs or len(t.args) < 2:
            t.update_kwarg("bias", node)
        else:
            t.args = (*t.args, node)
        return True

    def _add_again(self, bias: fx.Node, value: Tensor) -> bool:
        self.biases[str(bias.target)] += value
        return True

    def _beside(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.source.nodes:
            layer = self.layer_of(node)
            sources = node.all_input_nodes[:1] if _is_cast(node) else node.all_input_nodes
            if isinstance(layer, WriteBlock):
                sources = [node.args[2]] if layer.per == "batch" else []
            tensors = [n for n in sources if not self.known(n)]
            cast_like = _is_cast(node) and not tensors and node.args[1] in found
            if isinstance(layer, Memory) or cast_like or (tensors and found.issuperset(tensors)):
                found.add(node)
        return found

    # Arguments --------------------------------------------------------------------------------

    def _part(self, node: fx.Node) -> Part:
        entry, seen = self.env[node], self.watched.seen[node]
        if isinstance(entry, Part):
            return entry
        assert entry is not None
        if node in self.watched.constant:
            return Part(seen.value, None, str(node.target) if node.op == "get_attr" else "")
        return Part(seen.value, None if node in self.watched.fixed else entry.t)

    def _node(self, node: fx.Node) -> Any:
        entry = self.env[node]
        if isinstance(entry, Part) and not isinstance(entry.value, Tensor):
            return self.parts.lifted(entry)
        if isinstance(entry, Part):  # somebody needs the memory's part itself
            own = self.use(node, chosen, None, [entry]).t
            touched = node in self.watched.touched  # a map in store stays what it is
            return self.graph.call_method("clone", (own,)) if touched else own
        assert entry is not None
        return entry.t


def _without_gradient(module: nn.Module, *args: Any) -> Any:
    with torch.no_grad():
        return module(*args)


def _is_cast(node: fx.Node) -> bool:
    """Whether it is x.to(y)."""
    wanted = node.op == "call_method" and node.target == "to" and len(node.args) == 2
    return wanted and isinstance(node.args[1], fx.Node) and not node.kwargs


def _is_product(writer: FoldWriter, t: fx.Node) -> bool:
    """Whether a node is a product just written: nobody else looks at what it gives."""
    if t.users:
        return False
    layer = writer.layer_of(t)
    if layer is not None:
        return isinstance(layer, nn.modules.conv._ConvNd | nn.Linear)
    return t.target is F.linear or t.target in CONV_FUNCTIONS


def _dims(t: fx.Node, layer: nn.Module | None) -> int:
    if isinstance(layer, nn.modules.conv._ConvNd):
        return len(layer.kernel_size)
    return int(t.target.__name__[-2])  # type: ignore[union-attr]  # conv2d: two
