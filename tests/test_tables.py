"""Products with rows of a table that sizes choose: relative positions read, at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, transform
from tests.cases import assert_same, largest_difference, with_filled_reads

ROWS, WIDTH, FLOATS = 13, 4, 7
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Multiply = Callable[[Tensor, Tensor], Tensor]


def distances(q: Tensor) -> Tensor:
    places = torch.arange(q.shape[1], device=q.device)
    return places.unsqueeze(0) - places.unsqueeze(1) + ROWS // 2


def interpolated(q: Tensor, table: Tensor) -> Tensor:
    """As SAM takes rows for a map of another size than it was trained on."""
    size = 2 * q.shape[1] - 1
    if table.shape[0] != size:
        table = table.reshape(1, table.shape[0], -1).permute(0, 2, 1)
        table = F.interpolate(table, size=size, mode="linear").reshape(-1, size).permute(1, 0)
    return table[distances(q) - ROWS // 2 + size // 2]


PRODUCTS: dict[str, Multiply] = {
    "indexed": lambda q, t: torch.einsum("bqc,qkc->bqk", q, t[distances(q)]),
    "interpolated": lambda q, t: torch.einsum("bqc,qkc->bqk", q, interpolated(q, t)),
    "of a map": lambda q, t: torch.einsum(
        "bhqc,hkc->bhqk", q.reshape(q.shape[0], q.shape[1], 1, -1), t[distances(q)]
    ),
    "table first": lambda q, t: torch.einsum("qkc,bqc->bqk", t[distances(q)], q),
    "matmul": lambda q, t: q @ t[: q.shape[1]].transpose(-1, -2),
    "method": lambda q, t: q.unsqueeze(-2).matmul(t[distances(q)].mT).squeeze(-2),
    "bmm": lambda q, t: torch.bmm(q.transpose(0, 1), t[distances(q)].mT).transpose(0, 1),
    "features not last": lambda q, t: torch.einsum("bqc,kc->bkq", q, t),
    "linear": lambda q, t: F.linear(q, t[: q.shape[1]]),
    "embedding": lambda q, t: q.unsqueeze(-2) @ F.embedding(distances(q), t).transpose(-1, -2),
    "scaled": lambda q, t: q @ (2 * t.narrow(0, 1, q.shape[1])).mul(0.5).T.contiguous(),
    "padded": lambda q, t: q @ F.pad(t, (0, 0, q.shape[1], 0)).flip(0).t(),
    "weighted": lambda q, t: q @ (t[: q.shape[1]] * torch.arange(q.shape[1])[:, None]).T,
    "sizes of the table": lambda q, t: torch.einsum(
        "bqc,qkc->bqk", q, t.view(1, t.shape[0], t.shape[1]).expand(q.shape[1], -1, -1)
    ),
    "squeezed elsewhere": lambda q, t: q @ t.unsqueeze(0)[:, : q.shape[1]].squeeze(0).T,
    "as the queries": lambda q, t: q @ t[: q.shape[1]].to(q).T.type_as(q),
    "sizes as one": lambda q, t: q @ t.reshape(t.shape)[: q.shape[1]].T,
}


class Positions(nn.Module):
    """Multiplies queries with rows of a table."""

    def __init__(self, multiply: Multiply, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.multiply = multiply
        self.table = nn.Parameter(torch.randn(shape or (ROWS, WIDTH)))

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.query(x), self.table)


class Looked(nn.Module):
    """BERT's relative keys: the table is an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Embedding(ROWS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return torch.einsum("blc,lrc->blr", q, self.table(distances(q)))


def filled(model: nn.Module, **options: Any) -> tuple[Any, Tensor]:
    return with_filled_reads(model, X, floats=FLOATS, **options)


def joined(model: Positions, gm: Any, memory: Tensor, x: Tensor) -> Tensor:
    """cat[q, m] · f([R R_m]), as the article would write it."""
    wide = gm.get_parameter("query.weight")
    q = F.linear(x, wide[:, :WIDTH], model.query.bias) + wide[:, WIDTH:] @ memory
    q = torch.cat([q, memory.expand(*q.shape[:-1], -1)], -1)
    return model.multiply(
        q, torch.cat([model.table, gm.get_parameter("aim.reads.table.weight")], 1)
    )


@pytest.mark.parametrize("which", PRODUCTS)
def test_rows_of_a_table_read_as_if_it_had_more_columns(which: str) -> None:
    model = Positions(PRODUCTS[which]).double()
    gm, memory = filled(model)
    read = {read.site.name: read for read in gm.plan.reads}["table"]
    assert (read.site.in_channels, read.site.out_channels) == (WIDTH, ROWS)
    assert read.parameters == gm.get_parameter("aim.reads.table.weight").numel()
    assert gm.plan.skips == ()
    for batch, length in ((3, 5), (1, 5), (2, 3), (2, 6)):
        x = torch.randn(batch, length, WIDTH, dtype=torch.float64)
        expected = joined(model, gm, memory, x)
        assert_same(gm(x), expected)
        assert largest_difference(gm(x), model(x)) > 1e-3  # so the comparison can fail
        for other in (aim_surgery.lower(gm, "split"), aim_surgery.fold(gm.eval(), (X,))):
            assert_same(other(x), expected)


@pytest.mark.parametrize("which", PRODUCTS)
def test_they_verify(which: str) -> None:
    model = Positions(PRODUCTS[which])
    gm = transform(model, (X.float(),), config=AimConfig(budget=None, memory=FLOATS))
    result = aim_surgery.verify(model, gm, (X.float(),))
    assert result.ok, str(result)
    assert "table" in result.coverage.covered


@pytest.mark.parametrize("equation", ["bqc,c->bq", "...c,c->...", "c,bqc->bq"])
def test_a_vector(equation: str) -> None:
    """Bahdanau's scores: one row, which is all of the parameter."""
    first = equation.startswith("c,")
    model = Positions(
        lambda q, v: torch.einsum(equation, *((v, q) if first else (q, v))), WIDTH
    ).double()
    gm, memory = filled(model)
    read = {read.site.name: read for read in gm.plan.reads}["table"]
    assert (read.site.in_channels, read.site.out_channels) == (WIDTH, 1)
    for batch, length in ((3, 5), (1, 5), (2, 3)):
        x = torch.randn(batch, length, WIDTH, dtype=torch.float64)
        wide, own = gm.get_parameter("query.weight"), gm.get_parameter("aim.reads.table.weight")
        q = F.linear(x, wide[:, :WIDTH], model.query.bias) + wide[:, WIDTH:] @ memory
        expected = q @ model.table + memory @ own.flatten()
        assert_same(gm(x), expected)
        assert largest_difference(gm(x), model(x)) > 1e-3
        for other in (aim_surgery.lower(gm, "split"), aim_surgery.fold(gm.eval(), (X,))):
            assert_same(other(x), expected)
    fresh = transform(model.float(), (X.float(),), config=AimConfig(budget=None, memory=FLOATS))
    assert aim_surgery.verify(model, fresh, (X.float(),)).ok


def test_a_table_with_its_columns_first_and_heads() -> None:
    def multiply(q: Tensor, table: Tensor) -> Tensor:  # (1, c, rows)
        return torch.einsum("bqc,cqk->bqk", q, table[0][:, distances(q)])

    model = Positions(multiply, 1, WIDTH, ROWS).double()
    gm, memory = filled(model)
    own = gm.get_parameter("aim.reads.table.weight")
    assert own.shape == (ROWS, FLOATS)
    wide = gm.get_parameter("query.weight")
    q = F.linear(X, wide[:, :WIDTH], model.query.bias) + wide[:, WIDTH:] @ memory
    q = torch.cat([q, memory.expand(3, 5, -1)], -1)
    assert_same(gm(X), multiply(q, torch.cat([model.table, own.T[None]], 1)))


def test_an_embedding_of_distances_reads() -> None:
    model = Looked().double()
    gm, memory = filled(model)
    own = gm.get_parameter("aim.reads.table.weight")
    added = own[distances(X)] @ memory
    wide = gm.get_parameter("query.weight")
    q = F.linear(X, wide[:, :WIDTH], model.query.bias) + wide[:, WIDTH:] @ memory
    rows = model.table(distances(X))
    assert_same(gm(X), torch.einsum("blc,lrc->blr", q, rows) + added)
    result = aim_surgery.verify(model, transform(model, (X,)), (X,))
    assert result.ok, str(result)
    assert "table.weight" in result.coverage.covered


def test_a_table_shared_by_two_products_has_one_set_of_new_columns() -> None:
    def multiply(q: Tensor, table: Tensor) -> Tensor:
        down = torch.einsum("bqc,qkc->bqk", q, table[distances(q)])
        return down + torch.einsum("bqc,kqc->bqk", q, table[distances(q)])

    model = Positions(multiply).double()
    gm, memory = filled(model)
    assert [read.site.name for read in gm.plan.reads] == ["query", "table", "table@1"]
    assert_same(gm(X), joined(model, gm, memory, X))


def test_each_sample_reads_what_it_wrote() -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(), Positions(PRODUCTS["indexed"])
    ).double()
    gm, _ = filled(model, write="sample", write_at=("1",))
    assert {read.site.name: read.version for read in gm.plan.reads}["2.table"] == 1
    together = gm.eval()(X)
    for index in range(len(X)):
        assert_same(gm(X[index : index + 1]), together[index : index + 1])
    other = X.clone()
    other[0] += 1
    assert_same(gm(other)[1:], together[1:])
    assert largest_difference(gm(other)[:1], together[:1]) > 1e-3


def test_files_and_plans(tmp_path: Path) -> None:
    model = Positions(PRODUCTS["interpolated"]).double()
    gm, _ = filled(model)
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    loaded = aim_surgery.load(tmp_path / "aim.safetensors", model)
    assert_same(loaded(X), gm(X))
    assert_same(loaded.get_parameter("table"), model.table)
    assert aim_surgery.Plan.from_json(gm.plan.to_json()) == gm.plan
    assert_same(aim_surgery.apply(model, gm.plan)(X).shape, gm(X).shape)


def in_place(q: Tensor, table: Tensor) -> Tensor:
    rows = table[distances(q)]
    rows += 1
    return torch.einsum("bqc,qkc->bqk", q, rows)


REFUSED: dict[str, Multiply] = {
    "shifted": lambda q, t: q @ (t[: q.shape[1]] + 1).T,
    "changed in place": in_place,
    "columns see each other": lambda q, t: q @ t[: q.shape[1]].softmax(-1).T,
    "columns are cut": lambda q, t: q[..., :2] @ t[: q.shape[1], :2].T,
    "columns are flipped": lambda q, t: q @ t[: q.shape[1]].flip(1).T,
    "columns are weighted": lambda q, t: q @ (t[: q.shape[1]] * torch.arange(WIDTH)).T,
    "columns may be squeezed": lambda q, t: q @ t[: q.shape[1]].unsqueeze(0).squeeze().T,
    "columns might go alone": lambda q, t: q @ t[: q.shape[1]].squeeze(-1).T,
    "rows are summed over": lambda q, t: q.mT @ t[: q.shape[1]],
    "more is summed over": lambda q, t: torch.einsum("bqc,qkc->bk", q, t[distances(q)]),
    "the table is summed alone": lambda q, t: torch.einsum("bqc,dkc->bqk", q, t[distances(q)]),
    "divided by it": lambda q, t: q @ (1 / t[: q.shape[1]]).T,
    "padded with ones": lambda q, t: q @ F.pad(t, (0, 0, q.shape[1], 0), value=1.0).T,
}


@pytest.mark.parametrize("which", REFUSED)
def test_other_ways_to_a_product_are_listed(which: str) -> None:
    model = Positions(REFUSED[which])
    gm = transform(model, (X.float(),), config=AimConfig(budget=None, memory=FLOATS))
    assert [skip.weights for skip in gm.plan.skips] == [("table",)]
    assert "that is no site" in gm.plan.skips[0].reason
    result = aim_surgery.verify(model, gm, (X.float(),))
    assert result.ok, str(result)


def test_rows_that_inputs_choose_are_no_weight() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.table = nn.Linear(WIDTH, WIDTH), nn.Embedding(ROWS, WIDTH)

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            return self.query(x) @ self.table(tokens).mT

    model, tokens = Tokens(), torch.randint(ROWS, (3, 6))
    gm = transform(model, (X.float(), tokens))
    assert [read.site.name for read in gm.plan.reads] == ["query"]
    result = aim_surgery.verify(model, gm, (X.float(), tokens))
    assert result.ok, str(result)
