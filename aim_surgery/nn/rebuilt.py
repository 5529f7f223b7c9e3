"""An object of any class as a call in a graph: what a model returns besides tensors.

A model may put its tensors into objects of its own (a cache of keys and values) and return those.
A graph holds tensors; the object around them is made anew at each call, without its constructor,
from its attributes: those that hold tensors come from the graph, the others are constants.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


class Rebuilt:
    """Makes an object of a class from its attributes; the function of a `call_function` node.

    Args:
        kind: The class.
        constants: Attributes that are the same at each call; copied each time.
    """

    def __init__(self, kind: type, constants: Mapping[str, Any]) -> None:
        self.kind, self.constants = kind, dict(constants)
        self.__name__ = self.__qualname__ = f"rebuilt_{kind.__name__}"

    def __call__(self, **attributes: Any) -> Any:
        """Make the object."""
        made: Any = object.__new__(self.kind)
        vars(made).update(copy.deepcopy(self.constants))
        vars(made).update(attributes)
        return made
