"""Inputs of another batch size, made of the samples of one example.

The first axis of the first tensor runs over the samples, and so does that of each tensor of as many
entries. A detector takes its samples in lists: of images, and of what to find in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch.utils import _pytree as pytree

_SAMPLE_DIMS = 3  # of an image, (C, H, W); more are maps of a whole batch


def count_samples(values: tuple[Any, ...]) -> int:
    """Samples in the batch: entries of a first list of samples, or the first tensor's size.

    Args:
        values: The arguments of one call, in order.

    Returns:
        Their number; 0 where there is neither.
    """
    first = next((value for value in values if tensors_in(value)), None)
    if is_list_of_samples(first):
        return len(first)
    return next((tensor.shape[0] for tensor in tensors_in(values) if tensor.ndim), 0)


def take_samples(values: Any, old: int, new: int) -> Any:
    """The same values with another number of samples; what has no batch axis stays.

    Args:
        values: Nested arguments.
        old: Their number of samples, as `count_samples` gives it.
        new: The number wanted; samples are taken over and over where there are too few.

    Returns:
        The same nest; `values` themselves where nothing changes.
    """
    if old in (0, new):
        return values

    def resize(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            same = value.ndim and value.shape[0] == old
            return cycled(value, 0, new) if same else value
        return [value[i % old] for i in range(new)]

    def is_whole(value: Any) -> bool:
        listed = is_list_of_samples(value) and len(value) == old
        return listed or isinstance(value, torch.Tensor)

    return pytree.tree_map(
        lambda value: resize(value) if is_whole(value) else value, values, is_leaf=is_whole
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nest, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def is_list_of_samples(value: Any) -> TypeGuard[list[Any]]:
    """Whether a list has one entry a sample: images without a batch axis, or dicts of tensors."""
    if not isinstance(value, list) or not value:
        return False
    if all(isinstance(item, torch.Tensor) for item in value):
        return all(item.ndim <= _SAMPLE_DIMS for item in value)
    return all(isinstance(item, Mapping) for item in value) and bool(tensors_in(value))


def cycled(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Another number of entries along an axis: the first ones, over and over."""
    old = tensor.shape[axis]
    if size == old:
        return tensor
    index = torch.arange(size, device=tensor.device) % old
    if tensor.layout not in (torch.strided, torch.sparse_coo):
        return tensor.to_sparse().index_select(axis, index).to_sparse(layout=tensor.layout)
    return tensor.index_select(axis, index)
