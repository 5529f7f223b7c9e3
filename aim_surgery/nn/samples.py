"""The mean over all samples of a step, wherever they are computed.

    mean = sum over ranks, sum over samples / number of samples on all ranks

Every rank works on the same mean m. Rank r's loss L_r reaches it with g_r = dL_r/dm, and the loss
that DDP optimises is the mean of all L_r; so backward hands every rank the sum of all g_r, and the
average that DDP takes over ranks makes of it what one process with the whole batch would have.
`nn.SyncBatchNorm` has the same convention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_samples(x: Tensor, axis: int = 0) -> Tensor:
    """Average over the sample axis: over this process, or over all ranks of a distributed run.

    With more than one rank this is a collective: all ranks call it, with equal sizes but for the
    number of samples, which may differ (none at all included). It uses the default process group.

    Shapes:
        (..., N, ...) -> (..., 1, ...)

    Args:
        x: Any floating point tensor.
        axis: Its sample axis.

    Returns:
        The mean, of `x`'s type; gradients are right after DDP has averaged them over ranks.

    Example:
        >>> mean_over_samples(torch.ones(4, 3)).shape
        torch.Size([1, 3])
    """
    if not _distributed():
        return x.mean(axis, keepdim=True)
    count = torch.full((), x.shape[axis], device=x.device, dtype=torch.int64)
    dist.all_reduce(count)
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum of many halves would overflow
    count = count.clamp(min=1).to(wide)  # no rank has a sample: zeros
    return _SumOverRanks.apply(x.sum(axis, keepdim=True, dtype=wide) / count).to(x.dtype)


def nothing_to_average(x: Tensor, axis: int = 0) -> bool:
    """Whether there is no sample at all: an empty batch, and no other rank that may have one."""
    return x.shape[axis] == 0 and not _distributed()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _SumOverRanks(torch.autograd.Function):
    """`torch.distributed.nn.functional.all_reduce`, which is deprecated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _SumOverRanks.apply(*grad_outputs)
