"""Which Python calls need not be run: those that certainly reach no layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aim_surgery import transform
from aim_surgery.sites.closed import are_closed


class Drop(nn.Module):
    """Holds a number and a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.act, self.sizes = 0.1, nn.ReLU(), [1, {"a": (2.0, torch.float32)}]
        self.norm, self.f = nn.BatchNorm2d(3), torch.relu
        self.register_buffer("seen", torch.zeros(3))


def closing_over(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


LAYER = nn.Conv2d(3, 3, 1)


def with_layer_inside(drop: Drop) -> None:
    drop.act.inner = nn.Sequential(LAYER)


def with_layer_in_a_list(drop: Drop) -> None:
    vars(drop)["others"] = [LAYER]


def with_a_closure(drop: Drop) -> None:
    vars(drop)["f"] = closing_over(LAYER)


def with_a_bound_method(drop: Drop) -> None:
    vars(drop)["f"] = LAYER.forward


def with_a_hook(drop: Drop) -> None:
    drop.act.register_forward_hook(lambda _m, _a, y: LAYER(y))


def with_a_weight(drop: Drop) -> None:
    drop.act.weight = LAYER.weight


def with_a_forward_of_its_own(drop: Drop) -> None:
    vars(drop)["forward"] = LAYER.forward


class Objects:
    layer = LAYER


def with_an_object(drop: Drop) -> None:
    vars(drop)["objects"] = Objects()


def test_what_holds_plain_things_is_closed() -> None:
    assert are_closed([Drop()], [LAYER])


@pytest.mark.parametrize(
    "leak",
    [
        with_layer_inside, with_layer_in_a_list, with_a_closure, with_a_bound_method, with_a_hook,
        with_a_weight, with_a_forward_of_its_own, with_an_object,
    ],
)  # fmt: skip
def test_what_leads_to_a_layer_is_not(leak: Callable[[Drop], None]) -> None:
    drop = Drop()
    leak(drop)
    assert not are_closed([drop], [LAYER])


class Gate(nn.Module):
    """Branches on values and calls a layer of its neighbour, which it holds in a list."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if float(x.detach().sum()) > 1e9 else x * 2


def test_a_layer_held_in_a_list_reads_beside() -> None:
    layer = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(layer, Gate([layer]), Gate([])).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    gm = transform(model, x)
    assert torch.equal(gm(x), model(x))
    assert not gm.plan.reads[0].site.widens
