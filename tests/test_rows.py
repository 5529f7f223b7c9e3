"""Tables in Python calls whose rows are multiplied: listed, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, transform
from aim_surgery.nn.aim_modules import plan_of

WIDTH = 4
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Branching(nn.Module):
    """A query and a table, in a forward that branches on data."""

    def __init__(self, multiply: Callable[[Tensor, nn.Embedding, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(9, WIDTH)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) > 1e9:
            return x
        return self.multiply(self.query(x), self.table, x)


def places(q: Tensor) -> Tensor:
    return torch.arange(q.shape[1], device=q.device)


MULTIPLIED: dict[str, Callable[[Tensor, nn.Embedding, Tensor], Tensor]] = {
    "matmul": lambda q, table, _: q @ table(places(q)).T,
    "einsum": lambda q, table, _: torch.einsum("bqc,kc->bqk", q, 2 * table(places(q)) + 1),
    "bmm": lambda q, table, _: q.bmm(table(places(q)).T.expand(len(q), -1, -1)),
    "linear": lambda q, table, _: nn.functional.linear(q, table.weight),
    "baddbmm": lambda q, table, _: torch.baddbmm(
        q.new_zeros(1), q, table(places(q)).T.expand(len(q), -1, -1)
    ),
}
MULTIPLIED["matmul with constants"] = lambda q, table, _: (
    q + q.new_ones(5, 5) @ table(places(q)) * 0.5
)
APART: dict[str, Callable[[Tensor, nn.Embedding, Tensor], Tensor]] = {
    "added": lambda q, table, _: q + table(places(q)),
    "added in a product": lambda q, table, _: torch.baddbmm(table(places(q))[:, :1], q, q.mT),
    "rows of an input": lambda q, table, x: q @ table(x.argmax(-1)).mT,
    "input of a weight": lambda q, table, _: q @ (table(places(q)) @ torch.ones(4, 4)).mT,
}


@pytest.mark.parametrize("which", MULTIPLIED)
@pytest.mark.parametrize("emit", ["auto", "module"])
def test_a_table_whose_rows_are_multiplied_is_listed(which: str, emit: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Branching(MULTIPLIED[which]))
    config = AimConfig(budget=None, memory=7, write="none")
    gm = transform(model, X, config=config, emit=emit)  # type: ignore[call-overload]
    plan = plan_of(gm)
    assert [read.site.name for read in plan.reads] == ["0", "1.query"]
    (skip,) = plan.skips
    assert skip.weights == ("1.table.weight",)
    assert "multiplies its rows" in skip.reason
    result = aim_surgery.verify(model, gm, X)
    assert result.ok, str(result)
    assert [name for name, _ in result.coverage.skipped] == ["1.table.weight"]


@pytest.mark.parametrize("which", APART)
def test_other_tables_are_not(which: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Branching(APART[which]))
    gm = transform(model, X, config=AimConfig(budget=None, memory=7, write="none"))
    assert plan_of(gm).skips == ()
    result = aim_surgery.verify(model, gm, X)
    assert result.ok, str(result)
