"""Sites that no graph shows: layers that are called inside a Python call.

A submodule that stays a Python call (a detection head), or a whole model that keeps its class, is
run once on a copy, on the example inputs or noise of their shapes, and each call of a layer in it
is noted. Such a site reads through a hook on its layer; what is no layer with one weight of its own
has no place for a hook, and is listed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from aim_surgery.capture import Capture
from aim_surgery.sites.calls import LAYER_TYPES
from aim_surgery.sites.site import Kind, Site, Skip

_EXAMPLE = "given"


@dataclass(frozen=True)
class _Seen:
    """The first call of a layer."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def find_inside(
    capture: Capture, paths: Mapping[str, str], taken: frozenset[str]
) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Find the layers that are called inside Python calls.

    Args:
        capture: The captured model.
        paths: Qualified names of the Python calls, "" for the whole model, with why they are such.
        taken: Weights that sites of a graph read already.

    Returns:
        One site for each layer that was called, in the order of the calls, and the weights in there
        that can't be read, with reasons.
    """
    if not paths:
        return (), ()
    layers = {
        name: layer
        for name, layer in capture.modules.items()
        if any(_is_in(name, path) for path in paths) and _may_read(layer)
    }
    seen, failures = _run(capture, layers)
    sites: list[Site] = []
    skips: list[Skip] = []
    read: set[str] = set(taken)
    for name in (*seen, *(name for name in layers if name not in seen)):
        layer = layers[name]
        weights = _names(capture, layer)
        if not weights or not read.isdisjoint(weights):
            continue
        path = next(path for path in paths if _is_in(name, path))
        if name not in seen:
            why = f": {failures[0]}" if failures else ""
            skips.append(Skip(name, weights, f"not called when {path or 'the model'} was run{why}"))
            continue
        read.update(weights)
        sites.append(_site(capture, name, layer, weights, path, seen[name]))
    skips += _others(capture, paths, read | {w for skip in skips for w in skip.weights})
    return tuple(sites), tuple(skips)


def _is_in(name: str, path: str) -> bool:
    return name == path or not path or name.startswith(f"{path}.")


def _may_read(layer: nn.Module) -> bool:
    """A layer of torch's, or one that multiplies by its own matrix (GPT-2's `Conv1D`)."""
    if isinstance(layer, LAYER_TYPES):
        return True
    weight = layer._parameters.get("weight")
    embeds = isinstance(layer, nn.Embedding | nn.EmbeddingBag)
    alone = not any(True for _ in layer.children())
    return alone and weight is not None and weight.ndim == 2 and not embeds


def _names(capture: Capture, layer: nn.Module) -> tuple[str, ...]:
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return ()
    return tuple(capture.owners[id(weight)])


def _site(
    capture: Capture,
    name: str,
    layer: nn.Module,
    weights: tuple[str, ...],
    path: str,
    seen: _Seen,
) -> Site:
    kind: Kind = "linear"
    groups, kernel = 1, ()
    channels = (seen.inputs[-1], seen.outputs[-1])
    if isinstance(layer, nn.modules.conv._ConvNd):
        kind = "conv_transpose" if layer.transposed else "conv"
        groups, kernel = layer.groups, tuple(layer.kernel_size)
        channels = (layer.in_channels, layer.out_channels)
    dims = len(kernel)
    size = seen.outputs[-dims:] if dims else ()
    why = _why_beside(capture, layer)
    return Site(
        name=name,
        layer=name,
        kind=kind,
        in_channels=channels[0],
        out_channels=channels[1],
        groups=groups,
        kernel_size=kernel,
        spatial=seen.inputs[-dims:] if dims else (),
        positions=math.prod(size) if dims else math.prod(seen.outputs[1:-1]),
        weights=weights,
        widens=not why,
        why_beside=why,
        sample_axis=None,
        output_size=size,
        inside=path or ".",
    )


def _why_beside(capture: Capture, layer: nn.Module) -> str:
    weight = layer._parameters["weight"]
    assert weight is not None
    if not isinstance(layer, LAYER_TYPES):
        return "its forward is its own"
    if type(layer).forward is not _stock_forward(layer):
        return "its forward is its own"
    if len(capture.owners[id(weight)]) > 1:
        return "its weight is shared"
    if not weight.requires_grad:
        return "its weight is frozen"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "forward hooks see its input and output"
    return ""


def _stock_forward(layer: nn.Module) -> Any:
    stock = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn."))
    return stock.forward


# Running ------------------------------------------------------------------------------------


def _run(
    capture: Capture, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, _Seen], tuple[str, ...]]:
    """Run a copy of the model in both modes and note what the layers are called with."""
    names = {id(layer): name for name, layer in layers.items()}
    seen: dict[str, _Seen] = {}
    failures = []
    for training in (capture.model.training, not capture.model.training):
        twin = copy.deepcopy(capture.model).train(training)
        for original, layer in zip(capture.model.modules(), twin.modules(), strict=True):
            if id(original) in names:
                layer.register_forward_hook(_noting(seen, names[id(original)]), with_kwargs=True)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                args, kwargs = _examples(capture)
                twin(*args, **kwargs)
        except Exception as err:
            failures.append(f"{type(err).__name__}: {str(err).strip().splitlines()[0:1]}")
    return seen, tuple(failures)


def _noting(seen: dict[str, _Seen], name: str) -> Any:
    def note(_layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        tensors = isinstance(x, torch.Tensor) and isinstance(output, torch.Tensor)
        if tensors and x.ndim and x.is_floating_point() and name not in seen:
            seen[name] = _Seen(tuple(x.shape), tuple(output.shape))

    return note


def _examples(capture: Capture) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The user's own values, copied; noise where only shapes are known."""
    inputs = capture.inputs
    make = torch.clone if inputs.source == _EXAMPLE else _noise_like
    args, kwargs = tree_map_only(torch.Tensor, make, (inputs.args, dict(inputs.kwargs)))
    return args, kwargs


def _noise_like(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype.is_floating_point:
        return torch.rand_like(tensor)
    return torch.zeros_like(tensor)


def _others(capture: Capture, paths: Mapping[str, str], accounted: set[str]) -> Iterator[Skip]:
    """Matrices in a Python call that belong to no layer with a place for a hook."""
    for name, module in capture.modules.items():
        path = next((path for path in paths if _is_in(name, path)), None)
        if path is None or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        weights = tuple(
            f"{name}.{key}".removeprefix(".")
            for key, parameter in module._parameters.items()
            if parameter is not None and parameter.ndim >= 2 and parameter.is_floating_point()
        )
        rest = tuple(weight for weight in weights if weight not in accounted)
        if rest:
            reason = paths[path]
            kind = type(module).__name__
            why = f"{kind} uses it in a forward of its own" + (f" ({reason})" if reason else "")
            yield Skip(name or kind, rest, why)
