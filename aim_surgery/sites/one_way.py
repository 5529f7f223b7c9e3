"""Whether a model goes one way along its tokens, found by running it.

Some causality stands in no graph as a mask: padding on one side (WaveNet), shifts (RWKV), a state
that Python carries from step to step (Mamba). It shows in what the model gives:

    one way     other values from the middle of an input on change the output there and nothing
                before it, and other values before the middle change all of the output

A copy of the model runs in evaluation mode: on the example, and on the example with a half of one
input changed. That is twice for most models, which look both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from aim_surgery.capture import Capture
from aim_surgery.capture.copies import has_values, own_arguments, shared_state_kept, twin_of
from aim_surgery.capture.nested import named_leaves

_SEED = 0
_ROUNDING = 16  # times the rounding error of the largest output: less is no change


@dataclass(frozen=True)
class _Tokens:
    """An axis of tokens in one of the arguments."""

    leaf: int
    axis: int
    length: int

    @property
    def early(self) -> slice:
        """The first half."""
        return slice(None, self.length // 2)

    @property
    def late(self) -> slice:
        """The second half."""
        return slice(self.length // 2, None)


def goes_one_way(capture: Capture, sample_axis: int | None) -> bool:
    """Whether a model's output at a token depends on tokens before it, and on none behind it.

    Inputs that may hold tokens are sequences of numbers (N, T) and of vectors, (N, T, C) and
    (N, C, T), also with N behind T; outputs count that have an axis of T entries.

    Args:
        capture: The captured model; left unchanged.
        sample_axis: The axis of N, which holds no tokens; None where there is none.

    Returns:
        The answer; also False where the model can't be run here (on the meta device).
    """
    if not has_values(capture.model):
        return False
    try:
        with torch.no_grad(), shared_state_kept(capture.model):
            runs = _Runs(capture)
            return any(runs.show_one_way(tokens) for tokens in runs.tokens(sample_axis))
    except Exception:  # of the model's own, as it may be on changed values
        return False


def may_hold_tokens(value: Any) -> bool:
    """Whether an argument is a sequence of numbers or of vectors."""
    if not isinstance(value, torch.Tensor) or value.dtype is torch.bool or value.is_complex():
        return False
    return value.ndim == (3 if value.is_floating_point() else 2)


class _Runs:
    """Runs of one model: on the example, and on what is made of it."""

    def __init__(self, capture: Capture) -> None:
        self._model = capture.model
        self._leaves, self._spec = pytree.tree_flatten(own_arguments(capture.inputs))
        self._outputs = self._run(self._leaves)

    def tokens(self, sample_axis: int | None) -> Iterator[_Tokens]:
        """The axes of the arguments that some output has, too."""
        lengths = {size for output in self._outputs.values() for size in output.shape}
        for index, leaf in enumerate(self._leaves):
            if not may_hold_tokens(leaf):
                continue
            for axis, length in enumerate(leaf.shape):
                if axis != sample_axis and length > 1 and length in lengths:
                    yield _Tokens(index, axis, length)

    def show_one_way(self, tokens: _Tokens) -> bool:
        """Change the late half, then the early one, and look at the other halves of outputs."""
        after = self._run_on_others(tokens, tokens.late)
        ways = [
            (name, axis)
            for name, output in self._outputs.items()
            for axis in range(output.ndim)
            if output.shape[axis] == tokens.length
            and not self._differs(name, after, axis, tokens.early)
            and self._differs(name, after, axis, tokens.late)
        ]
        if not ways:
            return False
        after = self._run_on_others(tokens, tokens.early)
        return any(
            self._differs(name, after, axis, tokens.early)
            and self._differs(name, after, axis, tokens.late)
            for name, axis in ways
        )

    def _differs(self, name: str, after: dict[str, torch.Tensor], axis: int, part: slice) -> bool:
        before = self._outputs[name]
        limit = _ROUNDING * torch.finfo(before.dtype).eps * before.abs().max()
        change = (before - after[name])[_along(axis, part)].abs()
        return bool((change > limit).any())

    def _run_on_others(self, tokens: _Tokens, part: slice) -> dict[str, torch.Tensor]:
        leaves = list(self._leaves)
        leaves[tokens.leaf] = _with_others(leaves[tokens.leaf], _along(tokens.axis, part))
        return self._run(leaves)

    def _run(self, leaves: list[Any]) -> dict[str, torch.Tensor]:
        """The floating outputs by where they stand; of a new copy, as models may keep states."""
        own = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(own, self._spec)
        torch.manual_seed(_SEED)
        outputs = named_leaves(twin_of(self._model, training=False)(*args, **kwargs))
        return {
            name: leaf
            for name, leaf in outputs.items()
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel()
        }


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, part)


def _with_others(tensor: torch.Tensor, part: tuple[slice, ...]) -> torch.Tensor:
    """Other values in a part of a tensor: noise, or the next of the numbers that are there."""
    changed = tensor.clone()
    if tensor.is_floating_point():
        changed[part] = torch.rand_like(changed[part])
    else:
        changed[part] = (changed[part] + 1) % max(int(tensor.max()) + 1, 2)
    return changed
