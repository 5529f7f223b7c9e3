"""Copies to experiment on: neither the model nor the operated model is touched by a check."""

from __future__ import annotations

import contextlib
import io
import random
import sys
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from aim_surgery.capture.copies import deep_copy
from aim_surgery.planning import Read
from aim_surgery.verification.samples import Samples, cast

SEED = 0
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def copy_of(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy without gradients.

    Args:
        module: Left unchanged.
        dtype: What its floating tensors become, plain attributes too; None leaves them.

    Returns:
        The copy.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec")  # of torch, about its own programs
        twin = deep_copy(module)
    twin.zero_grad(set_to_none=True)
    if dtype is not None:
        convert(twin, dtype)
    return twin


def convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the precision of every floating tensor in place, plain attributes too."""
    module._apply(lambda tensor: cast(tensor, dtype))
    for child in module.modules():
        for name, value in vars(child).items():
            if isinstance(value, torch.Tensor):
                vars(child)[name] = cast(value.detach(), dtype)


def own_dtype(module: nn.Module) -> torch.dtype:
    """The type that most of a model's floating parameters have."""
    counts: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.get_default_dtype())


def set_mode(model: nn.Module, training: bool) -> None:
    """Change a model's mode; submodules that were set apart by hand (frozen norms) stay apart."""
    if model.training == training:
        return
    apart = [(m, m.training) for m in model.modules() if m.training != model.training]
    model.train(training)
    for module, mode in apart:
        module.training = mode


def modes_of(module: nn.Module) -> dict[str, bool]:
    """The training flag of every module, by all its names."""
    return {name: m.training for name, m in module.named_modules(remove_duplicate=False)}


def put_modes(module: nn.Module, modes: Mapping[str, bool]) -> None:
    """Set training flags by hand, name by name; what has no flag in `modes` follows the root."""
    module.train(modes[""])
    for name, child in module.named_modules(remove_duplicate=False):
        child.training = modes.get(name, child.training)


def call(module: nn.Module, samples: Samples) -> object:
    """Call a module from a fixed random state, so that two modules draw the same noise.

    What the module leaves of grad mode and autocast is undone: a second module begins as it did.
    A call that fails raises, and says nothing besides: fx prints where its own code failed, also
    on sizes that the original refuses as well.
    """
    _seed()
    own = samples.copy()
    said = io.StringIO()
    with switches_kept(), contextlib.redirect_stderr(said):
        output = module(*own.args, **own.kwargs)
    sys.stderr.write(said.getvalue())
    return output


def _seed() -> None:
    torch.default_generator.manual_seed(SEED)
    if torch.cuda.is_initialized():  # `torch.manual_seed` would also seed a device yet to wake up
        torch.cuda.manual_seed_all(SEED)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Give back the grad mode and the autocast state that the caller had."""
    autocast = [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
    ]
    cached = torch.is_autocast_cache_enabled()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cached)


def split_entries(weight: torch.Tensor, read: Read) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Views of a widened weight (or its gradient): the original entries, and the memory's.

    Shapes:
        conv            (C_out, C_in/g + k, \*kernel) -> the first C_in/g, the last k
        conv_transpose  (C_in + g·k, C_out/g, \*kernel) -> (g, C_in/g, ...), (g, k, ...)
        linear          (out, in + k) -> the first in, the last k

    Args:
        weight: The widened weight.
        read: How its layer reads.

    Returns:
        Two views; of `conv_transpose` with the groups as an axis of their own.
    """
    axis = 1
    if read.site.kind == "conv_transpose":
        weight = weight.unflatten(0, (read.site.groups, -1))
    split = weight.shape[axis] - read.planes
    return weight.narrow(axis, 0, split), weight.narrow(axis, split, read.planes)
