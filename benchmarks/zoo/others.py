"""Models of libraries that aim_surgery was not written with: what a new architecture meets.

Their packages are installed apart, and without what they ask for in turn (another torch):

    pip install --no-deps --target others -r benchmarks/zoo/others.txt
    PYTHONPATH=others python -m benchmarks.zoo --library others

Models are small or checked on small inputs, so checks are full.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import Inputs

Make = Callable[[], Inputs]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        target: What makes it, "package.module:name".
        inputs: Makes what it is called with.
        options: Keyword arguments of what makes it.
        args: Its positional arguments.
    """

    target: str
    inputs: Make
    options: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model, and its example inputs."""
        module, _, name = self.target.partition(":")
        make: Any = importlib.import_module(module)
        for part in name.split("."):
            make = getattr(make, part)
        return make(*self.args, **self.options), self.inputs()


def floats(*shapes: tuple[int, ...]) -> Make:
    """Tensors of these shapes."""
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def image(size: int, channels: int = 3, batch: int = 2) -> Make:
    """A batch of square images."""
    return floats((batch, channels, size, size))


def tokens(length: int, kinds: int = 100, times: int = 1) -> Make:
    """Sentences."""
    return lambda: tuple(torch.randint(0, kinds, (2, length)) for _ in range(times))


def at_times(*shapes: tuple[int, ...]) -> Make:
    """The first of these tensors, steps of a diffusion, then the other tensors."""

    def make() -> Inputs:
        first, *rest = (torch.randn(shape) for shape in shapes)
        return (first, torch.arange(3, 3 + shapes[0][0]), *rest)

    return make
