"""Sites: every convolution and linear call of a captured graph, as frozen data.

A site is one call; a layer is the weight behind one or more of them. A call is a site where its
weight does not depend on the input: a plain parameter, a tied one, or one computed from parameters
(weight standardisation, parametrisations). What multiplies by weights and is no site (attention
packed into one kernel, recurrent layers, einsum, weights made from the input) is listed with the
reason, so that no weight goes unmentioned.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from aim_surgery.capture import Capture

Kind = Literal["conv", "conv_transpose", "linear"]

CONV_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE_TYPES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYER_TYPES = (*CONV_TYPES, *CONV_TRANSPOSE_TYPES, nn.Linear)

_CONV_KINDS: tuple[Kind, ...] = ("conv", "conv_transpose")
_CONV_FUNCTIONS: dict[Any, Kind] = {
    getattr(home, f"{kind}{dims}d"): kind
    for dims in (1, 2, 3)
    for kind in _CONV_KINDS
    for home in (F, torch)
}
_MATMULS = (torch.matmul, operator.matmul, torch.mm)
_PRODUCTS = (
    *_MATMULS,
    *_CONV_FUNCTIONS,
    F.linear,
    torch.addmm,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.tensordot,
    torch.mv,
)
_PRODUCT_METHODS = frozenset({"addmm", "matmul", "mm", "bmm", "mv", "baddbmm", "__matmul__"})
_NOT_PRODUCTS = (
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.Embedding, nn.EmbeddingBag, nn.PReLU,
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One call of a convolution or linear weight.

    Attributes:
        name: Qualified name of its layer; later calls of the same layer get `@1`, `@2`, ...
        layer: Qualified name of the module, or of the weight where the call is a function.
        kind: "conv", "conv_transpose" or "linear".
        in_channels: Input channels (features).
        out_channels: Output channels (features).
        groups: Groups of a convolution, 1 for a linear call.
        kernel_size: Size of a convolution's kernel, () for a linear call.
        spatial: Spatial size of the input on the example, () for a linear call.
        positions: Output positions per sample on the example (tokens, for a linear call).
        weights: Qualified names of the parameters that the weight is made of.
        widens: Whether the layer can be widened in place; otherwise its memory weights live beside.
        why_beside: Why it can't, "" where it can.
    """

    name: str
    layer: str
    kind: Kind
    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    spatial: tuple[int, ...]
    positions: int
    weights: tuple[str, ...]
    widens: bool
    why_beside: str = ""


@dataclass(frozen=True)
class Unread:
    """Weights that are multiplied with activations at no site, and why."""

    name: str
    weights: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Call:
    """A site with its node: what surgery needs and a plan must not hold."""

    site: Site
    node: fx.Node
    input_index: int  # position of the activation among the node's arguments
    weight_node: fx.Node | None


def find_sites(capture: Capture) -> tuple[tuple[Site, ...], tuple[Unread, ...]]:
    """Find every convolution and linear call of a captured model.

    Args:
        capture: The captured model.

    Returns:
        The sites in execution order (those of the other mode's graph, if there is one, behind),
        and the weights that take part in products but are read by no site.
    """
    sites: dict[str, Site] = {}
    unread: dict[str, Unread] = {}
    for trace in capture.traces:
        for call in find_calls(capture, trace.graph):
            sites.setdefault(call.site.name, call.site)
        for item in _find_unread(capture, trace.graph):
            unread.setdefault(item.name, item)
    read = {weight for site in sites.values() for weight in site.weights}
    rest = (item for item in unread.values() if not set(item.weights) <= read)
    return tuple(sites.values()), tuple(rest)


def find_calls(capture: Capture, graph: fx.Graph) -> tuple[Call, ...]:
    """The sites of one graph with their nodes, in execution order.

    Args:
        capture: The captured model that the graph belongs to.
        graph: One of its graphs.

    Returns:
        One `Call` for each site.
    """
    owners = _parameter_owners(capture.model)
    weights = _weight_sources(capture.model, graph)
    looked_at = _weights_looked_at(capture)
    seen: Counter[str] = Counter()
    shapes: dict[str, tuple[int, int]] = {}
    calls = []
    for node in graph.nodes:
        call = _layer_call(capture.model, owners, looked_at, node)
        if call is None:
            call = _function_call(capture.model, owners, weights, node)
        if call is not None:
            site = call.site
            features = (site.in_channels, site.out_channels)
            layer = site.layer
            if shapes.setdefault(layer, features) != features:
                # one weight in two shapes (an autoencoder that decodes with W^T): two layers
                layer = f"{layer}_{site.in_channels}to{site.out_channels}"
            name = f"{layer}@{seen[layer]}" if seen[layer] else layer
            seen[layer] += 1
            calls.append(replace(call, site=replace(site, name=name, layer=layer)))
    return tuple(calls)


# Module calls -------------------------------------------------------------------------------


def _layer_call(
    model: nn.Module, owners: dict[int, list[str]], looked_at: frozenset[str], node: fx.Node
) -> Call | None:
    if node.op != "call_module":
        return None
    layer = model.get_submodule(str(node.target))
    source = _argument(node, 0, "input")
    if not isinstance(layer, LAYER_TYPES) or not _is_float(source):
        return None
    weight = layer.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    names = _weight_names(layer, str(node.target), owners)
    why = _why_beside(layer, owners)
    if not why and not looked_at.isdisjoint(names):
        why = "its weight has other uses"
    kind: Kind = "linear"
    groups, kernel = 1, ()
    if isinstance(layer, nn.modules.conv._ConvNd):
        kind = "conv_transpose" if layer.transposed else "conv"
        groups, kernel = layer.groups, tuple(layer.kernel_size)
    features = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (
        layer.in_channels, layer.out_channels)  # fmt: skip
    site = _site(str(node.target), kind, features, groups, kernel, source, node, names, why)
    return Call(site, node, 0, None)


def _why_beside(layer: nn.Module, owners: dict[int, list[str]]) -> str:
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed"
    if len(owners[id(weight)]) > 1:
        return f"its weight is shared by {', '.join(owners[id(weight)])}"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "forward hooks see its input and output"
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "backward hooks see its gradients"
    return ""


def _weight_names(layer: nn.Module, path: str, owners: dict[int, list[str]]) -> tuple[str, ...]:
    weight = layer._parameters.get("weight")
    if weight is not None:
        return tuple(owners[id(weight)])
    return tuple(
        f"{path}.{name}"
        for name, parameter in layer.named_parameters()
        if "weight" in name and parameter.is_floating_point()
    )


# Function calls -----------------------------------------------------------------------------


def _function_call(
    model: nn.Module,
    owners: dict[int, list[str]],
    weights: dict[fx.Node, tuple[str, ...]],
    node: fx.Node,
) -> Call | None:
    found = _operands(node, weights)
    if found is None:
        return None
    kind, index, source, weight = found
    names = weights.get(weight)
    if not names or not _is_float(source):
        return None
    shape = tuple(weight.meta["val"].shape)
    groups = 1
    if kind == "linear":
        transposed = node.target is not F.linear
        features = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        kernel = ()
    else:
        groups = _argument(node, 6, "groups", 1)
        if not isinstance(groups, int):
            return None
        kernel = shape[2:]
        features = (shape[1] * groups, shape[0])
        if kind == "conv_transpose":
            features = (shape[0], shape[1] * groups)
    why = _why_function_beside(model, owners, kind, node, weight)
    # `conv.weight` belongs to the layer `conv`, though its forward has been traced through
    layer = names[0].removesuffix(".weight")
    site = _site(layer, kind, features, groups, kernel, source, node, names, why)
    return Call(site, node, index, weight)


def _operands(
    node: fx.Node, weights: dict[fx.Node, tuple[str, ...]]
) -> tuple[Kind, int, fx.Node, fx.Node] | None:
    """Kind, index of the activation, activation and weight of a functional site."""
    if node.op == "call_function" and node.target in _CONV_FUNCTIONS:
        kind = _CONV_FUNCTIONS[node.target]
        source, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
    elif node.op == "call_function" and node.target is F.linear:
        kind = "linear"
        source, weight = _argument(node, 0, "input"), _argument(node, 1, "weight")
    elif _is_call(node, (torch.addmm,), {"addmm"}):
        kind = "linear"
        source, weight = _argument(node, 1, "mat1"), _argument(node, 2, "mat2")
    elif _is_call(node, _MATMULS, {"matmul", "mm"}):
        kind = "linear"
        source, weight = _argument(node, 0, "input"), _argument(node, 1, "other", "mat2")
    else:
        return None
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if source in weights or (kind == "linear" and weight.meta["val"].ndim != 2):
        return None
    index = 1 if _is_call(node, (torch.addmm,), {"addmm"}) else 0
    return kind, index, source, weight


def _why_function_beside(
    model: nn.Module, owners: dict[int, list[str]], kind: Kind, node: fx.Node, weight: fx.Node
) -> str:
    if weight.op != "get_attr":
        return "its weight is computed"
    if kind == "linear" and node.target is not F.linear:
        return "it is a matrix product"
    parameter = _attribute(model, str(weight.target))
    if type(parameter) is not nn.Parameter:
        return f"its weight is a {type(parameter).__name__}"
    if len(owners[id(parameter)]) > 1:
        return f"its weight is shared by {', '.join(owners[id(parameter)])}"
    path = str(weight.target).rpartition(".")[0]
    calls = (n for n in node.graph.nodes if n.op == "call_module" and n.target == path)
    if len(weight.users) > 1 or next(calls, None) is not None:
        return "its weight has other uses"
    module = model.get_submodule(path)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "its weight is an embedding"
    return ""


# Weights that no site reads -----------------------------------------------------------------


def _find_unread(capture: Capture, graph: fx.Graph) -> Iterator[Unread]:
    model = capture.model
    reasons = {call.path: call.reason for trace in capture.traces for call in trace.opaque}
    weights = _weight_sources(model, graph)
    for node in graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            layer = model.get_submodule(path)
            if isinstance(layer, LAYER_TYPES) and path not in reasons:
                continue
            names = _matrices(layer, path)
            if names:
                yield Unread(path, names, reasons.get(path) or _why_packed(layer))
        elif _is_call(node, _PRODUCTS, _PRODUCT_METHODS) or _takes_weights(node):
            names = {name for source in node.all_input_nodes for name in weights.get(source, ())}
            names = tuple(sorted(name for name in names if _is_matrix(_attribute(model, name))))
            if names:
                target = getattr(node.target, "__name__", node.target)
                yield Unread(names[0], names, f"used by a call of {target} that is no site")


def _why_packed(layer: nn.Module) -> str:
    return f"{type(layer).__name__} computes with its weights inside one call"


def _matrices(layer: nn.Module, path: str) -> tuple[str, ...]:
    names = []
    for prefix, module in layer.named_modules(prefix=path):
        if not isinstance(module, _NOT_PRODUCTS):
            names += [f"{prefix}.{n}" for n, p in module._parameters.items() if _is_matrix(p)]
    return tuple(names)


def _is_matrix(parameter: torch.Tensor | None) -> bool:
    return parameter is not None and parameter.ndim >= 2 and parameter.is_floating_point()


def _takes_weights(node: fx.Node) -> bool:
    """Functions that stay one call and get weights as arguments (packed attention)."""
    if node.op != "call_function":
        return False
    home = getattr(node.target, "__module__", "") or ""
    own = bool(home) and home.partition(".")[0] not in ("torch", "_operator", "builtins", "math")
    return own or node.target in (F.multi_head_attention_forward, F.bilinear)


# Shared -------------------------------------------------------------------------------------


def _site(
    layer: str,
    kind: Kind,
    features: tuple[int, int],
    groups: int,
    kernel: tuple[int, ...],
    source: fx.Node,
    node: fx.Node,
    weights: tuple[str, ...],
    why_beside: str,
) -> Site:
    value, output = source.meta["val"], node.meta["val"]
    dims = len(kernel)
    spatial = tuple(value.shape[value.ndim - dims :]) if dims else ()
    after = output.shape[output.ndim - dims :] if dims else output.shape[1:-1]
    positions = 1
    for size in after:
        positions *= int(size)
    return Site(
        name=layer,
        layer=layer,
        kind=kind,
        in_channels=int(features[0]),
        out_channels=int(features[1]),
        groups=groups,
        kernel_size=tuple(int(size) for size in kernel),
        spatial=tuple(int(size) for size in spatial),
        positions=positions,
        weights=weights,
        widens=not why_beside,
        why_beside=why_beside,
    )


def _weight_sources(model: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """Nodes that depend on no input, with the parameters they are made of."""
    parameters = {n for n, p in model.named_parameters(remove_duplicate=False) if p is not None}
    sources: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            sources[node] = (str(node.target),) if node.target in parameters else ()
        elif node.op in ("call_function", "call_method"):
            inputs = node.all_input_nodes
            if all(source in sources for source in inputs):
                names = (name for source in inputs for name in sources[source])
                sources[node] = tuple(dict.fromkeys(names))
    return sources


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """All qualified names of each parameter, by identity: more than one where it is tied."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _weights_looked_at(capture: Capture) -> frozenset[str]:
    """Parameters that some graph fetches by name: not through a call of their own layer alone."""
    nodes = (node for trace in capture.traces for node in trace.graph.nodes)
    return frozenset(str(node.target) for node in nodes if node.op == "get_attr")


def _attribute(model: nn.Module, qualname: str) -> Any:
    path, _, name = qualname.rpartition(".")
    return getattr(model.get_submodule(path), name)


def _argument(node: fx.Node, index: int, *names_and_default: Any) -> Any:
    names = [name for name in names_and_default if isinstance(name, str)]
    default = next((value for value in names_and_default if not isinstance(value, str)), None)
    if index < len(node.args):
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _is_call(node: fx.Node, functions: tuple[Callable[..., Any], ...], methods: Any) -> bool:
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def _is_float(source: Any) -> bool:
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()
