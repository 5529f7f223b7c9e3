"""What a forward does besides computing: after a trace the model is as it was, in every corner."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import aim_surgery
from aim_surgery import AimConfig, transform
from aim_surgery.capture.proxy import ValueProxy
from tests.cases import assert_same

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAST: Any = None
TABLES: dict[str, Any] = {"kept": []}


class Notes:
    """A plain object of the model's own."""

    def __init__(self) -> None:
        self.last: Any = None
        self.steps = 0


class Words(dict):
    """A dict that gives something else than it holds."""

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)


class Busy(nn.Module):
    """(N, 8) -> the same."""

    cache: dict[str, Any] = {"table": None}  # noqa: RUF012 - as people write it
    last: Any = None
    calls = 0

    def __init__(self, act: Callable[[Busy, Tensor], None]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.act = act
        self._private: list[Any] = []
        self.nested: dict[str, Any] = {"list": [], "dict": {"deep": set()}}
        self.recent: collections.deque[Any] = collections.deque(maxlen=2)
        self.ordered: dict[str, Any] = collections.OrderedDict(a=1)
        self.words = Words(a=1)
        self.notes, self.space = Notes(), types.SimpleNamespace(x=None, more=[])
        self.others = [nn.Linear(8, 8)]  # no child
        self.counts = np.zeros(3)
        self.kept = 5

    def forward(self, x: Tensor) -> Tensor:
        self.act(self, x)
        return self.fc(x)


def state(value: Any, depth: int = 0) -> Any:
    """Everything in a value, as something to compare; objects by their attributes."""
    if depth > 8 or isinstance(value, type | types.FunctionType | types.ModuleType):
        return id(value)
    if type(value) is ValueProxy or isinstance(value, FakeTensor):
        return "of a trace"
    if isinstance(value, Tensor | np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return type(value), [(k, state(v, depth + 1)) for k, v in dict.items(value)]
    if isinstance(value, list | tuple | set | collections.deque):
        return type(value), [state(item, depth + 1) for item in value]
    if hasattr(value, "__dict__"):
        return id(value), state(vars(value), depth + 1)
    return value


def look(model: nn.Module) -> Any:
    own = {key: value for key, value in vars(Busy).items() if not key.startswith("__")}
    return state(vars(model)), state(own), state(LAST), state(TABLES)


def warm(model: Busy, x: Tensor) -> None:
    if model.cache["table"] is None:
        model.cache["table"] = torch.arange(x.shape[1])


def set_last(model: Busy, x: Tensor) -> None:
    global LAST
    LAST = x


def delete(model: Busy, x: Tensor) -> None:
    if hasattr(model, "kept"):
        del model.kept


def count(model: Busy, x: Tensor) -> None:
    type(model).calls += 1
    type(model).last = x


def add_to_counts(model: Busy, x: Tensor) -> None:
    model.counts += 1


def remember_in_a_stranger(model: Busy, x: Tensor) -> None:
    model.others[0].seen = x


ACTS: dict[str, Callable[[Busy, Tensor], Any]] = {
    "a warm table": warm,
    "a private list": lambda model, x: model._private.append(x),
    "a nested list": lambda model, x: model.nested["list"].append(x),
    "a nested set": lambda model, x: model.nested["dict"]["deep"].add("new"),
    "a deque": lambda model, x: model.recent.append(x),
    "an ordered dict": lambda model, x: model.ordered.update(b=x),
    "a dict with ways": lambda model, x: model.words.update(b=x),
    "an object": lambda model, x: setattr(model.notes, "last", x),
    "an object's number": lambda model, x: setattr(model.notes, "steps", model.notes.steps + 1),
    "a namespace": lambda model, x: model.space.more.append(x),
    "a module that is no child": remember_in_a_stranger,
    "an array": add_to_counts,
    "a deleted attribute": delete,
    "a class": count,
    "a file": set_last,
    "a file's dict": lambda model, x: TABLES["kept"].append(x),
}


@pytest.mark.parametrize("act", ACTS)
def test_the_model_is_as_it_was(act: str) -> None:
    model = Busy(ACTS[act]).double().eval()
    before = look(model)
    gm: Any = aim_surgery.transform(model, X, emit="graph")
    assert look(model) == before
    assert any("is set inside forward" in note for note in gm.aim.plan.notes)
    expected = nn.functional.linear(X, model.fc.weight, model.fc.bias)
    assert_same(gm(X), expected)
    model(X)
    assert look(model) != before, "the forward does nothing that could be seen"
    Busy.cache["table"], Busy.calls, Busy.last = None, 0, None
    TABLES["kept"].clear()
    set_last(model, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keep",
    [
        lambda h: {"h": h},
        lambda h: (h, [h]),
        lambda h: collections.deque([{"h": h}]),
        lambda h: torch.distributions.Normal(h, 1.0),
    ],
)
def test_activations_that_a_model_keeps_are_copied_without_history(keep: Any) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.kept = nn.Linear(8, 8), nn.Linear(8, 2), None

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            self.kept = keep(hidden)
            return self.second(hidden)

    model, x = Keeps(), torch.randn(2, 8)
    config = AimConfig(write="none", budget=None, memory=8)
    for emit in ("auto", "module"):
        gm: Any = transform(model, x, config=config, emit=emit)
        expected = model(x), gm(x)  # both keep something with a history now
        assert aim_surgery.verify(model, gm, x).ok
        gm.eval()
        for changed in (
            aim_surgery.restore(gm),
            aim_surgery.fold(gm),
            aim_surgery.lower(gm, "split"),
        ):
            torch.testing.assert_close(changed(x), expected[1])
        torch.testing.assert_close(transform(model, x, config=config, emit=emit)(x), expected[0])
