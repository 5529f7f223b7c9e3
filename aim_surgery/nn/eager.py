"""Tells whether operations are what they seem: carried out at once, on plain tensors of a CPU.

And sees to it where they have to be: see `added` and `autocast_off`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad


def is_watched() -> bool:
    """Whether somebody looks on who doesn't know our functions: compilers, exporters, `func`."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0


def added(t: Tensor, other: Tensor) -> Tensor:
    """T + other, in place unless a transform of `torch.func` looks on, which may batch the other.

    Args:
        t: A tensor of the caller's own.
        other: Of the same shape, or broadcast to it.
    """
    return t + other if torch._C._are_functorch_transforms_active() else t.add_(other)


@contextlib.contextmanager
def autocast_off(model: nn.Module) -> Iterator[None]:
    """No autocast on the devices of a model, whatever the caller has: for values that stay."""
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    with contextlib.ExitStack() as stack:
        for device in filter(torch.amp.is_autocast_available, devices):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def is_batched(gradient: Tensor) -> bool:
    """Whether a gradient stands for several (`torch.autograd.grad(.., is_grads_batched=True)`)."""
    return is_legacy_batchedtensor(gradient)


def are_plain(first: Tensor, *others: Tensor | None) -> bool:
    """Whether functions of our own may work on tensors: nobody looks on, and nothing converts them.

    Args:
        first: One of them.
        others: The others; None for none.
    """
    if is_watched() or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (first, *(tensor for tensor in others if tensor is not None))
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == first.dtype
        for tensor in tensors
    )
