"""Views of the memory: its planes or features averaged down to k, its planes brought to a size.

Both are what `adaptive_avg_pool` gives, in forms that save what need not be done. Exporters take
that function apart into one addition for each entry of its largest window, thousands for a memory,
on which they then work for many minutes; so an export gets a few operations of the same values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aim_surgery.nn.spatial import ADAPTIVE_POOLS


def entries_of_each(entries: int, samples: int) -> int:
    """How many entries along an axis belong to each sample: its windows, its frames.

    Args:
        entries: Size of the axis.
        samples: N, which divides it; 0 of an empty batch. In a graph, a symbol or a tensor.

    Returns:
        Their ratio.
    """
    return 1 if isinstance(samples, int) and samples == 0 else entries // samples


def averaged(memory: Tensor, groups: int) -> Tensor:
    """Average floats, or planes, in contiguous groups, as `adaptive_avg_pool` forms them.

        group i of k, of n entries: from floor(i n / k) up to ceil((i + 1) n / k)

    Shapes:
        (N, n) -> (N, k); (N, n, S) -> (N, k, S)

    Args:
        memory: Floats, or planes with their positions in one axis.
        groups: k.

    Returns:
        The averages.
    """
    if torch.compiler.is_exporting():
        return _averaged_by_gathering(memory, groups)
    if memory.ndim == 2:
        return F.adaptive_avg_pool1d(memory, groups)
    return F.adaptive_avg_pool2d(memory, (groups, memory.shape[-1]))


def _averaged_by_gathering(memory: Tensor, groups: int) -> Tensor:
    count = memory.shape[1]
    if count % groups == 0:
        return memory.unflatten(1, (groups, count // groups)).mean(2)
    most = max(-(-(i + 1) * count // groups) - i * count // groups for i in range(groups))
    group = torch.arange(groups, device=memory.device).unsqueeze(1)
    start, end = group * count // groups, ((group + 1) * count + groups - 1) // groups
    entry = start + torch.arange(most, device=memory.device)
    share = (entry < end).to(memory.dtype) / (end - start)
    share = share.reshape(groups, most, *(1,) * (memory.ndim - 2))
    return (memory[:, entry.clamp(max=count - 1)] * share).sum(2)


def resized(view: Tensor, size: Sequence[int]) -> Tensor:
    """Bring planes to a spatial size; they are given back themselves where they have it.

    Shapes:
        (.., k, *S) -> (.., k, *size)

    Args:
        view: Planes, with or without batch.
        size: The spatial size.

    Returns:
        The planes, averaged or repeated as `adaptive_avg_pool` does.
    """
    if not torch.compiler.is_exporting() and view.shape[-len(size) :] == tuple(size):
        return view
    return ADAPTIVE_POOLS[len(size)](view, size)
