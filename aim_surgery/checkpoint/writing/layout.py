"""A checkpoint of the layout that came in: the training script that wrote it can go on.

    {"epoch": 3, "model": {"module.conv.weight": ...}, "optimizer": {...}}      in
    {"epoch": 3, "model": {"module.conv.weight": wide, "module.aim....": ...},  out
     "optimizer": carried over, or dropped}

Every dict in the checkpoint that holds this model's weights is operated on (averaged weights too);
what else there is stays untouched. Plan and model spec go where PyTorch keeps module versions,
`state_dict._metadata`, which `load_state_dict` passes over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from aim_surgery.checkpoint.operated import Operated
from aim_surgery.checkpoint.reading.names import Names, match_names
from aim_surgery.checkpoint.reading.nesting import (
    Where,
    dotted,
    find_all,
    is_optimizer_state,
    is_state_dict,
    is_tensor,
    value_at,
)
from aim_surgery.checkpoint.reading.source import FORMAT_KEY, Source
from aim_surgery.checkpoint.reading.torch_file import TorchFile, entry_of
from aim_surgery.checkpoint.writing.torch_file import Placeholders
from aim_surgery.errors import CheckpointError

# From the state of an optimizer, the original model and the operated one to the state that goes on.
CarryOptimizer = Callable[[Mapping[str, Any], Any, Any], Mapping[str, Any]]


def same_layout(
    operated: Operated,
    metadata: Mapping[str, str],
    placeholders: Placeholders,
    *,
    carry_optimizer: CarryOptimizer | None = None,
    drop_optimizer: bool = False,
) -> tuple[Any, list[str]]:
    """Build what `torch.save` is to write.

    Args:
        operated: The operated state dict.
        metadata: Text by name, to go with the weights.
        placeholders: Gets the tensors whose values are made later.
        carry_optimizer: Takes optimizer states through the surgery.
        drop_optimizer: Whether optimizer states are left out.

    Returns:
        The content, and notes for the user.

    Raises:
        CheckpointError: There is an optimizer state, and neither way to deal with it.
    """
    original = operated.original
    source = None if original is None else original.source
    if original is None or not isinstance(source, TorchFile) or source.module is not None:
        names = Names({}, "") if original is None else original.names
        weights = _weights(operated, names, {}, None, placeholders, metadata)
        return weights, left_behind(source)
    content, notes = source.content, []
    others: dict[Where, Names] = {}
    states = list(find_all(content, is_optimizer_state))
    own = original.model.state_dict(keep_vars=True)
    for where in find_all(content, is_state_dict):
        if where == source.where or any(where[: len(state)] == state for state in states):
            continue
        weights = value_at(content, where)
        names = match_names(own, {n: entry_of(v) for n, v in weights.items() if is_tensor(v)})
        if names.problems:
            notes.append(f"left as it was: {dotted(where)}, not this model's weights")
        else:
            others[where] = names
    if states and not drop_optimizer and carry_optimizer is None:
        raise CheckpointError(
            f"{source.path}: holds an optimizer state under {dotted(states[0])!r}, which belongs "
            f"to the narrow weights: leave it out with --drop-optimizer, or write a .safetensors "
            f"file, which holds weights alone"
        )
    for where in states:
        if drop_optimizer or carry_optimizer is None:
            content = _replaced(content, where, None)
            notes.append(f"left out: {dotted(where)}")
        else:
            state = carry_optimizer(value_at(content, where), original.model, operated.model)
            content = _replaced(content, where, state)
    for where, names in {source.where: original.names, **others}.items():
        weights = value_at(source.content, where)
        read = None if where == source.where else _reader(weights, names)
        content = _replaced(
            content, where, _weights(operated, names, weights, read, placeholders, metadata)
        )
    return content, notes


def left_behind(source: Source | None) -> list[str]:
    """What else a training checkpoint holds, where weights alone are written.

    Args:
        source: The checkpoint, where there is one.

    Returns:
        A note, or nothing.
    """
    content, where = getattr(source, "content", None), getattr(source, "where", ())
    if not where or not isinstance(content, Mapping):
        return []
    others = [str(key) for key in content if str(key) != where[0]]
    keeps = " (a .pt file keeps them)" if isinstance(source, TorchFile) else ""
    return [f"not taken along: {', '.join(others)}{keeps}"] if others else []


def _reader(weights: Mapping[str, Any], names: Names) -> Callable[[str], Tensor]:
    return lambda name: weights[names.keys[name]].detach()


def _weights(
    operated: Operated,
    names: Names,
    weights: Mapping[str, Any],
    read: Callable[[str], Tensor] | None,
    placeholders: Placeholders,
    metadata: Mapping[str, str],
) -> OrderedDict[str, Any]:
    """One operated state dict under the file's names: the old ones as they were, then new ones."""
    made: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        name = operated.aliases.get(name, name)
        if name not in made:
            entry = operated.entries[name]
            key = names.keys.get(name)
            kept: Any = weights.get(key) if key is not None else None
            if is_tensor(kept) and entry_of(kept) == entry:
                made[name] = kept
            else:
                made[name] = placeholders.add(
                    entry.shape, entry.dtype, lambda: operated.tensor(name, read)
                )
        return made[name]

    by_key = {key: name for name, key in reversed([*names.keys.items()])}
    found: OrderedDict[str, Any] = OrderedDict()
    for key, value in weights.items():
        found[key] = tensor(by_key[key]) if key in by_key else value
    for name in (*operated.entries, *operated.aliases):
        key = names.key_of(name)
        if key not in found:
            found[key] = tensor(name)
    versions = dict(getattr(weights, "_metadata", None) or {})
    found._metadata = versions | {FORMAT_KEY: dict(metadata)}  # type: ignore[attr-defined]
    return found


def _replaced(content: Any, where: Where, value: Any) -> Any:
    """A copy of nested dicts and lists with another value at a place; None leaves it out."""
    if not where:
        return value
    first, rest = where[0], where[1:]
    if isinstance(content, Mapping):
        copy = type(content)(content)  # type: ignore[call-arg]
        key = next(key for key in content if str(key) == first)
        inner = _replaced(content[key], rest, value)
        if inner is None and not rest:
            del copy[key]  # type: ignore[attr-defined]
        else:
            copy[key] = inner  # type: ignore[index]
        return copy
    items = list(content)
    inner = _replaced(items[int(first)], rest, value)
    items[int(first)] = inner
    if inner is None and not rest:
        del items[int(first)]
    return type(content)(items)
