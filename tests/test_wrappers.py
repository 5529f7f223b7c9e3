"""Models as people have them: the inner one is operated, or the error says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, CaptureError
from tests.cases import assert_same, mlp

LITERAL = AimConfig(memory=8, budget=None)
X = torch.randn(3, 8, dtype=torch.float64)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_is_taken_off_and_noted(wrap: Any) -> None:
    inner = model()
    wrapped = wrap(inner)
    gm: Any = aim_surgery.transform(wrapped, X, config=LITERAL)
    assert set(inner.state_dict()) < set(gm.state_dict())
    assert any("taken off" in note for note in gm.plan.notes)
    assert_same(gm(X), inner(X))
    assert aim_surgery.apply(wrapped, gm.plan).plan == gm.plan


def test_compiled_parts_are_traced_through() -> None:
    part, whole = model(), model()
    part[0] = torch.compile(part[0], backend="eager")  # type: ignore[call-overload]
    whole[0].compile(backend="eager")
    for case in (part, whole):
        gm: Any = aim_surgery.transform(case, X, config=LITERAL)
        assert len(gm.plan.reads) == 2
        assert_same(gm(X), case(X))


@pytest.mark.parametrize(
    "mark", ["mark_static_address", "mark_static", "mark_dynamic", "maybe_mark_dynamic"]
)
def test_what_the_compiler_is_told_of_a_tensor_stops_no_trace(mark: str) -> None:
    import torch._dynamo

    class Marks(nn.Module):
        """(N, 8) -> the same; caches of transformers do this."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x)
            getattr(torch._dynamo, mark)(x, *([] if mark == "mark_static_address" else [0]))
            return self.fc(x)

    original = getattr(torch._dynamo, mark)
    case = Marks().double()
    gm: Any = aim_surgery.transform(case, X, config=LITERAL, emit="graph")
    assert_same(gm(X), case(X))
    assert getattr(torch._dynamo, mark) is original


def test_lazy_layers_are_refused_until_they_have_weights() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4)).double()
    with pytest.raises(CaptureError, match=r"0 is a LazyLinear .* call the model once"):
        aim_surgery.transform(lazy, X)
    lazy(X)
    assert_same(aim_surgery.transform(lazy, X, config=LITERAL)(X), lazy(X))


def test_example_inputs_follow_a_model_to_the_meta_device() -> None:
    gm: Any = aim_surgery.transform(mlp().to("meta"), torch.randn(2, 16), config=LITERAL)
    assert gm(torch.empty(2, 16, device="meta")).device.type == "meta"
    plan = aim_surgery.plan(model().to("meta"), {"input": X}, config=LITERAL)
    assert len(plan.reads) == 2


def test_a_weight_that_is_asked_for_its_dtype_is_widened_all_the_same() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.to(self.fc.weight.dtype))

    plan = aim_surgery.plan(Asks().double(), X, config=LITERAL)
    assert [read.site.widens for read in plan.reads] == [True]


def test_what_can_not_be_captured_is_shown_with_its_line() -> None:
    class OnData(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else x

    line = r"tests/test_wrappers.py:\d+ `return self.fc\(x\) if x.sum\(\) > 0 else x`"
    with pytest.raises(CaptureError, match=line):
        aim_surgery.transform(OnData().double(), X, emit="graph")


class Padded(nn.Module):
    """A transformer's encoder with a mask of positions and one of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x, mask, padding))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_verify_takes_wrapped_models_and_masks() -> None:
    inputs = (torch.randn(3, 8, dtype=torch.float64),)
    wrapped: Any = torch.compile(model(), backend="eager")
    assert aim_surgery.verify(wrapped, aim_surgery.transform(wrapped, *inputs), *inputs).ok
    padded = Padded().double()
    mask, padding = torch.eye(5, dtype=torch.bool).roll(1, 1), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    example = (torch.randn(3, 5, 8, dtype=torch.float64), mask, padding)
    result = aim_surgery.verify(padded, aim_surgery.transform(padded, example), example)
    assert result.ok, str(result)
    assert torch.backends.mha.get_fastpath_enabled()
