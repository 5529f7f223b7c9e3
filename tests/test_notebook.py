"""The notebook by itself: trained alone, looked into, reset, left out. The base stays."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrize

import aim_surgery
from aim_surgery import (
    AimConfig,
    AimSurgeryError,
    disable,
    freeze_base,
    memory_parameters,
    read_memory,
    reset_memory,
)
from aim_surgery.nn.graph_module import AimGraphModule, graphs_of
from aim_surgery.nn.memory import Memory
from aim_surgery.nn.write_block import WriteBlock
from aim_surgery.planning.parts import Memory as PlannedMemory
from aim_surgery.surgery.notes import noted_sites
from aim_surgery.surgery.widen import fill_memory, split_weight, widen_weight
from tests.cases import (
    CASES,
    FLOAT32_TOLERANCE,
    Case,
    SmallNet,
    Tied,
    Twice,
    assert_same,
    largest_difference,
)

CASE_IDS = pytest.mark.parametrize("case", CASES, ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
WRITES = pytest.mark.parametrize("write", ["none", "sample", "batch"])
IMAGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()


def config(**changes: Any) -> AimConfig:
    return AimConfig(**{"memory": 100, "budget": None, "init": "fresh", **changes})


def small(training: bool = True, **changes: Any) -> tuple[nn.Module, AimGraphModule]:
    """SmallNet and its operated twin, away from where they began."""
    torch.manual_seed(0)
    model = SmallNet().double().train(training)
    model(IMAGE)  # running statistics of its own
    return model, aim_surgery.transform(model, IMAGE, config=config(**changes))


def seeded(module: nn.Module, *args: Any) -> Any:
    torch.manual_seed(5)
    return module(*args)


def trained(gm: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(IMAGE + step), torch.arange(4))
        loss.backward()
        optimizer.step()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names whose tensors are not the same to the bit, leading entries or all."""
    names = set()
    for name, value in module.state_dict().items():
        old = before.get(name)
        if old is not None:
            inner = value[tuple(slice(size) for size in old.shape)]
            names |= set() if torch.equal(inner, old) else {name}
    return names


# Taking a widened weight apart --------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_split_convolution_is_the_widened_one(dims: int, transposed: bool, groups: int) -> None:
    planes, size = 3, (5, 4, 3)[:dims]
    generator = torch.Generator().manual_seed(groups)
    kernel = (3,) * dims
    shape = (4, 8 // groups, *kernel) if transposed else (8, 4 // groups, *kernel)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = "conv_transpose" if transposed else "conv"
    wide = widen_weight(weight, planes, kind=kind, groups=groups, init="fresh")
    own, beside = split_weight(wide, planes, kind=kind, groups=groups)
    assert torch.equal(own, weight)
    again = widen_weight(own, planes, kind=kind, groups=groups, init="preserve")
    fill_memory(again, beside, kind=kind, groups=groups)
    assert torch.equal(again, wide)
    assert beside.shape == ((planes, 8, *kernel) if transposed else (8, planes, *kernel))
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    m = torch.randn(2, planes, *size, generator=generator, dtype=torch.float64)
    each = [torch.cat([part, m], 1) for part in x.chunk(groups, 1)]
    convolve = getattr(F, f"conv{'_transpose' if transposed else ''}{dims}d")
    joined = convolve(torch.cat(each, 1), wide, stride=2, padding=1, groups=groups)
    apart = convolve(x, own, stride=2, padding=1, groups=groups)
    assert_same(apart + convolve(m, beside, stride=2, padding=1), joined)
    assert largest_difference(apart, joined) > 1e-2


def test_a_split_linear_weight_and_its_layout() -> None:
    wide = torch.randn(5, 4 + 3)
    own, beside = split_weight(wide, 3, kind="linear", groups=1)
    assert torch.equal(torch.cat([own, beside], 1), wide)
    assert own.untyped_storage().data_ptr() != wide.untyped_storage().data_ptr()
    last = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    own, beside = split_weight(last, 2, kind="conv", groups=1)
    assert own.is_contiguous(memory_format=torch.channels_last)
    assert beside.is_contiguous()


# Freezing: the same function ----------------------------------------------------------------


def targets(gm: AimGraphModule) -> list[Counter[tuple[str, str]]]:
    return [Counter((node.op, str(node.target)) for node in graph.nodes) for graph in graphs_of(gm)]


def check_frozen(gm: AimGraphModule, model: nn.Module) -> None:
    """All that freezing promises about names, shapes, flags, graphs and the plan."""
    own, state = dict(model.named_parameters()), gm.state_dict()
    for name, parameter in gm.named_parameters():
        assert parameter.requires_grad is name.startswith("aim.")
        assert name.startswith("aim.") or parameter.shape == own[name].shape
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(read.site.widens for read in gm.plan.reads)
    new = list(memory_parameters(gm))
    assert new == [p for p in gm.parameters() if p.requires_grad]
    assert sum(p.numel() for p in new) == gm.plan.new_parameters
    for layer in gm.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, Memory):
            assert layer.weight.shape[1] == layer.in_features
        if isinstance(layer, nn.modules.conv._ConvNd):
            sizes = (layer.in_channels, layer.out_channels)[:: -1 if layer.transposed else 1]
            assert layer.weight.shape[1] * layer.groups == sizes[0]
    for graph in graphs_of(gm):
        graph.lint()
        for node, note in noted_sites(graph):
            names = {node.name: node for node in graph.nodes}
            assert names[note.source] in node.all_input_nodes
            (total,) = node.users
            assert total.args == (node, names[note.beside])
    rebuilt = aim_surgery.apply(model, gm.plan)
    assert list(rebuilt.state_dict()) == list(state)
    assert [n for n, _ in rebuilt.named_parameters()] == [n for n, _ in gm.named_parameters()]
    assert targets(rebuilt) == targets(gm)
    assert {n: type(m) for n, m in rebuilt.named_modules()} == {
        n: type(m) for n, m in gm.named_modules()
    } | {"": type(rebuilt)}


@CASE_IDS
@WRITES
def test_a_frozen_model_computes_the_same(case: Case, write: str) -> None:
    for training in (False, True):
        model = case.model().train(training)
        gm = aim_surgery.transform(model, case.input(), config=config(write=write))
        twin = copy.deepcopy(gm)
        assert freeze_base(twin) is twin
        check_frozen(twin, model)
        inputs = [case.input(batch=batch) for batch in (2, 3)]
        for x in inputs:
            assert_same(seeded(twin, x), seeded(gm, x))
        check_gradients(gm, twin, inputs[0])


def check_gradients(gm: AimGraphModule, frozen: AimGraphModule, x: Tensor) -> None:
    for module in (gm, frozen):
        output = seeded(module, x)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        (output * weights).sum().backward()
    reads = {read.site.layer: read for read in gm.plan.reads if read.site.widens}
    for name, parameter in frozen.named_parameters():
        if not name.startswith("aim."):
            assert parameter.grad is None
            continue
        read = reads.get(name.removeprefix("aim.reads.").removesuffix(".weight"))
        if read is None:
            expected = gm.get_parameter(name).grad
        else:
            whole = gm.get_parameter(read.site.weights[0]).grad
            assert whole is not None
            site = read.site
            _, expected = split_weight(whole, read.planes, kind=site.kind, groups=site.groups)
        if expected is not None:
            assert parameter.grad is not None, name
            assert_same(parameter.grad, expected, tolerance=1e-10)


def test_other_sizes_and_ranks_after_freezing() -> None:
    _, gm = small(training=False)
    frozen = freeze_base(copy.deepcopy(gm))
    x = torch.randn(3, 3, 17, 40, dtype=torch.float64)
    assert_same(frozen(x), gm(x))
    layers: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    gm = aim_surgery.transform(layers.double(), IMAGE, config=config(write="none"))
    frozen = freeze_base(copy.deepcopy(gm))
    assert_same(frozen(IMAGE[0]), gm(IMAGE)[0])


def test_sites_in_a_row_work_on_each_other_s_sums() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    gm = aim_surgery.transform(model.double(), IMAGE, config=config(write="none"))
    frozen = freeze_base(copy.deepcopy(gm))
    check_frozen(frozen, model)
    assert_same(frozen(IMAGE), gm(IMAGE))


@pytest.mark.parametrize("groups", [1, 2])
def test_output_sizes_of_transposed_convolutions(groups: int) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=groups)

        def forward(self, x: Tensor, like: Tensor) -> Tensor:
            return self.up(self.up(x, like.size()), output_size=[20, 19])

    model, x = Up().double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    like = torch.randn(2, 4, 10, 10, dtype=torch.float64)
    gm = aim_surgery.transform(model, (x, like), config=config(write="none"))
    frozen = freeze_base(copy.deepcopy(gm))
    check_frozen(frozen, model)
    assert len([name for name, _ in frozen.named_parameters() if "aim.reads" in name]) == 1
    assert_same(frozen(x, like), gm(x, like))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.aux, self.body, self.head = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_both_graphs_are_taken_apart() -> None:
    model, x = Auxiliary().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=config(write="none"))
    expected = {mode: gm.train(mode)(x) for mode in (True, False)}
    freeze_base(gm)
    check_frozen(gm, model)
    assert len(graphs_of(gm)) == 2
    for twin in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for mode in (True, False):
            assert_same(twin.train(mode)(x), expected[mode])


def test_tied_weights_stay_tied() -> None:
    tokens = torch.randint(0, 11, (2, 5))
    model = Tied().double()
    gm = aim_surgery.transform(model, tokens, config=config())
    frozen = freeze_base(copy.deepcopy(gm))
    check_frozen(frozen, model)
    assert frozen.get_parameter("embedding.weight") is frozen.get_parameter("head.weight")
    assert_same(frozen(tokens), gm(tokens))


def test_a_layer_inside_a_layer() -> None:
    """Names under `aim.reads` nest: a layer that was beside before has one that was widened."""

    class Outer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.late, self.early = nn.Linear(8, 8), nn.Linear(8, 8)
            self.late.register_forward_hook(lambda module, args, output: None)

        def forward(self, input: Tensor) -> Tensor:
            x = F.linear(input, torch.tanh(self.weight), self.bias)
            return self.late(torch.tanh(self.early(torch.tanh(x))))

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(8, 8)), Outer()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.fc(x)) @ self.w

    model, x = Holder().double(), torch.randn(3, 8, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=config(write="none"))
    assert [read.site.widens for read in gm.plan.reads] == [False, True, False, False]
    frozen = freeze_base(copy.deepcopy(gm))
    check_frozen(frozen, model)
    assert [name for name, _ in frozen.named_parameters() if name.startswith("aim.reads")] == [
        f"aim.reads.{layer}.weight" for layer in ("fc", "fc.early", "fc.late", "w")
    ]
    assert_same(frozen(x), gm(x))


def test_a_partly_operated_model_and_modes() -> None:
    model, _ = small()
    plan = aim_surgery.plan(model, IMAGE, config=config()).without("stem", "blocks.2.conv2")
    gm = aim_surgery.apply(model, plan).eval()
    expected = gm(IMAGE)
    freeze_base(gm)
    assert not any(module.training for module in gm.modules())
    assert_same(gm(IMAGE), expected)
    assert not gm.get_parameter("stem.weight").requires_grad


# Freezing: nothing of the base moves --------------------------------------------------------


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("every", [False, True], ids=["new", "every"])
def test_the_base_stays_to_the_bit(optimizer: str, statistics: bool, every: bool) -> None:
    model, gm = small(carry="state")
    before = state_of(gm)
    freeze_base(gm, statistics=statistics)
    parameters = gm.parameters() if every else memory_parameters(gm)
    trained(gm, OPTIMIZERS[optimizer](parameters))
    own = model.state_dict()
    kept = {name: own[name] for name in own if statistics or "bn1." not in name}
    assert changed(gm, kept) == set()
    moved = changed(gm, {name: before[name] for name in before if name.startswith("aim.")})
    assert {"aim.memory.weight", "aim.memory.bias", "aim.memory.state"} <= moved
    if not statistics:
        assert "blocks.0.bn1.running_mean" in changed(gm, own)
    model.eval()
    gm.eval()
    assert largest_difference(gm(IMAGE), model(IMAGE)) > 1e-3
    if statistics:
        with disable(gm):
            assert_same(gm(IMAGE), model(IMAGE))
        assert largest_difference(gm(IMAGE), model(IMAGE)) > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_freezing_the_base_moves(optimizer: str) -> None:
    model, gm = small()
    trained(gm, OPTIMIZERS[optimizer](memory_parameters(gm)), steps=1)
    assert "stem.weight" in changed(gm, state_of(model))


def test_what_is_trained_without_freezing() -> None:
    _, gm = small()
    names = {id(parameter): name for name, parameter in gm.named_parameters()}
    mine = [names[id(parameter)] for parameter in memory_parameters(gm)]
    widened = {read.site.weights[0] for read in gm.plan.reads}
    assert {name for name in mine if not name.startswith("aim.")} == widened
    assert len(mine) == len(set(mine))
    assert "stem.bias" not in mine


class Statistics(nn.Module):
    """Batch norm as a layer, by a function, without statistics, and one that never trains."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.layer, self.own = nn.BatchNorm2d(4), Traced(4)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.inst = nn.InstanceNorm2d(4, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inst(self.free(self.own(self.layer(self.conv(x)))))
        return self.head(self.dropout(x.mean((-1, -2))))


class Traced(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


def test_statistics_stay_through_modes_and_copies() -> None:
    torch.manual_seed(0)
    model = Statistics().double().train()
    model(IMAGE)
    gm = freeze_base(aim_surgery.transform(model, IMAGE, config=config()), statistics=True)
    own = state_of(model)
    for twin in (gm, copy.deepcopy(gm), copy.copy(gm), pickle.loads(pickle.dumps(gm))):
        for mode in (True, False, True):
            twin.train(mode)
            twin(IMAGE)
            modes = {
                n: m.training for n, m in twin.named_modules() if n in dict(model.named_modules())
            }
            assert {name for name in modes if not modes[name]} >= {"layer", "own", "inst"}
            assert [modes[name] for name in ("free", "dropout", "conv", "head")] == [mode] * 4
        assert changed(twin, own) == set()
        assert not torch.equal(twin(IMAGE), twin(IMAGE))  # dropout works on
        assert all(m.training for m in twin.get_submodule("aim").modules())


class Contrary(nn.Module):
    """Batch norm that trains in evaluation too, and a count that training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.count = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Module()
        self.count.register_buffer("num_batches_tracked", torch.zeros(()))

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.count.get_buffer("num_batches_tracked").add_(self.count.training)
        return self.norm(self.conv(x))


class Branches(Contrary):
    """Here, that is a branch in Python."""

    def forward(self, x: Tensor) -> Tensor:
        if self.count.training:
            self.count.get_buffer("num_batches_tracked").add_(1)
        return self.norm(self.conv(x))


def test_statistics_that_python_code_moves_are_refused() -> None:
    model = Branches().double().eval()
    gm = aim_surgery.transform(model, IMAGE, config=config(write="none"))
    with pytest.raises(AimSurgeryError, match=r"^count: its Python code goes another way"):
        freeze_base(gm, statistics=True)
    assert gm.plan.reads[0].site.widens
    assert gm.get_parameter("conv.weight").requires_grad
    freeze_base(gm).train()(IMAGE)


@pytest.mark.parametrize("statistics", [False, True])
def test_statistics_that_evaluation_moves(statistics: bool) -> None:
    model = Contrary().double().train()
    gm = aim_surgery.transform(model, IMAGE, config=config(write="none"))
    assert freeze_base(gm, statistics=statistics).training
    for mode in (True, False):
        gm.train(mode)(IMAGE)
    assert float(gm.get_buffer("norm.num_batches_tracked")) == (0 if statistics else 2)
    assert float(gm.get_buffer("count.num_batches_tracked")) == (0 if statistics else 1)


def test_statistics_move_where_they_may() -> None:
    model = Statistics().double().train()
    gm = freeze_base(aim_surgery.transform(model, IMAGE, config=config()))
    own = state_of(model)
    gm(IMAGE)
    assert {"layer.running_mean", "own.running_mean", "inst.running_var"} <= changed(gm, own)


def test_batch_norm_of_writes_goes_on_counting() -> None:
    _, gm = small(norm="batch", widths=(4,))
    freeze_base(gm, statistics=True)
    before = state_of(gm)
    gm(IMAGE)
    moved = changed(gm, before)
    assert moved
    assert all(name.startswith("aim.writes.") for name in moved)


def test_freezing_twice_is_freezing_once() -> None:
    _, gm = small()
    freeze_base(gm)
    before, plan, code = state_of(gm), gm.plan, gm.code
    parameters = list(gm.parameters())
    gm.get_parameter("head.bias").requires_grad_(True)
    gm.get_parameter("aim.memory.bias").requires_grad_(False)
    freeze_base(gm, statistics=True)
    freeze_base(gm, statistics=True)
    assert changed(gm, before) == set()
    assert (gm.plan, gm.code) == (plan, code)
    assert all(one is other for one, other in zip(parameters, gm.parameters(), strict=True))
    assert not gm.get_parameter("head.bias").requires_grad
    assert gm.get_parameter("aim.memory.bias").requires_grad
    assert gm.contrary[True] == ("blocks.0.bn1", "blocks.2.bn1")


@pytest.mark.parametrize("write", ["none", "sample"])
def test_copies_pickles_and_files_of_a_frozen_model(write: str, tmp_path: Path) -> None:
    model, gm = small(training=False, write=write)
    early = pickle.loads(pickle.dumps(gm))  # notes for the pass come along
    freeze_base(gm)
    freeze_base(early)
    aim_surgery.save(gm, tmp_path / "frozen.safetensors")
    loaded = aim_surgery.load(tmp_path / "frozen.safetensors", model)
    assert loaded.plan == gm.plan
    assert "the base is frozen" in loaded.plan.reads[0].site.why_beside
    assert loaded.get_parameter("stem.weight").requires_grad  # as documented
    check_frozen(freeze_base(loaded), model)
    copies = (copy.deepcopy(gm), copy.copy(gm), pickle.loads(pickle.dumps(gm)), early, loaded)
    for twin in copies:
        assert twin.plan == gm.plan
        assert_same(twin(IMAGE), gm(IMAGE))
        assert [n for n, p in twin.named_parameters() if p.requires_grad] == [
            n for n, p in gm.named_parameters() if p.requires_grad
        ]


def test_freezing_what_was_pickled_and_trained() -> None:
    _, gm = small()
    trained(gm, OPTIMIZERS["adamw"](gm.parameters()))
    twin: Any = pickle.loads(pickle.dumps(gm)).eval()
    expected = gm.eval()(IMAGE)
    wide = gm.get_parameter("stem.weight").detach()
    assert_same(freeze_base(twin)(IMAGE), expected)
    assert torch.equal(twin.get_parameter("stem.weight"), wide[:, :3])
    assert torch.equal(twin.get_parameter("aim.reads.stem.weight"), wide[:, 3:])


def test_freezing_under_inference_mode() -> None:
    _, gm = small()
    with torch.inference_mode():
        freeze_base(gm)
    trained(gm, OPTIMIZERS["sgd"](memory_parameters(gm)), steps=1)


def test_freezing_what_can_no_longer_be_taken_apart() -> None:
    def refused(gm: AimGraphModule, words: str) -> None:
        before, code, plan = state_of(gm), gm.code, gm.plan
        flags = [parameter.requires_grad for parameter in gm.parameters()]
        with pytest.raises(AimSurgeryError, match=words):
            freeze_base(gm)
        assert list(before) == list(gm.state_dict())
        assert changed(gm, before) == set()
        assert (gm.code, gm.plan) == (code, plan)
        assert flags == [parameter.requires_grad for parameter in gm.parameters()]

    _, gm = small()
    for node, _ in noted_sites(gm.graph):
        if node.target == "head":
            node.meta = {}
    refused(gm, "head: no node of this graph")
    _, gm = small()
    node, note = next(noted_sites(gm.graph))
    node.meta["aim"] = note._replace(view="gone")
    refused(gm, "stem: this graph has been changed")
    _, gm = small()
    node, _ = next(noted_sites(gm.graph))
    node.args = (3,)
    gm.recompile()
    refused(gm, "stem: this graph has been changed")
    _, gm = small()
    parametrize.register_parametrization(gm.get_submodule("head"), "weight", nn.Identity())
    refused(gm, r"head\.weight: expected the widened weight.*no parameter")
    _, gm = small()
    gm.get_submodule("stem").weight = nn.Parameter(torch.randn(12, 3, 3, 3).double())
    refused(gm, r"stem\.weight: expected .* got \(12, 3, 3, 3\)")


# Wrappers -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_a_compiled_model() -> None:
    model, gm = small(training=False)
    x = IMAGE[:2]
    torch._dynamo.reset()
    compiled: Any = torch.compile(gm, backend="eager")
    expected = gm(x)
    assert_same(compiled(x), expected)
    assert list(memory_parameters(compiled)) == list(memory_parameters(gm))
    assert freeze_base(compiled) is compiled
    assert_same(compiled(x), expected)
    check_frozen(gm, model)
    with disable(compiled):
        assert_same(compiled(x), model(x))
    assert_same(compiled(x), expected)
    values = read_memory(compiled, x)
    assert list(values) == list(read_memory(gm, x))
    assert len(values) > 1
    reset_memory(compiled)


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_in_place() -> None:
    _, gm = small(training=False)
    expected = read_memory(gm, IMAGE)
    torch._dynamo.reset()
    gm.compile(backend="eager")
    with torch.no_grad():
        before = gm(IMAGE)  # code that knows no hooks is there from now on
    assert_same(read_memory(gm, IMAGE), expected)
    copies = [copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))]
    assert_same(freeze_base(gm)(IMAGE), before)
    with torch.no_grad():
        gm.get_parameter("head.bias").add_(1)
    assert largest_difference(gm(IMAGE), before) > 1e-3
    for twin in copies:
        assert_same(twin(IMAGE), before)


def test_a_parallel_wrapper() -> None:
    class Parallel(nn.Module):  # as `DistributedDataParallel` is one
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    _, gm = small()
    wrapped = Parallel(gm)
    assert list(memory_parameters(wrapped)) == list(memory_parameters(gm))
    assert_same(read_memory(wrapped, IMAGE), read_memory(gm, IMAGE))
    with pytest.raises(AimSurgeryError, match=r"Parallel holds on to the parameters.*first"):
        freeze_base(wrapped)
    assert gm.plan.reads[0].site.widens


@pytest.mark.parametrize("model", [SmallNet(), nn.Sequential(), None], ids=["net", "empty", "none"])
def test_what_was_not_operated(model: Any) -> None:
    words = f"expected an operated model, got {type(model).__name__}"
    for call in (memory_parameters, freeze_base, read_memory, reset_memory):
        with pytest.raises(AimSurgeryError, match=words):
            call(model)
    with pytest.raises(AimSurgeryError, match=words), disable(model):
        pass


# Looking into the notebook ------------------------------------------------------------------


def layouts(gm: AimGraphModule, samples: int) -> dict[str, tuple[int, ...]]:
    layout = gm.plan.memory.layout
    shapes: dict[str, tuple[int, ...]] = {"memory": (1, *layout)}
    return shapes | {write.point.name: (samples, *layout) for write in gm.plan.writes}


@pytest.mark.parametrize(("write", "samples"), [("none", 1), ("sample", 4), ("batch", 1)])
def test_shapes_and_order_of_what_is_read(write: str, samples: int) -> None:
    _, gm = small(write=write)
    values = read_memory(gm, IMAGE)
    assert {name: tuple(value.shape) for name, value in values.items()} == layouts(gm, samples)
    assert list(values) == list(layouts(gm, samples))
    assert (len(values) > 2) is (write != "none")
    assert not any(value.requires_grad for value in values.values())
    assert_same(read_memory(gm, {"x": IMAGE}), values)
    assert_same(read_memory(gm, (IMAGE,)), values)


def test_without_convolutions_the_memory_is_a_vector() -> None:
    case = next(case for case in CASES if case.name == "mlp_tokens")
    gm = aim_surgery.transform(case.model(), case.input(), config=config())
    values = read_memory(gm, case.input())
    assert {name: tuple(value.shape) for name, value in values.items()} == layouts(gm, 2)
    assert tuple(values["memory"].shape) == (1, 100)


def test_what_is_read_is_the_memory_and_its_updates() -> None:
    _, gm = small(training=False)
    memory: Any = gm.get_submodule("aim.memory")
    start = (memory.weight + memory.bias[:, None]).flatten()
    updates: list[Tensor] = []
    for block in gm.get_submodule("aim.writes").children():
        assert isinstance(block, WriteBlock)
        block.register_forward_hook(lambda module, args, output: updates.append(output - args[2]))
    values = list(read_memory(gm, IMAGE).values())
    floats = [value.flatten(1)[:, :100] for value in values]
    assert_same(floats[0][0], start)
    assert all(not value.flatten(1)[:, 100:].any() for value in values)
    assert values[0].shape[1:].numel() > 100  # so that there is something to be zero
    assert all(update.abs().max() > 1e-3 for update in updates)
    for index in range(1, len(floats)):
        assert_same(floats[index], start + sum(updates[:index]))


def test_a_name_of_two() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.memory(x))

    x = torch.randn(3, 8)
    gm = aim_surgery.transform(Named(), x, config=config(write_at="memory"))
    assert {n: len(v) for n, v in read_memory(gm, x).items()} == {
        "memory": 1, "aim.writes.memory": 3,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["add", "replace"])
def test_without_inputs_only_constants_are_read(mode: str) -> None:
    _, gm = small(write="batch", mode=mode)
    for _ in range(3):
        gm(IMAGE)
    values = read_memory(gm)
    assert_same(values, read_memory(gm, IMAGE))
    assert len(values) > 2
    assert all(read_memory(gm)[name].abs().max() > 0 for name in values)
    assert list(read_memory(small(write="sample")[1])) == ["memory"]


def test_several_memories() -> None:
    model, _ = small()
    plan = aim_surgery.plan(model, IMAGE, config=config(write="none"))
    plan = dataclasses.replace(plan, further=(PlannedMemory(7, (7,), name="other"),))
    gm = aim_surgery.apply(model, plan)
    assert {n: tuple(v.shape) for n, v in read_memory(gm, IMAGE).items()}["other"] == (1, 7)
    freeze_base(gm)
    assert gm.get_parameter("aim.other.weight").requires_grad


class Counts(nn.Module):
    """Counts its calls in a buffer, in either mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        self.get_buffer("last").copy_(x[0].detach())
        return self.fc(x) + self.get_buffer("calls")


@pytest.mark.parametrize("write", ["sample", "batch"])
def test_looking_changes_nothing(write: str) -> None:
    _, gm = small(write=write, carry="state")
    gm(IMAGE)
    gm.get_submodule("blocks.0.bn1").eval()
    before = state_of(gm)
    modes = [module.training for module in gm.modules()]
    hooks = [len(module._forward_hooks) for module in gm.modules()]
    random = torch.get_rng_state()
    read_memory(gm, IMAGE)
    read_memory(gm)
    with pytest.raises(RuntimeError):
        read_memory(gm, IMAGE[:, :2])
    assert changed(gm, before) == set()
    assert modes == [module.training for module in gm.modules()]
    assert hooks == [len(module._forward_hooks) for module in gm.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in gm.parameters())
    gm(IMAGE)
    assert "aim.memory.state" in changed(gm, before)  # which looking did not do


def test_looking_leaves_buffers_that_evaluation_changes() -> None:
    x = torch.randn(3, 8)
    gm = aim_surgery.transform(Counts(), x, config=config(write="none"))
    calls, last = gm.get_buffer("calls"), gm.get_buffer("last")
    read_memory(gm, x)
    assert gm.get_buffer("calls") is calls
    assert float(calls) == 0
    assert not last.any()
    gm(x)
    assert float(gm.get_buffer("calls")) == 1


def test_looking_into_a_model_of_two_graphs() -> None:
    model, x = Auxiliary().double().train(), torch.randn(3, 4, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=config(write="none"))
    read_memory(gm, x)
    assert gm.training
    assert len(gm(x)) == 2


# Resetting and leaving out ------------------------------------------------------------------


@pytest.mark.parametrize("write", ["sample", "batch"])
def test_resetting_forgets_what_batches_wrote(write: str) -> None:
    _, gm = small(write=write, carry="state")
    before = state_of(gm)
    gm(IMAGE)
    assert "aim.memory.state" in changed(gm, before)
    reset_memory(gm)
    left = {name for name in changed(gm, before) if name.startswith("aim.")}
    assert left == set()
    assert "blocks.0.bn1.running_mean" in changed(gm, before)  # the base's own stays


@CASE_IDS
@WRITES
@MODES
def test_a_disabled_memory_leaves_the_original(case: Case, write: str, training: bool) -> None:
    model = case.model().train(training)
    gm = aim_surgery.transform(model, case.input(), config=config(write=write))
    x = case.input()
    original = seeded(copy.deepcopy(model), x)
    assert largest_difference(seeded(copy.deepcopy(gm), x), original) > 1e-3
    with disable(gm):
        before = state_of(gm.get_submodule("aim"))
        assert_same(seeded(gm, x), original)
        assert changed(gm.get_submodule("aim"), before) == set()


def test_a_disabled_memory_gets_no_gradients() -> None:
    _, gm = small()
    with disable(gm):
        gm(IMAGE).sum().backward()
    grads = {name: p.grad for name, p in gm.named_parameters() if p.grad is not None}
    assert "aim.memory.weight" not in grads
    assert not any(name.startswith("aim.writes") for name in grads)
    assert not grads["stem.weight"][:, 3:].any()
    assert grads["stem.weight"][:, :3].any()


def test_disabling_nests_and_ends_with_an_error() -> None:
    _, gm = small(training=False)
    expected = gm(IMAGE)
    with disable(gm):
        without = gm(IMAGE)
        with disable(gm):
            assert torch.equal(gm(IMAGE), without)
        assert torch.equal(gm(IMAGE), without)
        assert not any(value.any() for value in read_memory(gm, IMAGE).values())
    assert torch.equal(gm(IMAGE), expected)
    with pytest.raises(ZeroDivisionError), disable(gm):
        raise ZeroDivisionError
    assert torch.equal(gm(IMAGE), expected)
    assert largest_difference(without, expected) > 1e-3


def test_one_layer_called_twice_is_taken_apart_once() -> None:
    model, x = Twice().double(), torch.randn(2, 4, 12, 12, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=config(memory=400))
    frozen = freeze_base(copy.deepcopy(gm))
    check_frozen(frozen, model)
    assert sum(name.startswith("aim.reads") for name, _ in frozen.named_parameters()) == 2
    assert_same(frozen(x), gm(x))


def test_channels_last_and_halves() -> None:
    model: Any = SmallNet().eval()
    model.to(memory_format=torch.channels_last)
    x = IMAGE.float().contiguous(memory_format=torch.channels_last)
    gm = aim_surgery.transform(model, x, config=config())
    frozen = freeze_base(copy.deepcopy(gm))
    seen: dict[str, Any] = {}
    frozen.get_submodule("blocks.0.bn1").register_forward_hook(
        lambda module, args, output: seen.update(x=args[0])
    )
    assert_same(frozen(x), gm(x), tolerance=FLOAT32_TOLERANCE)
    assert seen["x"].is_contiguous(memory_format=torch.channels_last)
    assert_same(frozen.bfloat16()(x.bfloat16()), gm.bfloat16()(x.bfloat16()), tolerance=3e-2)
