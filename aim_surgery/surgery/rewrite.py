"""Surgery: a captured model and a plan go in, a new `GraphModule` in concat form comes out.

For each site the graph gets, before the call, the site's view of the memory, and the call gets

    conv(cat[x, m], [W_x ; W_m])        where the layer is widened, or
    conv(x, W_x) + conv(m, W_m)         where its weight is left alone (tied, computed, hooked).

Everything is plain PyTorch: reshape, pad, average pooling, expand, cat. Sizes are taken from the
tensors at run time, so batch, resolution, dtype and device stay as free as they were.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery._garbage import collection_paused
from aim_surgery.capture import Capture, Trace
from aim_surgery.errors import PlanError, UnsupportedLayerError
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.nn.memory import memory_layer
from aim_surgery.planning import Plan, Read
from aim_surgery.planning.budget import available_planes
from aim_surgery.sites import Call, find_calls
from aim_surgery.surgery.tree import build_tree, contrary_modules
from aim_surgery.surgery.widen import beside_weight, channels_last_format, widen_layer, widen_weight

MEMORY = "aim.memory"
READS = "aim.reads"

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@collection_paused()
def operate(capture: Capture, plan: Plan, *, copy: bool = True) -> AimGraphModule:
    """Build the operated model.

    Args:
        capture: The captured model; left unchanged.
        plan: What to do, made for this model.
        copy: Whether tensors that stay as they are get copied; if not, the new model shares them
            with the old one.

    Returns:
        A new module. Original parameters keep their names and their leading entries; new ones live
        under `aim.`.

    Raises:
        PlanError: The plan was made for another model, or was edited into one that can't be done.
        UnsupportedLayerError: The model already has something called `aim`.
    """
    model = capture.model
    calls = {t.training: find_calls(capture, t.graph) for t in capture.traces}
    reads = _match(plan, [call for found in calls.values() for call in found])
    if hasattr(model, "aim"):
        raise UnsupportedLayerError(
            f"{type(model).__name__} already has an attribute 'aim', where the memory would live"
        )
    # Graphs first: what the compilation of their code needs is free again when tensors are copied.
    home = _home_weight(model, plan)
    graphs = {t.training: _rewrite(t, calls[t.training], reads, plan, home) for t in capture.traces}
    gm = AimGraphModule(graphs, plan, training=model.training, class_name=type(model).__name__)
    gm.contrary = contrary_modules(model)
    gm.adopt(_operated_tree(capture, plan, reads, calls, copy_tensors=copy))
    return gm


def _match(plan: Plan, calls: list[Call]) -> dict[str, Read]:
    """Hold a plan against the sites that are really there."""
    plan.checked()
    sites = {call.site.name: call.site for call in reversed(calls)}  # the first, as `find_sites`
    for read in plan.reads:
        site = sites.get(read.site.name)
        if site is None:
            raise PlanError(f"the plan reads at {read.site.name!r}, which this model has not")
        theirs = read.site
        mine, planned = vars(site), vars(theirs)
        differ = {key for key in mine if mine[key] != planned[key]} - {"positions", "why_beside"}
        if differ and site.widens == theirs.widens:
            made_for, has = (
                ", ".join(f"{key}={of[key]!r}" for key in mine if key in differ)
                for of in (planned, mine)
            )
            raise PlanError(
                f"{site.name}: the plan was made for {made_for}, the model has {has}: plan again"
            )
        if differ:
            raise PlanError(
                f"{site.name}: the plan was made where its layer could"
                f"{'' if theirs.widens else ' not'} be widened: {site.why_beside or 'now it can'}"
            )
    layers = {read.site.layer for read in plan.reads}
    names = {read.site.name for read in plan.reads}
    for site in sites.values():
        if site.layer in layers and site.name not in names:
            raise PlanError(
                f"{site.name} is another call of layer {site.layer}, which the plan widens: all "
                f"calls of a layer read, or none"
            )
    return {read.site.name: read for read in plan.reads}


# Modules ------------------------------------------------------------------------------------


def _operated_tree(
    capture: Capture,
    plan: Plan,
    reads: dict[str, Read],
    calls: dict[bool, tuple[Call, ...]],
    *,
    copy_tensors: bool,
) -> nn.Module:
    """The model's tree with wide weights in it, and the memory's modules under `aim`."""
    model = capture.model
    widened = {r.site.weights[0]: r for r in reads.values() if r.site.widens}
    replaced: dict[int, torch.Tensor] = {}
    for name, read in widened.items():
        weight, site = model.get_parameter(name), read.site
        wide = widen_weight(weight, read.planes, kind=site.kind, groups=site.groups, init=plan.init)
        replaced[id(weight)] = nn.Parameter(wide, requires_grad=weight.requires_grad)
    root = build_tree(capture, replaced, copy_tensors=copy_tensors)
    for name, read in widened.items():
        widen_layer(root.get_submodule(name.rpartition(".")[0]), read.planes)
    root.aim = _memory_modules(capture, plan, reads, calls)
    return root


def _home_weight(model: nn.Module, plan: Plan) -> torch.Tensor:
    """The weight whose dtype and device the memory takes: that of the first read."""
    return model.get_parameter(plan.reads[0].site.weights[0])


def _memory_modules(
    capture: Capture, plan: Plan, reads: dict[str, Read], calls: dict[bool, tuple[Call, ...]]
) -> nn.Module:
    """The tree under `aim`: the memory layer, and weights that live beside their layers."""
    model = capture.model
    aim = nn.Module()
    home = _home_weight(model, plan)
    aim.memory = memory_layer(plan.memory.floats, device=home.device, dtype=home.dtype)
    aim.reads = nn.Module()
    beside: dict[str, list[Call]] = {}
    for call in (call for found in calls.values() for call in found):
        if call.site.name in reads and not call.site.widens:
            beside.setdefault(call.site.layer, []).append(call)
    for layer, layer_calls in beside.items():
        _place(aim.reads, layer, _beside_module(model, layer_calls, reads, plan))
    aim.train(model.training)
    return aim


def _beside_module(
    model: nn.Module, calls: list[Call], reads: dict[str, Read], plan: Plan
) -> nn.Module:
    """W_m of a layer that is left alone: in a twin of the layer where it is called as one."""
    read = reads[calls[0].site.name]
    site = read.site
    shape = (site.out_channels, read.planes, *site.kernel_size)
    if site.kind == "conv_transpose":
        shape = (read.planes, site.out_channels, *site.kernel_size)
    fan_in = (site.in_channels // site.groups + read.planes) * math.prod(site.kernel_size)
    weight = beside_weight(
        model.get_parameter(site.weights[0]), shape, fan_in=fan_in, init=plan.init
    )
    called = any(call.node.op == "call_module" for call in calls)
    module = _twin_layer(model.get_submodule(site.layer), read) if called else nn.Module()
    module.register_parameter("weight", weight)
    return module


def _place(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with plain modules on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in tree._modules:
            tree.add_module(parent, nn.Module())
        tree = tree.get_submodule(parent)
    if name in tree._modules:  # the way to a module placed before
        for child, inner in tree.get_submodule(name).named_children():
            module.add_module(child, inner)
    tree.add_module(name, module)


def _twin_layer(layer: nn.Module, read: Read) -> nn.Module:
    """A layer of the same geometry, from k planes to the same outputs, without bias."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(read.planes, layer.out_features, bias=False, device="meta")
    if not isinstance(layer, nn.modules.conv._ConvNd):
        raise UnsupportedLayerError(f"{read.site.name}: no twin for a {type(layer).__name__}")
    dims = len(layer.kernel_size)
    name = f"ConvTranspose{dims}d" if layer.transposed else f"Conv{dims}d"
    options: dict[str, Any] = {"output_padding": layer.output_padding} if layer.transposed else {}
    return getattr(nn, name)(
        read.planes,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
        device="meta",
        **options,
    )


# Graph --------------------------------------------------------------------------------------


def _rewrite(
    trace: Trace,
    calls: tuple[Call, ...],
    reads: dict[str, Read],
    plan: Plan,
    home: torch.Tensor,
) -> fx.Graph:
    """Copy a captured graph, with the reads in it."""
    by_node = {call.node: call for call in calls if call.site.name in reads}
    writer = _Writer(plan, home)
    copied: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        if node.op != "placeholder" and not writer.has_views:
            # first thing, so that no `no_grad` region of the model can swallow the gradient
            writer.write_views(reads[call.site.name] for call in by_node.values())
        call = by_node.get(node)
        if call is None:
            copied[node] = writer.copy(node, copied)
        else:
            copied[node] = writer.read(node, copied, call, reads[call.site.name])
    return writer.graph


class _Writer:
    """Writes the operated graph, node by node; views of the memory are written once each."""

    def __init__(self, plan: Plan, home: torch.Tensor) -> None:
        self.graph = fx.Graph()
        self._plan = plan
        self._home = (home.dtype, home.device)  # a mixed model's sites may work elsewhere
        self._views: dict[tuple[int, ...], fx.Node] = {}  # by (*spatial, k)

    @property
    def has_views(self) -> bool:
        """Whether `write_views` has been called."""
        return bool(self._views)

    def write_views(self, reads: Iterable[Read]) -> None:
        """Write the memory and the views of it that these reads want, one for all alike."""
        weight = self.graph.get_attr(f"{MEMORY}.weight")
        ones = self._method("new_ones", weight, (1, 1))
        memory = self.graph.call_module(MEMORY, (ones,))  # (1, M)
        self._views[()] = memory
        for read in reads:
            key = (*read.site.spatial, read.planes)
            if key not in self._views:
                features = read.site.kind == "linear"
                write = self._features if features else self._planes
                self._views[key] = write(memory, read)

    def copy(self, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> fx.Node:
        twin = self.graph.node_copy(node, copied.__getitem__)
        twin.meta, twin.type = {}, None
        return twin

    def read(
        self, node: fx.Node, copied: dict[fx.Node, fx.Node], call: Call, read: Read
    ) -> fx.Node:
        """Write a site."""
        original = _input_of(node, call)
        source, value = copied[original], original.meta["val"]
        if read.site.widens:
            joined = self._joined(source, read, value)
            twin = self.copy(node, copied)
            _set_input(twin, call, joined)
            return twin
        result = self.copy(node, copied)
        beside = self._beside(node, copied, call, read, source, value)
        return self._call(operator.add, result, beside)

    def _joined(self, source: fx.Node, read: Read, value: torch.Tensor) -> fx.Node:
        """cat[x, m] along the channels, group by group."""
        site, dims = read.site, len(read.site.spatial)
        axis = -(dims + 1)
        if site.groups > 1:
            source = self._method("unflatten", source, axis, (site.groups, -1))
        shape = self._call(getattr, source, "shape")
        view = self._view(source, shape, read, value)
        lead = self._call(operator.getitem, shape, slice(None, axis))
        size = self._call(operator.add, lead, (-1,) * (dims + 1))
        view = self._method("expand", view, size)
        layout = channels_last_format(value)
        if layout and site.groups == 1:
            view = self._laid_out(view, layout)  # or `cat` would fall back to contiguous
        joined = self._call(torch.cat, [source, view], axis)
        if site.groups > 1:
            joined = self._method("flatten", joined, axis - 1, axis)
            joined = self._laid_out(joined, layout) if layout else joined
        return joined

    def _laid_out(self, node: fx.Node, layout: torch.memory_format) -> fx.Node:
        return self.graph.call_method("contiguous", (node,), {"memory_format": layout})

    def _beside(
        self,
        node: fx.Node,
        copied: dict[fx.Node, fx.Node],
        call: Call,
        read: Read,
        source: fx.Node,
        value: torch.Tensor,
    ) -> fx.Node:
        """conv(m, W_m), without batch: it is added to every sample alike."""
        shape = self._call(getattr, source, "shape") if read.site.spatial else None
        view = self._view(source, shape, read, value)
        path = f"{READS}.{read.site.layer}"
        if node.op == "call_module":
            twin = self.copy(node, copied)
            twin.target = path
            _set_input(twin, call, view)
            self._without_batch(twin, len(read.site.spatial))
            return twin
        weight = self.graph.get_attr(f"{path}.weight")
        if read.site.kind == "linear":
            product = self._call(F.linear, view, weight)
            columns = call.weight_first and value.ndim > 1
            return self._method("unsqueeze", product, -1) if columns else product
        return _convolve_alone(self.copy(node, copied), view, weight)

    def _without_batch(self, twin: fx.Node, dims: int) -> None:
        """Cut a transposed convolution's `output_size` down to the spatial sizes."""
        if len(twin.args) < 2 and "output_size" not in twin.kwargs:
            return
        size = twin.args[1] if len(twin.args) > 1 else twin.kwargs["output_size"]
        if isinstance(size, fx.Node):
            with self.graph.inserting_before(twin):
                size = self._call(operator.getitem, size, slice(-dims, None))
        elif isinstance(size, list | tuple):
            size = size[-dims:]
        twin.args = twin.args[:1]
        twin.kwargs = {**twin.kwargs, "output_size": size}

    def _view(
        self, source: fx.Node, shape: fx.Node | None, read: Read, value: torch.Tensor
    ) -> fx.Node:
        """The site's planes (k, *spatial) or features (k,), on the input's device and dtype."""
        site = read.site
        view = self._views[(*site.spatial, read.planes)]
        if site.spatial and shape is not None:
            dims = len(site.spatial)
            size = self._call(operator.getitem, shape, slice(-dims, None))
            view = self._call(_POOLS[dims], view, size)
        if (value.dtype, value.device) == self._home:
            return view
        return self._method("to", view, source)

    def _features(self, memory: fx.Node, read: Read) -> fx.Node:
        if read.averaged:
            memory = self._call(F.adaptive_avg_pool1d, memory, read.planes)
        return self._method("reshape", memory, (read.planes,))

    def _planes(self, memory: fx.Node, read: Read) -> fx.Node:
        floats, size = self._plan.memory.floats, math.prod(read.site.spatial)
        available = available_planes(read.site, floats)
        if available * size > floats:
            memory = self._call(F.pad, memory, (0, available * size - floats))
        if read.planes < available:
            planes = self._method("reshape", memory, (1, available, size))
            memory = self._call(F.adaptive_avg_pool2d, planes, (read.planes, size))
        return self._method("reshape", memory, (read.planes, *read.site.spatial))

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


def _set_input(node: fx.Node, call: Call, source: fx.Node) -> None:
    if call.input_index < len(node.args):
        node.update_arg(call.input_index, source)
    else:
        node.update_kwarg(call.input_name, source)


def _convolve_alone(twin: fx.Node, view: fx.Node, weight: fx.Node) -> fx.Node:
    """Make a copied functional convolution one of (m, W_m): no bias, one group."""
    args, kwargs = list(twin.args), dict(twin.kwargs)
    replacements = {0: ("input", view), 1: ("weight", weight), 2: ("bias", None), 6: ("groups", 1)}
    for index, (name, value) in replacements.items():
        if index < len(args):
            args[index] = value
        elif name in kwargs:
            kwargs[name] = value
    twin.args, twin.kwargs = tuple(args), kwargs
    return twin
