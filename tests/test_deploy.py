"""All forms where models go: compiled, exported, in ONNX, under autocast, channels last."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, fold, lower
from aim_surgery.errors import CheckpointError
from aim_surgery.nn.views import _averaged_by_gathering, averaged
from tests.cases import assert_rounds_alike, assert_same

FORMS = ("concat", "split", "folded")
WRITES: tuple[Any, ...] = ("none", "batch", "sample")
# Exporters and compilers take seconds for each.
SLOW = [("concat", "none"), ("split", "sample"), ("split", "batch"), ("folded", "none"),
        ("folded", "sample")]  # fmt: skip
FLOATS = 700  # at 8x8: 11 planes, the last of them padded


class Net(nn.Module):
    """Norms, a depthwise convolution, a squeeze, pooling with and without values of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.body = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + F.hardswish(self.deep(x))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.body(F.max_pool2d(x, 2)).relu()
        return self.head(x.mean((2, 3)))


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape)


def net(form: str, write: Any, layout: torch.memory_format = torch.contiguous_format) -> Any:
    """In evaluation mode, with reads of uneven groups of planes; nothing is zero."""
    torch.manual_seed(0)
    x = images(2, 3, 8, 8).to(memory_format=layout)
    config = AimConfig(budget=None, memory=FLOATS, init="fresh", write=write)
    plan = aim_surgery.plan(Net(), (x,), config=config).with_planes(
        {"stem": 4, "deep": 3, "gate": 5, "head": 6}
    )
    gm: Any = aim_surgery.apply(Net(), plan, x)
    with torch.no_grad():
        for parameter in gm.aim.parameters():
            parameter.normal_()
        gm.norm.running_var.uniform_(0.5, 1.5)
    gm.eval()
    if form == "folded":
        return fold(gm)
    return lower(gm, "split") if form == "split" else gm


def onnx_session(gm: nn.Module, x: Tensor, **options: Any) -> tuple[Any, int]:
    """The ONNX model under onnxruntime, and its number of nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx, about its own parts
        program: Any = torch.onnx.export(gm, (x,), dynamo=True, verbose=False, **options)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session, len(program.model.graph)


def run(session: Any, x: Tensor) -> Tensor:
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(np.asarray(result))


@pytest.mark.parametrize(("form", "write"), SLOW)
def test_onnx(form: str, write: Any) -> None:
    gm = net(form, write)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    session, nodes = onnx_session(gm, images(2, 3, 8, 8), dynamic_shapes=shapes)
    for samples in (1, 2, 5):
        x = images(samples, 3, 8, 8)
        assert_same(run(session, x), gm(x), 1e-5)
    x = images(2, 3, 8, 8)
    assert_differs(run(session, x), gm(2 * x))
    assert nodes < 250  # a pooling of 700 floats taken apart is more than that by itself


def assert_differs(actual: Tensor, expected: Tensor) -> None:
    """What these comparisons say of another function's result."""
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(actual, expected, 1e-2)


@pytest.mark.parametrize("entries", [1, 5, 12, 13, 60])
@pytest.mark.parametrize("groups", [1, 2, 5, 12])
def test_averages_for_exports(entries: int, groups: int) -> None:
    groups = min(groups, entries)
    for shape in ((2, entries), (1, entries, 3)):
        memory = torch.randn(shape, dtype=torch.float64)
        ours, theirs = _averaged_by_gathering(memory, groups), averaged(memory, groups)
        assert ours.shape == theirs.shape
        assert_same(ours, theirs)


@pytest.mark.parametrize(("form", "write"), SLOW)
def test_exported_program(form: str, write: Any) -> None:
    gm = net(form, write)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(gm, (images(2, 3, 8, 8),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded: Any = torch.export.load(file).module()
    for samples in (1, 5):
        x = images(samples, 3, 8, 8)
        assert_same(loaded(x), gm(x), 1e-5)
    assert_differs(loaded(x), gm(2 * x))


@pytest.mark.parametrize(("form", "write"), SLOW)
def test_compiled_without_breaks(form: str, write: Any) -> None:
    gm = net(form, write)
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        compiled: Any = torch.compile(gm, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), gm(x), 1e-5)
        assert_differs(compiled(x), gm(2 * x))
    torch._dynamo.reset()


@pytest.mark.parametrize(("form", "write"), [("concat", "none"), ("split", "sample")])
def test_compiled_training(form: str, write: Any) -> None:
    gm = net(form, write).train()
    twin = copy.deepcopy(gm)
    compiled: Any = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = images(4, 3, 8, 8)
    for model in (gm, compiled):
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    theirs = dict(gm.named_parameters())
    for name, parameter in twin.named_parameters():
        expected = theirs[name].grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None and float(expected.abs().max()) > 1e-6:
            assert parameter.grad is not None
            assert_same(parameter.grad, expected, 1e-4)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's own imports
def test_down_to_machine_code() -> None:
    """One small model, once: a compiler of C++ takes its time."""
    x = images(2, 3, 8, 8)
    config = AimConfig(budget=None, memory=FLOATS, init="fresh", write="none")
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    folded = fold(aim_surgery.transform(model, x, config=config).eval())
    with torch.no_grad():
        compiled: Any = torch.compile(folded, fullgraph=True)
        assert_same(compiled(x), folded(x), 1e-5)
        assert_differs(compiled(x), folded(2 * x))
    torch._dynamo.reset()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str, write: Any) -> None:
    x = images(16, 3, 8, 8)
    concat = net("concat", write)
    if form == "concat":
        exact = copy.deepcopy(concat).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(concat(x).double(), exact, 0.02)
    else:
        as_form: Any = fold if form == "folded" else lambda gm: lower(gm, "split")
        assert_rounds_alike(concat, as_form, x)
    if form != "folded":
        gm = net(form, write).train()
        with torch.autocast("cpu", torch.bfloat16):
            F.cross_entropy(gm(x), torch.arange(16) % 5).backward()
        gradients = [p.grad for p in gm.parameters() if p.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert gm.aim.get_submodule("memory").weight.grad.abs().max() > 0


class Watch(torch.fx.Interpreter):
    """Which four-dimensional values with samples are in another format than channels last."""

    def __init__(self, gm: Any) -> None:
        super().__init__(gm)
        self.others: list[str] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        whole = isinstance(result, Tensor) and result.ndim == 4 and min(result.shape[1:]) > 1
        samples = whole and result.shape[0] == 3
        if samples and not result.is_contiguous(memory_format=torch.channels_last):
            self.others.append(n.name)
        return result


@pytest.mark.parametrize("write", ["none", "batch"])
@pytest.mark.parametrize("form", FORMS)
def test_channels_last_is_kept(form: str, write: Any) -> None:
    gm = net(form, write, torch.channels_last).to(memory_format=torch.channels_last)
    x = images(3, 3, 8, 8)
    watch = Watch(gm)
    assert_same(watch.run(x.to(memory_format=torch.channels_last)), gm(x), 1e-5)
    on_the_way = ("expand", "flatten")  # to what concat lays out as the example was
    assert [name for name in watch.others if not name.startswith(on_the_way)] == []
    watch.run(x)
    assert watch.others != []  # it sees what comes in in another format


@pytest.mark.parametrize("form", FORMS)
def test_channels_last_after_another_example(form: str) -> None:
    gm = net(form, "none").to(memory_format=torch.channels_last)
    x = images(3, 3, 8, 8).to(memory_format=torch.channels_last)
    watch = Watch(gm)
    assert_same(watch.run(x), gm(x), 1e-5)
    joined = ("expand", "cat", "unflatten", "flatten")  # what concat writes in the example's format
    assert [name for name in watch.others if not name.startswith(joined)] == []


def test_a_folded_model_is_not_saved_or_verified(tmp_path: Any) -> None:
    folded = net("folded", "none")
    with pytest.raises(CheckpointError, match="save the model that was given to fold"):
        aim_surgery.save(folded, tmp_path / "aim.safetensors")
    assert not (tmp_path / "aim.safetensors").exists()
    with pytest.raises(AimSurgeryError, match="verify the model that was given to fold"):
        aim_surgery.verify(Net(), folded, images(2, 3, 8, 8))
    gm = net("concat", "none")
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    again = fold(aim_surgery.load(tmp_path / "aim.safetensors", Net().eval()))
    x = images(2, 3, 8, 8)
    assert_same(again(x), folded(x), 1e-5)
