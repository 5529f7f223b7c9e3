"""The way back: the original's names, shapes and function, to the bit where nothing was in use."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aim_surgery
from aim_surgery import (
    AimConfig,
    AimSurgeryError,
    CheckpointError,
    PlanError,
    disable,
    freeze_base,
    memory_parameters,
    restore,
)
from aim_surgery.checkpoint.back import fold_file, restore_file
from aim_surgery.checkpoint.models.loading import load_into
from aim_surgery.checkpoint.reading.kinds import read_state_dict
from aim_surgery.nn.graph_module import graphs_of
from aim_surgery.surgery.state_dict import memory_in_use, restore_state_dict, widen_state_dict
from tests.cases import CASES, Case, SmallNet, Tied, largest_difference

CASE_IDS = pytest.mark.parametrize("case", CASES, ids=str)
IMAGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
FORMS = pytest.mark.parametrize("form", ["concat", "split"])
NO_GRAPHLESS_READS = ("functional", "products", "weight_first", "one_linear")


def config(**changes: Any) -> AimConfig:
    return AimConfig(**{"memory": 40, "budget": None, **changes})


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """In both modes, with the same dropout; of a copy, whose statistics may change."""
    found, model = [], copy.deepcopy(model)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(3)
        found.append(model(x))
    return found


def small(**changes: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = SmallNet().double()
    return model, aim_surgery.transform(model, IMAGE, config=config(**changes))


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@CASE_IDS
@FORMS
@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("init", ["preserve", "fresh"])
def test_the_original_comes_back(case: Case, form: Any, emit: Any, init: Any) -> None:
    model, x = case.model(), case.input()
    if emit == "module" and case.name in NO_GRAPHLESS_READS:
        with pytest.raises(PlanError):  # nothing reads where no layer is called
            aim_surgery.transform(model, x, config=config(init=init), emit=emit, form=form)
        return
    gm = aim_surgery.transform(model, x, config=config(init=init), emit=emit, form=form)
    keys, code = list(gm.state_dict()), getattr(gm, "code", "")
    base: Any = restore(gm)
    fresh = case.model()
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(base.state_dict(), strict=True)
    expected = outputs(model, x)
    assert_equal(outputs(base, x), expected)
    assert_equal(outputs(fresh, x), expected)
    assert list(base.state_dict()) == list(fresh.state_dict())
    assert type(base) is type(model) if emit == "module" else "aim" not in base.code
    assert base.restored.exact == (init == "preserve")
    if init == "fresh":
        assert base.restored.difference > 0
    assert (list(gm.state_dict()), getattr(gm, "code", "")) == (keys, code)  # left unchanged


def test_equality_can_fail() -> None:
    model, gm = small()
    with torch.no_grad():
        gm.get_parameter("head.weight")[0, 0] += 1e-9
    with pytest.raises(AssertionError):
        assert_equal(outputs(restore(gm), IMAGE), outputs(model, IMAGE))


@FORMS
def test_what_was_trained_in_the_base_stays_and_the_difference_is_told(form: Any) -> None:
    _, gm = small()
    gm = aim_surgery.lower(gm, form)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        gm(IMAGE).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(gm.state_dict())
    base = restore(gm, IMAGE)
    gm.eval()
    expected = largest_difference(gm(IMAGE), base.eval()(IMAGE))
    assert base.restored.difference == pytest.approx(expected, rel=1e-9)
    assert expected > 1e-6
    assert set(base.restored.in_use) == {read.site.layer for read in gm.plan.reads}
    assert "not exact: 6 layers" in str(base.restored)
    with disable(gm):
        assert restore(gm).restored.exact
        assert largest_difference(gm(IMAGE), base(IMAGE)) < 1e-12
    wide = gm.get_parameter("stem.weight")
    assert torch.equal(base.get_parameter("stem.weight"), wide[:, :3])
    assert all(torch.equal(before[name], value) for name, value in gm.state_dict().items())
    assert restore(gm, measure=False).restored.difference is None


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_after_freeze_base_the_base_is_the_original_and_is_trained_again(emit: Any) -> None:
    torch.manual_seed(0)
    model = SmallNet().double()
    model.get_parameter("stem.bias").requires_grad_(False)
    expected = [outputs(model, IMAGE), copy.deepcopy(model.state_dict())]
    gm = aim_surgery.transform(model, IMAGE, config=config(), emit=emit)
    freeze_base(freeze_base(gm), statistics=True)
    optimizer = torch.optim.AdamW(memory_parameters(gm), lr=0.1)
    for _ in range(2):
        gm.train()(IMAGE).square().mean().backward()
        optimizer.step()
    base: Any = restore(gm)
    assert base.restored.difference > 1e-6
    for name, value in base.state_dict().items():
        assert torch.equal(value, expected[1][name])  # type: ignore[call-overload]
    for name, parameter in base.named_parameters():
        assert parameter.requires_grad == (name != "stem.bias")
    base.train()
    assert base.get_submodule("blocks.0.bn1").training
    base(IMAGE)
    assert not torch.equal(base.state_dict()["blocks.0.bn1.running_mean"],
                           expected[1]["blocks.0.bn1.running_mean"])  # type: ignore[call-overload]  # fmt: skip


@pytest.mark.parametrize("write", ["sample", "batch", "none"])
@pytest.mark.parametrize("emit", ["graph", "module"])
def test_a_restored_model_is_a_model_like_any_other(write: Any, emit: Any) -> None:
    model, _ = small()
    write = "none" if emit == "module" else write
    gm = aim_surgery.transform(model, IMAGE, config=config(write=write), emit=emit)
    base = restore(gm)
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert_equal(outputs(twin, IMAGE), outputs(model, IMAGE))
    again = aim_surgery.transform(base, IMAGE, config=config(write=write))
    assert_equal(outputs(restore(again), IMAGE), outputs(model, IMAGE))
    assert aim_surgery.verify(base, again, IMAGE).ok
    with pytest.raises(AimSurgeryError, match="expected an operated model"):
        restore(base)


def test_tied_weights_stay_tied() -> None:
    model, tokens = Tied().double(), torch.arange(6).reshape(2, 3)
    gm = aim_surgery.transform(model, tokens, config=config())
    base: Any = restore(gm)
    assert base.head.weight is base.embedding.weight
    assert_equal(outputs(base, tokens), outputs(model, tokens))


def test_recurrent_layers_and_layers_in_python_calls_lose_their_hooks() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv1d(4, 4, 3, groups=2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x.mT).mT
            return self.fc(x) if float(x.detach().sum()) > 0 else self.fc(-x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.lstm, self.part = nn.Linear(3, 4), nn.LSTM(4, 4, 2), Branching()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.lstm(self.stem(x))[0])

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(5, 8, 3).double()
    for emit in ("graph", "module"):
        for form in ("concat", "split"):
            gm = aim_surgery.transform(
                model, x, config=config(init="fresh"), emit=emit, form=form  # type: ignore[arg-type]
            )  # fmt: skip
            base: Any = restore(gm)
            assert len(base.restored.in_use) == len({r.site.layer for r in _plan(gm).reads})
            assert_equal(outputs(base, x), outputs(model, x))
            for module in base.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
                assert "forward" not in vars(module)


def _plan(gm: Any) -> aim_surgery.Plan:
    return getattr(gm, "plan", None) or gm.aim.plan


def test_a_folded_model_is_refused_with_the_reason() -> None:
    _, gm = small(write="none")
    with pytest.raises(AimSurgeryError, match=r"folded.*Use the model that was given to fold"):
        restore(aim_surgery.fold(gm.eval()))


def test_a_user_of_the_memory_that_surgery_did_not_write_is_named() -> None:
    _, gm = small()
    for graph in graphs_of(gm):
        memory = next(node for node in graph.nodes if node.target == "aim.memory")
        output = next(node for node in graph.nodes if node.op == "output")
        output.args = ((output.args[0], memory),)
    gm.recompile()
    with pytest.raises(AimSurgeryError, match=r"aim.memory: something in this graph"):
        restore(gm)


def test_a_weight_that_is_no_longer_wide_is_named() -> None:
    _, gm = small()
    gm.get_submodule("head").weight = nn.Parameter(torch.zeros(7, 12).double())
    with pytest.raises(AimSurgeryError, match=r"head.weight: expected the widened weight"):
        restore(gm)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = SmallNet()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=config())
    base = restore(gm)
    assert base.get_parameter("head.weight").shape == (7, 12)
    assert base.restored.difference is None
    assert "meta device" in base.restored.inputs


# State dicts --------------------------------------------------------------------------------


@CASE_IDS
def test_state_dicts_go_there_and_back_without_a_model(case: Case) -> None:
    model, x = case.model(), case.input()
    gm = aim_surgery.transform(model, x, config=config())
    state, operated = model.state_dict(), gm.state_dict()
    wide = widen_state_dict(state, gm.plan)
    assert list(wide) == [name for name in operated if not name.startswith("aim.")]
    for name, value in wide.items():
        assert torch.equal(value, operated[name])
    for back in (restore_state_dict(wide, gm.plan), restore_state_dict(operated, gm.plan)):
        assert list(back) == list(state)
        assert all(torch.equal(back[name], state[name]) for name in state)
    restored: Any = restore_state_dict(operated, gm.plan)
    assert set(restored._metadata) == set(state._metadata)  # type: ignore[attr-defined]
    case.model().load_state_dict(restored, strict=True)


def test_a_restored_state_dict_is_stored_as_pytorchs_own(tmp_path: Path) -> None:
    _, gm = small()
    torch.save(restore_state_dict(gm.state_dict(), gm.plan), tmp_path / "w.pt")
    base: Any = torch.load(tmp_path / "w.pt", weights_only=True)  # no class of ours in it
    assert base._metadata.keys() == {p for p in gm.state_dict()._metadata if p[:3] != "aim"}


def test_a_state_dict_of_another_shape_is_refused() -> None:
    model, gm = small()
    with pytest.raises(CheckpointError, match=r"stem.weight.*with 4 entries along axis 1.*12, 3"):
        restore_state_dict(model.state_dict(), gm.plan)
    with pytest.raises(CheckpointError, match="expected the weight of the original model"):
        widen_state_dict(gm.state_dict(), gm.plan)


def test_what_is_in_use_can_be_told_without_a_model() -> None:
    _, gm = small(write="none")
    state = gm.state_dict()
    assert memory_in_use(state, gm.plan) == ()
    state["head.weight"][0, -1] = float("nan")
    assert memory_in_use(state, gm.plan) == ("head",)
    state["aim.memory.bias"].copy_(-state["aim.memory.weight"].squeeze(1))
    assert memory_in_use(state, gm.plan) == ()  # W_m · 0, and nothing is written
    _, gm = small(init="fresh")
    state = gm.state_dict()
    state["aim.memory.bias"].copy_(-state["aim.memory.weight"].squeeze(1))
    written = tuple(r.site.layer for r in gm.plan.reads if r.version > 0)
    assert memory_in_use(state, gm.plan) == written != ()
    with pytest.raises(CheckpointError, match=r"head.weight.*got NoneType"):
        memory_in_use({k: v for k, v in state.items() if k != "head.weight"}, gm.plan)


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_files_are_restored_and_folded(tmp_path: Path, emit: Any) -> None:
    torch.manual_seed(0)
    model = SmallNet().double().eval()
    gm = aim_surgery.transform(model, IMAGE, config=config(init="fresh"), emit=emit)
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    file, restored = tmp_path / "aim.safetensors", tmp_path / "base.safetensors"
    lost, _ = restore_file(file, restored, model)
    assert lost.difference is not None
    assert lost.difference > 1e-6
    base = SmallNet().double().eval()
    load_into(base, read_state_dict(restored), restored)
    assert_equal([base(IMAGE)], [model(IMAGE)])
    fold_file(file, tmp_path / "slim.pt2", model)
    slim = torch.export.load(tmp_path / "slim.pt2").module()
    assert largest_difference(slim(IMAGE), gm(IMAGE)) < 1e-12
    for go, output in ((restore_file, restored), (fold_file, tmp_path / "slim.pt2")):
        with pytest.raises(CheckpointError, match="no such file"):
            go(tmp_path / "none.safetensors", output, model)
