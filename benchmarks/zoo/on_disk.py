"""Backward of models whose activations are more than the memory: what it needs lies on disk."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

_LEAST_BYTES = 2**20


@contextlib.contextmanager
def saved_on_disk(model: nn.Module) -> Iterator[Path]:
    """Write what autograd saves for backward to files, and read it back when backward asks.

    The model's own tensors stay where they are, and so does what is smaller than a MiB.

    Args:
        model: The one that runs forward and backward inside; gradients are the same to the bit.

    Yields:
        The folder of the files; gone afterwards.
    """
    owned = {
        tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
    }
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor | Path:
        nonlocal count
        small = tensor.numel() * tensor.element_size() < _LEAST_BYTES
        if small or tensor.untyped_storage().data_ptr() in owned:
            return tensor
        count += 1
        path = folder / f"{count}.pt"
        torch.save(tensor.detach().clone(), path)  # of a view, not all that it is a view of
        return path

    def unpack(saved: torch.Tensor | Path) -> torch.Tensor:
        return torch.load(saved) if isinstance(saved, Path) else saved

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield folder
