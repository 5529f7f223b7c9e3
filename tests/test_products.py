"""Products with weights that are no plain matrices: einsum, stacks of matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, transform
from aim_surgery.capture import capture
from aim_surgery.sites import find_sites
from tests.cases import assert_same, with_filled_reads

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STACKS = X.transpose(0, 1).contiguous()


class Heads(nn.Module):
    """Features go to two axes, and two axes back to one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.split = nn.Parameter(torch.randn(4, 2, 3))
        self.merge = nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btc,chd->bthd", self.first(x).relu(), self.split)
        return torch.einsum("...nd,hnd->...h", heads.tanh(), self.merge)


class Experts(nn.Module):
    def __init__(self, multiply: Any) -> None:
        super().__init__()
        self.multiply = multiply
        self.experts = nn.Parameter(torch.randn(5, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.experts)


PRODUCTS = {
    "bmm": (torch.bmm, STACKS),
    "method": (lambda x, w: x.bmm(w), STACKS),
    "matmul": (lambda x, w: x.unsqueeze(-2) @ w, X),
    "method matmul": (lambda x, w: x.unsqueeze(-2).matmul(other=w), X),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_ones(1, 1, 6), x, w), STACKS),
    "transposed": (lambda x, w: torch.bmm(x, w.transpose(1, 2).mT * 2), STACKS),
    "einsum": (lambda x, w: torch.einsum("bec,ecd->bed", x, w), X),
    "einsum, channels first": (lambda x, w: torch.einsum("cbe,ecd->bed", x, w), X.permute(2, 0, 1)),
}


def filled(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, Tensor]:
    return with_filled_reads(model, x, floats=7, **options)


@pytest.mark.parametrize("which", PRODUCTS)
def test_a_stack_of_matrices_reads(which: str) -> None:
    multiply, x = PRODUCTS[which]
    model = Experts(multiply).double()
    gm, memory = filled(model, x)
    (read,) = gm.plan.reads
    assert (read.site.in_channels, read.site.out_channels) == (4, 6)
    assert gm.plan.skips == ()
    added = gm.get_parameter("aim.reads.experts.weight") @ memory
    assert added.shape == (6,)
    assert_same(gm(x), model(x) + added)
    result = aim_surgery.verify(model, transform(model, (x,)), (x,))
    assert result.ok, str(result)


def test_features_of_several_axes() -> None:
    torch.manual_seed(0)
    model = Heads().double()
    gm, memory = filled(model, X)
    reads = {read.site.name: read.site for read in gm.plan.reads}
    assert (reads["split"].in_channels, reads["split"].out_channels) == (4, 6)
    assert (reads["merge"].in_channels, reads["merge"].out_channels) == (6, 6)
    own = {name: gm.get_parameter(f"aim.reads.{name}.weight") for name in ("split", "merge")}
    first = gm.get_parameter("first.weight")
    with torch.no_grad():
        h = F.linear(X, first[:, :4], model.first.bias) + first[:, 4:] @ memory
        h = torch.einsum("btc,chd->bthd", h.relu(), model.split) + (own["split"] @ memory).view(
            2, 3
        )
        h = torch.einsum("btnd,hnd->bth", h.tanh(), model.merge) + own["merge"] @ memory
    assert_same(gm(X), h)
    for batch, length in ((1, 5), (2, 9)):
        x = torch.randn(batch, length, 4, dtype=torch.float64)
        same = transform(model, (X,))
        assert_same(same(x), model(x))


def test_a_written_memory_reaches_rows_of_its_sample_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Heads()).double()
    gm, _ = filled(model, X, write="sample", write_at=("1",))
    versions = {read.site.name: read.version for read in gm.plan.reads}
    axes = {read.site.name: read.site.sample_axis for read in gm.plan.reads}
    assert versions == {"0": 0, "2.first": 1, "2.split": 1, "2.merge": 0}
    assert axes["2.merge"] is None
    together = gm.eval()(X)
    for index in range(len(X)):
        assert_same(gm(X[index : index + 1]), together[index : index + 1])
    other = X.clone()
    other[0] += 1
    assert_same(gm(other)[1:], together[1:])


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_runs_of_rows_read() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(x, self.experts, offs=ends)

    model = Grouped()  # whose kernel has no float64, and whose rule for shapes only bfloat16
    x, ends = torch.randn(10, 16), torch.tensor([3, 3, 10], dtype=torch.int32)
    gm = transform(model, (x, ends), config=AimConfig(budget=None, memory=7, write="none"))
    with torch.no_grad():
        gm.get_parameter("aim.reads.experts.weight").fill_(0.5)
    memory = aim_surgery.read_memory(gm, (x, ends))["memory"]
    assert_same(gm(x, ends), model(x, ends) + 0.5 * memory.sum(), tolerance=1e-5)
    result = aim_surgery.verify(model, transform(model, (x, ends)), (x, ends))
    assert result.ok, str(result)
    assert [name for name, _ in result.coverage.skipped] == []


NO_SITES = {
    "rows are summed": lambda x, w: torch.einsum("bec,ecd->ed", x, w),
    "no output": lambda x, w: torch.einsum("bec,ecd", x, w),
    "features are not last": lambda x, w: torch.einsum("bce,ecd->bde", x.mT, w),
    "the weight is summed alone": lambda x, w: torch.einsum("bec,fcd->bed", x, w),
    "nothing is multiplied out": lambda x, w: torch.einsum("bec,ecd->becd", x, w),
    "three operands": lambda x, w: torch.einsum("bec,ecd,d->bed", x, w, w[0, 0]),
    "weights first": lambda x, w: torch.bmm(w.mT, x.permute(1, 2, 0)),
}


@pytest.mark.parametrize("which", NO_SITES)
def test_other_products_are_listed(which: str) -> None:
    sites, unread = find_sites(capture(Experts(NO_SITES[which]).double(), X))
    assert sites == ()
    assert [skip.weights for skip in unread] == [("experts",)]
    assert "that is no site" in unread[0].reason
