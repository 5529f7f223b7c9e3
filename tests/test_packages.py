"""Code of other packages, called by a forward, sees in a proxy what the model's own code sees."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tests
from aim_surgery.capture import capture
from aim_surgery.capture.packages import packages_of

SOURCE = """
import functools
import torch

def swap(x):
    if not isinstance(x, torch.Tensor):
        raise RuntimeError(f"tensor type unknown: {type(x)}")
    return x.transpose(*_axes(len(x.shape)))

@functools.lru_cache
def _axes(count):
    return count - 2, count - 1
"""


OWN_FILES = {
    "tests.a_file": "from a_package_of_functions import swap\ndef flat(x):\n    return swap(x)",
    "tests.its_twin": "from tests import a_file\ndef flat(x):\n    return a_file.flat(x)",
}


@pytest.fixture
def own_files(elsewhere: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the package that the models below are in."""
    for name, source in OWN_FILES.items():
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(tests, name.rpartition(".")[2], module, raising=False)
        exec(compile(source, f"{name}.py", "exec"), vars(module))
    monkeypatch.setitem(globals(), "own_file", sys.modules["tests.a_file"])
    monkeypatch.setitem(globals(), "flat", vars(sys.modules["tests.its_twin"])["flat"])


@pytest.fixture
def elsewhere() -> Iterator[types.ModuleType]:
    module = types.ModuleType("a_package_of_functions")
    exec(compile(SOURCE, "a_package_of_functions.py", "exec"), vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


class CallsElsewhere(nn.Module):
    def __init__(self, module: types.ModuleType) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        globals()["swap"], globals()["elsewhere_module"] = module.swap, module

    def by_name(self, x: Tensor) -> Tensor:
        return swap(x)  # type: ignore[name-defined] # noqa: F821

    def by_module(self, x: Tensor) -> Tensor:
        return elsewhere_module.swap(x)  # type: ignore[name-defined] # noqa: F821

    def by_helper(self, x: Tensor) -> Tensor:
        return _helper(x)


class InForward(CallsElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.by_helper(x))


class InNested(CallsElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functools.reduce(lambda a, _: self.by_name(a), range(1), x))


class InModule(CallsElsewhere):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.by_module(x))


class KnowsOwnFiles(nn.Module):
    def __init__(self, _: types.ModuleType) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)


class InOwnModule(KnowsOwnFiles):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(own_file.flat(x))  # type: ignore[name-defined] # noqa: F821


class InTwins(KnowsOwnFiles):
    """Two functions of one name, in two files of one package."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(flat(x))  # type: ignore[name-defined] # noqa: F821


def _helper(x: Tensor) -> Tensor:
    return swap(x)  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize("kind", [InForward, InNested, InModule, InOwnModule, InTwins])
@pytest.mark.usefixtures("own_files")
def test_a_function_of_another_package_is_traced(
    kind: type[CallsElsewhere | KnowsOwnFiles], elsewhere: types.ModuleType
) -> None:
    model, x = kind(elsewhere).eval(), torch.randn(2, 8, 8)
    captured = capture(model, x)
    assert not captured.traces[0].opaque
    torch.testing.assert_close(
        torch.fx.GraphModule(captured.model, captured.graph)(x), model(x), rtol=0, atol=0
    )
    assert "isinstance" not in vars(elsewhere)


def test_what_a_forward_does_not_call_is_left_alone(elsewhere: types.ModuleType) -> None:
    names = {module.__name__ for module in packages_of(InForward(elsewhere).eval())}
    assert {"tests.test_packages", elsewhere.__name__} <= names
    assert not {"torch", "numpy", "functools", "pytest", "hypothesis"} & names
    assert packages_of(nn.Sequential(nn.Linear(2, 2))) == []
