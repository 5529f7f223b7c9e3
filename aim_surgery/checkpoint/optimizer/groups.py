"""Which group each new parameter joins.

The resumed script makes its groups by its own rule, and `load_state_dict` asks for the same sizes.
`new_group` says how; by default:

    one group                                  new parameters are its last
    one of vectors (biases, norms) and one
    of matrices, as for weight decay           each goes to its own kind
    one for each parameter                     one for each new one, with the options of the last
                                               of its kind
    else                                       the last group

`new_group` is the index of a group, or "own" (or a dict of options that differ) for a new last
group with the options of the last. A scheduler needs `carry_scheduler` where groups are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from aim_surgery.checkpoint.optimizer.moments import Shape, fits
from aim_surgery.checkpoint.optimizer.parameter_order import Found, Parameters
from aim_surgery.errors import CheckpointError

NewGroup = int | Literal["own"] | Mapping[str, Any]


def join_groups(
    groups: list[dict[str, Any]],
    state: Mapping[str, Any],
    found: Found,
    before: Parameters,
    new: Mapping[str, Shape],
    new_group: NewGroup | None,
) -> list[tuple[str, int]]:
    """Find the group of each new parameter; groups of their own are added.

    Args:
        groups: Of the state that goes on; changed in place where some are added.
        state: The state that came in.
        found: What is known of its entries.
        before: Parameters of the base model.
        new: Shapes of new parameters by name.
        new_group: See `carry_optimizer`.

    Returns:
        New parameters by name, with the index of their group.

    Raises:
        CheckpointError: `new_group` names none.
    """
    if new_group == "own" or isinstance(new_group, Mapping):
        options = dict(new_group) if isinstance(new_group, Mapping) else {}
        if {"params", "param_names"} & set(options):
            raise CheckpointError("new_group: give options (lr=...), not parameters")
        _add_group(groups, groups[-1], options)
        return [(name, len(groups) - 1) for name in new]
    if new_group is None:
        kinds = _kinds_of(groups, state, found, before)
        if not kinds and len(groups) > 1 and all(len(group["params"]) == 1 for group in groups):
            return _one_each(groups, found, before, new)
        return [(name, kinds.get(len(shape) > 1, len(groups) - 1)) for name, shape in new.items()]
    if isinstance(new_group, bool) or not isinstance(new_group, int):
        raise CheckpointError(f"new_group: expected an index, 'own' or options, got {new_group!r}")
    if not -len(groups) <= new_group < len(groups):
        raise CheckpointError(f"new_group: there are {len(groups)} groups, got {new_group}")
    return [(name, new_group % len(groups)) for name in new]


def _one_each(
    groups: list[dict[str, Any]], found: Found, before: Parameters, new: Mapping[str, Shape]
) -> list[tuple[str, int]]:
    """Add a group for each new parameter, with the options of the last of vectors or matrices."""
    last = {
        len(before.shapes[found.names[key]]) > 1: group
        for group in groups for key in group["params"] if key in found.names
    }  # fmt: skip
    places = []
    for name, shape in new.items():
        _add_group(groups, last.get(len(shape) > 1, groups[-1]))
        places.append((name, len(groups) - 1))
    return places


def _add_group(
    groups: list[dict[str, Any]], like: Mapping[str, Any], options: Mapping[str, Any] = {}
) -> None:
    named = {"param_names": []} if "param_names" in like else {}
    groups.append({**like, **options, "params": [], **named})


def _kinds_of(
    groups: list[dict[str, Any]], state: Mapping[str, Any], found: Found, before: Parameters
) -> dict[bool, int]:
    """The groups of vectors (False) and matrices (True), where two groups are just that."""
    if len(groups) != 2:
        return {}
    kinds: dict[bool, int] = {}
    for index, group in enumerate(groups):
        matrices = set()
        for key in group["params"]:
            entry = state["state"].get(key)
            if key in found.names:
                matrices.add(len(before.shapes[found.names[key]]) > 1)
            elif entry:
                fitting = {s for s in before.shapes.values() if fits(entry, s, group)}
                own = {tuple(v.shape) for v in entry.values() if isinstance(v, Tensor)}
                # moments of one number pass for a counter of any parameter's
                matrices |= {len(shape) > 1 for shape in fitting & own or fitting}
        if len(matrices) == 1:
            kinds[matrices.pop()] = index
    return kinds if len(kinds) == 2 else {}
