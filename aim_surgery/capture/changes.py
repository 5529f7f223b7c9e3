"""What a forward changes of its model while it is traced, kept to be undone.

Attributes in the order in which they were set, what hangs on modules besides (`belongings`), and
hooks, which are numbered as they are registered. A part of a trace that is given up is undone to
where it began; at the end all of it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from aim_surgery.capture.belongings import Belongings
from aim_surgery.capture.proxy import ValueProxy


class Mark(NamedTuple):
    """A moment to come back to: attributes set so far, and the number of the next hook."""

    attributes: int
    next_hook: int


class _Attribute(NamedTuple):
    module: nn.Module
    name: str
    home: dict[str, Any] | None  # of the module's dictionaries; None: it had no such attribute
    old: Any

    def put_back(self) -> None:
        module = self.module
        for other in (module.__dict__, module._parameters, module._buffers, module._modules):
            if other is not self.home:
                other.pop(self.name, None)
        if self.home is not None:
            self.home[self.name] = self.old


class Changes:
    """The changes of one trace.

    Attributes:
        belongings: What hangs on the model, as it was before any trace.
    """

    def __init__(self, belongings: Belongings) -> None:
        self._attributes: list[_Attribute] = []
        self.belongings = belongings

    def note(self, module: nn.Module, name: str) -> None:
        """Note what an attribute is, before it is set."""
        homes = (module._parameters, module._buffers, module._modules, module.__dict__)
        home = next((home for home in homes if name in home), None)
        old = None if home is None else home[name]
        self._attributes.append(_Attribute(module, name, home, old))

    def note_item(self, module: nn.Module, name: str, index: int) -> None:
        """Note what a list was before the attribute noted last was put into it, at an index."""
        items = [*vars(module)[name]]
        items[index] = self._attributes[-1].old
        self._attributes.append(_Attribute(module, name, vars(module), items))

    def mark(self) -> Mark:
        """This moment."""
        return Mark(len(self._attributes), RemovableHandle.next_id)

    def undo(self, mark: Mark, root: nn.Module | None) -> tuple[str, ...]:
        """Undo what came after a moment.

        Args:
            mark: The moment.
            root: What belongs to it and to the modules in it is as it was at first again; None
                leaves all as they are.

        Returns:
            Names of what had other items.
        """
        while len(self._attributes) > mark.attributes:
            self._attributes.pop().put_back()
        if RemovableHandle.next_id > mark.next_hook:  # else none was registered since
            for table in self.belongings.hooks:
                for number in [number for number in table if number >= mark.next_hook]:
                    del table[number]
        modules = () if root is None else root.modules()
        kept = (entry for module in modules for entry in self.belongings.of_modules.get(module, ()))
        return tuple(entry.name for entry in kept if entry.put_back())

    def handed_in(self, mark: Mark, root: nn.Module) -> Iterator[str]:
        """Attributes of a module, or of those in it, that hold traced values since before.

        Args:
            mark: When the module was called.
            root: The module.

        Yields:
            Their names.
        """
        before = self._attributes[: mark.attributes]
        inside = {id(module) for module in root.modules()} if before else set()
        for entry in before:
            value = vars(entry.module).get(entry.name)
            if id(entry.module) in inside and type(value) is ValueProxy:
                yield entry.name
