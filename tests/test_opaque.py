"""What stays Python: submodules as small as can be, whole models, and detectors in both modes."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import aim_surgery
from aim_surgery import AimConfig, CaptureError, PlanError, transform
from aim_surgery.capture import capture
from aim_surgery.cli import app
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.verification.comparison import Case
from aim_surgery.verification.pair import Pair
from aim_surgery.verification.rounding import RoundedOtherwise
from aim_surgery.verification.samples import Samples
from tests.cases import assert_same

WIDE = AimConfig(budget=None, memory=48)
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def between(inner: nn.Module) -> nn.Module:
    """A graph with something in it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), inner, nn.Linear(8, 8)).double()


def opaque_paths(model: nn.Module, *inputs: Any) -> list[list[str]]:
    return [[call.path for call in t.opaque] for t in capture(model, inputs or (X,)).traces]


def filled(gm: Any) -> Any:
    """As if trained: what is new is no longer zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in aim_surgery.memory_parameters(gm):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return gm


# What tracing stops at ------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)


class ToNumpy(Inner):
    def forward(self, x: Tensor) -> Tensor:
        mask = np.asarray(x.detach()) > 0
        return self.fc(x) * torch.from_numpy(mask)


class WantsTensor(Inner):
    def forward(self, x: Tensor) -> Tensor:
        if x.__class__ is not Tensor:
            raise TypeError(f"a tensor, and no {x.__class__.__name__}")
        return self.fc(x)


class Rebinds(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.table + x.detach().sum(0)
        return self.fc(x) + self.table


class OnData(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class OverData(Inner):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int((x > 0).sum()) % 3 + 1):
            x = self.fc(x)
        return x


REASONS = {
    ToNumpy: r"tracing stops with \w+: .* at tests/test_opaque.py:\d+ `mask = np.asarray",
    WantsTensor: r"TypeError: a tensor, and no ValueProxy at tests/test_opaque.py:\d+ `raise",
    Rebinds: r"1\.table is replaced inside forward.* at tests/test_opaque.py:\d+ `self.table =",
    OnData: r"asks for tensor data at tests/test_opaque.py:\d+ `return self.fc\(x\) if x.sum",
    OverData: r"asks for tensor data at tests/test_opaque.py:\d+ `for _ in range",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_tracing_stops_at_stays_one_call(kind: type[nn.Module]) -> None:
    model = between(kind())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (trace,) = capture(model, X).traces
    ((path, reason),) = (vars(call).values() for call in trace.opaque)
    assert path == "1"
    assert re.search(REASONS[kind], reason), reason
    assert_same(dict(model.state_dict()), before, tolerance=0)
    gm = transform(model, X, config=WIDE)
    assert any(f"1 stays a Python call: {reason}" == note for note in gm.plan.notes)
    reads = {read.site.name: read.site.inside for read in gm.plan.reads}
    assert reads == {"0": "", "2": "", "1.fc": "1"}
    assert aim_surgery.verify(model, gm, X).ok
    for x in (X, -X, X[:1]):
        assert_same(gm(x), model(x))
    untouched = model(X)
    assert not torch.allclose(filled(gm)(X), untouched)


def test_one_reason_is_one_note() -> None:
    model = between(nn.Sequential(*(WantsTensor() for _ in range(6))))
    (note,) = [note for note in transform(model, X, config=WIDE).plan.notes if "stay" in note]
    assert note.startswith("1.0, 1.1, 1.2, 1.3 and 2 more stay Python calls: ")


def test_an_error_of_the_model_stays_an_error() -> None:
    class Broken(Inner):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, :5])

    class Refuses(Inner):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("eight features are too many")

    line = r"'1.fc'.*tests/test_opaque.py:\d+ `return self.fc\(x\[:, :5\]\)`.*RuntimeError"
    for emit in ("auto", "graph"):
        with pytest.raises(CaptureError, match=line):
            transform(between(Broken()), X, emit=emit)
        with pytest.raises(CaptureError, match=r"in '1'.*`raise ValueError.*too many"):
            transform(between(Refuses()), X, emit=emit)


class Counted(Inner):
    """Takes numbers from 2, so that its call alone doesn't work on noise, which is 0 or 1."""

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        if bool((counts < 2).any()):
            raise ValueError("nothing was counted")
        return self.fc(x) / counts


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.counted = nn.Linear(8, 8), Counted()

    def forward(self, x: Tensor) -> Tensor:
        counts = (x.abs() < 9).sum(-1, keepdim=True)
        return self.counted(self.first(x), counts)


def test_where_a_call_does_not_work_the_module_around_it_is_tried() -> None:
    model = between(Counts())
    assert opaque_paths(model) == [["1"]]
    gm = transform(model, X, config=WIDE)
    assert {read.site.name for read in gm.plan.reads} == {"0", "2", "1.first", "1.counted.fc"}
    assert aim_surgery.verify(model, gm, X).ok


def test_numbers_that_data_gave_are_not_assumed() -> None:
    class Counter(nn.Module):
        def forward(self, x: Tensor) -> int:
            return int((x > 0).any(1).sum())

    class Repeats(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.counter = Counter()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.counter(x)):
                x = self.fc(x)
            return x

    model = between(Repeats())
    assert opaque_paths(model) == [["1"]]
    gm = transform(model, X, config=WIDE)
    for x in (X, X[:2], -X.abs() * 9):
        assert_same(gm(x), model(x))


def test_a_tensor_that_a_call_leaves_behind_is_not_frozen() -> None:
    class Leaves(Inner):
        left: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.left = x.sum() if x.sum() > 0 else -x.sum()
            return self.fc(x)

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Leaves()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.left

    model = between(Takes())
    assert opaque_paths(model) == [["1"]]
    assert model.get_submodule("1.inner").left is None
    gm = transform(model, X, config=WIDE)
    for x in (X, -X):
        assert_same(gm(x), model(x))


# Modes and calls ------------------------------------------------------------------------------


class NumpyInTraining(Inner):
    """Masks as wav2vec2 does: with NumPy, in training alone."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            kept = np.random.rand(x.shape[-1]) > 0.5
            x = x * torch.from_numpy(kept[np.arange(x.shape[-1])])
            if np.asarray(x.detach()).sum() > 1e9:
                return x
        return self.fc(x)


class TwoModes(Inner):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + 1 if self.training else self.fc(x)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_python_in_one_mode_is_so_in_both(training: bool) -> None:
    model = between(nn.Sequential(TwoModes(), NumpyInTraining())).train(training)
    states: Any = random.getstate(), torch.get_rng_state(), np.random.get_state(legacy=False)
    assert opaque_paths(model) == [["1.1"], ["1.1"]]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    now: Any = np.random.get_state(legacy=False)
    assert (now["state"]["key"] == states[2]["state"]["key"]).all()
    assert now["state"]["pos"] == states[2]["state"]["pos"]
    gm = transform(model, X, config=WIDE)
    assert isinstance(gm, AimGraphModule)
    assert [read.site.inside for read in gm.plan.reads if read.site.name == "1.1.fc"] == ["1.1"]
    assert aim_surgery.verify(model, gm, X).ok
    for mode in (True, False):
        results = []
        for module in (model, gm):
            np.random.seed(3)
            results.append(module.train(mode)(X))
        assert_same(*results)


def test_all_calls_of_a_module_are_of_one_kind() -> None:
    class Sometimes(Inner):
        def forward(self, x: Tensor, *, look: bool = False) -> Tensor:
            return self.fc(x) if not look or x.sum() > 0 else x

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Sometimes()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(x), look=True)

    model = Twice().double()
    (trace,) = capture(model, X).traces
    assert [str(n.target) for n in trace.graph.nodes if n.op == "call_module"] == ["part", "part"]
    gm = transform(model, X, config=WIDE)
    assert [read.site.inside for read in gm.plan.reads] == ["part"]
    assert aim_surgery.verify(model, gm, X).ok


# The model itself -----------------------------------------------------------------------------


class Root(nn.Module):
    """Its own forward branches on data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(64, 64), nn.Linear(64, 8)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.out(x if x.sum() > 0 else -x)


def root() -> Root:
    torch.manual_seed(0)
    return Root()


INPUT = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def test_a_model_that_branches_on_data_keeps_its_class(tmp_path: Path) -> None:
    model = root()
    plan = aim_surgery.plan(model)
    assert plan.emit == "module"
    assert not plan.writes
    (why,) = [note for note in plan.notes if "own forward stays a Python call" in note]
    assert re.search(
        r"asks for tensor data at tests/test_opaque.py:\d+ `return self.out\(x if", why
    )
    assert any("nothing is written" in note for note in plan.notes)
    for gm in (transform(model), aim_surgery.apply(model, plan)):
        assert type(gm) is Root
        assert [read.site.name for read in plan_of(gm).reads] == ["fc", "out"]
        assert set(model.state_dict()) == {k for k in gm.state_dict() if not k.startswith("aim.")}
        for x in (INPUT, -INPUT):
            assert_same(gm(x), model(x), tolerance=1e-6)
        assert_same(gm.features(INPUT), model.features(INPUT), tolerance=1e-6)
        assert aim_surgery.verify(model, gm).ok
    path = tmp_path / "aim.safetensors"
    gm = filled(transform(model))
    aim_surgery.save(gm, path)
    loaded = aim_surgery.load(path, model)
    assert type(loaded) is Root
    assert_same(loaded(INPUT), gm(INPUT), tolerance=0)


def test_the_wanted_form_is_a_choice() -> None:
    with pytest.raises(CaptureError, match=r"the model itself can't be captured as a graph.*x.sum"):
        transform(root(), emit="graph")
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert isinstance(transform(plain), AimGraphModule)
    assert type(transform(plain, emit="module")) is nn.Sequential
    with pytest.raises(PlanError, match=r"write_at: .*no graph.*x.sum\(\) > 0.*write='none'"):
        transform(root(), config=AimConfig(write_at=("fc",)))
    with pytest.raises(PlanError, match="emit must be 'auto', 'graph' or 'module'"):
        transform(plain, emit="none")  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    weights, output = tmp_path / "root.pt", tmp_path / "aim.safetensors"
    torch.save(root().state_dict(), weights)
    spec = ["--model", "tests.test_opaque:root"]
    done = CliRunner().invoke(app, ["transform", str(weights), *spec, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "the model's own forward stays a Python call" in done.output
    done = CliRunner().invoke(app, ["verify", str(weights), str(output), *spec])
    assert done.exit_code == 0, done.output
    failed = CliRunner().invoke(
        app, ["transform", str(weights), *spec, "-o", str(output), "--emit", "graph"]
    )
    assert failed.exit_code == 1
    assert "can't be captured as a graph" in failed.output


def test_a_mode_that_needs_more_than_the_example_is_not_lost() -> None:
    class WantsTarget(Inner):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y = self.fc(x)
            if self.training:
                if target is None:
                    raise ValueError("in training a target is wanted")
                return (y - target).square().mean()
            return y

    model = WantsTarget().double().eval()
    gm = transform(model, X, config=WIDE)
    assert type(gm) is WantsTarget
    assert any("training mode could not be captured" in n for n in plan_of(gm).notes)
    assert_same(gm(X), model(X))
    assert_same(gm.train()(X, X), model.train()(X, X))
    graph = transform(model.eval(), X, config=WIDE, emit="graph")
    assert isinstance(graph, AimGraphModule)
    assert any("training mode could not be captured" in n for n in graph.plan.notes)
    both = transform(model, (X, X), config=WIDE)
    assert isinstance(both, AimGraphModule)
    assert aim_surgery.verify(model, both, (X, X)).ok


# Detectors ------------------------------------------------------------------------------------


class Detector(nn.Module):
    """Images of several sizes in, boxes out; losses in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.scores, self.boxes = nn.Conv2d(16, 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        side = max(max(image.shape[1:]) for image in images)
        batch = torch.stack(
            [nn.functional.pad(i, (0, side - i.shape[2], 0, side - i.shape[1])) for i in images]
        )
        features = self.stem(batch).relu()
        scores = self.scores(features).flatten(1)
        boxes = self.boxes(features).flatten(2).transpose(1, 2)
        if self.training:
            if targets is None:
                raise ValueError("targets are wanted in training")
            losses = []
            for target, own_scores, own in zip(targets, scores, boxes, strict=True):
                if target["boxes"].dtype != torch.float32:
                    raise TypeError("boxes must be float32")
                if (target["boxes"][:, 2:] <= target["boxes"][:, :2]).any():
                    raise ValueError("an empty box")
                chosen = own[torch.randperm(len(own))[: len(target["boxes"])]]
                rest = own.square().mean() + own_scores.square().mean()
                losses.append((chosen - target["boxes"]).abs().mean() + rest)
            return {"loss": torch.stack(losses).sum()}
        found = []
        for own_scores, own in zip(scores, boxes, strict=True):
            kept = own_scores > 0
            order = own_scores[kept].argsort(descending=True)
            found.append({"scores": own_scores[kept][order], "boxes": own[kept][order]})
        return found


def detector() -> Detector:
    torch.manual_seed(0)
    return Detector()


IMAGES = [torch.rand(3, 10, 8), torch.rand(3, 7, 12)]
TARGETS = [{"boxes": torch.tensor([[1.0, 1, 5, 6], [0, 2, 3, 4]])[: n + 1]} for n in range(2)]


@pytest.mark.parametrize("given", [None, (IMAGES,), (IMAGES, TARGETS)])
def test_a_detector_works_in_both_modes(given: Any) -> None:
    model = detector()
    model.train(given is not None and len(given) == 2)
    gm = transform(model, given)
    assert {read.site.name for read in plan_of(gm).reads} == {"stem", "scores", "boxes"}
    if given is None:
        assert plan_of(gm).inputs.source.startswith("found: a list of 2 of [3, ")
    for images in (IMAGES, IMAGES[1:], [*IMAGES, torch.rand(3, 4, 4)]):
        model.eval()
        gm.eval()
        assert_same(gm(images), model(images), tolerance=1e-5)
        assert all(len(image["scores"]) for image in model(images))
        targets = [TARGETS[i % 2] for i in range(len(images))]
        losses = []
        for module in (model.train(), gm.train()):
            torch.manual_seed(1)
            losses.append(module(images, targets))
        assert_same(*losses, tolerance=1e-5)
    result = aim_surgery.verify(model, gm, (IMAGES, TARGETS))
    assert result.ok, str(result)
    assert result.gradients.mode == "training"
    assert {c.dtype for c in result.equivalence.comparisons} == {torch.float64}
    cases = {c.case for c in result.equivalence.comparisons if c.what == "outputs"}
    words = ("training, batch 2", "evaluation, batch 1", "evaluation, batch 3", "evaluation, size")
    assert all(any(case.startswith(word) for case in cases) for word in words), cases
    with torch.no_grad():
        gm.get_parameter("boxes.bias").add_(1e-3)
    assert not aim_surgery.verify(model, gm, (IMAGES, TARGETS)).equivalence.ok


class TwoFrames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, first: Tensor, second: Tensor, rounds: int = 2) -> Tensor:
        return self.conv(first) - rounds * self.conv(second)


def test_a_forward_that_wants_several_arguments_gets_them() -> None:
    gm = transform(TwoFrames())
    assert isinstance(gm, AimGraphModule)
    assert gm.plan.inputs.source == "found: [2, 3, 224, 224] and [2, 3, 224, 224] fits"


# Samples and comparisons ----------------------------------------------------------------------


def test_a_list_of_images_is_a_batch() -> None:
    samples = Samples((IMAGES, TARGETS), {"scale": torch.ones(2), "shared": torch.ones(3)})
    assert samples.batch == 2
    three = samples.take(3)
    assert three.batch == 3
    assert [tuple(image.shape) for image in three.args[0]] == [(3, 10, 8), (3, 7, 12), (3, 10, 8)]
    assert [len(target["boxes"]) for target in three.args[1]] == [1, 2, 1]
    assert three.kwargs["scale"].shape == (3,)
    assert three.kwargs["shared"].shape == (3,)
    assert samples.take(1).args[0][0] is IMAGES[0]
    maps = Samples(([torch.rand(5, 4, 8, 8), torch.rand(5, 8, 4, 4)],), {})
    assert maps.batch == 5
    assert [len(m) for m in maps.take(2).args[0]] == [2, 2]
    (moved, _), _ = samples.nudged(0).args, None
    assert 0 < float((moved[0] - IMAGES[0]).abs().max()) < 1e-6


class Ranks(nn.Module):
    """Orders numbers that are as good as equal, and some that are not."""

    def __init__(self, shift: float, gain: float = 1.0, *, joined: bool = False) -> None:
        super().__init__()
        self.shift, self.gain, self.joined = shift, gain, joined

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tied = torch.where(torch.arange(x.shape[-1]) % 2 == 1, 1 + self.shift, 1.0) * x
        order, total = tied.argsort(-1), self.gain * x.sum(-1, keepdim=True)
        if self.joined:
            return {"both": torch.cat([order, total], -1)}
        return {"order": order, "sum": total}


def compared(base: nn.Module, other: nn.Module, x: Tensor) -> tuple[Any, list[str]]:
    notes: list[str] = []
    plan = aim_surgery.plan(nn.Sequential(nn.Linear(64, 64)))
    pair = Pair(base, other, plan, (1e-5, 1e-3))
    found = pair.compare(Case(False, Samples((x,), {}), "batch 1", torch.float32), notes)
    return found[0], notes


def test_outputs_that_jump_by_rounding_are_named_and_not_judged() -> None:
    tied, apart = torch.full((1, 64), 0.5), torch.rand(1, 64, generator=torch.Generator())
    eps = torch.finfo(torch.float32).eps
    found, notes = compared(Ranks(0.0), Ranks(eps), tied)
    assert found.ok
    (note,) = notes
    assert re.search(r"output\['order'\] is not judged: it differs by .* and by .* alone", note)
    found, notes = compared(Ranks(0.0), Ranks(eps, gain=1.001), tied)
    assert not found.ok
    assert found.offenders[0].startswith("output['sum']")
    found, notes = compared(Ranks(0.0), Ranks(0.5), apart)
    assert not found.ok
    assert not notes


def test_a_small_defect_does_not_hide_beside_jumps() -> None:
    tied, eps = torch.full((1, 64), 0.5), torch.finfo(torch.float32).eps
    defect = 1 + 5e-5
    found, _ = compared(Ranks(0.0), Ranks(eps, gain=defect), tied)
    assert [text.split()[0] for text in found.offenders] == ["output['sum']"]
    # nor among entries of one tensor that jump, where the others are judged
    found, notes = compared(Ranks(0.0, joined=True), Ranks(eps, joined=True), tied)
    assert found.ok
    assert found.judged
    assert re.search(r"\d\d entries of output\['both'\] are not judged", notes[0])
    found, _ = compared(Ranks(0.0, joined=True), Ranks(eps, gain=1 + 5e-4, joined=True), tied)
    assert not found.ok


class Jumps(nn.Module):
    """Keeps what is above a threshold that rounding crosses, and something is wrong with it."""

    def __init__(self, wrong: str = "") -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> dict[str, Any]:
        # sums of tied numbers, in an order that rounding chooses
        kept = (x * (x >= 0.5)).clone()
        some = x[x >= 0.5][: -1 if self.wrong == "shape" else None, None].expand(-1, 3)
        out: dict[str, Any] = {"kept": kept, "some": some, "ends": x.sum()}
        if self.wrong == "missing":
            del out["kept"]
        if self.wrong == "nan":
            out["kept"] = torch.full_like(kept, float("nan"))
        if self.wrong == "huge":
            out["kept"] = kept * 100
        if self.wrong == "features":
            out["some"] = some[:, :2]
        if self.wrong == "dtype":
            out["some"] = some.double()
        if self.wrong == "new":
            out["more"] = kept
        return out


@pytest.mark.parametrize(
    ("wrong", "name"),
    [("missing", "kept"), ("nan", "kept"), ("huge", "kept"), ("features", "some"),
     ("dtype", "some"), ("new", "more")],
)  # fmt: skip
def test_what_rounding_can_not_do_is_judged_where_outputs_jump(wrong: str, name: str) -> None:
    x = torch.full((1, 64), 0.5)
    found, _ = compared(Jumps(), Jumps("shape"), x)
    assert found.ok  # as many as this may be kept, or other ones
    found, _ = compared(Jumps(), Jumps(wrong), x)
    assert [text.split()[0] for text in found.offenders] == [f"output['{name}']"]


def test_what_float32_can_not_tell_float64_does() -> None:
    x = 1 + torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    model = nn.Sequential(nn.Linear(8, 8), Cancels(1.0))
    gm = transform(model, x, config=WIDE, emit="module")
    vars(gm.get_submodule("1"))["gain"] = 1 + 5e-5
    offenders = aim_surgery.verify(model, gm, x).equivalence.offenders
    assert {one.what for one in offenders if one.dtype == torch.float64} >= {"outputs"}


def test_empty_outputs_say_nothing() -> None:
    class FindsNothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y if self.training else y[y > 1e9]

    model = FindsNothing()
    result = aim_surgery.verify(model, transform(model, X.float(), config=WIDE), X.float())
    assert result.ok
    assert result.equivalence.own.case.startswith("training")
    assert any("no outputs are left that would say anything" in note for note in result.notes)


class Cancels(nn.Module):
    """What is left of two numbers that are almost equal: rounding shows in the fourth digit."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return (x - 1) * self.gain


def test_a_difference_as_small_as_what_rounding_does_is_no_fault() -> None:
    x = 1 + torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    found, notes = compared(Cancels(1.0), Cancels(1 + 5e-5), x)
    assert found.ok
    assert any(note.startswith("evaluation, batch 1, float32: output is not") for note in notes)
    found, notes = compared(Cancels(1.0), Cancels(1 + 1e-3), x)
    assert not found.ok
    assert not notes


def test_rounding_otherwise_changes_the_last_bits_of_products_alone() -> None:
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    with RoundedOtherwise(0):
        product, total = a @ a, a + a
    moved = (product - a @ a).abs().max() / (a @ a).square().mean().sqrt()
    assert 0 < float(moved) < 20 * torch.finfo(torch.float32).eps
    assert torch.equal(total, a + a)
