"""Who reads how much: `plan_reads(capture, config) -> Plan`.

A convolution with spatial size S sees a memory of M floats as K = ceil(M / S) planes: a reshape
where S divides M, zeros padded up to whole planes elsewhere. It is given k ≤ K of them, averaged in
k contiguous groups along the plane axis, so that every float reaches every site. A linear layer
sees k features, averaged from M likewise.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import Capture, ExampleInputs
from aim_surgery.config import AimConfig, Filter, matches
from aim_surgery.errors import PlanError
from aim_surgery.planning.budget import choose_sizes, home_positions
from aim_surgery.planning.plan import InputSpec, Memory, Plan, Read
from aim_surgery.sites import Site, Skip, find_sites

_LITERALS = (bool, int, float, str, type(None))


def plan_reads(capture: Capture, config: AimConfig) -> Plan:
    """Decide which sites read how many planes of a memory of what size.

    Args:
        capture: The captured model.
        config: Budget, memory size and filters.

    Returns:
        The plan. Nothing is built.

    Raises:
        PlanError: There is nothing to read with, a filter matches nothing, or the budget is too
            small; the message says what would do.
    """
    sites, unread = find_sites(capture)
    if not sites:
        raise PlanError(_nothing_to_read(capture.model, unread))
    chosen, skips = _choose(sites, config)
    parameters = sum(parameter.numel() for parameter in capture.model.parameters())
    sizes = choose_sizes(config, chosen, parameters)
    reads = tuple(Read.of(site, sizes.floats, sizes.planes[site.layer]) for site in chosen)
    return Plan(
        model=type(capture.model).__name__,
        base_parameters=parameters,
        memory=Memory.of(sizes.floats, home_positions(chosen)),
        reads=reads,
        skips=(*skips, *unread),
        init=config.init,
        inputs=input_spec(capture.inputs),
        notes=(*sizes.notes, *capture.notes),
    )


def _choose(
    sites: tuple[Site, ...], config: AimConfig
) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Split sites by the filters; a layer goes with its first site."""
    _check_matches("include", config.include, sites)
    _check_matches("exclude", config.exclude, sites)
    chosen, skips, out = [], [], {}
    for site in sites:
        reason = out.get(site.layer)
        if reason is None:
            excluded = matches(config.exclude, site)
            if excluded:
                reason = f"excluded by {excluded!r}"
            elif not matches(config.include, site):
                reason = "not included"
        if reason is None:
            chosen.append(site)
        else:
            out[site.layer] = reason
            skips.append(Skip(site.name, site.weights, reason))
    kept = tuple(site for site in chosen if site.layer not in out)
    skips += [
        Skip(site.name, site.weights, out[site.layer]) for site in chosen if site.layer in out
    ]
    if not kept:
        raise PlanError(
            f"include={config.include!r} and exclude={config.exclude!r} leave no site of "
            f"{len(sites)} to read"
        )
    return kept, tuple(skips)


def _check_matches(name: str, chosen: Filter, sites: tuple[Site, ...]) -> None:
    if callable(chosen):
        return
    names = [site.name for site in sites]
    for pattern in (chosen,) if isinstance(chosen, str) else chosen:
        if not any(matches(pattern, site) for site in sites):
            close = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
            raise PlanError(f"{name}={pattern!r} matches no site; close: {', '.join(close)}")


def _nothing_to_read(model: nn.Module, unread: tuple[Skip, ...]) -> str:
    message = f"{type(model).__name__} has no convolution or linear call to read with"
    if unread:
        listed = "; ".join(f"{item.name}: {item.reason}" for item in unread[:5])
        return f"{message}. Its weights stand in other calls: {listed}"
    quantized = [n for n, m in model.named_modules() if "quantized" in type(m).__module__]
    integers = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if quantized or integers:
        listed = ", ".join((quantized + integers)[:5])
        return f"{message}: its weights are quantized integers ({listed}). Operate, then quantize"
    return message


def input_spec(inputs: ExampleInputs) -> InputSpec:
    """Example inputs as plain data.

    Args:
        inputs: The inputs that a model was captured with.

    Returns:
        Their shapes; with `args=None` where they hold something other than tensors, literals,
        tuples, lists and dicts.
    """
    try:
        args = tuple(_spec(value) for value in inputs.args)
        kwargs = tuple((name, _spec(value)) for name, value in inputs.kwargs.items())
    except TypeError:
        return InputSpec(None, (), inputs.source)
    return InputSpec(args, kwargs, inputs.source)


def _spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return ("tensor", tuple(int(size) for size in value.shape), dtype)
    if isinstance(value, _LITERALS):
        return value
    if type(value) in (tuple, list):
        return (type(value).__name__, tuple(_spec(item) for item in value))
    if isinstance(value, Mapping):
        return ("dict", tuple((str(key), _spec(item)) for key, item in value.items()))
    raise TypeError(type(value).__name__)


def inputs_of_plan(spec: InputSpec, model: nn.Module) -> ExampleInputs | None:
    """The inverse of `input_spec`: tensors without data, on the model's device.

    Args:
        spec: The plan's input.
        model: Its first parameter's device is used.

    Returns:
        The inputs, or None where the plan could not tell them.

    Raises:
        PlanError: No tensor has the shapes that the plan tells.
    """
    if spec.args is None:
        return None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        args = tuple(_example(value, device) for value in spec.args)
        kwargs = {name: _example(value, device) for name, value in spec.kwargs}
    except (RuntimeError, TypeError, ValueError, OverflowError) as err:
        raise PlanError(
            f"the example inputs of this plan can't be made: {err}. Pass example_inputs"
        ) from err
    return ExampleInputs(args, kwargs, spec.source)


def _example(spec: Any, device: torch.device) -> Any:
    if not isinstance(spec, tuple):
        return spec
    kind, content, *rest = spec
    if kind == "tensor":
        return torch.zeros(content, dtype=getattr(torch, rest[0]), device=device)
    if kind == "dict":
        return {key: _example(value, device) for key, value in content}
    return (tuple if kind == "tuple" else list)(_example(value, device) for value in content)
