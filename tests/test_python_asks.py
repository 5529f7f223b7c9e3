"""What Python asks of a traced value: text, types, copies; and what is only shown."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aim_surgery
from aim_surgery.capture import capture
from aim_surgery.config import AimConfig
from tests.cases import assert_same

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLAIN = AimConfig(write="none", budget=None, memory=8)


class Asks(nn.Module):
    """(N, 8) -> the same; `ask` decides whether another layer follows, which it does."""

    def __init__(self, ask: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.ask = ask
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.ask(x)
        x = self.first(x)
        return self.second(x) if asked else x


def matches(x: Tensor) -> bool:
    names = {"8"}
    return "%s" % x.shape[-1] in names  # noqa: UP031 - old code


QUESTIONS: dict[str, Callable[[Tensor], bool]] = {
    "str": lambda x: str(x.shape[-1]) in {"8"},
    "repr": lambda x: repr(x.shape[1:]) == "torch.Size([8])",
    "percent": matches,
    "join": lambda x: "x".join(map(str, x.shape[1:])) == "8",
    "a list's": lambda x: str([*x.shape[1:]]) == "[8]",
    "format": lambda x: "{}".format(x.shape[1]) == "8",  # noqa: UP032 - old code
    "dtype": lambda x: str(x.dtype) == "torch.float64",
    "device": lambda x: "cpu" in str(x.device),
    "type of a tensor": lambda x: type(x) is torch.Tensor,
    "type of a size": lambda x: type(x.shape[0]) is int,
    "type of chunks": lambda x: type(x.chunk(2)) is tuple,
    "type of a list": lambda x: type([x]) in (list, tuple),
    "type as a class": lambda x: isinstance(int, type) and issubclass(type, type),
    "type as a maker": lambda x: type("Made", (), {"a": 1}).a == 1,  # pyright: ignore[reportAttributeAccessIssue]
    "copy of a size": lambda x: copy.copy(x.shape)[1] == 8,
    "deep copy": lambda x: copy.deepcopy(x.shape)[1] == 8,
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("emit", ["graph", "auto"])
def test_the_model_is_answered_as_without_a_trace(question: str, emit: Any) -> None:
    model = Asks(QUESTIONS[question]).double().eval()
    gm = aim_surgery.transform(model, X, config=PLAIN, emit=emit)
    assert_same(gm(X), model(X))
    assert {read.site.name for read in gm.aim.plan.reads} == {"first", "second"}


def test_text_that_decides_is_assumed() -> None:
    gm = aim_surgery.transform(Asks(lambda x: str(x.shape[0]) == "2").double(), X, emit="graph")
    with pytest.raises(AssertionError, match="breaks what the graph"):
        gm(torch.randn(3, 8).double())


def printed(x: Tensor) -> bool:
    print("shape", x.shape, f"of {x.shape[0]} samples")
    return True


def test_nothing_is_assumed_of_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = Asks(printed).double().eval()
    gm = aim_surgery.transform(model, X, emit="graph", config=PLAIN)
    assert "shape torch.Size([2, 8]) of 2 samples" in capsys.readouterr().out
    assert_same(gm(X[:1]), model(X[:1]))


class Named(nn.Module):
    """(N, T, 8) -> the same, by a layer that T names."""

    def __init__(self) -> None:
        super().__init__()
        self.w3, self.w4 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        layer = getattr(self, f"w{x.shape[1]}")
        torch._assert(x.ndim == 3, "expected 3 dimensions")
        return layer(x)


def test_a_message_with_the_same_digits_takes_no_assumption_back() -> None:
    gm = aim_surgery.transform(Named(), torch.randn(2, 3, 8), emit="graph")
    with pytest.raises(AssertionError, match="breaks what the graph"):
        gm(torch.randn(2, 4, 8))


def test_a_number_that_is_shown_and_used_is_assumed() -> None:
    def ask(x: Tensor) -> bool:
        torch._assert(x.shape[0] > 0, f"{x.shape[0]} samples")
        return str(x.shape[0]) == "2"

    gm = aim_surgery.transform(Asks(ask).double(), X, emit="graph")
    with pytest.raises(AssertionError, match="breaks what the graph"):
        gm(torch.randn(3, 8).double())


class Copies(nn.Module):
    """(N, 8) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept = copy.deepcopy(x)
        return self.fc(copy.copy(x).mul_(2)) + kept + x


def test_copies_of_tensors_are_recorded() -> None:
    model = Copies().double().eval()
    gm = aim_surgery.transform(model, X, config=PLAIN)
    assert_same(gm(X.clone()), model(X.clone()))


DTYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "of a factory": lambda x: torch.tensor([0.5], dtype=float, device=x.device),  # type: ignore[arg-type]
    "of a method": lambda x: x.new_ones(8, dtype=int),  # type: ignore[arg-type]
    "converted": lambda x: (x > 0).to(float),  # type: ignore[call-overload]
    "summed": lambda x: x.sum(-1, keepdim=True, dtype=complex).real,  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", DTYPES)
def test_types_of_python_are_dtypes_to_torch(case: str) -> None:
    class Typed(nn.Module):
        """(N, 8) -> the same."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + DTYPES[case](x)

    model = Typed().double().eval()
    gm = aim_surgery.transform(model, X, config=PLAIN, emit="graph")
    assert_same(gm(X), model(X))


class Catches(nn.Module):
    """(N, 8) -> the same; what a graph can't know decides, in a `try`."""

    def __init__(self, attempt: Callable[[Tensor], Tensor], error: type[Exception]) -> None:
        super().__init__()
        self.attempt, self.error = attempt, error
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            x = self.attempt(x)
        except self.error:
            x = -x
        return self.fc(x)


def positive(x: Tensor) -> Tensor:
    return 2 * x if x.sum() > -1e9 else x


@pytest.mark.parametrize(
    ("attempt", "error", "reason"),
    [
        (lambda x: x.view(3, -1, 8), RuntimeError, "catches an error of"),
        (lambda x: x.unbind()[5], IndexError, "catches an error of"),
        (lambda x: torch.stack(x.unbind()[2:]), RuntimeError, "catches an error of"),
        (positive, Exception, "asks for tensor data"),
    ],
)
def test_errors_that_a_model_catches_do_not_decide_for_good(
    attempt: Callable[[Tensor], Tensor], error: type[Exception], reason: str
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Catches(attempt, error), nn.Linear(8, 8)).double().eval()
    (trace,) = capture(model, X).traces
    assert [reason in call.reason for call in trace.opaque] == [True]
    gm = aim_surgery.transform(model, X, config=PLAIN)
    assert_same(gm(X), model(X))
    for samples in (3, 4, 6):
        x = torch.randn(samples, 8).double()
        assert_same(gm(x), model(x))


SIZED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "fft": lambda x, w: torch.fft.fft(x, n=w).real,
    "irfft2": lambda x, w: torch.fft.irfft2(torch.fft.rfft2(x), s=(w, w)),
    "kthvalue": lambda x, w: torch.kthvalue(x, w // 2)[0],
    "tensor_split": lambda x, w: torch.tensor_split(x, (w // 2,), -1)[0],
    "min": lambda x, w: x[..., : min(x.shape[-2], w) - 2],
    "max": lambda x, w: x[..., : max(x.shape[-2:]) // 2],
    "max of a list": lambda x, w: x / max([w, 5, x.shape[-2] / 2]),
    "divmod": lambda x, w: x[..., : sum(divmod(w, 3))],
    "divmod by it": lambda x, w: x[..., : divmod(100, w)[1]],
    "round": lambda x, w: x[..., : round(w / 2)],
    "ceil": lambda x, w: x[..., : math.ceil(w / 2)],
}


@pytest.mark.parametrize("use", SIZED)
def test_sizes_stay_sizes(use: str) -> None:
    class Sized(nn.Module):
        """(N, 3, H, W) -> something of a size of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return SIZED[use](x, x.shape[-1])

    model = Sized().double().eval()
    gm = aim_surgery.transform(model, torch.randn(2, 3, 16, 16).double(), config=PLAIN)
    for height, width in ((16, 16), (12, 18), (20, 14)):
        x = torch.randn(3, 3, height, width).double()
        assert_same(gm(x), model(x))


def test_the_least_of_tensors_is_still_data() -> None:
    class Least(nn.Module):
        """(N, 8) -> (N, 8)."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * min(x.sum(), x.prod())

    model = nn.Sequential(Least()).double().eval()
    gm = aim_surgery.transform(model, X, config=PLAIN)
    for x in (X, -X):
        assert_same(gm(x), model(x))


def test_where_torch_alone_asks_there_is_no_line_to_show() -> None:
    """The innermost line outside torch and this package is the caller's, who asked nothing."""
    inputs = torch.randn(3, 4, 8)
    (traced, _) = capture(nn.TransformerEncoderLayer(8, 2, 16), inputs).traces
    assert {one.place for one in traced.assumptions} == {None}
    (traced,) = capture(nn.Sequential(Asks(lambda x: x.shape[0] > 0)), inputs).traces
    assert {one.place[0] for one in traced.assumptions if one.place} == {__file__}
