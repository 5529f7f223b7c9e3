"""Surgery: the same function, every float within reach, nothing of the model lost or changed."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import prune

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, CaptureError, PlanError, UnsupportedLayerError
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.planning import Plan
from aim_surgery.surgery.widen import widen_weight
from tests.cases import (
    CASES,
    FLOAT32_TOLERANCE,
    Case,
    Functional,
    SmallNet,
    Tied,
    Twice,
    assert_same,
    conv_geometries,
    largest_difference,
    mlp,
)

LITERAL = AimConfig(memory=100, budget=None)
FRESH = AimConfig(memory=100, budget=None, init="fresh")
CASE_IDS = pytest.mark.parametrize("case", CASES, ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def seeded(module: nn.Module, *args: Any) -> Any:
    torch.manual_seed(5)
    return module(*args)


# The same function --------------------------------------------------------------------------


@CASE_IDS
@MODES
def test_preserve_init_reproduces_the_original(case: Case, training: bool) -> None:
    model = case.model().train(training)
    gm = aim_surgery.transform(model, case.input(), config=LITERAL)
    for batch in (2, 3):
        x = case.input(batch=batch)
        assert_same(seeded(gm, x), seeded(copy.deepcopy(model), x))


@CASE_IDS
def test_fresh_init_does_not(case: Case) -> None:
    model = case.model().eval()
    gm = aim_surgery.transform(model, case.input(), config=FRESH)
    assert largest_difference(gm(case.input()), model(case.input())) > 1e-3


@CASE_IDS
def test_gradients_of_the_original_parameters_agree(case: Case) -> None:
    model = case.model().eval()
    gm = aim_surgery.transform(model, case.input(), config=LITERAL)
    generator = torch.Generator().manual_seed(2)
    outputs = [model(case.input()), gm(case.input())]
    weights = torch.randn(outputs[0].shape, generator=generator, dtype=torch.float64)
    for output in outputs:
        (output * weights).sum().backward()
    for name, parameter in model.named_parameters():
        mine = gm.get_parameter(name).grad
        assert mine is not None
        assert parameter.grad is not None
        if mine.shape != parameter.grad.shape:
            continue  # widened: see test_widened_weights_keep_their_entries for the layout
        assert_same(mine, parameter.grad, tolerance=1e-10)


def reference_read(value: torch.Tensor, size: tuple[int, ...], planes: int) -> torch.Tensor:
    """The read of the design, written the long way: pad, reshape, mean of contiguous groups."""
    floats, positions = len(value), math.prod(size)
    available = -(-floats // positions)
    padded = torch.cat([value, value.new_zeros(available * positions - floats)])
    stack = padded.reshape(available, positions)
    groups = []
    for i in range(planes):
        first, last = i * available // planes, -(-(i + 1) * available // planes)
        groups.append(stack[first:last].mean(0))
    return torch.stack(groups).reshape(planes, *size)


@pytest.mark.parametrize("planes", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_read_is_the_convolution_of_the_memory(planes: int, groups: int) -> None:
    model: Any = nn.Sequential(nn.Conv2d(6, 12, 3, padding=1, groups=groups)).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    plan = aim_surgery.plan(model, x, config=AimConfig(memory=123, budget=None, init="fresh"))
    assert plan.reads[0].available == 5
    gm = aim_surgery.apply(model, plan.with_planes({"0": planes}))
    memory: Any = gm.get_submodule("aim.memory")
    value = (memory.weight + memory.bias[:, None]).flatten()
    m = reference_read(value, (5, 5), planes)
    weight = gm.get_parameter("0.weight")
    w_x, w_m = weight.split((6 // groups, planes), dim=1)
    expected = F.conv2d(x, w_x, model[0].bias, padding=1, groups=groups)
    assert_same(gm(x), expected + F.conv2d(m[None], w_m, padding=1))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_read_is_the_transposed_convolution_of_the_memory(groups: int) -> None:
    model: Any = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=groups)).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=AimConfig(memory=14, budget=None, init="fresh"))
    memory: Any = gm.get_submodule("aim.memory")
    m = (memory.weight + memory.bias[:, None]).reshape(2, 7)
    grouped = gm.get_parameter("0.weight").view(groups, -1, 6 // groups, 3)
    w_x, w_m = grouped.split((4 // groups, 2), dim=1)
    expected = F.conv_transpose1d(
        x, w_x.reshape(4, 6 // groups, 3), model[0].bias, stride=2, groups=groups
    )
    read = torch.cat([F.conv_transpose1d(m[None], w, stride=2) for w in w_m], dim=1)
    assert_same(gm(x), expected + read)


def test_a_linear_read_is_the_product_with_the_averaged_memory() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    plan = aim_surgery.plan(model, x, config=FRESH).with_planes({"0": 7})
    gm = aim_surgery.apply(model, plan)
    memory: Any = gm.get_submodule("aim.memory")
    m = reference_read((memory.weight + memory.bias[:, None]).flatten(), (), 7)
    w_x, w_m = gm.get_parameter("0.weight").split((4, 7), dim=1)
    assert_same(gm(x), F.linear(x, w_x, model[0].bias) + w_m @ m)


@pytest.mark.parametrize("case", [c for c in CASES if c.beside], ids=str)
def test_memory_weights_beside_are_read(case: Case) -> None:
    model = case.model().eval()
    gm = aim_surgery.transform(model, case.input(), config=LITERAL)
    before = gm(case.input())
    beside = [p for name, p in gm.named_parameters() if name.startswith("aim.reads")]
    assert len(beside) == case.beside
    for parameter in beside:
        with torch.no_grad():
            parameter.fill_(0.1)
        assert largest_difference(gm(case.input()), before) > 1e-6
        with torch.no_grad():
            parameter.zero_()


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("hooked", [False, True], ids=["widened", "beside"])
def test_every_geometry(dims: int, hooked: bool) -> None:
    """All combinations of groups, stride, dilation, padding and its modes, bias, transposition."""
    tried = 0
    for geometry in conv_geometries():
        options = dict(geometry)
        if options.pop("dims") != dims:
            continue
        plain = options["padding"] in (0, 1) and options["padding_mode"] == "zeros"
        for transposed in (False, True) if plain else (False,):
            for out_channels, bias in ((8, True), (4, False)):
                extra = {"output_padding": min(options["stride"], options["dilation"], 2) - 1}
                kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
                more = extra if transposed else {}
                layer = kind(4, out_channels, 3, bias=bias, **options, **more).double()
                if hooked:
                    layer.register_forward_hook(lambda module, args, output: None)
                x = torch.randn(2, 4, *(11, 9, 7)[:dims], dtype=torch.float64)
                model = nn.Sequential(layer)
                gm = aim_surgery.transform(model, x, config=AimConfig(memory=40, budget=None))
                assert gm.plan.reads[0].site.widens is not hooked
                assert_same(gm(x), model(x))
                tried += 1
    assert tried > 60


def test_one_output_channel() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(16, 1)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert_same(aim_surgery.transform(model, x, config=LITERAL)(x), model(x))


# As free as before --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (17, 63)])
def test_other_resolutions(size: tuple[int, int]) -> None:
    model: Any = SmallNet().double().eval()
    gm = aim_surgery.transform(
        model, torch.randn(2, 3, 32, 32, dtype=torch.float64), config=LITERAL
    )
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    assert_same(gm(x), model(x))


def test_ranks_that_layers_accept() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).double()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 9, 9).double(), config=FRESH)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert_same(gm(x[0]), gm(x)[0])  # unbatched
    dense = mlp().double()
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    for write in ("none", "batch", "sample"):
        config = dataclasses.replace(FRESH, write=write)
        gm = aim_surgery.transform(dense, torch.zeros(2, 16).double(), config=config).eval()
        assert_same(gm(tokens)[1:], gm(tokens[1:]))
        assert_same(gm(tokens[1]), gm(tokens[1].unsqueeze(1))[:, 0])  # five samples, five tokens
        assert_same(gm(tokens[1, 0]), gm(tokens[1, :1])[0])  # one sample by itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    model: Any = SmallNet().eval()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=LITERAL)
    model, gm = model.to(dtype), gm.to(dtype)
    x = torch.randn(2, 3, 32, 32).to(dtype)
    tolerance = {torch.float32: FLOAT32_TOLERANCE, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    assert_same(gm(x), model(x), tolerance=tolerance[dtype])
    born = aim_surgery.transform(model, x, config=LITERAL)
    assert {parameter.dtype for parameter in born.parameters()} == {dtype}
    assert_same(born(x), model(x), tolerance=tolerance[dtype])


def test_mixed_dtypes_and_autocast() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.trunk(x.bfloat16()).float())

    model, x = Mixed(), torch.randn(3, 8)
    gm = aim_surgery.transform(model, x, config=LITERAL)
    assert_same(gm(x), model(x), tolerance=1e-2)
    net = SmallNet().eval()
    gm = aim_surgery.transform(net, torch.zeros(2, 3, 32, 32), config=LITERAL)
    image = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gm(image), net(image), tolerance=3e-2)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = SmallNet()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32, device="meta"), config=LITERAL)
    assert {parameter.device.type for parameter in gm.parameters()} == {"meta"}
    assert gm(torch.zeros(5, 3, 32, 32, device="meta")).shape == (5, 7)


def test_channels_last_stays() -> None:
    model: Any = SmallNet().eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    gm = aim_surgery.transform(model, x, config=LITERAL)
    weight = gm.get_parameter("blocks.0.conv1.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert_same(gm(x), model(x), tolerance=FLOAT32_TOLERANCE)
    seen = {}
    gm.get_submodule("blocks.0.conv1").register_forward_hook(
        lambda module, args, output: seen.update(x=args[0], y=output)
    )
    gm(x)
    assert seen["x"].is_contiguous(memory_format=torch.channels_last)
    assert seen["y"].is_contiguous(memory_format=torch.channels_last)


def test_modes_and_flags_are_kept() -> None:
    model: Any = SmallNet().train()
    model.blocks[0].bn1.eval()
    model.stem.weight.requires_grad_(False)
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=LITERAL)
    assert gm.training
    assert not gm.get_submodule("blocks.0.bn1").training
    assert gm.get_submodule("blocks.2.bn1").training
    assert not gm.get_parameter("stem.weight").requires_grad
    assert gm.get_parameter("head.weight").requires_grad
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(gm(x), gm(x))  # both dropouts are alive
    gm.eval()
    assert torch.equal(gm(x), gm(x))


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_two_modes_two_graphs_one_set_of_weights() -> None:
    model = Auxiliary().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    gm: Any = aim_surgery.transform(model, x, config=LITERAL)
    assert {read.site.name for read in gm.plan.reads} == {"body", "head", "aux"}
    for twin in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert_same(twin.eval()(x), model.eval()(x))
        assert_same(twin.train()(x), model.train()(x))
        assert set(model.state_dict()) < set(twin.state_dict())


# Names and tensors --------------------------------------------------------------------------


@CASE_IDS
def test_names_entries_and_counts(case: Case) -> None:
    model = case.model()
    gm = aim_surgery.transform(model, case.input(), config=LITERAL)
    state, new = model.state_dict(), gm.state_dict()
    assert {name for name in new if name not in state} == {
        name for name in new if name.startswith("aim.")
    }
    assert list(state) == [name for name in new if not name.startswith("aim.")]
    assert sum(p.numel() for p in gm.parameters()) == gm.plan.total_parameters
    widened = {r.site.weights[0] for r in gm.plan.reads if r.site.widens}
    for name, value in state.items():
        assert (new[name].shape != value.shape) == (name in widened)
        if name not in widened:
            assert torch.equal(new[name], value)
            assert new[name].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear"])
def test_widened_weights_keep_their_entries(kind: Any, groups: int) -> None:
    groups = 1 if kind == "linear" else groups
    weight = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 6, 3, 3)
    wide = widen_weight(weight, 5, kind=kind, groups=groups, init="preserve")
    if kind == "conv_transpose":
        each = wide.view(groups, 4 // groups + 5, 6, 3, 3)
        assert torch.equal(each[:, : 4 // groups].reshape(weight.shape), weight)
        assert not each[:, 4 // groups :].any()
        assert wide.shape == (4 + groups * 5, 6, 3, 3)
    else:
        assert torch.equal(wide[:, :6], weight)
        assert not wide[:, 6:].any()
        assert wide.shape[1] == 11


def test_fresh_weights_are_drawn_at_the_new_fan_in() -> None:
    weight = torch.zeros(64, 32, 3, 3)
    new = widen_weight(weight, 32, kind="conv", groups=1, init="fresh")[:, 32:]
    bound = 1 / math.sqrt(64 * 9)
    assert new.abs().max() <= bound
    assert new.abs().max() > 0.99 * bound
    assert abs(float(new.std()) - bound / math.sqrt(3)) < 0.02 * bound


def test_what_the_graph_does_not_use_is_kept_too() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
            self.register_buffer("table", torch.arange(4.0), persistent=False)
            self.register_buffer("seen", torch.zeros(1))
            self.scale = torch.tensor(2.0)  # no buffer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.get_buffer("seen").add_(1)
            return self.fc(x) * self.scale + self.table

    model: Any = Spare()
    x = torch.randn(2, 4)
    gm: Any = aim_surgery.transform(model, x, config=LITERAL)
    assert set(gm.state_dict()) == {*model.state_dict(), "aim.memory.weight", "aim.memory.bias"}
    assert float(model.seen) == 0  # capture runs nothing for real
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert list(twin.state_dict()) == list(gm.state_dict())
        assert_same(twin(x), model(x), tolerance=FLOAT32_TOLERANCE)
    assert float(gm.seen) == 0
    gm(x)
    assert float(gm.get_buffer("seen")) == 1


def test_tied_weights_stay_tied() -> None:
    model = Tied().double()
    tokens = torch.randint(0, 11, (2, 5))
    gm = aim_surgery.transform(model, tokens, config=LITERAL)
    assert gm.get_parameter("embedding.weight") is gm.get_parameter("head.weight")
    assert_same(gm(tokens), model(tokens))


def test_one_layer_called_twice_has_one_wide_weight() -> None:
    model = Twice().double()
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=AimConfig(memory=400, budget=None, init="fresh"))
    assert gm.get_parameter("conv.weight").shape == (4, 4 + 3, 3, 3)
    assert gm(x).shape == (2, 4)


def test_layers_know_their_new_width() -> None:
    gm = aim_surgery.transform(SmallNet(), torch.zeros(2, 3, 32, 32), config=LITERAL)
    for layer in gm.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[1] * layer.groups == layer.in_channels
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape[1] == layer.in_features


def test_containers_keep_their_place_and_kind() -> None:
    gm: Any = aim_surgery.transform(SmallNet(), torch.zeros(2, 3, 32, 32), config=LITERAL)
    assert isinstance(gm.blocks, nn.Sequential)
    assert isinstance(gm.blocks[0].conv1, nn.Conv2d)


@CASE_IDS
def test_the_model_is_left_as_it_was(case: Case) -> None:
    model = case.model().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    gm = aim_surgery.transform(model, case.input(), config=FRESH)
    gm(case.input()).sum().backward()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(module.training for module in model.modules())


def test_without_copying_tensors_are_shared() -> None:
    model: Any = SmallNet()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=LITERAL, copy=False)
    assert gm.get_parameter("stem.bias") is model.stem.bias
    assert gm.get_buffer("blocks.0.bn1.running_mean") is model.blocks[0].bn1.running_mean
    assert gm.get_parameter("stem.weight") is not model.stem.weight
    assert model.stem.weight.shape == (12, 3, 3, 3)


# What users do with the result --------------------------------------------------------------


def test_formats_of_memory_in_a_pickle() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.conv(x).contiguous(memory_format=torch.channels_last))

    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    gm: Any = aim_surgery.transform(Asks(), x, config=FRESH)
    for form in (gm, aim_surgery.lower(gm, "split"), aim_surgery.fold(gm.eval())):
        file = io.BytesIO()
        torch.save(form, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(x), form(x))
        assert [n.meta for n in twin.graph.nodes] == [n.meta for n in form.graph.nodes]


def test_copies_pickles_and_moves() -> None:
    model: Any = SmallNet().eval()
    gm: Any = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=FRESH).eval()
    x = torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(gm), copy.copy(gm), pickle.loads(pickle.dumps(gm))):
        assert isinstance(twin, AimGraphModule)
        assert twin.plan == gm.plan
        assert torch.equal(twin(x), gm(x))
        assert twin.code == gm.code
        assert not twin.training
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert not torch.equal(twin.train()(x), twin(x))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(gm, protocol))
        assert torch.equal(twin(x), gm(x))
    deep = copy.deepcopy(gm)
    with torch.no_grad():
        deep.get_parameter("head.bias").add_(1)
    assert not torch.equal(deep(x), gm(x))
    assert_same(gm.double()(x.double()), gm(x.double()))


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_compile() -> None:
    model: Any = SmallNet().eval()
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 32, 32), config=FRESH).eval()
    torch._dynamo.reset()
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for batch in (2, 5, 3):
        x = torch.randn(batch, 3, 32, 32)
        assert_same(compiled(x), gm(x), tolerance=FLOAT32_TOLERANCE)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_export_with_a_dynamic_batch() -> None:
    gm = aim_surgery.transform(SmallNet(), torch.zeros(2, 3, 32, 32), config=FRESH).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    example = (torch.randn(4, 3, 32, 32),)
    program = torch.export.export(gm, example, dynamic_shapes=({0: batch},))
    for size in (1, 7):
        x = torch.randn(size, 3, 32, 32)
        assert_same(program.module()(x), gm(x), tolerance=FLOAT32_TOLERANCE)


def test_it_trains() -> None:
    torch.manual_seed(0)
    gm = aim_surgery.transform(SmallNet().train(), torch.zeros(2, 3, 32, 32), config=LITERAL)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 7, (16,))
    before = gm.get_parameter("aim.memory.weight").detach().clone()
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(gm(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(gm.get_parameter("aim.memory.weight"), before)
    assert gm.get_parameter("stem.weight")[:, 3:].abs().max() > 0


# Refusals -----------------------------------------------------------------------------------


def test_an_operated_model_is_refused() -> None:
    gm = aim_surgery.transform(SmallNet(), torch.zeros(2, 3, 32, 32), config=LITERAL)
    with pytest.raises(CaptureError, match="has been operated on"):
        aim_surgery.transform(gm, torch.zeros(2, 3, 32, 32))
    with pytest.raises(CaptureError, match="submodule '0'"):
        aim_surgery.plan(nn.Sequential(gm), torch.zeros(2, 3, 32, 32))


def test_a_plan_for_another_model_is_refused() -> None:
    x = torch.zeros(2, 3, 32, 32)
    plan = aim_surgery.plan(SmallNet(), x, config=LITERAL)
    with pytest.raises(PlanError, match="reads at 'stem', which this model has not"):
        aim_surgery.apply(nn.Sequential(nn.Conv2d(3, 3, 3)), plan)
    with pytest.raises(PlanError, match="head: the plan was made for"):
        aim_surgery.apply(SmallNet(classes=9), plan)
    tied: Any = SmallNet()
    tied.blocks[2].conv1.weight = tied.blocks[0].conv1.weight
    with pytest.raises(PlanError, match=r"could be widened.*shared"):
        aim_surgery.apply(tied, plan)


def test_a_plan_read_from_json_and_edited_is_applied() -> None:
    model, x = SmallNet().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plan = aim_surgery.plan(model, x, config=FRESH)
    again = Plan.from_json(plan.to_json()).with_planes({"head": 3}).without("stem")
    gm = aim_surgery.apply(model, again)
    assert gm.get_parameter("head.weight").shape == (7, 12 + 3)
    assert gm.get_parameter("stem.weight").shape == (12, 3, 3, 3)


def test_nested_inputs_in_a_plan() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, batch: dict[str, Any], scale: float = 1.0) -> torch.Tensor:
            return self.fc(batch["x"]) * scale + batch["pair"][0]

    model = Nested()
    batch = {"x": torch.randn(2, 4), "pair": (torch.ones(4), torch.ones(4))}
    plan = Plan.from_json(aim_surgery.plan(model, (batch,), config=LITERAL).to_json())
    assert_same(aim_surgery.apply(model, plan)(batch), model(batch), tolerance=FLOAT32_TOLERANCE)

    class Box:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class Boxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, box: Any) -> torch.Tensor:
            return self.fc(x)

    boxed = Boxed()
    inputs = (torch.randn(2, 4), Box(torch.ones(1)))
    plan = aim_surgery.plan(boxed, inputs, config=LITERAL)
    with pytest.raises(PlanError, match="pass example_inputs"):
        aim_surgery.apply(boxed, plan)
    assert aim_surgery.apply(boxed, plan, inputs).plan == plan


def test_the_name_aim_is_taken() -> None:
    model = nn.Sequential()
    model.add_module("aim", nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayerError, match="already has an attribute 'aim'"):
        aim_surgery.transform(model, torch.zeros(2, 4), config=LITERAL)


@pytest.mark.parametrize("name", ["code", "graph", "plan"])
def test_names_that_a_graph_module_has_for_itself(name: str) -> None:
    class Shadowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, nn.Linear(64, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.get_submodule(name)(x)

    model, x = Shadowed().double(), torch.randn(2, 64, dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match=f"called '{name}'.*emit='module'"):
        aim_surgery.transform(model, x)
    gm = aim_surgery.transform(model, x, emit="module")
    assert_same(gm(x), model(x))
    assert len(plan_of(gm).reads) == 1


@pytest.mark.parametrize("model", [None, "resnet50", torch.zeros(2)])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(AimSurgeryError, match=r"torch\.nn\.Module"):
        aim_surgery.transform(model)


def test_functional_weights_of_its_own_are_widened() -> None:
    model = Functional().double()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=LITERAL)
    assert gm.get_parameter("conv_weight").shape == (6, 4 + 2, 3, 3)
    assert gm.get_parameter("up_weight").shape == (6 + 2 * 2, 2, 2, 2)
    assert gm.get_parameter("linear_weight").shape == (5, 4 + 100)


def test_tensors_that_hooks_compute_are_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    prune.l1_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 4, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=LITERAL)
    assert_same(gm(x), model(x))
    assert "computed" in gm.plan.reads[0].site.why_beside


def test_a_read_with_the_weight_on_the_left_is_one_more_column_each() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w @ x

    model = Left().double()
    for x in (torch.randn(2, 4, 7).double(), torch.randn(4, 7).double(), torch.randn(4).double()):
        gm: Any = aim_surgery.transform(model, x, config=FRESH)
        memory = gm.aim.memory
        m = (memory.weight + memory.bias[:, None]).flatten()
        read = gm.get_parameter("aim.reads.w.weight") @ m
        assert_same(gm(x), model(x) + (read[:, None] if x.ndim > 1 else read))


# What a graph can't hold --------------------------------------------------------------------


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {"local": nn.Conv2d(3, 8, 3, padding=1), "global": nn.Conv2d(3, 8, 7, padding=3)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branches["local"](x) + self.branches["global"](x)


def test_a_name_that_is_a_word_of_pythons_own() -> None:
    net, x = Views(), torch.randn(2, 3, 8, 8)
    gm = aim_surgery.transform(net, x, config=LITERAL)
    plan = plan_of(gm)
    assert plan is not None
    assert plan.emit == "module"
    assert any("'global' is a word of Python's own" in note for note in plan.notes)
    assert_same(gm(x), net(x), tolerance=FLOAT32_TOLERANCE)
    assert "branches.global.weight" in gm.state_dict()
    with pytest.raises(CaptureError, match="'global' is a word of Python's own"):
        aim_surgery.transform(net, x, config=LITERAL, emit="graph")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(8, 8), 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu() * self.count

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def test_state_that_a_graph_does_not_keep_is_told_of() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8), Counting(), nn.BatchNorm1d(8)), torch.randn(4, 8)
    notes = aim_surgery.plan(net, x, config=LITERAL).notes
    assert any(note.startswith("1: only parameters and buffers are kept") for note in notes)
    net.get_parameter("0.weight").register_hook(lambda gradient: gradient * 0)
    notes = aim_surgery.plan(net, x, config=LITERAL).notes
    assert "hooks on gradients of parameters are not kept: 0.weight" in notes
    plain = aim_surgery.plan(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), x, config=LITERAL)
    assert not any("kept" in note for note in plain.notes)


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_what_scripts_note_on_parameters_stays(emit: Any) -> None:
    """Optimizers' groups are made by it: `no_weight_decay`, `_optim`."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    for name, parameter in net.named_parameters():
        parameter.noted = name  # type: ignore[attr-defined]
    gm = aim_surgery.transform(net, torch.randn(4, 8), config=LITERAL, emit=emit)
    assert {n: p.noted for n, p in gm.named_parameters() if hasattr(p, "noted")} == {
        name: name for name, _ in net.named_parameters()
    }
    other = aim_surgery.restore(gm)
    assert all(p.noted == n for n, p in other.named_parameters())
