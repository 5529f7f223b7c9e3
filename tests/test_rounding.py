"""What verify takes for rounding, and what it may never take for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import aim_surgery
from aim_surgery.verification.comparison import TOLERANCES, Case, Comparison
from aim_surgery.verification.pair import Pair
from aim_surgery.verification.rounding import MARGIN, RoundedOtherwise, held_against
from aim_surgery.verification.samples import Samples


class Does(nn.Module):
    """A model that is one function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def compared(base: nn.Module, other: nn.Module, x: Tensor) -> tuple[list[Comparison], list[str]]:
    notes: list[str] = []
    plan = aim_surgery.plan(nn.Linear(64, 64), torch.zeros(1, 64))
    pair = Pair(base, other, plan, TOLERANCES[x.dtype])
    training = any(True for _ in base.buffers())
    found = pair.compare(Case(training, Samples((x,), {}), "batch 4", x.dtype), notes)
    assert not isinstance(found, str)
    return found, notes


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (lambda x: x, lambda x: x.double()),
        (lambda x: (x > 0).int(), lambda x: (x > 0).long()),
        (lambda x: x.nonzero().int(), lambda x: x.nonzero()),
    ],
)
def test_another_dtype_is_no_rounding(base: Any, other: Any) -> None:
    (found,), notes = compared(Does(base), Does(other), noise(4, 64))
    assert not found.ok
    assert not notes


def test_products_beyond_255_are_judged_in_float16() -> None:
    weight = noise(64, 64, dtype=torch.float16)
    x = 100 * noise(4, 64, dtype=torch.float16)
    base = Does(lambda x: functional.linear(x, weight))
    for wrong in (1.5, 1.05, float("nan")):
        (found,), _ = compared(base, Does(lambda x, by=wrong: functional.linear(x, weight) * by), x)
        assert not found.ok
    (found,), _ = compared(base, Does(lambda x: functional.linear(x.flip(-1), weight.flip(-1))), x)
    assert found.ok


def test_infinite_entries_of_a_sum_leave_the_others_be() -> None:
    mask = torch.zeros(4, 4).fill_diagonal_(float("-inf"))
    x = noise(4, 64)
    with RoundedOtherwise(0):
        moved = torch.addmm(mask, x, x.mT)
    assert torch.equal(moved.isfinite(), mask.isfinite())
    torch.testing.assert_close(moved, torch.addmm(mask, x, x.mT), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [torch.lgamma, torch.digamma, lambda x: x * torch.hamming_window(8),
     lambda x: functional.interpolate(x[None], scale_factor=2, mode="bilinear")],
)  # fmt: skip
def test_kernels_that_sum_no_products_are_left_alone(function: Any) -> None:
    x = noise(2, 8, 8).abs() + 1
    with RoundedOtherwise(0):
        found = function(x)
    assert torch.equal(found, function(x))


@pytest.mark.parametrize(
    "function",
    [lambda x: functional.scaled_dot_product_attention(x, x, x), lambda x: x @ x.mT,
     lambda x: torch.dot(x.flatten(), x.flatten()), lambda x: functional.conv1d(x[0], x[0])],
)  # fmt: skip
def test_kernels_that_sum_products_are_nudged(function: Any) -> None:
    x = noise(1, 4, 8, 8)
    with RoundedOtherwise(0):
        found = function(x)
    assert not torch.equal(found, function(x))
    torch.testing.assert_close(found, function(x), rtol=1e-5, atol=1e-4)


class Checks(nn.Module):
    """Takes one input alone, bit by bit, and may count its calls."""

    def __init__(self, x: Tensor, by: float, *, counts: bool) -> None:
        super().__init__()
        self.x, self.by = x, by
        if counts:
            self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if "count" in self._buffers:
            self.count = self.count + self.by
        if not torch.equal(x, self.x):
            raise ValueError("these are no whole numbers")
        return x * self.by


@pytest.mark.parametrize("counts", [False, True])
def test_an_original_that_refuses_nudged_inputs_is_compared_as_it_is(counts: bool) -> None:
    x = noise(4, 64)
    base, other = (Checks(x, by, counts=counts) for by in (1.0, 1.001))
    found, notes = compared(base, other, x)
    assert [one.ok for one in found] == [False] * (1 + counts)
    assert any("these are no whole numbers" in note for note in notes)
    if counts:
        assert float(base.count) == 1.0  # of one run


def test_buffers_that_forward_adds_are_no_error() -> None:
    class Grows(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            if "seen" not in self._buffers:
                self.register_buffer("seen", x.mean(0))
            self.count += self.by
            return x

    found, _ = compared(Grows(1.0), Grows(1.001), noise(4, 64))
    assert [one.what for one in found if not one.ok] == ["buffers"]


def test_one_more_draw_may_move_twice_as_far_and_no_farther() -> None:
    e = noise(100).clamp(-1, 1)
    e[0] = 1  # the scale
    nudged = [e + 1e-4 * torch.linspace(-1, 1, 100) * sign for sign in (1, -1)]
    for factor, passes in ((0.5, True), (0.99 * MARGIN, True), (1.01 * MARGIN, False)):
        got = e.clone()
        got[50] += 1e-4 * factor
        assert held_against(e, got, nudged, 1e-6).is_rounding(1e-6) is passes


def test_beside_jumps_those_near_to_it_are_not_judged_and_steady_ones_are() -> None:
    e = noise(100)
    moves = torch.full((100,), 0.1)
    moves[98], moves[99] = 5e-3, 1e-6  # nearly jumps; steady
    nudged = [e + moves * sign for sign in (1, -1)]
    got = e.clone()
    got[98] += 0.2
    one = held_against(e, got, nudged, 1e-6)
    assert (one.jumping, one.is_rounding(1e-6)) == (99, True)
    got[99] += 1e-3
    assert not held_against(e, got, nudged, 1e-6).is_rounding(1e-6)
    steady = [e + moves.clamp(max=5e-3) * sign for sign in (1, -1)]  # nothing jumps
    got = e.clone()
    got[98] += 0.2
    assert not held_against(e, got, steady, 1e-6).is_rounding(1e-6)
    got[0] = 100.0  # nothing that the original gives
    assert not held_against(e, got, nudged, 1e-6).is_rounding(1e-6)
