"""What code remembers from call to call: a trace takes nothing from it and leaves nothing there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import aim_surgery
from aim_surgery.capture import capture
from tests.cases import assert_same

RAN: list[str] = []
TABLES: dict[Any, torch.Tensor] = {}


@functools.lru_cache(maxsize=4)
def ramp(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(length, dtype=dtype) / length


@functools.cache
def scale() -> float:
    RAN.append("scale")
    return 0.5


@functools.cache
def four() -> torch.Tensor:
    return torch.ones(4)


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of a library: the cache is in a cell of what it returns."""
    cached = functools.lru_cache(maxsize=2)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return cached(*args)

    return wrapper


def tabled(length: int) -> torch.Tensor:
    if length not in TABLES:
        TABLES[length] = torch.linspace(0, 1, length)
    return TABLES[length]


class Layer(nn.Module):
    """(N, L, 4) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)


class ByFunction(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + ramp(x.shape[1], x.dtype)[:, None] * scale() + four()


class ByStaticMethod(Layer):
    @staticmethod
    @remembering
    def table(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(shape[1:], dtype=dtype).cumsum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.table(x.shape, x.dtype)


class ByMethod(Layer):
    @functools.lru_cache(maxsize=4)  # noqa: B019 - what is tested
    def doubled(self) -> torch.Tensor:
        return self.fc.weight * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x @ self.doubled()


class ByProperty(Layer):
    @functools.cached_property
    def doubled(self) -> torch.Tensor:
        return self.fc.weight * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + x @ self.doubled


class ByAttribute(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.remembered = functools.lru_cache(maxsize=2)(torch.zeros_like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.remembered(x)


class OnDataWithTable(nn.Module):
    """Stays a Python call, and is run on fake values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + ramp(x.shape[1], x.dtype)[:, None] + four()
        return y if x.sum() > 0 else 2 * y


class Opaque(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OnDataWithTable()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.fc(x))


KINDS = (ByFunction, ByStaticMethod, ByMethod, ByProperty, ByAttribute, Opaque)


@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_remembered(kind: type[Layer], used: bool) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 3, 4)
    if used and kind is not ByProperty:  # which the original itself would not compute anew
        model(x)
    first = aim_surgery.transform(model, (x,))
    operated = aim_surgery.transform(model, (x,))  # takes nothing of the first one
    assert isinstance(model(x), torch.Tensor)
    assert type(model(x)) is torch.Tensor
    for gm in (first, operated):
        for length in (3, 5):
            other = torch.randn(2, length, 4)
            assert_same(gm(other), model.forward(other), tolerance=1e-6)
    ByMethod.doubled.cache_clear()
    model.__dict__.pop("doubled", None)
    wide, doubles = torch.randn(2, 3, 4, dtype=torch.float64), operated.double()
    assert_same(doubles(wide), model.double()(wide), tolerance=1e-14)
    assert doubles(wide).dtype == torch.float64


def test_caches_are_put_back_and_plain_results_stay() -> None:
    model, x = ByFunction(), torch.randn(2, 3, 4)
    own = ramp
    ramp.cache_clear()
    kept = ramp(7, torch.float32)
    scale.cache_clear()
    RAN.clear()
    capture(model, x)
    capture(model, x)
    assert RAN == ["scale"]
    assert ramp is own
    assert ramp.cache_info().currsize == 1
    assert ramp(7, torch.float32) is kept
    assert type(four()) is torch.Tensor


class ByTable(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + tabled(x.shape[1])[:, None]


def test_tables_of_a_file_are_put_back() -> None:
    model, x = ByTable(), torch.randn(2, 3, 4)
    TABLES.clear()
    TABLES[9] = torch.linspace(0, 1, 9)
    captured = capture(model, x)
    assert list(TABLES) == [9]
    assert any("TABLES" in note for note in captured.notes)
    gm = aim_surgery.transform(model, (x,))
    assert list(TABLES) == [9]
    assert_same(gm(x), model(x), tolerance=1e-6)
