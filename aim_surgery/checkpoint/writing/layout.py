"""A checkpoint of the layout that came in: the training script that wrote it can go on.

    {"epoch": 3, "model": {"module.conv.weight": ...}, "optimizer": {...}}      in
    {"epoch": 3, "model": {"module.conv.weight": wide, "module.aim....": ...},  out
     "optimizer": carried over, or dropped}

Every dict in the checkpoint that holds this model's weights is operated on (averaged weights too);
what else there is stays untouched, but for a scheduler where the optimizer has another number of
groups now. The way back is the same with the arrow turned. Plan and model spec go where PyTorch
keeps module versions, `state_dict._metadata`, which `load_state_dict` passes over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from copy import copy as shallow_copy
from typing import Any, TypeGuard

from torch import Tensor, nn

from aim_surgery.checkpoint.operated import Operated
from aim_surgery.checkpoint.optimizer import carry_scheduler, restore_optimizer
from aim_surgery.checkpoint.reading.dcp_folder import DcpFolder
from aim_surgery.checkpoint.reading.names import Names, match_names
from aim_surgery.checkpoint.reading.nesting import (
    Where,
    dotted,
    find_all,
    is_optimizer_state,
    is_other_scheduler,
    is_scheduler_state,
    is_state_dict,
    is_tensor,
    is_tensor_list,
    value_at,
)
from aim_surgery.checkpoint.reading.source import Entry, Source
from aim_surgery.checkpoint.reading.torch_file import TorchFile, entry_of
from aim_surgery.checkpoint.writing.torch_file import Placeholders
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import FORMAT_KEY
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.planning import Plan
from aim_surgery.surgery.state_dict import is_new, restore_state_dict, versioned

# From the state of an optimizer, the original model and the operated one to the state that goes on.
CarryOptimizer = Callable[..., Mapping[str, Any]]

_Weights = Mapping[str, Any]


def operated_layout(
    operated: Operated,
    metadata: Mapping[str, str],
    placeholders: Placeholders,
    carry_optimizer: CarryOptimizer | None,
) -> tuple[Any, list[str]]:
    """Build what `torch.save` is to write of an operated checkpoint.

    Args:
        operated: The operated state dict.
        metadata: Text by name, to go with the weights.
        placeholders: Gets the tensors whose values are made later.
        carry_optimizer: Takes optimizer states through the surgery; None leaves them out.

    Returns:
        The content, and notes for the user.

    Raises:
        CheckpointError: An optimizer's state can't be carried.
    """
    original = operated.original
    source = None if original is None else original.source
    if original is None or not keeps_layout(source):
        names = Names({}, "") if original is None else original.names
        return _weights(operated, names, {}, None, placeholders, metadata), left_behind(source)

    def change(where: Where, weights: _Weights, names: Names) -> _Weights:
        read = None if where == source.where else _reader(weights, names)
        return _weights(operated, names, weights, read, placeholders, metadata)

    carry = None
    if carry_optimizer is not None:
        carry = functools.partial(carry_optimizer, model=original.model, gm=operated.model)
    own = original.model.state_dict(keep_vars=True)
    return _relaid(source, own, original.names, change, carry)


def restored_layout(
    source: TorchFile | DcpFolder, gm: nn.Module, *, drop_optimizer: bool
) -> tuple[Any, list[str]]:
    """Build what `torch.save` is to write of an operated checkpoint that is to be one of the base.

    Args:
        source: The operated checkpoint.
        gm: Its model, from `load`.
        drop_optimizer: Whether optimizer states are left out.

    Returns:
        The content, and notes for the user.

    Raises:
        CheckpointError: An optimizer's state can't be carried back.
    """
    plan, own = plan_of(gm), gm.state_dict(keep_vars=True)
    found = value_at(source.content, source.where)
    names = match_names(own, _entries(found))
    if names.problems:
        raise CheckpointError(
            f"{source.path}: is not by the names of its model: {'; '.join(names.problems)}; write "
            f"a .safetensors file, of weights alone"
        )

    def change(where: Where, weights: _Weights, names: Names) -> _Weights:
        return _restored(weights, names, plan)

    carry = None if drop_optimizer else functools.partial(restore_optimizer, gm=gm)
    return _relaid(source, own, names, change, carry)


def _relaid(
    source: TorchFile | DcpFolder,
    own: Mapping[str, Any],
    names: Names,
    change: Callable[[Where, _Weights, Names], _Weights],
    carry: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None,
) -> tuple[Any, list[str]]:
    """A checkpoint with other weights and optimizer states in the places of the old ones.

    Args:
        source: The checkpoint.
        own: State dict of its model: by it, further weights are found.
        names: Those of the weights that are meant.
        change: What becomes of weights.
        carry: What becomes of optimizer states; None leaves them out.

    Returns:
        The content, and notes for the user.
    """
    content, notes = source.content, []
    states = list(find_all(content, is_optimizer_state))
    places = {source.where: names}
    for where in find_all(content, is_state_dict):
        if where == source.where or any(where[: len(state)] == state for state in states):
            continue
        found = match_names(own, _entries(value_at(content, where)))
        if found.problems:
            notes.append(f"left as it was: {dotted(where)}, not this model's weights")
        else:
            places[where] = found
    for where, names in places.items():
        content = _replaced(content, where, change(where, value_at(source.content, where), names))
    groups: set[tuple[int, int]] = set()
    for where in reversed(states):  # what is left out of a list changes the places behind it
        if carry is None:
            content = _replaced(content, where, None)
            notes.append(f"left out: {dotted(where)}")
            continue
        old = value_at(content, where)
        new = carry(old)
        groups.add((len(old["param_groups"]), len(new["param_groups"])))
        content = _replaced(content, where, new)
    changed = {(old, new) for old, new in groups if old != new}
    for where in find_all(content, is_scheduler_state) if changed else ():
        if len(groups) > 1:
            notes.append(f"left as it was: {dotted(where)}, the scheduler of one of {len(states)}")
            continue
        scheduler = carry_scheduler(value_at(content, where), *next(iter(changed)))
        content = _replaced(content, where, scheduler)
    for where in find_all(content, is_other_scheduler) if changed else ():
        notes.append(f"left as it was: {dotted(where)}, a scheduler of another number of groups")
    shapes = {tuple(value.shape) for value in own.values() if is_tensor(value) and value.ndim > 1}
    for where in find_all(source.content, is_tensor_list):
        copies = value_at(source.content, where)
        inside = any(where[: len(place)] == place for place in (*places, *states))
        if not inside and shapes & {tuple(value.shape) for value in copies}:
            notes.append(
                f"left as it was: {dotted(where)}, {len(copies)} tensors without names, some of "
                f"the shapes of weights: copies do not fit the model any more"
            )
    return content, notes


def keeps_layout(source: Source | None) -> TypeGuard[TorchFile | DcpFolder]:
    """Whether a checkpoint has a layout that is kept."""
    return isinstance(source, DcpFolder) or (
        isinstance(source, TorchFile) and source.module is None
    )


def left_behind(source: Source | None) -> list[str]:
    """What else a training checkpoint holds, where weights alone are written.

    Args:
        source: The checkpoint, where there is one.

    Returns:
        A note, or nothing.
    """
    if source is None or not source.besides:
        return []
    keeps = " (a .pt file keeps them)" if keeps_layout(source) else ""
    return [f"not taken along: {', '.join(source.besides)}{keeps}"]


def _reader(weights: Mapping[str, Any], names: Names) -> Callable[[str], Tensor]:
    return lambda name: weights[names.keys[name]].detach()


def _weights(
    operated: Operated,
    names: Names,
    weights: Mapping[str, Any],
    read: Callable[[str], Tensor] | None,
    placeholders: Placeholders,
    metadata: Mapping[str, str],
) -> _Weights:
    """One operated state dict under the file's names: the old ones as they were, then new ones."""
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        name = operated.aliases.get(name, name)
        if name not in made:
            entry = operated.entries[name]
            key = names.keys.get(name)
            kept: Any = weights.get(key) if key is not None else None
            if is_tensor(kept) and entry_of(kept) == entry:
                made[name] = operated.seen(name, kept)
            else:  # averaged weights are often kept in another dtype
                own = entry_of(kept) if read is not None and is_tensor(kept) else entry
                made[name] = placeholders.add(
                    entry.shape, own.dtype, lambda: operated.tensor(name, read)
                )
        return made[name]

    by_key = {key: name for name, key in reversed([*names.keys.items()])}
    found: dict[str, Any] = {}
    for key, value in weights.items():
        found[key] = tensor(by_key[key]) if key in by_key else value
    for name in (*operated.entries, *operated.aliases):
        key = names.key_of(name)
        if key not in found:
            found[key] = tensor(name)
    versions = getattr(weights, "_metadata", None) or _own_versions(operated.model, names.prefix)
    return versioned(found, {**versions, FORMAT_KEY: dict(metadata)})


def _own_versions(gm: nn.Module, prefix: str) -> dict[str, Any]:
    """Versions of a model's modules under the file's names, for weights that came without any."""
    own = getattr(gm.state_dict(keep_vars=True), "_metadata", None) or {}
    return {
        (prefix + path).removesuffix("."): {"version": told["version"]}
        for path, told in own.items()
        if "version" in told
    }


def _restored(weights: _Weights, names: Names, plan: Plan) -> _Weights:
    """One restored state dict under the file's names, without what told of the operation."""
    of = {key: name for name, key in reversed([*names.keys.items()])}
    narrow = restore_state_dict({of.get(key, key): value for key, value in weights.items()}, plan)
    kept = {key: narrow[of.get(key, key)] for key in weights if of.get(key, key) in narrow}
    versions = getattr(weights, "_metadata", None)
    if versions is not None:
        versions = {
            path: told
            for path, told in versions.items()
            if path != FORMAT_KEY and not is_new(path.removeprefix(names.prefix))
        }
    return versioned(kept, versions)


def _entries(weights: _Weights) -> dict[str, Entry]:
    return {name: entry_of(value) for name, value in weights.items() if is_tensor(value)}


def _replaced(content: Any, where: Where, value: Any) -> Any:
    """A copy of nested dicts and lists with another value at a place; None leaves it out."""
    if not where:
        return value
    first, rest = where[0], where[1:]
    if isinstance(content, Mapping):
        copy: Any = shallow_copy(content)  # of a class that may want arguments
        key = next(key for key in content if str(key) == first)
        inner = _replaced(content[key], rest, value)
        if inner is None and not rest:
            del copy[key]
        else:
            copy[key] = inner
        return copy
    items, named = list(content), hasattr(content, "_make")
    inner = _replaced(items[int(first)], rest, value)
    items[int(first)] = inner
    if inner is None and not rest and not named:
        del items[int(first)]
    if isinstance(content, tuple):
        return content._make(items) if named else type(content)(items)  # type: ignore[attr-defined]
    copy = shallow_copy(content)
    copy[:] = items
    return copy
