"""What a folded graph calls: maps of the sizes that come in, and additions that ride on other work.

at_least      max(t + o, 0)      = max(t, -o) + o
within        clamp(t + o, a, b) = clamp(t, a - o, b - o) + o
plus          t + o
scaled_plus   s·t + o
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from aim_surgery.errors import AimSurgeryError
from aim_surgery.nn.eager import autocast_off, is_watched
from aim_surgery.nn.graph_state import graph_from_state, graph_state
from aim_surgery.nn.spatial import channels_last_format

_REMEMBERED = 8  # sizes besides the planned ones
_LITERALS = (bool, int, float, str, type(None))


class Maps(nn.Module):
    """All maps of a folded model, for the sizes of the inputs that come in.

    Those of the planned sizes are buffers. Those of other sizes are computed by the recipe, a graph
    over the model's own layers, when such inputs come first, and remembered for a few sizes.

    Args:
        maps: The maps of the planned sizes, by name.
        sized: Positions of those that depend on sizes.
        recipe: Computes these from the model's inputs; None where there are none.
        given: Constants of the recipe, by name.
        shell: A module that shares all that the model holds; the recipe works on it. It is no child
            of this one.
        inputs: Example inputs of the planned sizes.
        batched: Whether the first axis runs over samples, on which no map depends.

    Attributes:
        planned: What is compared with the sizes that come in.
    """

    def __init__(
        self,
        maps: Mapping[str, Tensor],
        sized: Sequence[int],
        recipe: fx.Graph | None,
        given: Mapping[str, Tensor],
        shell: nn.Module,
        inputs: Sequence[Any],
        *,
        batched: bool,
    ) -> None:
        super().__init__()
        for name, value in maps.items():
            self.register_buffer(name, value)
        self.given = nn.Module()
        for name, value in given.items():
            self.given.register_buffer(name, value)
        self.sized, self.recipe = tuple(sized), recipe
        self._shell = (shell,)  # a module by itself would become a child
        tensors = [leaf for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor)]
        counts = [tensor.shape[:1] for tensor in tensors]
        self._free = tuple(batched and bool(count) and count == counts[0] for count in counts)
        self.planned = self._sizes(inputs)
        self._forget()

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Give the maps for inputs of the model; without inputs, those that fit all."""
        if self.recipe is None or self._sizes(inputs) == self.planned:
            return self._stored()
        if torch.compiler.is_exporting():
            raise AimSurgeryError(
                f"the maps of this folded model belong to inputs of sizes {self.planned}, and an "
                f"export can't compute others: fold with example_inputs of the size to export"
            )
        elsewhere: Any = self._elsewhere
        return elsewhere(inputs)

    def _stored(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())  # type: ignore[arg-type]

    def _sizes(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """All that maps may depend on: sizes, but for the samples', and literals."""
        sizes: list[Any] = []
        tensors = 0
        for value in inputs:
            for leaf in (value,) if isinstance(value, Tensor) else tree_leaves(value):
                if isinstance(leaf, Tensor):
                    free = tensors < len(self._free) and self._free[tensors]
                    sizes.append(tuple(leaf.shape[1:] if free else leaf.shape))
                    tensors += 1
                elif isinstance(leaf, _LITERALS):
                    sizes.append(leaf)
        return tuple(sizes)

    # as torch.compiler.disable, which takes a second to import the compiler
    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def _elsewhere(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        sizes = self._sizes(inputs)
        with self._lock:
            found = self._others.get(sizes)
            if found is None:
                found = self._computed(inputs)
                while len(self._others) >= _REMEMBERED:
                    self._others.pop(next(iter(self._others)))
                self._others[sizes] = found
        return found

    def _computed(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        maps = [*self._stored()]
        # they outlive this call
        with torch.inference_mode(False), torch.no_grad(), autocast_off(self):
            copies = tree_map_only(Tensor, torch.clone, tuple(inputs))
            assert self.recipe is not None
            found = fx.Interpreter(self._shell[0], graph=self.recipe).run(*copies)
            for index, value in zip(self.sized, found, strict=True):
                maps[index] = laid_out(value.to(maps[index]), maps[index])
        return tuple(maps)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._others: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Maps:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k not in ("_lock", "_others")}
        return {**state, "recipe": self.recipe and graph_state(self.recipe)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.recipe = self.recipe and graph_from_state(self.recipe)  # type: ignore[arg-type]
        self._forget()


def at_least(t: Tensor, maps: Sequence[Tensor], low: int, inplace: bool = False) -> Tensor:
    """max(t, map), position by position.

    Args:
        t: Any tensor that the map broadcasts to.
        maps: All maps.
        low: Which one.
        inplace: Whether `t` is changed.

    Returns:
        A tensor like `t`.
    """
    least = _cast(maps[low], t)
    return torch.maximum(t, least, out=t) if inplace and _untracked(t) else t.clamp_min(least)


def within(t: Tensor, maps: Sequence[Tensor], low: int, high: int, inplace: bool = False) -> Tensor:
    """min(max(t, map), other map), position by position.

    Args:
        t: Any tensor that the maps broadcast to.
        maps: All maps.
        low: Which one is the least.
        high: Which one is the most.
        inplace: Whether `t` is changed.

    Returns:
        A tensor like `t`.
    """
    least, most = _cast(maps[low], t), _cast(maps[high], t)
    return t.clamp_(least, most) if inplace else t.clamp(least, most)


def plus(t: Tensor, maps: Sequence[Tensor], index: int, inplace: bool = False) -> Tensor:
    """T + map.

    Args:
        t: Any tensor that the map broadcasts to.
        maps: All maps.
        index: Which one.
        inplace: Whether `t` is changed.

    Returns:
        A tensor like `t`.
    """
    added = _cast(maps[index], t)
    return t.add_(added) if inplace else t + added


def scaled_plus(
    t: Tensor, maps: Sequence[Tensor], index: int, scale: int, inplace: bool = False
) -> Tensor:
    """Scale · t + map.

    Args:
        t: Any tensor that both broadcast to.
        maps: All maps.
        index: Which one is added.
        scale: Which one multiplies.
        inplace: Whether `t` may be overwritten.

    Returns:
        A tensor like `t`.
    """
    out = t if inplace and _untracked(t) else None
    return torch.addcmul(_cast(maps[index], t), t, _cast(maps[scale], t), out=out)


def chosen(maps: Sequence[Tensor], index: int) -> Tensor:
    """One of the maps, by itself."""
    return maps[index]


def spread(o: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat a map over all axes of a shape but that of samples, which either may lack.

    Shapes:
        (1, .., C, .., 1) -> (1, *shape[1:]), or (1, *shape) for a shape without samples;
        (.., C, .., 1) without samples -> shape, or shape[1:] for a shape with them
    """
    if o.ndim == len(shape):
        return o.expand(o.shape[0], *shape[1:])
    return o.expand(1, *shape) if o.ndim > len(shape) else o.expand(*shape[1:])


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Bring a tensor, without copying where it is so already, to another's memory format."""
    return value.contiguous(memory_format=channels_last_format(like) or torch.contiguous_format)


def _cast(value: Tensor, t: Tensor) -> Tensor:
    """A map in a tensor's dtype; without the samples' axis, where the tensor comes without."""
    if value.ndim == t.ndim + 1 and value.shape[0] == 1:
        value = value[0]
    return value if value.dtype == t.dtype else value.to(t.dtype)


def _untracked(t: Tensor) -> bool:
    """Whether a result may be written into a tensor: not where autograd or others look on."""
    return not is_watched() and not (torch.is_grad_enabled() and t.requires_grad)
