"""`x in entries` is one question: the graph takes whatever gives the same answer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aim_surgery import AimConfig, transform, verify
from aim_surgery.capture import capture
from aim_surgery.capture.membership import entries_asked
from tests.cases import assert_same

FLOATS = [torch.float16, torch.float32, torch.float64]
X = torch.randn(2, 3, 4)


class Asks(nn.Module):
    """Asks for dtype and sizes, by entries written there, and by names of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.lengths = (1, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in FLOATS:
            x = x.float()
        if x.shape[1] in self.lengths:
            x = 2 * x
        return self.layer(x) if x.shape[0] not in (7, 9) else x


def claims(model: nn.Module) -> set[str]:
    return {one.claim for trace in capture(model, X).traces for one in trace.assumptions}


def test_one_question_for_all_entries() -> None:
    dtypes = "(torch.float16, torch.float32, torch.float64)"
    assert claims(Asks()) == {
        f"x.dtype in {dtypes} is true",
        "x.shape[1] in (1, 3, 5) is true",
        "mul.shape[0] in (7, 9) is false",
    }


def test_inputs_with_the_same_answers_are_taken() -> None:
    model: Any = Asks()
    gm = transform(model, X, config=AimConfig(budget=None, memory=48))
    for x in (X, torch.randn(4, 1, 4), torch.randn(8, 5, 4)):
        assert_same(gm(x), model(x))
    for x in (torch.randn(2, 2, 4), torch.randn(7, 3, 4)):
        with pytest.raises(AssertionError, match="breaks what the graph was captured with"):
            gm(x)
    assert verify(model, gm, X).ok
    assert_same(gm.double()(X.double()), model.double()(X.double()))
    with pytest.raises(AssertionError, match=r"dtype in"):
        gm.bfloat16()(X.bfloat16())


def test_entries_that_are_computed_are_asked_one_by_one() -> None:
    class Computed(Asks):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.shape[1] in (len(self.lengths), 4) else x

    assert claims(Computed()) == {"x.shape[1] == 3 is true"}


def test_code_without_source_is_asked_one_by_one() -> None:
    space: dict[str, Any] = {"Asks": Asks}
    exec(  # as in a template of code: there is no file to read
        "class Sourceless(Asks):\n"
        "    def forward(self, x):\n"
        "        return self.layer(x) if x.shape[1] in (2, 3) else x\n",
        space,
    )
    assert claims(space["Sourceless"]()) == {"x.shape[1] == 2 is false", "x.shape[1] == 3 is true"}


def test_comparisons_elsewhere_are_no_membership() -> None:
    class Probe:
        asked: Any = ()

        def __eq__(self, other: object) -> bool:
            Probe.asked = entries_asked(sys._getframe(1), (int,))
            return False

        __hash__ = None  # pyright: ignore[reportAssignmentType]

    assert Probe() not in (4, 5)
    assert Probe.asked == (4, 5)
    Probe.asked = ()
    assert Probe() != 5
    assert Probe.asked is None
    assert not Probe() == 4  # noqa: SIM201 - the comparison itself
    assert Probe.asked is None
    assert Probe() not in [4, "5"]
    assert Probe.asked is None
