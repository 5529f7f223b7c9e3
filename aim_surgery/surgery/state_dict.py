"""State dicts through surgery and back, tensor by tensor: a plan is enough, no model is built.

    widen_state_dict      base -> operated    W_x -> [W_x ; 0]     what is new (`aim.…`) is not made
    restore_state_dict    operated -> base    [W_x ; W_m] -> W_x   what is new is dropped

    restore_state_dict(widen_state_dict(state)) = state

Both are `widen_for` and `split_for` by name. A part of a state dict (one shard) will do.
`memory_in_use` tells what is lost on the way back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from aim_surgery.errors import CheckpointError
from aim_surgery.planning import Plan, Read
from aim_surgery.surgery.modules import AIM, beside_path, memory_path, widened_reads
from aim_surgery.surgery.widen import input_size, split_for, widen_for


def widen_state_dict(state_dict: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Widen the weights of a base model's state dict, as the operation does.

    Shapes:
        See `widen_weight`.

    Args:
        state_dict: Of the base model, or a part of it; left unchanged.
        plan: What to do.

    Returns:
        The same names in the same order; widened weights are new tensors, with zeros where the
        memory comes in whatever `plan.init` says, the others are the same tensors. Memories,
        weights that live beside their layers and update blocks are not in it.

    Raises:
        CheckpointError: A weight has another shape than the plan was made for.

    Example:
        >>> from torch import nn
        >>> import aim_surgery
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = aim_surgery.plan(model)
        >>> wide = widen_state_dict(model.state_dict(), plan)
        >>> wide["2.weight"].shape == (10, 64 + plan.reads[1].planes)
        True
    """
    return _changed(
        state_dict, plan, lambda w, read: widen_for(w, read, "preserve"), operated=False
    )


def restore_state_dict(state_dict: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Take the memory out of an operated model's state dict.

    Shapes:
        See `nn.widened.slices`.

    Args:
        state_dict: Of the operated model, or a part of it; left unchanged.
        plan: Its plan.

    Returns:
        Names and shapes of the base model, in order. Weights that were widened become new tensors,
        the others are the same. Versions of the base's modules come along.

    Raises:
        CheckpointError: A weight has another shape than the plan says.

    Example:
        >>> from torch import nn
        >>> import aim_surgery
        >>> gm = aim_surgery.transform(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)))
        >>> base = restore_state_dict(gm.state_dict(), gm.plan)
        >>> {name: tuple(tensor.shape) for name, tensor in base.items()}
        {'0.weight': (64, 64), '0.bias': (64,), '1.weight': (10, 64), '1.bias': (10,)}
    """
    base = {name: value for name, value in state_dict.items() if not is_new(name)}
    restored = _changed(base, plan, lambda w, read: split_for(w, read)[0], operated=True)
    versions = getattr(state_dict, "_metadata", None)
    if isinstance(versions, Mapping):
        versions = OrderedDict((path, told) for path, told in versions.items() if not is_new(path))
    return versioned(restored, versions)


def memory_in_use(state_dict: Mapping[str, Tensor], plan: Plan) -> tuple[str, ...]:
    """Find the layers that have something from the memory: conv(m, W_m) is not zero for all m.

    Args:
        state_dict: Of the operated model, whole.
        plan: Its plan.

    Returns:
        Their names, in the order of the plan; none where `restore_state_dict` gives what computes
        the same. On the meta device, nobody can tell, and all layers are named.

    Raises:
        CheckpointError: A weight has another shape than the plan says, or there is none.
    """
    empty = {
        memory.name for memory in plan.memories if _is_empty(memory_path(memory.name), state_dict)
    }
    found: dict[str, None] = {}
    for read in plan.reads:
        if read.site.layer in found or (read.memory in empty and read.version == 0):
            continue
        site = read.site
        name = site.weights[0] if site.widens else f"{beside_path(read)}.weight"
        weight = state_dict.get(name)
        if site.widens or weight is None:
            _check(name, weight, read, operated=True)
        assert weight is not None
        if site.widens:
            _, weight = split_for(weight, read)
        if weight.is_meta or bool(weight.any()):  # NaN counts
            found[site.layer] = None
    return tuple(found)


def _is_empty(path: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a memory is zeros before any write."""
    weight, bias = (state_dict.get(f"{path}.{name}") for name in ("weight", "bias"))
    state = state_dict.get(f"{path}.state")
    if weight is None or bias is None or weight.is_meta:
        return False
    value = weight.sum(1) + bias
    return not bool(value.any()) and (state is None or not bool(state.any()))


def is_new(name: str) -> bool:
    """Whether a name in an operated model is that of something that the operation added."""
    return name.split(".", 1)[0] == AIM


def versioned(tensors: Mapping[str, Any], versions: Any) -> OrderedDict[str, Any]:
    """A state dict as PyTorch makes it: with the versions of its modules, where they are known.

    A class of our own would stand in every file that `torch.save` makes of it.
    """
    found: Any = OrderedDict(tensors)
    if versions is not None:
        found._metadata = versions
    return found


def _changed(
    state_dict: Mapping[str, Any],
    plan: Plan,
    change: Callable[[Tensor, Read], Tensor],
    *,
    operated: bool,
) -> dict[str, Any]:
    reads, changed = widened_reads(plan), {}
    for name, value in state_dict.items():
        read = reads.get(name)
        if read is not None:
            _check(name, value, read, operated=operated)
            with torch.no_grad():
                value = change(value, read)
        changed[name] = value
    return changed


def _check(name: str, weight: Any, read: Read, *, operated: bool) -> None:
    axis, size = input_size(read, operated=operated)
    if not isinstance(weight, Tensor) or weight.ndim <= axis or weight.shape[axis] != size:
        has = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        kind = "an operated" if operated else "the original"
        raise CheckpointError(
            f"{name}: expected the weight of {kind} model, with {size} entries along axis {axis}, "
            f"got {has}: is this the state dict that the plan belongs to?"
        )
