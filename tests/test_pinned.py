"""Modules that ask for the batch size as Python's own: the batch stays free around them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, transform
from aim_surgery.capture import capture, pinned
from aim_surgery.nn.graph_module import AimGraphModule
from tests.cases import BatchAsNumber, FixedBatch, OneByOneInTraining, PerSample, assert_same

WIDE = AimConfig(budget=None, memory=48)
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def between(*inner: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *inner, nn.Linear(8, 8)).double()


def opaque_paths(model: nn.Module) -> list[list[str]]:
    return [[call.path for call in trace.opaque] for trace in capture(model, X).traces]


@pytest.mark.parametrize("kind", [PerSample, BatchAsNumber])
def test_who_asks_for_the_batch_size_stays_one_call(kind: type[nn.Module]) -> None:
    model = between(nn.Sequential(kind(), nn.ReLU()), kind())
    assert opaque_paths(model) == [["1.0", "2"]]
    gm = transform(model, X, config=WIDE)
    assert isinstance(gm, AimGraphModule)
    assert {r.site.name: r.site.inside for r in gm.plan.reads} == {
        "0": "", "1.0.fc": "1.0", "2.fc": "2", "3": ""
    }  # fmt: skip
    notes = "; ".join(note for note in gm.plan.notes if "stay" in note)
    assert re.search(r"1.0.* stays? (a )?Python calls?: other batch sizes would be refused", notes)
    assert "at tests/cases.py:" in notes
    for batch in (1, 3, 4, 9):
        x = torch.randn(batch, 8, dtype=torch.float64)
        assert_same(gm(x), model(x))
    assert aim_surgery.verify(model, gm, X).ok


def test_without_it_other_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned._Stretched, "changes", lambda *_: False)
    model = between(PerSample())
    assert opaque_paths(model) == [[]]
    assert not aim_surgery.verify(model, transform(model, X, config=WIDE), X).ok


def test_all_modules_of_one_kind_cost_one_more_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    takes = pinned._takes
    monkeypatch.setattr(pinned, "_takes", lambda *args: runs.append(args) or takes(*args))
    assert opaque_paths(between(*(BatchAsNumber() for _ in range(7))))[0] == [*"1234567"]
    assert len(runs) == 1


@pytest.mark.parametrize("training", [False, True])
def test_both_modes_agree_on_it(training: bool) -> None:
    class TwoModes(PerSample):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + 1 if self.training else self.fc(x)

    model = between(OneByOneInTraining(), TwoModes()).train(training)
    assert opaque_paths(model) == [["1"], ["1"]]
    gm = transform(model, X, config=WIDE)
    assert aim_surgery.verify(model, gm, X).ok
    for mode in (True, False):
        assert_same(gm.train(mode)(X[:3]), model.train(mode)(X[:3]))


def test_a_model_that_asks_itself_keeps_its_class() -> None:
    class Root(PerSample):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.fc(x))

    model = Root().double()
    gm: Any = transform(model, X, config=WIDE)
    assert gm.__class__ is Root
    assert gm.aim.plan.emit == "module"
    (note,) = [note for note in gm.aim.plan.notes if "own forward stays" in note]
    assert "other batch sizes would be refused" in note
    assert aim_surgery.verify(model, gm, X).ok
    graph = transform(model, X, config=WIDE, emit="graph")
    assert any("other batch sizes would be refused" in note for note in graph.plan.notes)
    assert_same(graph(X), model(X))
    with pytest.raises(AssertionError, match="breaks what the graph was captured with: len"):
        graph(X[:3])


def test_lists_of_samples_are_batches() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = PerSample()

        def forward(self, images: list[Tensor]) -> Tensor:
            return self.inner(torch.stack(images))

    model = Listed().double()
    gm = transform(model, (list(X),), config=WIDE)
    for batch in (1, 4, 5):
        x = list(torch.randn(batch, 8, dtype=torch.float64))
        assert_same(gm(x), model(x))


def test_a_model_of_one_batch_size_is_traced() -> None:
    model = between(FixedBatch())
    assert opaque_paths(model) == [[]]
    gm = transform(model, X, config=WIDE)
    assert_same(gm(X), model(X))
    with pytest.raises(AssertionError, match="breaks what the graph was captured with"):
        gm(X[:3])


def test_an_exported_program_of_a_fixed_batch_stays_a_graph() -> None:
    program = torch.export.export(between(nn.ReLU()), (X,))
    gm = transform(program, config=WIDE)
    assert isinstance(gm, AimGraphModule)
    assert not [note for note in gm.plan.notes if "batch" in note]


def test_questions_that_leave_the_batch_free_cost_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(PerSample):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 0 or x.shape[1] % 4 or x.ndim != 2 or len(x) < 1:
                return x
            left, right = self.fc(x).reshape(-1, 4, 2).permute(2, 0, 1).unbind(0)
            return torch.cat([right, left], 1).view(x.shape[0], -1)

    monkeypatch.setattr(pinned, "_twin", lambda *_: pytest.fail("is run"))
    for batch in (1, 2, 4):
        (trace,) = capture(between(Asks()), X[:batch]).traces
        assert trace.assumptions
        assert not trace.opaque


def test_a_batch_of_one_is_freed_as_well() -> None:
    (trace, *_) = capture(between(PerSample()), X[:1]).traces
    assert [call.path for call in trace.opaque] == ["1"]


def test_tensors_of_two_arguments_are_no_list_of_samples() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(9, 8), PerSample()

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.inner(self.embed(tokens) * mask[..., None])

    model, tokens = Two(), torch.randint(9, (2, 5))
    gm = transform(model, (tokens, tokens % 2), config=WIDE)
    for batch in (1, 2, 3):
        given = tokens[:1].expand(batch, 5)
        assert_same(gm(given, given % 2), model(given, given % 2))


def test_a_model_of_which_there_is_no_copy_is_traced_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: Any) -> nn.Module:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pinned, "_twin", refuses)
    assert opaque_paths(between(PerSample())) == [[]]


def test_runs_on_a_copy_leave_constants_and_modes_alone() -> None:
    class Own(nn.Linear):
        def train(self, mode: bool = True) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().train(mode)

    model, constant = Own(8, 8), torch.zeros(3)
    twin: Any = pinned._twin(model, False, {"constant": constant})
    twin.constant.add_(1)
    assert not constant.any()
    assert (twin.training, model.training) == (False, True)


def test_a_train_that_returns_nothing_is_called_all_the_same() -> None:
    class Own(PerSample):
        def train(self, mode: bool = True) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().train(mode)

        def forward(self, x: Tensor) -> Tensor:  # no graph holds this
            return self.fc(x) if float(x.sum()) > 0 else self.fc(x) - 1

    model = Own().double()
    gm: Any = transform(model, X, config=WIDE)
    assert gm.aim.plan.emit == "module"
    assert_same(gm(X), model(X))
    assert_same(gm(-X), model(-X))


class Picks(nn.Module):
    """Gives as many tokens as the data says, and nothing beside where those are few."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        kept = x[:, : 1 + int(x[0, 0, 0] > 0)]
        return kept, (kept if kept.shape[1] > 1 else None)


class UsesPicks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.picks, self.fc = Picks(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept, beside = self.picks(x)
        return self.fc(kept) if beside is None else self.fc(kept) + beside


def test_who_asks_what_data_gave_stays_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = between(UsesPicks())
    x = torch.rand(4, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()  # or the sign would not arrive
    monkeypatch.setattr(pinned, "_normal_noise", lambda t: -torch.rand_like(t))
    gm = transform(model, (x,), config=AimConfig(budget=None, memory=48, write="none"))
    assert [[call.path for call in t.opaque] for t in capture(model, (x,)).traces] == [["1"]]
    assert any("other data would be refused" in note for note in gm.plan.notes)
    for each in (x, -x):
        assert_same(gm(each), model(each))
    monkeypatch.setattr(pinned, "_asked_of_calls", lambda *_: [])
    narrow = transform(model, (x,), config=AimConfig(budget=None, memory=48, write="none"))
    with pytest.raises(AssertionError, match="breaks what the graph was captured with"):
        narrow(-x)
