"""Sizes of inputs that go to tensors which are no inputs, and to `torch.Size`: they stay free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributions, nn

import aim_surgery
from aim_surgery import AimConfig, CaptureError
from tests.cases import assert_same

TABLE = torch.arange(36.0).view(9, 4)

OF_A_TABLE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "expand": lambda t, n: t[0].unsqueeze(0).expand(n, -1),
    "repeat": lambda t, n: t[1].repeat(n, 1),
    "repeat_interleave": lambda t, n: t[:1].repeat_interleave(n, 0),
    "tile": lambda t, n: t[2].tile(n, 1),
    "broadcast_to": lambda t, n: t[3].broadcast_to((n, 4)),
    "slice": lambda t, n: t[:n],
    "slice from": lambda t, n: t[n - 9 :][:1] + t[1::n][:1],
    "item": lambda t, n: t[n],
    "view": lambda t, n: t.view(-1)[: n * 4].view(n, 4),
    "reshape": lambda t, n: t[:n].reshape(n, 4),
    "split": lambda t, n: t.split(n)[0],
    "chunk": lambda t, n: t.chunk(n)[0][:1],
    "narrow": lambda t, n: t.narrow(0, 0, n),
    "select": lambda t, n: t.select(0, n),
    "roll": lambda t, n: t.roll(n, 0)[:1],
    "unflatten": lambda t, n: t[:n].flatten().unflatten(0, (n, 4)),
    "new_zeros": lambda t, n: t.new_zeros((n, 4)),
    "new_ones": lambda t, n: t.new_ones(n, 4),
    "new_full": lambda t, n: t.new_full((n, 1), 3.0),
    "index": lambda t, n: t[torch.arange(n)],
}


class Anchored(nn.Module):
    """Adds what it makes of a tensor that is a plain attribute, no buffer."""

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.function = TABLE.clone(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.enter(x) + self.function(self.table, x.shape[0]))


@pytest.mark.parametrize("which", OF_A_TABLE)
def test_methods_of_a_tensor_that_is_an_attribute(which: str) -> None:
    before = set(vars(torch.Tensor))
    model = Anchored(OF_A_TABLE[which])
    gm = aim_surgery.transform(model, torch.randn(3, 4), emit="graph")
    assert set(vars(torch.Tensor)) == before  # put back
    for batch in (3, 5, 1):
        x = torch.randn(batch, 4)
        assert_same(gm(x), model(x), tolerance=1e-6)


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: distributions.Normal(x, x.exp()).rsample(),
    "standard normal": lambda x: distributions.Normal(torch.zeros_like(x), 1.0).rsample(),
    "first of several": lambda x: distributions.Normal(x, 1.0).sample((2,))[0],
    "independent": lambda x: distributions.Independent(distributions.Normal(x, 1.0), 1).rsample(),
    "bernoulli": lambda x: distributions.Bernoulli(logits=x).sample(),
    "categorical": lambda x: distributions.Categorical(logits=x).sample()[:, None] + 0 * x,
    "uniform": lambda x: distributions.Uniform(x, x + 1).rsample(),
    "multivariate": lambda x: distributions.MultivariateNormal(x, torch.eye(6)).rsample(),
    "size": lambda x: x + torch.ones(torch.Size((x.shape[0], 6))),
    "size of a list": lambda x: x + x.new_ones(torch.Size([len(x), 6])),
}


class Autoencoder(nn.Module):
    """A variational autoencoder written with distributions."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.mean, self.out = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x.shape[:1], torch.Size)
        return self.out(self.draw(self.mean(torch.relu(self.enter(x)))))


@pytest.mark.parametrize("which", DRAWS)
def test_distributions_draw_for_any_batch(which: str) -> None:
    size = torch.Size
    model = Autoencoder(DRAWS[which])
    gm: Any = aim_surgery.transform(model, torch.randn(3, 8), config=AimConfig(budget=0.9))
    assert torch.Size is size
    assert gm.plan.emit == "graph"
    assert gm.plan.writes
    for batch in (3, 5, 1):
        x = torch.randn(batch, 8)
        torch.manual_seed(1)
        ours = gm(x)
        torch.manual_seed(1)
        assert_same(ours, model(x), tolerance=1e-6)
    assert aim_surgery.verify(model, gm, torch.randn(3, 8)).ok


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("emit", ["auto", "graph", "module"])
def test_nested_tensors_are_refused_with_a_remedy(layout: torch.layout, emit: Any) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(5, 4)], layout=layout)
    with pytest.raises(CaptureError, match=r"nested .* padded example inputs"):
        aim_surgery.transform(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), x, emit=emit)
