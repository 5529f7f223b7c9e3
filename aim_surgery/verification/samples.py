"""Inputs to verify with: what the user gave, or noise; also in other batches and sizes.

Batches and sizes are made by taking samples and positions of one example, over and over where it
has too few, so that real data stays real. A detector takes its samples in lists: of images, and of
what to find in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.capture.batches import count_samples, cycled, take_samples, tensors_in
from aim_surgery.errors import MissingInputsError
from aim_surgery.planning import Plan, inputs_of_plan

_NOISE_SEED = 20210
_MULTIPLE = 32  # networks halve their input about five times


@dataclass(frozen=True)
class Samples:
    """Arguments of one call.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def batch(self) -> int:
        """Samples in the batch: entries of a first list of samples, or the first tensor's size.

        0 where there is neither.
        """
        return count_samples((*self.args, *self.kwargs.values()))

    def describe(self) -> str:
        """The shapes in words."""
        return ExampleInputs(self.args, self.kwargs, "").describe()

    def take(self, batch: int) -> Samples:
        """The same inputs with another number of samples; what has no batch axis stays."""
        args, kwargs = take_samples((self.args, dict(self.kwargs)), self.batch, batch)
        return Samples(args, kwargs)

    def resized(self) -> Iterator[tuple[str, Samples]]:
        """The same inputs at other resolutions, the likeliest to be accepted first.

        Yields:
            The new size in words, and the inputs.
        """
        dims = [t.ndim for t in self._tensors() if t.is_floating_point() and t.ndim >= 3]
        if not dims:
            return
        axes = [(-1,), (-2,)] if max(dims) == 3 else [tuple(range(2, max(dims)))]
        for ratio in (3 / 4, 1 / 2):
            for chosen in axes:
                sizes: list[str] = []
                inputs = self._map(_Resize(max(dims), chosen, ratio, sizes))
                if sizes:
                    yield sizes[0], inputs

    def to(self, dtype: torch.dtype, *, first_only: bool = False) -> Samples:
        """The same inputs with floating (and complex) tensors in the precision of `dtype`.

        Args:
            dtype: A floating type.
            first_only: Leave all but the first argument as it is: some models insist on the types
                of what is no activation (targets).
        """
        converted = self._map(lambda tensor: cast(tensor, dtype))
        if not first_only:
            return converted
        kwargs = dict(self.kwargs)
        if not self.args and kwargs:
            name = next(iter(kwargs))
            kwargs[name] = converted.kwargs[name]
        return Samples((*converted.args[:1], *self.args[1:]), kwargs)

    def nudged(self, seed: int) -> Samples:
        """The same inputs, each float another by about its rounding error."""
        generator = torch.Generator().manual_seed(seed)

        def nudge(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor)
            return tensor * (1 + torch.finfo(tensor.dtype).eps * (4 * noise - 2))

        return self._map(nudge)

    def copy(self) -> Samples:
        """Inputs of their own memory, for a call that may write into them."""
        return self._map(torch.clone)

    def _tensors(self) -> list[torch.Tensor]:
        return tensors_in((self.args, dict(self.kwargs)))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Samples:
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, dict(self.kwargs)))
        return Samples(args, kwargs)


@dataclass(frozen=True)
class _Resize:
    ndim: int
    axes: tuple[int, ...]
    ratio: float
    sizes: list[str]  # filled with what was done, in words

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point() or tensor.ndim != self.ndim:
            return tensor
        before = tensor.shape
        for axis in self.axes:
            tensor = cycled(tensor, axis, _smaller(tensor.shape[axis], self.ratio))
        if tensor.shape != before:
            self.sizes.append("x".join(str(tensor.shape[axis]) for axis in self.axes))
        return tensor


def samples_for(
    model: nn.Module, plan: Plan, example_inputs: Inputs | ExampleInputs | None
) -> Samples:
    """Choose what to run a model on.

    Args:
        model: Noise is made on its device.
        plan: Gives the shapes where no example inputs are given.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.
            Floating tensors of one value (zeros, say) count as shapes.

    Returns:
        The inputs, in the dtypes that they were given in.

    Raises:
        MissingInputsError: There are no example inputs, neither given nor in the plan.
    """
    given = example_inputs is not None
    chosen = inputs_of_plan(plan.inputs, model) if example_inputs is None else example_inputs
    if chosen is not None and not isinstance(chosen, ExampleInputs):
        chosen = ExampleInputs.given(chosen)
    if chosen is None:
        raise MissingInputsError(
            "this plan's example inputs hold objects that a plan can't store: pass example_inputs"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(_NOISE_SEED)

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        on_meta = tensor.device.type == "meta"
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device=device) if on_meta else tensor.detach()
        if tensor.layout != torch.strided:
            return tensor.detach()
        if given and not on_meta and tensor.numel() and bool((tensor != tensor.flatten()[0]).any()):
            return tensor.detach()
        noise = torch.randn(tensor.shape, generator=generator, device="cpu")
        return noise.to(device if on_meta else tensor.device, tensor.dtype)

    return Samples(chosen.args, chosen.kwargs)._map(fill)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A floating tensor in another dtype, a complex one in the complex dtype that matches it."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _smaller(size: int, ratio: float) -> int:
    wanted = int(size * ratio)
    return wanted // _MULTIPLE * _MULTIPLE if size >= 2 * _MULTIPLE else max(wanted, 1)
