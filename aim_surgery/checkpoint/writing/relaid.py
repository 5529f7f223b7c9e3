"""A checkpoint on its way to another of the same layout: what is in the places of the old things.

Weights of the model that is meant are changed wherever they stand, optimizer states are carried,
schedulers are told of a changed number of groups. All else stays, and notes say of what might have
been meant as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy as shallow_copy
from typing import Any

from aim_surgery.checkpoint.optimizer import carry_scheduler
from aim_surgery.checkpoint.reading.dcp_folder import DcpFolder
from aim_surgery.checkpoint.reading.names import Names, match_names
from aim_surgery.checkpoint.reading.nesting import (
    Where,
    dotted,
    find_all,
    is_flat_optimizer_state,
    is_optimizer_state,
    is_other_scheduler,
    is_scheduler_state,
    is_state_dict,
    is_tensor,
    is_tensor_list,
    value_at,
)
from aim_surgery.checkpoint.reading.source import Entry
from aim_surgery.checkpoint.reading.torch_file import TorchFile, entry_of
from aim_surgery.errors import CheckpointError

Weights = Mapping[str, Any]


def relaid(
    source: TorchFile | DcpFolder,
    own: Mapping[str, Any],
    names: Names,
    change: Callable[[Where, Weights, Names], Weights],
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
    layout = _Layout(source, own)
    layout.change_weights(names, change)
    layout.change_optimizers(carry)
    layout.change_schedulers()
    layout.tell_of_copies()
    return layout.content, layout.notes


class _Layout:
    """A checkpoint on its way to another of the same layout.

    Attributes:
        content: As far as it has come.
        notes: For the user.
    """

    def __init__(self, source: TorchFile | DcpFolder, own: Mapping[str, Any]) -> None:
        self.content, self.notes = source.content, list[str]()
        self._source, self._own = source, own
        self._states = list(find_all(self.content, is_optimizer_state))
        self._weights: list[Where] = []  # of this model
        self._others = False  # weights of another model
        self._groups: set[tuple[int, int]] = set()  # numbers of groups before and after

    def change_weights(
        self, names: Names, change: Callable[[Where, Weights, Names], Weights]
    ) -> None:
        """Put changed weights in the place of all that are this model's."""
        places = {self._source.where: names}
        for where in find_all(self.content, is_state_dict):
            if where == self._source.where or self._is_in(where, self._states):
                continue
            found = match_names(self._own, entries_of(value_at(self.content, where)))
            if found.problems:
                self._leave(where, "not this model's weights")
                self._others = True
            else:
                places[where] = found
        for where, found in places.items():
            self._put(where, change(where, value_at(self._source.content, where), found))
        self._weights = [*places]

    def change_optimizers(
        self, carry: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None
    ) -> None:
        """Carry optimizer states, or leave them out; another model's stays, where there is one."""
        failed: dict[Where, CheckpointError] = {}
        for where in reversed(self._states):  # what is left out changes the places behind it
            if carry is None:
                self._put(where, None)
                self.notes.append(f"left out: {dotted(where)}")
                continue
            old = value_at(self.content, where)
            try:
                new = carry(old)
            except CheckpointError as err:
                failed[where] = err
                continue
            self._groups.add((len(old["param_groups"]), len(new["param_groups"])))
            self._put(where, new)
        if failed and not (self._others and self._groups):
            raise next(iter(failed.values()))
        for where in failed:
            self._leave(where, "an optimizer's state of another model")

    def change_schedulers(self) -> None:
        """Tell schedulers of a changed number of groups."""
        changed = {(old, new) for old, new in self._groups if old != new}
        if not changed:
            return
        for where in find_all(self.content, is_scheduler_state):
            if len(self._states) > 1 and (len(self._groups) > 1 or self._others):
                self._leave(where, f"the scheduler of one of {len(self._states)}")
                continue
            scheduler = carry_scheduler(value_at(self.content, where), *next(iter(changed)))
            self._put(where, scheduler)
        for where in find_all(self.content, is_other_scheduler):
            self._leave(where, "a scheduler of another number of groups")

    def tell_of_copies(self) -> None:
        """Tell of lists of tensors that may be copies of weights, and of flat optimizer states."""
        for where in find_all(self._source.content, is_flat_optimizer_state):
            self._leave(
                where,
                "an optimizer's state in one flat dict, which does not fit the model any more: "
                "save it without flatten_optimizer_state_dict",
            )
        values = filter(is_tensor, self._own.values())
        shapes = {tuple(value.shape) for value in values if value.ndim > 1}
        for where in find_all(self._source.content, is_tensor_list):
            copies = value_at(self._source.content, where)
            known = self._is_in(where, (*self._weights, *self._states))
            if not known and shapes & {tuple(value.shape) for value in copies}:
                self._leave(
                    where,
                    f"{len(copies)} tensors without names, some of the shapes of weights: copies "
                    f"do not fit the model any more",
                )

    def _is_in(self, where: Where, places: Iterable[Where]) -> bool:
        return any(where[: len(place)] == place for place in places)

    def _put(self, where: Where, value: Any) -> None:
        self.content = _replaced(self.content, where, value)

    def _leave(self, where: Where, what: str) -> None:
        self.notes.append(f"left as it was: {dotted(where)}, {what}")


def entries_of(weights: Weights) -> dict[str, Entry]:
    """What a state dict's tensors are."""
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
