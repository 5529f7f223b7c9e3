"""Who reads how much and where is written: `make_plan(capture, config) -> Plan`.

A convolution with spatial size S sees a memory of M floats as K = ceil(M / S) planes: a reshape
where S divides M, zeros padded up to whole planes elsewhere. It is given k ≤ K of them, averaged in
k contiguous groups along the plane axis, so that every float reaches every site. A linear layer
sees k features, averaged from M likewise.
"""

from __future__ import annotations

import difflib
from typing import Any

from aim_surgery.capture import Capture
from aim_surgery.config import AimConfig, Filter, matches
from aim_surgery.errors import PlanError, RequestError, listed
from aim_surgery.planning.budget import Sizes, choose_sizes
from aim_surgery.planning.inputs import input_spec
from aim_surgery.planning.parts import Memory, Read, Write, module_name
from aim_surgery.planning.plan import Plan
from aim_surgery.planning.writes import Schedule, schedule_writes
from aim_surgery.sites import Site, Skip, find_calls, find_sites


def make_plan(capture: Capture, config: AimConfig) -> Plan:
    """Decide which sites read how many planes of a memory of what size, and what writes to it.

    Args:
        capture: The captured model.
        config: Budget, memory size, writes and filters.

    Returns:
        The plan. Nothing is built.

    Raises:
        PlanError: There is nothing to read with, a filter or write point matches nothing, or the
            budget is too small; the message says what would do.
    """
    sites, unread = find_sites(capture)
    if not sites:
        raise PlanError(_nothing_to_read(capture, unread))
    chosen, skips = _choose(sites, config)
    schedule = schedule_writes(capture, config, chosen)
    parameters = sum(parameter.numel() for parameter in capture.model.parameters())
    sizes = choose_sizes(config, chosen, schedule.points, parameters)
    memory = Memory.of(sizes.floats, sizes.home, carry=config.carry, momentum=config.momentum)
    return Plan(
        model=type(capture.model).__name__,
        base_parameters=parameters,
        memory=memory,
        reads=tuple(
            Read.of(
                site,
                sizes.floats,
                sizes.planes[site.layer],
                version=schedule.versions.get(site.name, 0),
            )
            for site in chosen
        ),
        skips=(*skips, *unread),
        init=config.init,
        inputs=input_spec(capture.inputs),
        notes=(*sizes.notes, *schedule.notes, *_of_one_mode(capture, chosen), *capture.notes),
        writes=_writes(config, schedule, sizes, memory),
        unwritten=schedule.left_out,
        emit="module" if capture.whole else "graph",
    )


def _of_one_mode(capture: Capture, chosen: tuple[Site, ...]) -> tuple[str, ...]:
    """Tell of sites that one mode alone has: what the memory adds there, the other does without."""
    calls = {
        trace.training: {call.site.name for call in find_calls(capture, trace.graph)}
        for trace in capture.traces
    }
    notes = []
    for training in calls if len(calls) > 1 else ():
        only = calls[training] - calls[not training]
        names = [site.name for site in chosen if site.name in only and not site.inside]
        if names:
            mode, other = ("training", "evaluation")[:: 1 if training else -1]
            notes.append(f"read in {mode} alone, as {other} has no such call: {listed(names, 4)}")
    return tuple(notes)


def _writes(
    config: AimConfig, schedule: Schedule, sizes: Sizes, memory: Memory
) -> tuple[Write, ...]:
    options: dict[str, Any] = {
        "per": config.write,
        "mode": config.mode,
        "widths": sizes.widths,
        "kernel_size": config.kernel_size,
        "norm": config.norm,
        "activation": config.activation,
        "momentum": config.momentum,
    }
    writes: list[Write] = []
    for point, planes in zip(schedule.points, sizes.write_planes, strict=True):
        name = module_name(point.name, {write.name for write in writes})
        version = len(writes) + 1
        writes.append(Write.of(point, memory, planes, version, name=name, **options))
    return tuple(writes)


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
            raise RequestError(f"{name}={pattern!r} matches no site; close: {', '.join(close)}")


def _nothing_to_read(capture: Capture, unread: tuple[Skip, ...]) -> str:
    model = capture.model
    message = f"{type(model).__name__} has no convolution or linear call to read with"
    if unread:
        listed = "; ".join(f"{item.name}: {item.reason}" for item in unread[:5])
        return f"{message}. Its weights stand in other calls: {listed}"
    quantized = [n for n, m in model.named_modules() if "quantized" in type(m).__module__]
    integers = [n for n, _ in model.named_parameters() if n not in capture.floating_parameters]
    if quantized or integers:
        listed = ", ".join((quantized + integers)[:5])
        return f"{message}: its weights are quantized integers ({listed}). Operate, then quantize"
    return message
