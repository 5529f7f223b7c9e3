"""Optimizer state through surgery: a resumed run goes on where the old one stopped.

    carry_optimizer(state, model, gm)     base -> operated
    restore_optimizer(state, gm)          operated -> base, where `restore(gm)` goes

`state` is what `optimizer.state_dict()` gave, or the optimizer itself. Moments of a widened weight
get zeros where the weight got new entries (see `moments`), `step` stays, and so does all that is no
parameter's (learning rates, options). New parameters join a group at its end, where
`gm.parameters()` has them, and start fresh. With a memory frozen at zero, a resumed run computes
what the run without surgery would have.

The exception is Adafactor: its steps are scaled by root mean squares of the whole parameter and of
its whole update, and more entries, even of zeros, are another scale (not so with
`scale_parameter=False` and a `clip_threshold` that is not reached). Its moments are carried to be
those of the wider weight. After `freeze_base`, memory weights live beside, and the base keeps its
shapes.

**Which group.** See `groups`: the one that suits a new parameter, or `new_group`. A scheduler needs
`carry_scheduler` where groups are added.

**Which parameter.** See `parameter_order`: by name, or by the model's order.

**What else depends on shapes** in a training checkpoint: averaged weights (EMA, SWA), which are
state dicts (`widen_state_dict`, or `transform` with the averaged weights); copies of weights in
flat buffers (DeepSpeed, FSDP's flat parameters), which are refused: save those consolidated; copies
in lists (Apex, torch_ema), which stay as they are and are told of. A gradient scaler knows no
shapes; a scheduler knows the number of groups.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from aim_surgery.checkpoint.optimizer.groups import NewGroup, join_groups
from aim_surgery.checkpoint.optimizer.moments import (
    Entry,
    Shape,
    UnknownState,
    fits,
    narrow_entry,
    why_unknown,
    widen_entry,
)
from aim_surgery.checkpoint.optimizer.parameter_order import Found, Parameters, Role, find_roles
from aim_surgery.errors import CheckpointError
from aim_surgery.nn.aim_modules import operated_in, plan_of
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.modules import widened_reads
from aim_surgery.surgery.state_dict import is_new

State = Mapping[str, Any]

_NO_GROUPS = ("_milestones", "_schedule_phases")  # lists in schedulers that are not by group
_KEPT, _NEW = "kept", "new"  # roles besides a `Read`
_DROP = "leave its state out with --drop-optimizer: moments start fresh then"


def carry_optimizer(
    state: State | Optimizer,
    model: nn.Module,
    gm: nn.Module,
    *,
    new_group: NewGroup | None = None,
    names: Sequence[Sequence[str]] | None = None,
    start_new: bool = False,
) -> dict[str, Any]:
    """Carry an optimizer's state from a base model to the operated one.

    Args:
        state: What the optimizer's `state_dict` gave, or the optimizer itself; left unchanged.
        model: The base model; its names and shapes count (it may be on the meta device).
        gm: The operated model, likewise.
        new_group: Where new parameters go: the index of a group, "own" for a new last one, or a
            dict of the options in which the new one differs from the last. By default the one that
            suits it, see `groups`.
        names: Names of each group's parameters, where the state tells none and they are not in the
            model's order.
        start_new: Whether new parameters get entries as before any step, where they can; by default
            the optimizer makes them in its first step. `torch.distributed.checkpoint` asks for
            entries of all parameters.

    Returns:
        A state dict for an optimizer of the same class with the parameters of `gm`, new ones last
        in their group. What didn't have to change are the same tensors.

    Raises:
        CheckpointError: It is no optimizer's state or not this model's; an optimizer remembers
            something whose new entries nobody can tell; or it is ambiguous which parameter is
            which. The message says what to do.

    Example:
        >>> from torch import nn
        >>> import aim_surgery
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> gm = aim_surgery.transform(model)
        >>> resumed = torch.optim.AdamW(gm.parameters())
        >>> resumed.load_state_dict(carry_optimizer(optimizer, model, gm))
        >>> resumed.state[gm.get_parameter("2.weight")]["exp_avg"].shape
        torch.Size([10, 65])
    """
    inner = operated_in(gm)
    plan: Plan = plan_of(inner)
    before, after = Parameters.of(model), Parameters.of(inner)
    _check_order(before, after)
    reads = widened_reads(plan)
    state, names = _state_and_names(state, model, names)
    _check_known(state, before)

    def role(name: str) -> Role:
        return reads.get(name, _KEPT)

    found = find_roles(state, before, role, names, all_keys=False)
    entries: dict[Any, Any] = {}
    for key, entry, options in _entries(state):
        read = found.roles[key]
        if not isinstance(read, Read):
            entries[key] = entry
            continue
        shape = _own_shape(read, before)
        with _telling(key, found):
            entries[key] = widen_entry(
                entry, shape, read, options, from_zero=plan.init == "preserve"
            )
    groups = [dict(group, params=list(group["params"])) for group in state["param_groups"]]
    new = {name: shape for name, shape in after.shapes.items() if is_new(name)}
    places = join_groups(groups, state, found, before, new, new_group)
    return _renumbered(state, groups, entries, places, inner, found, start_new=start_new)


def restore_optimizer(
    state: State | Optimizer,
    gm: nn.Module,
    *,
    names: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The way back of `carry_optimizer`, for the model that `restore(gm)` gives.

    Args:
        state: Of an optimizer with the parameters of `gm`, or that optimizer; left unchanged.
        gm: The operated model; its names and shapes count.
        names: See `carry_optimizer`.

    Returns:
        A state dict for the base model's parameters. Groups that held nothing else than new
        parameters are gone.

    Raises:
        CheckpointError: See `carry_optimizer`.
    """
    inner = operated_in(gm)
    reads, parameters = widened_reads(plan_of(inner)), Parameters.of(inner)
    state, names = _state_and_names(state, inner, names)
    _check_known(state, parameters)

    def role(name: str) -> Role:
        return _NEW if is_new(name) else reads.get(name, _KEPT)

    found = find_roles(state, parameters, role, names, all_keys=True)
    entries: dict[Any, Any] = {}
    for key, entry, options in _entries(state):
        read = found.roles[key]
        if isinstance(read, Read):
            shape = parameters.shapes[read.site.weights[0]]
            with _telling(key, found):
                entries[key] = narrow_entry(entry, shape, read, options)
        elif read != _NEW:
            entries[key] = entry
    groups = []
    for group in state["param_groups"]:
        kept = [i for i, key in enumerate(group["params"]) if found.roles[key] != _NEW]
        lists = [name for name in ("params", "param_names") if name in group]
        if kept:
            groups.append({**group, **{name: [group[name][i] for i in kept] for name in lists}})
    return _renumbered(state, groups, entries, [], inner, found)


def carry_scheduler(state: State, groups: int, to: int) -> dict[str, Any]:
    """Let the state of a learning-rate scheduler know of another number of groups.

    Args:
        state: What its `state_dict` gave; left unchanged.
        groups: How many groups there were.
        to: How many there are. New ones have what the last one had; what is too many goes from the
            end.

    Returns:
        A state dict in which each list with one entry a group has as many as there are groups;
        schedulers inside (`SequentialLR`, `ChainedScheduler`) likewise.

    Example:
        >>> carry_scheduler({"base_lrs": [0.1], "_last_lr": [0.05], "last_epoch": 3}, 1, 2)
        {'base_lrs': [0.1, 0.1], '_last_lr': [0.05, 0.05], 'last_epoch': 3}
    """
    carried = dict(state)
    for name, value in state.items():
        if name == "_schedulers":
            carried[name] = [carry_scheduler(inner, groups, to) for inner in value]
        elif name not in _NO_GROUPS and isinstance(value, list) and len(value) == groups:
            carried[name] = [*value[:to], *value[-1:] * (to - groups)]
    return carried


# What comes in ------------------------------------------------------------------------------


def _state_and_names(
    state: State | Optimizer,
    model: nn.Module,
    names: Sequence[Sequence[str]] | None,
) -> tuple[State, Sequence[Sequence[str]] | None]:
    if isinstance(state, Optimizer):
        by_id = {id(p): name for name, p in model.named_parameters()}
        groups = [[by_id.get(id(p)) for p in group["params"]] for group in state.param_groups]
        if any(name is None for group in groups for name in group):
            raise CheckpointError(
                "this optimizer has parameters that the model has not: pass the model that it "
                "was made for"
            )
        # a copy: optimizers count in place, and two would count in the same tensors
        return copy.deepcopy(state.state_dict()), [
            [str(name) for name in group] for group in groups
        ]
    well_formed = (
        isinstance(state, Mapping)
        and isinstance(state.get("state"), Mapping)
        and isinstance(state.get("param_groups"), list)
        and all(isinstance(g, Mapping) and "params" in g for g in state["param_groups"])
    )
    if not well_formed:
        has = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"expected an optimizer's state dict (state, param_groups), got {has}; {_DROP}"
        )
    keys = [key for group in state["param_groups"] for key in group["params"]]
    stray = [key for key in state["state"] if key not in set(keys)]
    if stray:
        raise CheckpointError(
            f"the optimizer's state has an entry {stray[0]!r}, but no group has it; {_DROP}"
        )
    if names is not None and [len(n) for n in names] != [
        len(g["params"]) for g in state["param_groups"]
    ]:
        raise CheckpointError(
            f"names: expected one name a parameter, group by group: "
            f"{[len(g['params']) for g in state['param_groups']]}, got {[len(n) for n in names]}"
        )
    return state, names


def _check_order(before: Parameters, after: Parameters) -> None:
    kept = [name for name in after.shapes if not is_new(name)]
    if kept != list(before.shapes):
        differ = sorted(set(kept) ^ set(before.shapes)) or kept
        raise CheckpointError(
            f"the operated model was not made from this model: they differ in {differ[:5]}"
        )


def _check_known(state: State, parameters: Parameters) -> None:
    """Each entry must be that of some parameter at all."""
    shapes = set(parameters.shapes.values())
    for key, entry, options in _entries(state):
        if any(fits(entry, shape, options) for shape in shapes):
            continue
        sizes = [tuple(v.shape) for v in entry.values() if isinstance(v, Tensor) and v.ndim]
        near = next((shape for shape in shapes if shape in sizes), next(iter(shapes)))
        why = why_unknown(entry, near, options)
        raise CheckpointError(
            f"the optimizer's state of parameter {key!r} is none that surgery can widen: {why} "
            f"(known: SGD, Adam and its kin, RMSprop, Adagrad, Adafactor, and what else keeps "
            f"tensors of the parameter's shape); {_DROP}"
        )


def _entries(state: State) -> Iterator[tuple[Any, Entry, Mapping[str, Any]]]:
    for group in state["param_groups"]:
        for key in group["params"]:
            if key in state["state"]:
                yield key, state["state"][key], group


def _own_shape(read: Read, parameters: Parameters) -> Shape:
    return parameters.shapes[read.site.weights[0]]


class _telling:  # noqa: N801  # a context manager
    """Says which entry it was that is not known."""

    def __init__(self, key: Any, found: Found) -> None:
        self._what = found.names.get(key, f"number {key}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, err: BaseException | None, _trace: object) -> None:
        if isinstance(err, UnknownState):
            raise CheckpointError(
                f"the optimizer's state of {self._what} can't be carried: {err}; {_DROP}"
            ) from err


# What goes out ------------------------------------------------------------------------------


def _renumbered(
    state: State,
    groups: list[dict[str, Any]],
    entries: Mapping[Any, Any],
    places: list[tuple[str, int]],
    gm: nn.Module,
    found: Found,
    *,
    start_new: bool = False,
) -> dict[str, Any]:
    """State and groups with keys anew: numbers counted through, names as they are."""
    by_name = all(isinstance(key, str) for group in groups for key in group["params"])
    carried: dict[Any, Any] = {}
    out, count = [], 0
    for index, group in enumerate(groups):
        keys: list[Any] = []
        new = [found.prefix + name for name, place in places if place == index]
        for key in [*group["params"], *new]:
            fresh = isinstance(key, str) and not by_name  # a new parameter among numbers
            target = key if by_name else count
            count += 1
            keys.append(target)
            if not fresh and key in entries:
                carried[target] = entries[key]
        for name, target in zip(new, keys[len(keys) - len(new) :], strict=True):
            parameter = gm.get_parameter(name.removeprefix(found.prefix))
            started = _started(entries, group, parameter, always=start_new)
            if started:
                carried[target] = started
        names = {"param_names": [*group["param_names"], *new]} if "param_names" in group else {}
        out.append({**group, "params": keys, **names})
    return {**state, "state": carried, "param_groups": out}


def _started(
    entries: Mapping[Any, Any], group: Mapping[str, Any], new: Tensor, *, always: bool
) -> dict[str, Any]:
    """What an optimizer has of a new parameter: nothing, but for Adagrad, which starts at once.

    With `always`, zeros, where all that it keeps is counters and tensors as the parameter.
    """
    like = next(iter(entries.values()), {})
    if not (always or set(like) == {"step", "sum"}) or not all(map(_is_uniform, entries.values())):
        return {}
    device = None if not new.is_meta else "cpu"
    started: dict[str, Any] = {}
    for name, value in like.items():
        start = float(group.get("initial_accumulator_value", 0)) if name == "sum" else 0.0
        if isinstance(value, Tensor) and value.ndim:
            started[name] = torch.full_like(new.detach(), start, dtype=value.dtype, device=device)
        elif isinstance(value, Tensor):
            started[name] = torch.zeros_like(value)
        else:
            started[name] = type(value)() if isinstance(value, int | float) else value
    return started


def _is_uniform(entry: Entry) -> bool:
    """Whether an entry's tensors are counters and such of one shape."""
    shapes = {value.shape for value in entry.values() if isinstance(value, Tensor) and value.ndim}
    return len(shapes) <= 1
