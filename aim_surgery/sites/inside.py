"""Sites that no graph shows: layers that are called inside a Python call.

A submodule that stays a Python call (a detection head), or a whole model that keeps its class, is
run once on a copy, on the example inputs or noise of their shapes, and each call of a layer in it
is noted. Such a site reads through a hook on its layer (a recurrent one: through its biases). A
layer whose weight others use besides (packed attention takes that of its projection) is left as it
is; what has no place for a hook is listed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import deep_copy, own_arguments, shared_state_kept
from aim_surgery.errors import in_one_line
from aim_surgery.nn.layer_types import LAYER_TYPES
from aim_surgery.nn.recurrent import is_recurrent
from aim_surgery.sites.closed import are_closed
from aim_surgery.sites.layers import (
    FROZEN,
    geometry_of,
    matrix_of,
    weights_of,
    why_beside,
)
from aim_surgery.sites.recurrent import fault_recurrent, recurrent_sites, recurrent_skips
from aim_surgery.sites.rows import RowsWatched
from aim_surgery.sites.site import Site, Skip
from aim_surgery.sites.unread import NOT_PRODUCTS, is_matrix, unless_complex

# What may be asked of a weight without using its values or its size.
_HARMLESS = frozenset(
    ("dtype", "device", "requires_grad", "is_cuda", "is_meta", "is_leaf", "layout", "grad",
     "is_quantized", "is_sparse", "is_cpu", "is_mps", "itemsize", "grad_fn", "names")
)  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """The first call of a layer."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    path: str  # the Python call that it was in


@dataclass
class _Runs:
    """What runs of the model showed.

    Attributes:
        seen: Layers that were called inside a Python call.
        odd: Layers whose calls took or gave something else than a float tensor.
        elsewhere: Functions that took a layer's weight while the layer was not being called.
        failures: Why a mode did not run, in one line.
        calls: How often each of them was called in the first mode in which it was.
        rows: Embeddings whose rows were multiplied, and the function.
    """

    seen: dict[str, _Seen] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)
    elsewhere: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    rows: dict[str, str] = field(default_factory=dict)


def find_inside(
    capture: Capture, paths: Mapping[str, str], taken: frozenset[str]
) -> tuple[tuple[Site, ...], tuple[Skip, ...], frozenset[str]]:
    """Find the layers that are called inside Python calls.

    Args:
        capture: The captured model.
        paths: Qualified names of the Python calls, "" for the whole model, with why they are such.
        taken: Weights that sites of a graph read, and that no hook is to read.

    Returns:
        One site for each layer that was called, in the order of the calls; the weights in there
        that can't be read, with reasons; and those of `taken` that are called in there, too.
    """
    if not paths:
        return (), (), frozenset()
    layers = {name: layer for name, layer in capture.modules.items() if _may_read(layer)}
    closed = are_closed((capture.modules[path] for path in paths), layers.values())
    runs = _Runs() if closed else _run(capture, layers, paths)
    within = [name for name in layers if name not in runs.seen and path_of(name, paths) is not None]
    sites: list[Site] = []
    skips: list[Skip] = []
    read: set[str] = set(taken)
    both: set[str] = set()
    recurrent: set[nn.Module] = set()
    for name in (*runs.seen, *within):
        layer = layers[name]
        if is_recurrent(layer):
            if layer in recurrent:  # by another name
                continue
            recurrent.add(layer)
            found, left = _recurrent(capture, name, runs)
            sites += found
            skips += left
            read.update(weight for site in found for weight in site.weights)
            continue
        weights = weights_of(capture, name)
        if name in runs.seen:
            both |= taken.intersection(weights)
        if not weights or not read.isdisjoint(weights):
            continue
        seen = runs.seen.get(name)
        reason = _why_not(name, layer, seen, runs) or _why_not_linear(layer, seen)
        if reason or seen is None:
            skips.append(Skip(name or type(layer).__name__, weights, reason))
            continue
        read.update(weights)
        why = why_beside(capture, layer)
        if not why and name in runs.elsewhere:
            why = f"{runs.elsewhere[name]} uses its weight, too"
        sites.append(_site(name, layer, weights, seen, why))
    skips += _others(capture, paths, read | {w for skip in skips for w in skip.weights})
    skips += _rows(capture, paths, runs.rows, read)
    return tuple(sites), tuple(skips), frozenset(both)


def fault_inside(capture: Capture, site: Site, paths: Mapping[str, str]) -> str:
    """Hold a planned site against the model, without running it: "" if it fits.

    Args:
        capture: The captured model.
        site: A site inside a Python call, from a plan.
        paths: As for `find_inside`.

    Returns:
        What is wrong, as a clause.
    """
    fault = fault_recurrent(capture, site)  # whose call may also stand in a graph
    if fault is not None:
        return fault
    layer = capture.modules.get(site.layer)
    if layer is None or not _may_read(layer):
        return "the model has no such layer"
    if path_of(site.layer, paths) is None and path_of(site.inside, paths) is None:
        return "it is in no Python call"
    weights = weights_of(capture, site.layer)
    if weights != site.weights:
        return f"its weights are {weights!r}, the plan was made for {site.weights!r}"
    geometry = geometry_of(layer)
    if geometry is None:
        shape, planned = matrix_of(layer), {site.in_channels, site.out_channels}
        if shape is not None and set(shape) != planned:
            return f"its weight is of {tuple(shape)}, the plan was made for {planned}"
    else:
        planned = (site.kind, site.in_channels, site.out_channels, site.groups, site.kernel_size)
        if geometry != planned:
            return f"it is {geometry!r}, the plan was made for {planned!r}"
    why = why_beside(capture, layer) if site.widens else ""
    return "" if why in ("", FROZEN) else f"the plan was made where it could be widened: {why}"


def path_of(name: str, paths: Mapping[str, str]) -> str | None:
    """The Python call that a module is in, by their qualified names; None where in none."""
    parts = name.split(".")
    outer = ("", *(".".join(parts[:length]) for length in range(1, len(parts) + 1)))
    return next((path for path in outer if path in paths), None)


def _may_read(layer: nn.Module) -> bool:
    """A layer of torch's, or one that multiplies by its own matrix (GPT-2's `Conv1D`)."""
    if isinstance(layer, torch.jit.ScriptModule):  # compiled: no hook gets in
        return False
    if isinstance(layer, LAYER_TYPES) or is_recurrent(layer):
        return True
    alone = not any(True for _ in layer.children())
    return alone and matrix_of(layer) is not None and not isinstance(layer, NOT_PRODUCTS)


def _why_not(name: str, layer: nn.Module, seen: _Seen | None, runs: _Runs) -> str:
    """Why a layer is no site."""
    if seen is not None:
        return "" if name else "it is the whole model: put it into a module, or use emit='graph'"
    if name in runs.elsewhere:
        return f"{runs.elsewhere[name]} uses its weight without calling the layer"
    if name in runs.odd:
        kind = type(layer).__name__
        return f"calls of this {kind} take or give something else than a float tensor"
    why = f": {runs.failures[0]}" if runs.failures else ""
    return f"this {type(layer).__name__} was not called when the model was run{why}"


def _recurrent(capture: Capture, name: str, runs: _Runs) -> tuple[list[Site], list[Skip]]:
    """The sites of a recurrent layer, and what of it does not read."""
    seen = runs.seen.get(name)
    inside = (seen.path if seen else "") or "."
    sites = list(recurrent_sites(capture, name, inside, runs.calls[name]))
    skips = list(recurrent_skips(capture, name))
    if seen is None:
        reason = _why_not(name, capture.modules[name], seen, runs)
        return [], [*(Skip(site.name, site.weights, reason) for site in sites), *skips]
    return sites, skips


def _why_not_linear(layer: nn.Module, seen: _Seen | None) -> str:
    if seen is None or isinstance(layer, LAYER_TYPES):
        return ""
    shape = matrix_of(layer)
    ends = (seen.inputs[-1], seen.outputs[-1])
    if shape is not None and (*shape,) in (ends, ends[::-1]):
        return ""
    return f"{type(layer).__name__} has a forward of its own, which is no linear map by its weight"


def _site(name: str, layer: nn.Module, weights: tuple[str, ...], seen: _Seen, why: str) -> Site:
    ends = (seen.inputs[-1], seen.outputs[-1])
    kind, inputs, outputs, groups, kernel = geometry_of(layer) or ("linear", *ends, 1, ())
    dims = len(kernel)
    size = seen.outputs[-dims:] if dims else ()
    return Site(
        name=name,
        layer=name,
        kind=kind,
        in_channels=inputs,
        out_channels=outputs,
        groups=groups,
        kernel_size=kernel,
        spatial=seen.inputs[-dims:] if dims else (),
        positions=math.prod(size) if dims else math.prod(seen.outputs[1:-1]),
        weights=weights,
        widens=not why,
        why_beside=why,
        sample_axis=None,
        output_size=size,
        inside=seen.path or ".",
    )


# Running ------------------------------------------------------------------------------------


def _run(capture: Capture, layers: Mapping[str, nn.Module], paths: Mapping[str, str]) -> _Runs:
    """Run a copy of the model in both modes and note what the layers are called with."""
    runs = _Runs()
    try:
        twin = deep_copy(capture.model)
        modules = dict(twin.named_modules(remove_duplicate=False))
    except Exception as err:
        runs.failures.append(f"{type(capture.model).__name__} can't be copied: {in_one_line(err)}")
        return runs
    if not {*modules.values()}.isdisjoint(capture.modules.values()):
        runs.failures.append(f"{type(capture.model).__name__} gives itself for a copy")
        return runs
    tables = {
        name: module.weight
        for name, module in modules.items()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and path_of(name, paths) is not None
    }
    rows = RowsWatched(tables)
    calls = {p: modules[p] for p in paths if not isinstance(modules[p], torch.jit.ScriptModule)}
    watch = _Watch(runs, {n: modules[n] for n in layers}, calls, rows)
    for training in (capture.model.training, not capture.model.training):
        try:
            twin.train(training)
            with torch.no_grad(), shared_state_kept(capture.model), watch:
                args, kwargs = own_arguments(capture.inputs)
                rows.begin((args, kwargs))
                twin(*args, **kwargs)
        except Exception as err:
            mode = "training" if training else "evaluation"
            runs.failures.append(f"in {mode} it fails with {in_one_line(err)}")
        watch.forget()
    runs.rows = rows.multiplied
    return runs


class _Watch(TorchFunctionMode):
    """Notes the calls of layers within paths, and uses of their weights outside of such calls."""

    def __init__(
        self,
        runs: _Runs,
        layers: Mapping[str, nn.Module],
        paths: Mapping[str, nn.Module],
        rows: RowsWatched,
    ) -> None:
        super().__init__()
        self._runs, self._rows = runs, rows
        self._stack: list[str] = []  # paths that are being called
        self._active: list[str] = []  # layers that are
        self._mode = 0  # number of the run
        self._counted: dict[str, int] = {}  # the run in which a layer's calls are counted
        self._weights: dict[int, str] = {}
        once = {id(layer): (name, layer) for name, layer in reversed(list(layers.items()))}
        for name, layer in once.values():
            weight = layer._parameters.get("weight")
            if weight is not None:
                self._weights[id(weight)] = name
            layer.register_forward_pre_hook(self._entering(name, weight))
            layer.register_forward_hook(self._noting(name), with_kwargs=True)
        for path, module in paths.items():  # behind, as a whole model may be one layer
            module.register_forward_pre_hook(lambda *_, path=path: self._stack.append(path))
            module.register_forward_hook(lambda *_: _drop(self._stack))

    def forget(self) -> None:
        """Begin anew: a run that failed left calls open."""
        self._stack.clear()
        self._active.clear()
        self._mode += 1

    def _entering(self, name: str, weight: nn.Parameter | None) -> Any:
        def enter(layer: nn.Module, *_: Any) -> None:
            self._active.append(name)
            if weight is not None and getattr(layer, "weight", weight) is not weight:
                self._runs.elsewhere.setdefault(name, "functional_call")  # of another weight

        return enter

    def _noting(self, name: str) -> Any:
        def note(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _drop(self._active)
            if self._stack and self._counted.setdefault(name, self._mode) == self._mode:
                self._runs.calls[name] += 1
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, PackedSequence):
                x = x.data
            if name in self._runs.seen or not self._stack:
                return
            if is_recurrent(layer):  # gives a tensor or a tuple
                output = x
            if not (_is_feature(x) and _is_feature(output)):
                self._runs.odd.add(name)
            else:
                path = self._stack[-1]
                self._runs.seen[name] = _Seen(tuple(x.shape), tuple(output.shape), path)

        return note

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            name = self._weights.get(id(value))
            if name is not None and name not in self._active and not _is_harmless(func):
                self._runs.elsewhere.setdefault(name, getattr(func, "__name__", str(func)))
        result = func(*args, **(kwargs or {}))
        self._rows.see(func, args, kwargs or {}, result)
        return result


def _drop(stack: list[str]) -> None:
    if stack:
        stack.pop()


def _is_feature(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.is_floating_point()


def _is_harmless(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") in _HARMLESS
    return name in ("is_floating_point", "is_complex", "dim", "__hash__", "__repr__")


def _others(capture: Capture, paths: Mapping[str, str], accounted: set[str]) -> Iterator[Skip]:
    """Matrices in a Python call that belong to no layer with a place for a hook."""
    for name, module in capture.modules.items():
        path = path_of(name, paths)
        if path is None or isinstance(module, NOT_PRODUCTS):
            continue
        weights = tuple(
            f"{name}.{key}".removeprefix(".")
            for key, parameter in module._parameters.items()
            if is_matrix(parameter)
        )
        rest = tuple(weight for weight in weights if weight not in accounted)
        if rest:
            reason = paths[path]
            kind = type(module).__name__
            why = f"{kind} uses it in a forward of its own" + (f" ({reason})" if reason else "")
            yield Skip(name or kind, rest, unless_complex(capture, rest, why))


def _rows(
    capture: Capture, paths: Mapping[str, str], multiplied: Mapping[str, str], read: set[str]
) -> Iterator[Skip]:
    """Tables whose rows are multiplied, where nothing else reads at them."""
    for name, function in multiplied.items():
        weights = tuple(capture.owners[id(capture.modules[name].weight)])
        if read.isdisjoint(weights):
            reason = paths[path_of(name, paths) or ""]
            why = f"{function} multiplies its rows inside a Python call"
            yield Skip(name, weights, f"{why} ({reason})" if reason else why)
