"""Two ranks against one process; `test_nn.py` starts it under torchrun.

Each rank first works the whole batch alone, then joins the group and works its part under DDP.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.nn import write_block
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.samples import mean_over_samples
from aim_surgery.nn.write_block import WriteBlock
from tests.cases import assert_same

TOLERANCE = 1e-10
SAMPLES, STEPS = 8, 3


class Net(nn.Module):
    """Features write into the memory, which answers each sample."""

    def __init__(self, per: str, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.memory = Memory(8, carry_state=True)
        self.write = WriteBlock(
            3, 2, floats=8, layout=(2, 2, 2), dims=2, channel_axis=1, sample_axis=0,
            widths=(4, 3), norm=norm, activation="tanh", per=per,
        )  # fmt: skip
        self.head = nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        memory = self.memory()
        written = self.write(features, memory.view(1, 2, 2, 2), memory)
        self.memory(written)
        return (self.head(features.mean((2, 3))) * written).sum(1) ** 2


def operated(write: Any) -> nn.Module:
    """A network that has been through the operation, without batch norms of its own."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    config = AimConfig(
        budget=None, memory=18, init="fresh", write=write, write_at="1", carry="state",
        activation="tanh",
    )  # fmt: skip
    return aim_surgery.transform(model, torch.zeros(2, 2, 6, 6), config=config)


def train(net: nn.Module, batches: Tensor, share: float) -> list[Any]:
    """Outputs, gradients and buffers of all steps; the loss counts every sample alike."""
    kept = []
    for x in batches:
        net.zero_grad()
        outputs = net(x)
        (outputs.sum() * share).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
        # In one row: a bias before a batch norm has no gradient, and rounding is all there is.
        gradients = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        kept.append((outputs.detach(), gradients, [b.clone() for b in net.buffers()]))
    return kept


def same(actual: list[Any], expected: list[Any], part: slice) -> None:
    for (outputs, *rest), (expected_outputs, *expected_rest) in zip(actual, expected, strict=True):
        assert_same(outputs, expected_outputs[part], TOLERANCE)
        assert_same(rest, expected_rest, TOLERANCE)


def fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def main() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, SAMPLES, 2, 6, 6, generator=generator, dtype=torch.float64)
    nets: list[tuple[nn.Module, list[Any]]] = []
    # A batch norm would see its own rank's samples where each sample writes for itself.
    for per, norm in (("batch", "layer"), ("batch", "batch"), ("sample", "layer")):
        torch.manual_seed(0)
        net = Net(per, norm).double()
        nets.append((net, train(copy.deepcopy(net), x, 1 / SAMPLES)))
    for write in ("batch", "sample"):
        net = operated(write).double()
        nets.append((net, train(copy.deepcopy(net), x, 1 / SAMPLES)))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for first in (4, 3):  # equal halves, then 3 and 5
        part = slice(0, first) if rank == 0 else slice(first, None)
        share = dist.get_world_size() / SAMPLES  # DDP divides by the number of ranks
        for net, expected in nets:
            same(train(ddp(net), x[:, part], share), expected, part)
            local = mock.patch.object(write_block, "mean_over_samples", local_mean)
            with local, mock.patch("aim_surgery.nn.memory.mean_over_samples", local_mean):
                wrong = train(ddp(net), x[:, part], share)
            assert fails(lambda a=wrong, e=expected, p=part: same(a, e, p))
    if rank == 0:  # alone: evaluation communicates nothing
        nets[0][0].eval()(x[0])
    none = mean_over_samples(x[0, : 4 * rank].half())  # no sample at all on rank 0
    assert none.dtype == torch.float16
    assert_same(none, x[0, :4].half().mean(0, keepdim=True), 1e-2)
    dist.barrier()
    dist.destroy_process_group()


def ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(copy.deepcopy(net))


def local_mean(x: Tensor, axis: int = 0) -> Tensor:
    return x.mean(axis, keepdim=True)


if __name__ == "__main__":
    main()
