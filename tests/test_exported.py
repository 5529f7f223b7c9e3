"""Exported programs and graphs of aten operators go in; operated graphs can be exported again."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx

import aim_surgery
from aim_surgery import AimConfig, CaptureError
from aim_surgery.capture import capture
from tests.cases import CASES, SmallNet, assert_same, largest_difference

# of torch, about its own programs
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes? .*_flat_weights:UserWarning"),
]

BATCH = Dim("batch", min=1, max=64)


def exported(
    model: nn.Module, *args: Any, core: bool = False, batch: bool = False, **kwargs: Any
) -> ExportedProgram:
    """The program of a model; `core`: in core aten operators."""
    shapes: Any = ({0: BATCH},) if batch else None
    program = export(model, args, kwargs, dynamic_shapes=shapes)
    return program.run_decompositions() if core else program


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def operators(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if isinstance(node.target, OpOverload)}


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


def decisions(plan: aim_surgery.Plan) -> list[Any]:
    reads = [(r.site.name, r.planes, r.version, r.site.widens) for r in plan.reads]
    return [*reads, *((w.point.name, w.version, w.planes) for w in plan.writes)]


@pytest.mark.parametrize("core", [False, True], ids=["program", "core"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_reads_as_the_model_does(case: Any, core: bool) -> None:
    model, x = case.model().eval(), case.input()
    program = exported(model, x, core=core)
    before = {name: tensor.clone() for name, tensor in program.state_dict.items()}
    gm = aim_surgery.transform(program)
    assert len(gm.plan.reads) == case.reads
    assert_same(gm(x), model(x))
    assert set(before) <= set(gm.state_dict())
    assert all(torch.equal(program.state_dict[name], before[name]) for name in before)
    assert operators(gm.graph) == set()


@pytest.mark.parametrize("core", [False, True], ids=["program", "core"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_program_is_planned_as_its_model_and_verified(training: bool, core: bool) -> None:
    torch.manual_seed(0)
    model, x = SmallNet().double().train(training), torch.randn(2, 3, 32, 32).double()
    program = exported(model, x, core=core, batch=True)
    gm = aim_surgery.transform(program)
    expected = aim_surgery.plan(model, (x,))
    assert len(expected.writes) == 2
    assert decisions(gm.plan) == decisions(expected)
    assert gm.training is training
    assert set(program.state_dict) <= set(gm.state_dict())
    result = aim_surgery.verify(program, gm)
    assert result.ok, str(result)
    assert result.equivalence.own.difference < 1e-12


@pytest.mark.parametrize("core", [False, True], ids=["program", "core"])
def test_packed_attention_reads_and_writes_as_in_the_model(core: bool) -> None:
    model, x = encoder(), torch.randn(2, 5, 8).double()
    program = exported(model, x, core=core, batch=True)
    gm = aim_surgery.transform(program)
    expected = aim_surgery.plan(model, (x,))
    layers = {r.site.weights[0] for r in expected.reads}
    assert {r.site.weights[0] for r in gm.plan.reads} == layers
    assert len(layers) == 8
    assert all(read.site.widens and read.site.sample_axis is not None for read in gm.plan.reads)
    result = aim_surgery.verify(program, gm)
    assert result.ok, str(result)
    y = torch.randn(7, 5, 8).double()
    assert_same(gm(y), model(y))


def test_sizes_stay_as_free_as_the_program_left_them() -> None:
    model, x = SmallNet().double().eval(), torch.randn(2, 3, 32, 32).double()
    shapes = ({0: BATCH, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = export(model, (x,), dynamic_shapes=shapes)
    gm = aim_surgery.transform(program)
    for size in ((1, 32, 32), (5, 48, 40), (64, 8, 8)):
        y = torch.randn(size[0], 3, *size[1:]).double()
        assert_same(gm(y), model(y))
    with pytest.raises(AssertionError, match="<= 64"):
        gm(torch.randn(65, 3, 8, 8).double())
    with pytest.raises(AssertionError, match="== 3"):
        gm(torch.randn(2, 4, 8, 8).double())


@pytest.mark.parametrize("core", [False, True], ids=["program", "core"])
def test_running_statistics_are_updated_and_the_program_trains(core: bool) -> None:
    torch.manual_seed(0)
    model, x = SmallNet().double().train(), torch.randn(4, 3, 16, 16).double()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    program = exported(model, x, core=core)
    gm = aim_surgery.transform(program)
    gm(x).square().sum().backward()
    assert program.state_dict["blocks.0.bn1.num_batches_tracked"] == 0
    model(x)
    for name, buffer in model.named_buffers():
        assert_same(gm.get_buffer(name), buffer)
    assert gm.get_buffer("blocks.0.bn1.num_batches_tracked") == 1
    reads = [gm.get_parameter(read.site.weights[0]) for read in gm.plan.reads]
    assert all(w.grad is not None and bool(w.grad.abs().sum() > 0) for w in reads)


class Regions(nn.Module):
    """A region without gradients, a constant, a tensor that is made and changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.table = torch.arange(4.0)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, Any]:
        x = torch.tanh(self.fc(x))
        with torch.no_grad():
            still = x * 2
            count = torch.zeros(2)
            count += still[0, 0]
        constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
        constant += still.sum()
        x = self.head(x + still + self.table + constant) + count.sum()
        return {"x": x if scale is None else x * scale, "count": [count]}


@pytest.mark.parametrize("core", [False, True], ids=["program", "core"])
def test_what_a_program_makes_is_made_anew_at_each_call(core: bool) -> None:
    torch.manual_seed(0)
    model, x, scale = Regions(), torch.randn(2, 4), torch.tensor([2.0])
    program = exported(model, x, core=core, scale=scale)
    gm = aim_surgery.transform(program)
    for _ in range(3):
        assert_same(gm(x, scale=scale), model(x, scale=scale), 1e-6)
    assert aim_surgery.verify(program, gm).ok
    enabled = torch._C._set_grad_enabled in {node.target for node in gm.graph.nodes}
    assert enabled is not core  # run_decompositions drops the region itself


def test_example_inputs_come_from_the_program() -> None:
    program = exported(Regions(), torch.randn(3, 4), scale=torch.tensor([2.0]))
    program = saved_and_loaded(program)
    plan = aim_surgery.plan(program)
    assert plan.inputs.args == (("tensor", (3, 4), "float32"),)
    assert plan.inputs.kwargs == (("scale", ("tensor", (1,), "float32")),)
    program.example_inputs = None  # pyright: ignore[reportAttributeAccessIssue]
    assert aim_surgery.plan(program).inputs == plan.inputs


def test_notes_say_how_a_program_was_exported() -> None:
    x = torch.randn(2, 3, 8, 8)
    for training, words in ((True, "exported for training:"), (False, "exported for evaluation:")):
        plan = aim_surgery.plan(exported(SmallNet().train(training), x))
        assert [note for note in plan.notes if note.startswith(words)]
        assert not [note for note in plan.notes if "hooks" in note]
    assert not [note for note in aim_surgery.plan(SmallNet(), x).notes if "exported" in note]


def test_writes_follow_where_the_users_names_say() -> None:
    program = exported(SmallNet().eval(), torch.randn(2, 3, 32, 32))
    plan = aim_surgery.plan(program, config=AimConfig(write_at=("blocks.0",)))
    assert [write.point.name for write in plan.writes] == ["blocks.0"]
    assert "blocks.0.relu@1" in plan.writes[0].point.names


def test_operated_models_are_exported_saved_and_loaded() -> None:
    program = exported(SmallNet().double().eval(), torch.randn(2, 3, 16, 16).double(), batch=True)
    gm = aim_surgery.transform(program)
    shapes = ({0: BATCH},)
    again = export(gm, (torch.randn(2, 3, 16, 16).double(),), dynamic_shapes=shapes)
    again = saved_and_loaded(again)
    x = torch.randn(5, 3, 16, 16).double()
    assert_same(again.module()(x), gm(x))
    assert set(again.state_dict) == set(gm.state_dict())


@pytest.mark.parametrize(("kind", "write"), [(encoder, "sample"), (SmallNet, "batch")])
def test_operated_models_are_exported_with_a_free_batch(kind: Any, write: Any) -> None:
    model = kind().double().eval()
    shape = (5, 8) if isinstance(model, nn.TransformerEncoder) else (3, 16, 16)
    x = torch.randn(2, *shape).double()
    gm = aim_surgery.transform(model, (x,), config=AimConfig(write=write)).eval()
    program = export(gm, (x,), dynamic_shapes=({0: BATCH},))
    y = torch.randn(6, *shape).double()
    assert_same(program.module()(y), gm(y))


def test_graphs_of_operators_are_captured_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model, x = model.double().eval(), torch.randn(2, 3, 8, 8).double()
    module = exported(model, x).module()
    for graph in (module, make_fx(model)(x)):
        gm = aim_surgery.transform(graph, (x,))
        assert len(gm.plan.reads) == 2
        assert_same(gm(x), model(x))
        assert operators(gm.graph) == set()
        assert aim_surgery.verify(graph, gm, (x,)).ok
    inside = nn.Sequential(module, nn.Conv2d(2, 2, 1).double())
    gm = aim_surgery.transform(inside, (x,))
    assert [read.site.name for read in gm.plan.reads] == ["0.0", "0.3", "1"]
    assert_same(gm(x), inside(x))


def test_saved_weights_go_back_onto_the_program(tmp_path: Any) -> None:
    x = torch.randn(2, 3, 16, 16)
    program = exported(SmallNet().eval(), x)
    plan = aim_surgery.plan(program)
    gm = aim_surgery.apply(program, plan)
    for parameter in aim_surgery.memory_parameters(gm):
        nn.init.normal_(parameter)
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    assert torch.equal(aim_surgery.load(tmp_path / "aim.safetensors", program)(x), gm(x))


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.fc(x)
        return self.head(x.float())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.fc(y), lambda y: y * 2, (x,))


def test_programs_in_programs_are_refused_with_what_to_do() -> None:
    x = torch.randn(2, 4)
    program = exported(Casts(), x)
    with pytest.raises(CaptureError, match=r"run_decompositions\(\) writes its casts out"):
        aim_surgery.transform(program)
    program = program.run_decompositions()
    gm = aim_surgery.transform(program)
    assert aim_surgery.verify(program, gm).ok
    assert len(gm.plan.reads) == 2
    with pytest.raises(CaptureError, match=r"higher_order.cond.*Transform the model itself"):
        aim_surgery.transform(exported(Branches(), x))
    with pytest.raises(CaptureError, match="no methods to keep"):
        aim_surgery.transform(program, emit="module")


class Recurrent(nn.Module):
    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 5, batch_first=True, bidirectional=bidirectional)
        self.fc = nn.Linear(10 if bidirectional else 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(torch.relu(self.stem(x)))[0])


def test_weights_of_recurrent_operators_are_named() -> None:
    program = exported(Recurrent(), torch.randn(2, 6, 4))
    gm = aim_surgery.transform(program)
    assert [read.site.name for read in gm.plan.reads] == ["stem", "fc"]
    (skip,) = [skip for skip in gm.plan.skips if "lstm" in skip.reason]
    assert set(skip.weights) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert aim_surgery.verify(program, gm).ok


def test_recurrent_operators_of_one_direction_are_causal() -> None:
    x = torch.randn(2, 6, 4)
    assert aim_surgery.plan(exported(Recurrent(), x)).writes == ()
    assert aim_surgery.plan(exported(Recurrent(bidirectional=True), x)).writes


class Words(nn.Module):
    """Operators whose words in PyTorch take other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.table = nn.Parameter(torch.randn(5, 6))
        self.square = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
        aten = torch.ops.aten
        up = aten.convolution.default(x, self.weight, None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2)
        looked = aten.embedding.default(self.table, at, 1)
        cut = aten.slice.Tensor(looked, -2, 1, 2**63 - 1)
        index = torch.tensor([0, 2])
        picked = aten.index.Tensor(looked, [None, None, index])
        cast = aten._to_copy.default(picked, dtype=torch.float64)
        soft = aten._softmax.default(looked, -1, False)
        heads = looked.unsqueeze(1)
        seen = aten._scaled_dot_product_flash_attention_for_cpu.default(heads, heads, heads)[0]
        size = aten.sym_size.int(looked, 1)
        parts = aten.split.Tensor(looked, 2, -1)
        product = aten.addmm.default(
            self.table[0], aten.view.default(looked, [-1, 6]), aten.t.default(self.square)
        )
        made = aten.full.default([2, 3], 0.5)
        made = aten.add_.Tensor(made, x.mean())
        return (
            *(up, looked, cut, cast, soft, seen, *parts, product, made),
            aten.view.default(looked, [looked.size(0) * size, 6]),
        )


def test_operators_in_other_words_compute_the_same() -> None:
    torch.manual_seed(0)
    model, x, at = Words(), torch.randn(2, 4, 5, 5), torch.tensor([[0, 1, 4], [2, 2, 3]])
    gm = aim_surgery.transform(model, (x, at))
    assert operators(capture(model, (x, at)).graph) == set()
    for _ in range(2):
        assert_same(gm(x, at), model(x, at), 1e-6)
    other = torch.randn(3, 4, 7, 6), torch.tensor([[0, 1], [2, 2], [4, 1]])
    assert_same(gm(*other), model(*other), 1e-6)
    for one in (model, gm):
        one.zero_grad()
        sum(value.double().sum() for value in one(x, at)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradient = gm.get_parameter("table").grad
    assert gradient is not None
    assert model.table.grad is not None
    assert largest_difference(gradient, model.table.grad) < 1e-5


def test_a_product_with_a_parameter_of_other_uses_stays_right() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = self.weight.t()
            return torch.tanh(x @ turned) @ turned + F.linear(x, turned) + turned.sum()

    torch.manual_seed(0)
    model, x = Shared().double(), torch.randn(3, 4).double()
    for core in (False, True):
        program = exported(model, x, core=core)
        gm = aim_surgery.transform(program)
        assert len(gm.plan.reads) == 3
        assert_same(gm(x), model(x))
        assert aim_surgery.verify(program, gm).ok
