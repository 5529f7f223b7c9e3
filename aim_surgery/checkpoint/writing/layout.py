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
from typing import Any, TypeGuard

from torch import Tensor, nn

from aim_surgery.checkpoint.operated import Operated
from aim_surgery.checkpoint.optimizer import restore_optimizer
from aim_surgery.checkpoint.reading.dcp_folder import DcpFolder
from aim_surgery.checkpoint.reading.names import Names, match_names
from aim_surgery.checkpoint.reading.nesting import EXTRA_STATE, Where, is_tensor, value_at
from aim_surgery.checkpoint.reading.source import Source
from aim_surgery.checkpoint.reading.torch_file import TorchFile, entry_of
from aim_surgery.checkpoint.writing.relaid import Weights, entries_of, relaid
from aim_surgery.checkpoint.writing.torch_file import Placeholders
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import FORMAT_KEY
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.planning import Plan
from aim_surgery.surgery.state_dict import is_new, restore_state_dict, versioned

# From the state of an optimizer, the original model and the operated one to the state that goes on.
CarryOptimizer = Callable[..., Mapping[str, Any]]


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

    def change(where: Where, weights: Weights, names: Names) -> Weights:
        read = None if where == source.where else _reader(weights, names)
        return _weights(operated, names, weights, read, placeholders, metadata)

    carry = None
    if carry_optimizer is not None:
        carry = functools.partial(carry_optimizer, model=original.model, gm=operated.model)
    own = original.model.state_dict(keep_vars=True)
    return relaid(source, own, original.names, change, carry)


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
    names = match_names(own, entries_of(found))
    if names.problems:
        raise CheckpointError(
            f"{source.path}: is not by the names of its model: {'; '.join(names.problems)}; write "
            f"a .safetensors file, of weights alone"
        )

    def change(where: Where, weights: Weights, names: Names) -> Weights:
        return _restored(weights, names, plan)

    carry = None if drop_optimizer else functools.partial(restore_optimizer, gm=gm)
    return relaid(source, own, names, change, carry)


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
) -> Weights:
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
    lost = _lost_states(operated.model, weights, names.prefix)
    for key, value in weights.items():
        if key in lost:
            continue
        found[key] = tensor(by_key[key]) if key in by_key else value
    for name in (*operated.entries, *operated.aliases):
        key = names.key_of(name)
        if key not in found:
            found[key] = tensor(name)
    versions = getattr(weights, "_metadata", None) or _own_versions(operated.model, names.prefix)
    return versioned(found, {**versions, FORMAT_KEY: dict(metadata)})


def _lost_states(gm: nn.Module, weights: Mapping[str, Any], prefix: str) -> set[str]:
    """Extra state of modules that the operated model doesn't have: a graph has none."""
    states = {key for key in weights if key.rpartition(".")[2] == EXTRA_STATE}
    own = gm.state_dict(keep_vars=True) if states else {}
    return {key for key in states if key.removeprefix(prefix) not in own}


def _own_versions(gm: nn.Module, prefix: str) -> dict[str, Any]:
    """Versions of a model's modules under the file's names, for weights that came without any."""
    own = getattr(gm.state_dict(keep_vars=True), "_metadata", None) or {}
    return {
        (prefix + path).removesuffix("."): {"version": told["version"]}
        for path, told in own.items()
        if "version" in told
    }


def _restored(weights: Weights, names: Names, plan: Plan) -> Weights:
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
