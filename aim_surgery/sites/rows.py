"""Tables inside Python calls whose rows are multiplied with activations: relative positions there.

    q · E[i], i made of sizes alone

E is a weight of that product, as a linear layer's is, though it lies in an embedding. No hook can
widen q, so such a table is listed. What depends on an input is an activation; E[tokens] is one, and
its products are not E's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_ACTIVATION: frozenset[str] | None = None
# functions and methods that multiply, with how many of their first arguments they add instead
_PRODUCTS = {
    **dict.fromkeys(
        ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "linear", "inner", "tensordot",
         "scaled_dot_product_attention"), 0),
    "einsum": 1,
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), 1),
}  # fmt: skip
# what takes nothing but shape and dtype from tensors
_CONSTANTS = frozenset(
    ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like",
     "ones_like", "full_like", "rand_like", "randn_like")
)  # fmt: skip


class RowsWatched:
    """Follows what tensors are made of, from one call of a torch function to the next.

    Attributes:
        multiplied: Tables whose rows were multiplied, with the function's name.
    """

    def __init__(self, tables: Mapping[str, torch.Tensor]) -> None:
        """Watch tables.

        Args:
            tables: Weights of embeddings, by name.
        """
        self.multiplied: dict[str, str] = {}
        self._tables = dict(tables)
        self._origins = WeakIdKeyDictionary()

    def begin(self, inputs: Any) -> None:
        """Begin a run with its inputs."""
        self._origins = WeakIdKeyDictionary()
        for name, table in self._tables.items():
            self._origins[table] = frozenset((name,))
        for tensor in _tensors(inputs):
            self._origins[tensor] = _ACTIVATION

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note one call.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Its keyword arguments.
            result: What it gave.
        """
        name = getattr(func, "__name__", "")
        if not self._tables or name in _CONSTANTS:
            return
        added = _PRODUCTS.get(name)
        if added is None:
            origin = self._merged(_tensors((args, kwargs)))
        else:
            operands = _tensors((args[added:], kwargs))
            origin = self._merged(operands)
            if origin is not _ACTIVATION:  # of constants, the last one is the weight
                operands = operands[-1:]
                origin = self._merged(operands)
            for operand in operands:
                for table in self._origins.get(operand, frozenset()) or ():
                    self.multiplied.setdefault(table, name)
        if origin is _ACTIVATION or origin:
            for tensor in _tensors(result):
                self._origins[tensor] = origin

    def _merged(self, tensors: list[torch.Tensor]) -> frozenset[str] | None:
        origins = [self._origins.get(tensor, frozenset()) for tensor in tensors]
        if _ACTIVATION in origins:
            return _ACTIVATION
        return frozenset[str]().union(*(origin for origin in origins if origin))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
