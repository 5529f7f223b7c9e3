"""The operated network writes: values, versions, independence of samples, carry, gradients."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, PlanError
from tests.cases import CASES, Case, SmallNet, assert_same, largest_difference, mlp

FULL = AimConfig(memory=100, budget=None, init="fresh")


class Columns(nn.Module):
    """Samples are columns: W @ x, from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(16, n) / 4) for n in (8, 16))
        self.third = nn.Parameter(torch.randn(3, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second @ torch.relu(self.first @ x.T))
        return (self.third @ x).T


class BatchLast(nn.Module):
    """Samples come last for a while, behind tokens and features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
        self.middle = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle @ self.a(x).relu().permute(1, 2, 0)
        return self.o(x.permute(2, 0, 1).mean(1))


class Tops(nn.Module):
    """The first eight of a batch go through a head of their own."""

    def __init__(self, pick: Any) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16))
        self.head, self.aux = nn.Linear(16, 3), nn.Linear(16, 3)
        self.pick = pick

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.b(self.a(x).relu()).relu().mean((2, 3))
        return self.head(x), self.aux(self.pick(x))


PICKS = {
    "first": lambda x: x[:8],
    "every_second": lambda x: x[::2],
    "half": lambda x: x[: len(x) // 2 + 1],
    "sized_half": lambda x: x[: x.shape[0] // 2 + 1],
    "tail": lambda x: x[-8:],
    "narrow": lambda x: torch.narrow(x, 0, 0, 1),
    "split": lambda x: x.split(8)[0],
    "chunk": lambda x: x.chunk(2)[0],
    "whole": lambda x: x[: x.shape[0]],
}


@pytest.mark.parametrize("write", ["sample", "batch", "none"])
@pytest.mark.parametrize(("model", "sizes"), [(Columns, (8,)), (BatchLast, (5, 8))])
def test_samples_on_the_last_axis_are_no_features(model: Any, sizes: Any, write: Any) -> None:
    torch.manual_seed(0)
    net = model()
    gm = aim_surgery.transform(net, torch.randn(4, *sizes), config=AimConfig(write=write))
    for count in (4, 1, 7, 16, 8, 3):  # as many as features, too
        x = torch.randn(count, *sizes)
        for form in (gm, aim_surgery.lower(gm, "split")):
            assert_same(form.eval()(x), net(x), tolerance=1e-5)
    gm = aim_surgery.transform(
        net,
        torch.randn(4, *sizes),
        config=AimConfig(memory=20, budget=None, write=write, init="fresh"),
    ).eval()
    x = torch.randn(16, *sizes)
    assert_same(torch.cat([gm(one[None]) for one in x]), gm(x), tolerance=1e-5)


@pytest.mark.parametrize("name", PICKS)
@pytest.mark.parametrize("count", [1, 4])
def test_a_cut_of_the_batch_may_be_whole_on_the_example(name: str, count: int) -> None:
    torch.manual_seed(0)
    net = Tops(PICKS[name])
    gm = aim_surgery.transform(net, torch.randn(count, 3, 8, 8))
    assert gm.plan.writes
    for size in (1, 2, 8, 16):
        x = torch.randn(size, 3, 8, 8)
        for found, expected in zip(gm(x), net(x), strict=True):
            assert_same(found, expected, tolerance=1e-5)
    reads = {read.site.name: read.version for read in gm.plan.reads}
    assert (reads["aux"] == reads["head"]) == (name == "whole"), gm.plan.notes


X = torch.zeros(2, 3, 32, 32)
POINTS = ("stem", "blocks.0")


def small(write: Any = "sample", **options: Any) -> Any:
    torch.manual_seed(0)
    config = dataclasses.replace(FULL, write=write, write_at=POINTS, **options)
    return aim_surgery.transform(SmallNet().double(), X.double(), config=config)


def images(batch: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


# Values -------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two convolutions and a linear layer; 2 x 2 positions at the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1, groups=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


def pair_by_hand(p: Mapping[str, Tensor], x: Tensor, *, batch: bool, replace: bool) -> Tensor:
    """What the operated `Pair` computes, with M = 8 floats at home in 2 x 2 positions."""
    memory = (p["aim.memory.weight"][:, 0] + p["aim.memory.bias"])[None]  # (1, 8)

    def at_four(memory: Tensor) -> Tensor:  # at 4 x 4 positions: half a plane, and zeros
        return F.pad(memory, (0, 8)).reshape(-1, 1, 4, 4).expand(len(x), -1, -1, -1)

    features = torch.relu(
        F.conv2d(torch.cat([x, at_four(memory)], 1), p["first.weight"], p["first.bias"])
    )
    seen = features.mean(0, keepdim=True) if batch else features
    joined = torch.cat([seen, memory.reshape(1, 2, 2, 2).expand(len(seen), -1, -1, -1)], 1)
    block = {name.split("relu.", 1)[1]: t for name, t in p.items() if "writes.relu." in name}
    hidden = F.conv2d(joined, block["block.0.weight"], block["block.0.bias"])
    centred = hidden - hidden.mean((1, 2, 3), keepdim=True)
    hidden = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    hidden = hidden * block["block.1.weight"][:, None, None] + block["block.1.bias"][:, None, None]
    update = torch.einsum("nwij,cw->ncij", torch.sigmoid(hidden), block["out.weight"])
    update = (update + block["out.bias"][:, None, None]).reshape(-1, 8)
    written = update if replace else memory + update
    view = written.reshape(-1, 2, 2, 2).expand(len(x), -1, -1, -1)
    features = F.conv2d(torch.cat([features, view], 1), p["second.weight"], p["second.bias"])
    features = torch.cat([features.mean((2, 3)), written.expand(len(x), -1)], 1)
    return F.linear(features, p["head.weight"], p["head.bias"])


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("write", ["sample", "batch"])
def test_the_operated_network_computes_what_is_written_down_here(write: Any, mode: Any) -> None:
    config = AimConfig(
        memory=8, budget=None, init="fresh", write=write, mode=mode, activation="sigmoid"
    )
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    gm = aim_surgery.transform(Pair().double(), x, config=config)
    assert [(w.point.name, w.version) for w in gm.plan.writes] == [("relu", 1)]
    expected = pair_by_hand(
        dict(gm.named_parameters()), x, batch=write == "batch", replace=mode == "replace"
    )
    assert_same(gm(x), expected)
    gm.get_parameter("aim.writes.relu.out.bias").data += 1  # the comparison can fail
    assert largest_difference(gm(x), expected) > 1e-3


def test_each_site_reads_its_version() -> None:
    """Writing 0 in the place of the memory silences the reads after it, and no others."""
    gm = small(mode="replace").eval()
    x = images()
    for write in gm.aim.writes.children():
        nn.init.zeros_(write.out.weight)
        nn.init.zeros_(write.out.bias)
    quiet = gm(x)
    for read in gm.plan.reads:
        twin = copy.deepcopy(gm)
        weight = twin.get_parameter(f"{read.site.layer}.weight")
        weight.data[:, -read.planes :] += 1.0
        changed = largest_difference(twin(x), quiet) > 1e-9
        assert changed == (read.version == 0), read.site.name
    later = aim_surgery.apply(SmallNet().double(), gm.plan.with_versions({"head": 0})).eval()
    later.load_state_dict(gm.state_dict())
    assert largest_difference(later(x), quiet) > 1e-9  # an edited plan chooses


# One sample does not see another ------------------------------------------------------------


@pytest.mark.parametrize("write", ["sample", "batch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_do_not_depend_on_their_batch(case: Case, write: Any) -> None:
    model, x = case.model(), case.input()
    config = dataclasses.replace(FULL, write=write)
    gm = aim_surgery.transform(model, x, config=config)
    gm(x)  # running averages that are not zero
    gm.eval()
    rows = gm(x)
    if case.name == "weight_first":  # its two entries are not samples to the model
        return
    assert_same(gm(x.flip(0)), rows.flip(0))
    assert_same(torch.cat([gm(row) for row in x.split(1)]), rows)
    assert_same(gm(torch.cat([x, 100 * torch.ones_like(x)]))[: len(x)], rows)


class Windows(nn.Module):
    """Four windows of each image as samples of their own, then back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))  # (B, 4, 8, 8)
        batch, channels, height, width = x.shape
        x = x.reshape(batch, channels, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1)
        x = torch.relu(self.inner(x.reshape(-1, 16, channels)))
        return self.head(x.reshape(batch, -1, channels).mean(1))


class TimeFirst(nn.Module):
    """(time, samples, features): samples on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(5, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x)).transpose(0, 1)
        return self.head(torch.relu(self.inner(x)).sum(0))


@pytest.mark.parametrize(
    ("model", "shape", "larger"),
    [(Windows(), (2, 3, 16, 16), (2, 3, 24, 32)), (TimeFirst(), (3, 2, 5), (3, 7, 5))],
    ids=["windows", "time_first"],
)
def test_memory_follows_its_sample(
    model: nn.Module, shape: tuple[int, ...], larger: tuple[int, ...]
) -> None:
    model = model.double()
    gm = aim_surgery.transform(model, torch.zeros(shape).double(), config=FULL).eval()
    assert gm.plan.writes
    assert gm.plan.reads[-1].version > 0
    for size in (shape, larger):
        x = torch.randn(size, dtype=torch.float64)
        rows = gm(x)
        assert_same(torch.cat([gm(row) for row in x.split(1)]), rows)
        with aim_surgery.disable(gm):
            assert largest_difference(gm(x), rows) > 1e-6


def test_an_example_without_samples_does_not_narrow_the_model() -> None:
    for model, shape in (
        (mlp(), (16,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), (3, 9, 9)),
    ):
        gm = aim_surgery.transform(model.double(), torch.zeros(shape).double(), config=FULL).eval()
        assert gm.plan.writes
        x = torch.randn(4, *shape, dtype=torch.float64)
        assert_same(torch.stack([gm(row) for row in x]), gm(x))


@pytest.mark.parametrize("write", ["sample", "batch"])
def test_an_empty_batch_leaves_no_trace(write: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    config = dataclasses.replace(FULL, write=write, carry="state")
    gm = aim_surgery.transform(model, torch.zeros(2, 3, 9, 9), config=config)
    gm(torch.randn(2, 3, 9, 9))
    before = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    assert gm(torch.zeros(0, 3, 9, 9)).shape == (0, 4, 5, 5)
    after = dict(gm.named_buffers())
    if write == "batch":  # the average stands in, and it is noted as what was written
        assert after.pop("aim.memory.state").isfinite().all()
        del before["aim.memory.state"]
    assert_same(after, before, tolerance=0)
    assert gm.eval()(torch.zeros(0, 3, 9, 9)).shape == (0, 4, 5, 5)


# Batches ------------------------------------------------------------------------------------


def test_evaluation_uses_the_running_average() -> None:
    gm = small("batch", momentum=0.5)
    batches = [images(3), images(2) + 1, images(4) * 2]
    for x in batches:
        gm(x)
    running = "aim.writes.stem.running"
    assert float(gm.get_buffer("aim.writes.stem.batches")) == 3
    gm.eval()
    kept = gm.get_buffer(running).clone()
    gm(images(5))
    assert_same(gm.get_buffer(running), kept)
    memory = aim_surgery.read_memory(gm)
    layout = gm.plan.memory.layout
    first = gm.aim.memory()[0] + kept
    places = torch.Size(layout).numel()
    assert_same(memory["stem"][0], F.pad(first, (0, places - 100)).reshape(layout))


def test_a_batch_of_one_trains() -> None:
    for write in ("sample", "batch"):
        gm = small(write)
        for module in gm.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        gm(images(1)).sum().backward()
        assert_gradients(gm)
    dense = aim_surgery.transform(mlp(), torch.zeros(2, 16), config=FULL)
    dense(torch.randn(1, 16)).sum().backward()
    assert_gradients(dense)


def assert_gradients(gm: nn.Module) -> None:
    """Finite everywhere; at zero weights the reads alone get one that is not zero."""
    gradients = {n: p.grad for n, p in gm.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(gm.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for name, gradient in gradients.items() if "aim" not in name)


@pytest.mark.parametrize("write", ["sample", "batch"])
def test_a_batch_norm_that_sees_one_value_says_what_to_choose(write: Any) -> None:
    config = dataclasses.replace(FULL, write=write, norm="batch")
    gm = aim_surgery.transform(mlp(), torch.zeros(2, 16), config=config)
    with pytest.raises(AimSurgeryError, match=r'sees one value.*norm="layer"'):
        gm(torch.randn(1, 16))
    gm.eval()(torch.randn(1, 16))


# Other sizes, types, modes ------------------------------------------------------------------


@pytest.mark.parametrize("write", ["sample", "batch"])
@pytest.mark.parametrize("size", [24, 32, 47])
def test_other_resolutions(write: Any, size: int) -> None:
    model: Any = SmallNet().double()
    config = dataclasses.replace(FULL, write=write, write_at=POINTS, init="preserve")
    gm = aim_surgery.transform(model, X.double(), config=config)
    x = images(3, size)
    assert_same(gm.eval()(x), model.eval()(x))
    fresh = small(write).eval()
    before = fresh(x)
    fresh.aim.memory.bias.data += 1
    assert largest_difference(fresh(x), before) > 1e-6


def test_autocast() -> None:
    gm: Any = aim_surgery.transform(SmallNet(), X, config=FULL).eval()
    x = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = gm(x)
    assert half.dtype == torch.bfloat16
    assert_same(half.float(), gm(x), tolerance=5e-2)


class TwoWays(nn.Module):
    """Another path in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.one(x))
        if self.training:
            return self.three(self.two(x)), self.two(x)
        return self.three(self.two(x))


def test_both_graphs_of_a_model_write() -> None:
    model: Any = TwoWays().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=dataclasses.replace(FULL, init="preserve"))
    assert [write.point.name for write in gm.plan.writes] == ["relu"]
    assert_same(gm(x), model(x))
    assert_same(gm.eval()(x), model.eval()(x))
    gm.get_parameter("three.weight").data[:, 6:] += 1
    assert largest_difference(gm(x), model(x)) > 1e-3


def test_it_compiles_and_exports() -> None:
    gm = small("sample").eval()
    x = images(2)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), gm(x))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(gm, (images(3),), dynamic_shapes=({0: batch},)).module()
    assert_same(exported(images(5)), gm(images(5)))


# Carry --------------------------------------------------------------------------------------


class _Noting:
    """Keeps what a module gives."""

    def __init__(self, module: nn.Module, seen: list[Tensor]) -> None:
        self._handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))

    def close(self) -> None:
        self._handle.remove()


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("write", ["sample", "batch"])
def test_the_state_accumulates_in_training_only(write: Any, mode: Any, tmp_path: Path) -> None:
    gm = small(write, carry="state", mode=mode, momentum=0.25)
    state = gm.get_buffer("aim.memory.state")
    assert not state.any()
    expected = torch.zeros(100, dtype=torch.float64)
    for batch in (2, 5, 3):
        before = gm.aim.memory()[0].detach()
        seen: list[Tensor] = []
        last = gm.get_submodule("aim.writes.blocks_0")
        with contextlib.closing(_Noting(last, seen)):
            gm(images(batch))
        written = seen[0].mean(0)
        written = written if mode == "replace" else written - before
        expected = 0.75 * expected + 0.25 * written
        assert_same(gm.get_buffer("aim.memory.state"), expected)
    assert_same(gm.aim.memory()[0], (gm.aim.memory.weight[:, 0] + gm.aim.memory.bias) + expected)
    gm.eval()(images(3))
    assert_same(gm.get_buffer("aim.memory.state"), expected)
    aim_surgery.save(gm, tmp_path / "aim.safetensors")
    again = aim_surgery.load(tmp_path / "aim.safetensors", SmallNet().double().eval())
    assert_same(again(images()), gm(images()))
    aim_surgery.reset_memory(gm)
    assert not gm.get_buffer("aim.memory.state").any()
    assert largest_difference(gm(images()), again(images())) > 1e-6


def test_no_state_by_default() -> None:
    assert AimConfig().carry == "weights"
    assert not [name for name, _ in small().named_buffers() if name.startswith("aim.")]


# Start and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"write": "sample"}, {"write": "batch"}, {"write": "sample", "carry": "state"},
    {"write": "batch", "mode": "replace", "norm": "batch"}, {"write": "sample", "norm": "none",
     "widths": (5, 3), "kernel_size": 3, "activation": "gelu"},
], ids=str)  # fmt: skip
def test_preserve_init_whatever_the_memory_holds(options: dict[str, Any]) -> None:
    model: Any = SmallNet().double()
    config = AimConfig(budget=None, memory=100, write_at=POINTS, **options)
    gm = aim_surgery.transform(model, X.double(), config=config)
    for name, parameter in gm.named_parameters():
        if name.startswith(("aim.memory", "aim.writes")):
            nn.init.normal_(parameter, std=3)
    torch.manual_seed(1)
    expected = model(images())
    torch.manual_seed(1)
    assert_same(gm(images()), expected)
    assert_same(gm.eval()(images()), model.eval()(images()))


@pytest.mark.parametrize("write", ["sample", "batch"])
def test_two_steps_reach_memory_and_writes(write: Any) -> None:
    config = AimConfig(budget=None, memory=100, write=write, write_at=POINTS)
    gm = aim_surgery.transform(SmallNet(), X, config=config).double()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        gm(images()).square().sum().backward()
        new = {n: p.grad for n, p in gm.named_parameters() if n.startswith("aim.")}
        reached = {name for name, grad in new.items() if grad is not None and grad.any()}
        assert reached == (set(new) if step else set())
        optimizer.step()


@pytest.mark.parametrize("options", [
    {"write": "sample"}, {"write": "batch"},
    {"write": "sample", "mode": "replace", "norm": "batch", "widths": (2, 3), "kernel_size": 3},
], ids=str)  # fmt: skip
def test_gradcheck(options: dict[str, Any]) -> None:
    config = AimConfig(budget=None, memory=8, init="fresh", activation="tanh", **options)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    torch.manual_seed(0)
    gm = aim_surgery.transform(Pair().double(), x, config=config)
    names, values = zip(*gm.named_parameters(), strict=True)
    buffers = dict(gm.named_buffers())

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        tensors = dict(zip(names, parameters, strict=True)) | {
            name: buffer.clone() for name, buffer in buffers.items()
        }
        return functional_call(gm, tensors, (x,))

    inputs = (x.requires_grad_(), *(v.detach().clone().requires_grad_() for v in values))
    assert torch.autograd.gradcheck(run, inputs)


def test_write_points_that_cannot_be() -> None:
    def planned(at: str) -> None:
        aim_surgery.plan(SmallNet(), X, config=AimConfig(write_at=at))

    with pytest.raises(PlanError, match=r"'stam' does not exist.*stem"):
        planned("stam")
    with pytest.raises(PlanError, match=r"'blocks.0.conv1' does not dominate"):
        planned("blocks.0.conv1")


class Named(nn.Module):
    """Write points whose names can't all be names of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.enc_1, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enc_1(self.enc[1](self.enc[0](x)))
        return self.last(torch.relu(x).to(torch.float64))


def test_any_point_has_a_name() -> None:
    model, x = Named().double(), torch.randn(3, 6, dtype=torch.float64)
    config = dataclasses.replace(FULL, init="preserve", write_at=("enc.1", "enc_1", "to"))
    gm = aim_surgery.transform(model, x, config=config)
    assert [write.name for write in gm.plan.writes] == ["enc_1", "enc_1_2", "to_2"]
    assert_same(gm(x), model(x))


class Swapped(nn.Module):
    """Two layers in the other order in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.b(x)) if self.training else self.b(self.a(x)))


def test_points_in_another_order_in_the_other_mode() -> None:
    config = dataclasses.replace(FULL, write_at=("a", "b"))
    gm = aim_surgery.transform(Swapped(), torch.randn(3, 6), config=config)
    assert len(gm.plan.writes) == 1
    assert "in another order" in gm.plan.unwritten[0].reason
    gm.train()(torch.randn(2, 6))
    gm.eval()(torch.randn(2, 6))


def test_a_plan_of_writes_is_held_against_the_model() -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=dataclasses.replace(FULL, write_at=POINTS))

    def edited(**fields: Any) -> Any:
        write = plan.writes[1]
        point = dataclasses.replace(write.point, **fields)
        return dataclasses.replace(
            plan, writes=(plan.writes[0], dataclasses.replace(write, point=point))
        )

    for fields, words in (
        ({"name": "nowhere"}, "'nowhere', which this model does not pass"),
        ({"channels": 5}, "was made for a write point with 5 channels"),
        ({"sample_axis": None}, "samples on axis None"),
        ({"sample_axis": 2}, "samples on axis 2"),
        ({"sample_axis": 1}, "samples and channels can't be one axis"),
        ({"channel_axis": -1}, "count from 0"),
    ):
        with pytest.raises(PlanError, match=words):
            aim_surgery.apply(SmallNet(), edited(**fields))
    early = dataclasses.replace(plan.writes[1], version=1, source=0)
    late = dataclasses.replace(plan.writes[0], version=2, source=1)
    with pytest.raises(PlanError, match=r"stem: starts from version 1 .* written after it"):
        aim_surgery.apply(SmallNet(), dataclasses.replace(plan, writes=(early, late)))


def test_what_is_not_written_is_said() -> None:
    flat = aim_surgery.plan(nn.Linear(6, 6), torch.zeros(2, 6), config=FULL)
    assert flat.notes[0].startswith("nothing is written: each write point was left out")
    with pytest.raises(PlanError, match="write_at names no write point"):
        AimConfig(write_at=())
    config = AimConfig(budget=0.1, widths=(500,), write_at="stem")
    with pytest.raises(PlanError, match=r"too small .* 1 writes of width 500 [\d,]+, besides"):
        aim_surgery.plan(SmallNet(), X, config=config)
