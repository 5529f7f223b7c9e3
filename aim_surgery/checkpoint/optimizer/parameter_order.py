"""Which parameter each entry of an optimizer's state belongs to.

Optimizers number parameters in the order in which groups were given. A file that holds names
(groups with `param_names`, states keyed by name) says it outright. A file with numbers alone is
read on one assumption, which holds for `model.parameters()`, for splits by weight decay and for one
group a part of the model, frozen parameters left out or not: *each group lists its parameters in
the model's order*; and groups of one parameter each are in it themselves. All assignments are
followed that agree with it and with the shapes of the moments; what differs among them, nobody can
tell, and it is refused with what would help: names.

What an entry needs to know of its parameter is its *role* (how it is widened, or that it is new).
Where all assignments give an entry the same role, it does not matter which is the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from aim_surgery.checkpoint.optimizer.moments import Shape, fits
from aim_surgery.checkpoint.reading.names import readings
from aim_surgery.errors import CheckpointError

Role = Hashable

_MOST_STATES = 100_000
_REMEDY = (
    "pass the optimizer itself or its parameters' names (names=...), save it with names "
    "(Adam(model.named_parameters())), or leave its state out with --drop-optimizer"
)


@dataclass(frozen=True)
class Parameters:
    """A model's parameters, tied ones once, in its order.

    Attributes:
        shapes: By name.
        trained: Names of those that ask for gradients.
        aliases: First names by all names.
    """

    shapes: Mapping[str, Shape]
    trained: tuple[str, ...]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> Parameters:
        """Those of a model."""
        every = dict(model.named_parameters())
        first = {id(parameter): name for name, parameter in every.items()}
        tied = model.named_parameters(remove_duplicate=False)
        return cls(
            {name: tuple(parameter.shape) for name, parameter in every.items()},
            tuple(name for name, parameter in every.items() if parameter.requires_grad),
            {name: first[id(parameter)] for name, parameter in tied},
        )


@dataclass(frozen=True)
class Found:
    """What is known of each entry.

    Attributes:
        roles: Role by key; keys without an entry may be missing where they need none.
        names: Parameter by key, where it is known.
        prefix: What names in the file have before the model's.
    """

    roles: Mapping[Any, Role]
    names: Mapping[Any, str]
    prefix: str = ""


def find_roles(
    state: Mapping[str, Any],
    parameters: Parameters,
    role: Callable[[str], Role],
    names: Sequence[Sequence[str]] | None,
    *,
    all_keys: bool,
) -> Found:
    """Find the role of each entry of an optimizer's state.

    Args:
        state: An optimizer's state dict.
        parameters: Of the model that it was made for.
        role: The role of a parameter.
        names: Names of each group's parameters, where the caller knows them.
        all_keys: Whether roles are needed of parameters without an entry too.

    Returns:
        What was found.

    Raises:
        CheckpointError: The names are not the model's, entries fit no parameters, or more than one
            assignment is possible.
    """
    groups: list[Mapping[str, Any]] = list(state["param_groups"])
    named = names if names is not None else _names_in(groups)
    if named is None:
        named = _in_order(state, groups, parameters)
    if named is not None:
        keyed = [zip(g["params"], ns, strict=True) for g, ns in zip(groups, named, strict=True)]
        by_key = {key: name for pairs in keyed for key, name in pairs}
        prefix, known = _own_names(list(by_key.values()), parameters)
        own = {key: parameters.aliases[known[name]] for key, name in by_key.items()}
        return Found({key: role(name) for key, name in own.items()}, own, prefix)
    return Found(_Search(state, groups, parameters, role).roles(all_keys=all_keys), {})


def _names_in(groups: Sequence[Mapping[str, Any]]) -> list[list[str]] | None:
    """The names that a file tells, group by group."""
    named = []
    for group in groups:
        names = group.get("param_names", group["params"])
        if len(names) != len(group["params"]) or not all(isinstance(n, str) for n in names):
            return None
        named.append(list(names))
    return named


def _in_order(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], parameters: Parameters
) -> list[list[str]] | None:
    """The names of all parameters, or all that ask for gradients: of one group, or of one each."""
    if len(groups) > 1 and any(len(group["params"]) != 1 for group in groups):
        return None
    keyed = [(key, group) for group in groups for key in group["params"]]
    for names in (list(parameters.shapes), list(parameters.trained)):
        if len(names) == len(keyed) and all(
            fits(state["state"].get(key, {}), parameters.shapes[name], group)
            for (key, group), name in zip(keyed, names, strict=True)
        ):
            return [names] if len(groups) == 1 else [[name] for name in names]
    return None


def _own_names(names: Sequence[str], parameters: Parameters) -> tuple[str, dict[str, str]]:
    """What stands before the file's names, and the model's name for each of them."""
    best: tuple[str, dict[str, str]] = ("", {})
    for prefix, keys in readings(parameters.aliases, dict.fromkeys(names)):
        own = {key: name for name, key in keys.items()}
        if own.keys() == set(names):
            return prefix, own
        best = max(best, (prefix, own), key=lambda found: len(found[1]))
    strange = [name for name in names if name not in best[1]]
    raise CheckpointError(
        f"the optimizer's state names {len(strange)} parameters that the model has not: "
        f"{', '.join(strange[:5])}; check the model, or use --drop-optimizer"
    )


class _Search:
    """Follows all assignments of parameters to groups, each group in the model's order."""

    def __init__(
        self,
        state: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]],
        parameters: Parameters,
        role: Callable[[str], Role],
    ) -> None:
        self._shapes, self._role = parameters.shapes, role
        self._keys = [list(group["params"]) for group in groups]
        self._count = sum(map(len, self._keys))
        sizes = set(parameters.shapes.values())
        self._allowed: dict[Any, frozenset[Shape] | None] = {}
        for group in groups:
            for key in group["params"]:
                entry = state["state"].get(key)
                if not entry:
                    self._allowed[key] = None
                    continue
                fitting = frozenset(shape for shape in sizes if fits(entry, shape, group))
                self._allowed[key] = fitting
        self._names = self._candidates(parameters)

    def _candidates(self, parameters: Parameters) -> list[str]:
        """The parameters that groups hold, or are among."""
        if self._count == len(parameters.trained):
            return list(parameters.trained)
        if self._count > len(parameters.shapes):
            raise CheckpointError(
                f"the optimizer's state has {self._count} parameters, the model "
                f"{len(parameters.shapes)}: check the model, or use --drop-optimizer"
            )
        return list(parameters.shapes)

    def _check_order(self) -> None:
        """Each group by itself must fit into the model's order."""
        for index, keys in enumerate(self._keys):
            rest = iter(self._names)
            for key in keys:
                allowed = self._allowed[key]
                if not any(allowed is None or self._shapes[name] in allowed for name in rest):
                    raise CheckpointError(
                        f"the optimizer's state does not fit the model's parameters in their "
                        f"order, from number {key} in group {index} on; {_REMEDY}"
                    )

    def roles(self, *, all_keys: bool) -> dict[Any, Role]:
        """The role of each key; of those with an entry at least."""
        self._check_order()
        by_shape: dict[Shape, set[Role]] = {}
        for name in self._names:
            by_shape.setdefault(self._shapes[name], set()).add(self._role(name))
        found: dict[Any, set[Role]] = {}
        for key, allowed in self._allowed.items():
            if allowed is not None:
                found[key] = set().union(*(by_shape.get(shape, set()) for shape in allowed))
        needed = self._allowed if all_keys else found
        if any(len(found.get(key, ())) != 1 for key in needed):
            found = self._follow()
        for key in needed:
            if len(found.get(key, ())) != 1:
                raise CheckpointError(
                    f"the optimizer's state doesn't tell which of the model's parameters number "
                    f"{key} is: {len(self._keys)} groups of {self._count} parameters fit the "
                    f"model's {len(self._shapes)} in several ways; {_REMEDY}"
                )
        return {key: next(iter(roles)) for key, roles in found.items() if len(roles) == 1}

    def _follow(self) -> dict[Any, set[Role]]:
        """Roles of each key in any assignment: forward to what is reachable, back along it."""
        start, end = tuple(0 for _ in self._keys), tuple(map(len, self._keys))
        spare = len(self._names) - self._count
        layers: list[set[tuple[int, ...]]] = [{start}]
        seen = 0
        for index, name in enumerate(self._names):
            reached: set[tuple[int, ...]] = set()
            for places in layers[-1]:
                if index - sum(places) < spare:
                    reached.add(places)  # left out
                reached.update(after for _, after in self._steps(places, self._shapes[name]))
            layers.append(reached)
            seen += len(reached)
            if not reached:
                raise CheckpointError(
                    f"the optimizer's state does not fit the model's parameters in their order, "
                    f"from {name} {self._shapes[name]} on; {_REMEDY}"
                )
            if seen > _MOST_STATES:
                raise CheckpointError(
                    f"the optimizer's state has {len(self._keys)} groups that fit the model's "
                    f"parameters in too many ways; {_REMEDY}"
                )
        roles: dict[Any, set[Role]] = {}
        alive = {end} & layers[-1]
        for name, layer in zip(reversed(self._names), reversed(layers[:-1]), strict=True):
            before = layer & alive if spare else set()
            for places in layer:
                for key, after in self._steps(places, self._shapes[name]):
                    if after in alive:
                        before.add(places)
                        roles.setdefault(key, set()).add(self._role(name))
            alive = before
        return roles

    def _steps(self, places: tuple[int, ...], shape: Shape) -> list[tuple[Any, tuple[int, ...]]]:
        steps = []
        for group, (keys, place) in enumerate(zip(self._keys, places, strict=True)):
            if place < len(keys):
                allowed = self._allowed[keys[place]]
                if allowed is None or shape in allowed:
                    after = (*places[:group], place + 1, *places[group + 1 :])
                    steps.append((keys[place], after))
        return steps
