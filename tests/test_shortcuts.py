"""Fake values that are known without asking torch are those that torch would give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensor

from aim_surgery.capture import shortcuts
from aim_surgery.capture.values import FakeValues


def spec(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def both(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """What we give and what torch gives, for the same fake values."""
    values = FakeValues()
    fakes = values.of_all(args), values.of_all(kwargs)
    ours = values.call(function, *fakes)
    with values.mode, torch.no_grad():
        return ours, function(*fakes[0], **fakes[1])


def inputs() -> list[torch.Tensor]:
    x = torch.zeros(2, 4, 3, 5)
    strided = torch.zeros(2, 8, 3, 5)[:, ::2]
    return [x, x.to(torch.bfloat16), x.to(memory_format=torch.channels_last), x.mT, strided, x[:0]]


def name_of(function: Callable[..., Any]) -> str:
    home = getattr(function, "__module__", type(function).__name__)
    return f"{home}.{function.__name__}"


def by_name(functions: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    return sorted(functions, key=name_of)


@pytest.mark.parametrize("function", by_name(shortcuts._ACTIVATIONS), ids=name_of)
def test_activations(function: Callable[..., Any]) -> None:
    for x in inputs():
        ours, theirs = both(function, x)
        assert isinstance(ours, FakeTensor)
        assert spec(ours) == spec(theirs)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    for x in inputs():
        each = [torch.ones(4, dtype=x.dtype) for _ in range(4)]
        ours, theirs = both(F.batch_norm, x, *each, training)
        assert spec(ours) == spec(theirs)
        ours, theirs = both(F.batch_norm, x, *each[:2], weight=each[2], training=training)
        assert spec(ours) == spec(theirs)
    mixed = [torch.ones(4) for _ in range(4)]
    ours, theirs = both(F.batch_norm, torch.zeros(2, 4, 3, dtype=torch.bfloat16), *mixed, training)
    assert spec(ours) == spec(theirs)


def test_in_place_gives_the_input_itself() -> None:
    values = FakeValues()
    x = values.of(torch.zeros(2, 3))
    assert values.call(F.relu, (x,), {"inplace": True}) is x
    assert values.call(F.dropout, (x, 0.5, False, True), {}) is x


@pytest.mark.parametrize("function", by_name(shortcuts._IN_PLACE), ids=name_of)
def test_in_place_ones_do_as_torch_does(function: Callable[..., Any]) -> None:
    values = FakeValues()
    for x in map(values.of, inputs()):
        before = spec(x)
        assert values.call(function, (x,), {"inplace": True}) is x
        with values.mode, torch.no_grad():
            assert function(x, inplace=True) is x
        assert spec(x) == before


def test_errors_are_torchs_own() -> None:
    values = FakeValues()
    x, one, four = (values.of(torch.zeros(*shape)) for shape in ((1, 3, 1), (3,), (4,)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        values.call(F.batch_norm, (x, one, one), {"training": True})
    wide = values.of(torch.zeros(2, 3, 5))
    with pytest.raises(RuntimeError):
        values.call(F.batch_norm, (wide, four, four), {})
    assert spec(values.call(F.batch_norm, (wide, one, one), {})) == spec(wide)


def test_a_known_shape_costs_no_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    values = FakeValues()
    x = values.of(torch.zeros(2, 3))

    def refuse(*_: Any) -> Any:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(type(values.mode), "dispatch", refuse)
    assert values.call(F.silu, (x,), {}).shape == (2, 3)
    with pytest.raises(AssertionError):
        values.call(torch.cumsum, (x, 0), {})
