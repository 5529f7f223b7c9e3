"""Folding: an operated model for inference, in which constant memory is no longer computed."""

from __future__ import annotations

import copy
import io
import math
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, fold, lower, transform
from aim_surgery.errors import MissingInputsError
from aim_surgery.nn.add_product import add_product
from aim_surgery.nn.folded import Maps, at_least, plus, scaled_plus, within
from aim_surgery.nn.memory import Memory
from tests.cases import CASES, Case, SmallNet, assert_rounds_alike, assert_same

WRITES = ("none", "batch", "sample")


def random_weights(gm: Any) -> Any:
    """Memories, memory weights and statistics that are not what they start as."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in gm.aim.parameters():
            parameter.normal_()
        for name, buffer in gm.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return gm


def operated(model: nn.Module, *inputs: Any, write: Any = "none", emit: Any = "graph") -> Any:
    torch.manual_seed(2)
    config = AimConfig(budget=None, memory=48, init="fresh", write=write)
    gm = random_weights(transform(model.double(), inputs, config=config, emit=emit))
    return gm.eval()


def images(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape, dtype=torch.float64)


def reads_memory(gm: Any) -> bool:
    return any(isinstance(module, Memory) for module in gm.aim.modules())


def functions(gm: Any) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_site(case: Case, write: str, batch_norm: bool) -> None:
    x = images(*case.shape)
    gm = operated(case.model(), x, write=write)
    code = gm.code
    state = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    folded = fold(gm, batch_norm=batch_norm)
    assert_same(folded(x), gm(x))
    assert_same(folded(images(3, *case.shape[1:])), gm(images(3, *case.shape[1:])))
    if not gm.plan.writes or write == "batch":
        assert not reads_memory(folded)
        assert folded.notes == ()
    assert gm.code == code
    assert all(torch.equal(tensor, state[name]) for name, tensor in gm.state_dict().items())


@pytest.mark.parametrize("name", ["small_net", "conv1d", "conv3d", "autoencoder", "standardized"])
def test_other_sizes_are_exact(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    gm = operated(case.model(), images(*case.shape), write="batch")
    folded = fold(gm)
    for more in (1, 2, 4, 1):
        x = images(2, case.shape[1], *(size + more for size in case.shape[2:]))
        assert_same(folded(x), gm(x))
    assert_same(folded(images(*case.shape)), gm(images(*case.shape)))


class UNet(nn.Module):
    """Down and up again, with transposed convolutions and concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6())
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.twice = nn.ConvTranspose2d(12, 4, 3, stride=2, padding=1, output_padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down(F.avg_pool2d(a, 2))
        y = self.norm(self.twice(torch.cat([self.up(b), a], 1)))
        y = F.interpolate(F.hardtanh(y), scale_factor=0.5, mode="bilinear")
        return self.out(y) * 0.5 - x.mean((2, 3), keepdim=True)[:, :2]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_skip_connections_and_transposed_convolutions(write: str, batch_norm: bool) -> None:
    gm = operated(UNet(), images(2, 3, 8, 8), write=write)
    folded = fold(gm, batch_norm=batch_norm)
    for size in (8, 12, 6):
        assert_same(folded(images(3, 3, size, size)), gm(images(3, 3, size, size)))
    if batch_norm:
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    if write == "none":
        assert {at_least, within} & {*functions(folded)} == (
            {at_least, within} if batch_norm else set()
        )


class Squeezed(nn.Module):
    """Squeeze and excite: convolutions on one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.less, self.more = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        gate = F.relu(self.less(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.more(gate))


def test_what_is_the_same_at_all_positions_becomes_a_bias() -> None:
    gm = operated(Squeezed(), images(2, 3, 8, 8))
    folded: Any = fold(gm)
    assert_same(folded(images(2, 3, 8, 8)), gm(images(2, 3, 8, 8)))
    assert [target for target in functions(folded) if target in (plus, scaled_plus)] == [
        scaled_plus
    ]
    assert folded.more.bias is not None
    mlp = operated(
        nn.Sequential(nn.Linear(6, 6, bias=False), nn.GELU(), nn.Linear(6, 4)), images(3, 6)
    )
    folded = fold(mlp)
    assert [node.op for node in folded.graph.nodes].count("call_module") == 3
    assert not any(
        isinstance(module, Maps) for module in folded.modules()
    )  # so nothing is compared
    assert_same(folded(images(3, 6)), mlp(images(3, 6)))


def test_as_many_nodes_as_before() -> None:
    torch.manual_seed(0)
    model, x = SmallNet().double().eval(), images(2, 3, 32, 32)
    plain = aim_surgery.capture.capture(model, x).traces[0].graph  # type: ignore[attr-defined]
    folded: Any = fold(operated(SmallNet(), x))
    assert len(folded.graph.nodes) <= len(plain.nodes) + 3  # maps, two sums
    merged: Any = fold(operated(SmallNet(), x), batch_norm=True)
    assert len(merged.graph.nodes) < len(folded.graph.nodes)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    ours = folded.state_dict()
    for name, tensor in model.state_dict().items():
        assert ours[name].shape == tensor.shape


class Blocks(nn.Module):
    """Changes tensors in place that are looked at again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y[:, :2]
        y.add_(self.b(x))
        z = self.c(y)
        torch.relu_(z)
        kept = z.view(z.shape[0], -1)
        z += y
        F.hardswish(z, inplace=True)
        return torch.cat([z.flatten(1), view.flatten(1), kept], 1)


def test_changes_in_place_that_others_see() -> None:
    x = images(2, 4, 6, 6)
    gm = operated(Blocks(), x)
    folded = fold(gm)
    before = x.clone()
    assert_same(folded(x), gm(x))
    assert_same(folded(x[..., :5]), gm(x[..., :5]))
    assert torch.equal(x, before)


class Growing(nn.Module):
    """A scale of many digits after each layer, so that offsets outgrow what relu leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) * 3
        return x


def test_offsets_do_not_outgrow_values() -> None:
    x = images(2, 4, 8, 8)
    gm = operated(Growing(), x)
    single, folded = copy.deepcopy(gm).float(), fold(gm)
    assert functions(folded).count(plus) > 1
    assert_same(folded(x), gm(x))
    exact = gm(x).detach()
    error = float((fold(single)(x.float()) - exact).abs().max() / exact.abs().max())
    assert error <= 1e-5


class OnValues(nn.Module):
    """Stays a Python call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(torch.relu(self.conv(x)).mean((-1, -2)))
        return x if float(x.detach().sum()) > 1e9 else x * 2


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_python_calls(emit: str) -> None:
    x = images(2, 3, 8, 9)
    gm = operated(nn.Sequential(nn.Conv2d(3, 8, 3), OnValues()), x, emit=emit)
    folded: Any = fold(gm)
    assert isinstance(folded, nn.Sequential if emit == "module" else nn.Module)
    assert_same(folded(x), gm(x))
    assert_same(pickle.loads(pickle.dumps(folded))(x), gm(x))
    notes: Any = folded.notes
    kept = [note.partition(":")[0] for note in notes]
    assert kept == (["1.conv"] if emit == "graph" else ["0", "1.conv"])
    assert reads_memory(folded)
    assert not len(folded.get_submodule("1.fc")._forward_hooks)
    folded.train()
    assert_same(folded(x), gm(x))


def test_recurrent_layers_are_told() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lstm = nn.Linear(6, 6), nn.LSTM(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.fc(x))[0]

    x = images(5, 2, 6)
    gm = operated(Recurrent(), x)
    folded: Any = fold(gm)
    assert_same(folded(x), gm(x))
    assert [note for note in folded.notes if note.startswith("lstm:")]


def test_what_samples_wrote_is_told() -> None:
    x = images(2, 3, 32, 32)
    gm = operated(SmallNet(), x, write="sample")
    folded: Any = fold(gm)
    told = {note.partition(":")[0] for note in folded.notes}
    assert told == {read.site.name for read in gm.plan.reads if read.version}
    assert "stem" not in told
    assert not reads_memory(folded)


def test_what_samples_wrote_is_added_as_it_is_computed() -> None:
    x = images(2, 3, 32, 32)
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3, padding=1),
    )  # fmt: skip
    gm = transform(net.double(), x, config=AimConfig(budget=None, memory=196, write_at=("1",)))
    gm = random_weights(gm).eval()
    folded: Any = fold(gm)
    late = [read for read in gm.plan.reads if read.version]
    small = [r for r in late if r.planes * math.prod(r.site.kernel_size) <= 16]
    assert 0 < len(small) < len(late)  # the others' columns would be more than their result
    assert functions(folded).count(add_product) == len(small)
    for size in (32, 24):
        x = images(3, 3, size, size)
        assert_same(folded(x), gm(x))


def test_any_form_and_frozen_bases() -> None:
    x = images(2, 3, 32, 32)
    gm = operated(SmallNet(), x, write="batch")
    assert_same(fold(lower(gm, "split"))(x), gm(x))
    frozen = aim_surgery.freeze_base(copy.deepcopy(gm))
    assert_same(fold(frozen)(x), gm(x))
    with torch.inference_mode():
        folded = fold(gm)
        assert_same(folded(x), gm(x))
        assert_same(folded(images(2, 3, 24, 24)), gm(images(2, 3, 24, 24)))
    y = images(2, 3, 24, 24).requires_grad_()
    folded(y).sum().backward()
    assert y.grad is not None
    z = y.detach().clone().requires_grad_()
    gm(z).sum().backward()
    assert_same(y.grad, z.grad)


def test_it_is_for_inference() -> None:
    x = images(2, 3, 32, 32)
    gm = operated(SmallNet(), x)
    folded: Any = fold(gm)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert_same(folded.train()(x), gm(x))
    assert not any(module.training for module in folded.modules())
    with pytest.raises(AimSurgeryError, match=r"gm\.eval\(\)"):
        fold(gm.train())
    with pytest.raises(AimSurgeryError, match="expected an operated model"):
        fold(nn.Linear(2, 2).eval())
    for refused in (fold, lambda m: lower(m, "split"), aim_surgery.freeze_base):
        with pytest.raises(AimSurgeryError, match="this model is folded"):
            refused(folded)
    with pytest.raises(AimSurgeryError, match="this model is folded"), aim_surgery.disable(folded):
        pass


def test_copies_files_types_and_devices() -> None:
    x, y = images(2, 3, 32, 32), images(2, 3, 20, 28)
    gm = operated(SmallNet(), x)
    folded: Any = fold(gm)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    folded(y)
    twins = [
        copy.deepcopy(folded), copy.copy(folded), pickle.loads(pickle.dumps(folded)),
        torch.load(file, weights_only=False),
    ]  # fmt: skip
    for twin in twins:
        assert_same(twin(x), gm(x))
        assert_same(twin(y), gm(y))
        assert twin.notes == folded.notes
        assert twin.plan == gm.plan
    single = copy.deepcopy(folded).float()
    assert {tensor.dtype for tensor in single.state_dict().values()} <= {torch.float32, torch.int64}
    for inputs in (x, y):
        assert_same(single(inputs.float()), gm.float()(inputs.float()), 1e-5)
        gm.double()
    other = fold(operated(SmallNet(), x, write="batch"))
    other.load_state_dict(folded.state_dict(), strict=False)
    fresh = {name for name, _ in folded.named_buffers() if name.startswith("aim.maps.")}
    assert fresh
    assert fresh <= folded.state_dict().keys()


def test_half_the_digits() -> None:
    x = images(2, 3, 16, 16)
    gm = operated(convolutions()[:4], x).float()
    for size in (16, 12):
        assert_rounds_alike(gm, fold, images(2, 3, size, size).float())


def test_layouts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    x = images(2, 8, 6, 6).to(memory_format=torch.channels_last)
    gm = operated(model, x).to(memory_format=torch.channels_last)
    folded: Any = fold(gm, x)
    assert folded(x).is_contiguous(memory_format=torch.channels_last)
    maps = [tensor for name, tensor in folded.named_buffers() if ".at_" in name]
    assert maps
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in maps)
    assert_same(folded(x), gm(x))


def test_example_inputs_choose_the_stored_sizes() -> None:
    gm = operated(convolutions(), images(2, 3, 16, 16))
    folded: Any = fold(gm, {"input": images(1, 3, 10, 12)})
    assert folded.aim.maps.planned == ((3, 10, 12),)
    assert_same(folded(images(4, 3, 10, 12)), gm(images(4, 3, 10, 12)))
    assert not folded.aim.maps._others
    for size in range(6, 18):
        assert_same(folded(images(1, 3, size, size)), gm(images(1, 3, size, size)))
    assert len(folded.aim.maps._others) <= 8
    with pytest.raises(AimSurgeryError, match="takes no other"):
        fold(gm, {"input": images(1, 3, 8, 8), "other": 1})
    with pytest.raises(AimSurgeryError, match="no value for input"):
        fold(gm, {})


def test_threads() -> None:
    gm = operated(convolutions(), images(2, 3, 16, 16))
    folded: Any = fold(gm)
    sizes = [8, 9, 10, 11] * 3
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        results[index] = folded(images_of[index])

    images_of = [images(2, 3, size, size) for size in sizes]
    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(images_of):
        assert_same(results[index], gm(x))


def test_export() -> None:
    x = images(2, 3, 16, 16)
    gm = operated(convolutions(), x)
    folded: Any = fold(gm)
    batch = {0: torch.export.Dim("batch", max=64)}
    program = torch.export.export(folded, (x,), dynamic_shapes=(batch,))
    assert_same(program.module()(images(5, 3, 16, 16)), gm(images(5, 3, 16, 16)))
    with pytest.raises(Exception, match="fold with example_inputs of the size to export"):
        torch.export.export(folded, (images(2, 3, 8, 8),))


@pytest.mark.parametrize("write", ["none", "sample"])
def test_compile_without_breaks(write: str) -> None:
    x = images(2, 3, 16, 16)
    gm = operated(convolutions(), x, write=write)
    folded: Any = fold(gm)
    with torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x), gm(x))
        torch._dynamo.reset()
        compiled = torch.compile(folded, backend="aot_eager")  # other sizes may break
        assert_same(compiled(images(2, 3, 8, 8)), gm(images(2, 3, 8, 8)))
    torch._dynamo.reset()


def test_a_graph_changed_since() -> None:
    x = images(2, 3, 8, 8)
    gm = operated(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    frozen: Any = aim_surgery.freeze_base(gm)
    total = next(node for node in frozen.graph.nodes if node.name.startswith("add"))
    site = total.args[0]
    total.replace_all_uses_with(site, lambda user: user is not total)
    frozen.graph.erase_node(total)
    with pytest.raises(AimSurgeryError, match="its sum is no longer in it"):
        fold(frozen)


class Noisy(nn.Module):
    """Draws anew in each call, also in evaluation."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.rand_like(self.scale)


def test_noise_is_no_constant() -> None:
    x = images(2, 3, 8, 8)
    gm = operated(Noisy(), x)
    before = torch.get_rng_state()
    folded = fold(gm)
    assert torch.equal(before, torch.get_rng_state())
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = gm(x)
        torch.manual_seed(seed)
        assert_same(folded(x), expected)


def test_the_hooks_of_a_layer_see_what_it_gives_without_memory() -> None:
    """In the concat form W_m m is added behind them; in a bias it would come before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].register_forward_hook(lambda module, inputs, output: output.mul(2))
    x = torch.randn(3, 6, dtype=torch.float64)
    gm = aim_surgery.transform(model, x, config=AimConfig(write="none")).eval()
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert_same(fold(gm)(x), gm(x))


class CastsInputs(nn.Module):
    """Brings its input to its weights' type, as many of transformers' embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.conv.weight.dtype:
            x = x.to(self.conv.weight.dtype)
        return self.conv(x)


def test_a_model_of_another_type_now_that_asks_for_its_inputs_type() -> None:
    x = images(2, 3, 16, 16).float()
    gm = transform(CastsInputs(), x, config=AimConfig(write="none")).eval().double()
    random_weights(gm)
    assert_same(fold(gm)(x.double()), gm(x.double()))


class AsksForMarks(nn.Module):
    """Refuses inputs without a certain value, as vision-language models do their image tokens."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not bool((ids == 7).any()):
            raise ValueError("no mark")
        return ids.float()


def test_a_model_that_refuses_noise_asks_for_example_inputs() -> None:
    model = nn.Sequential(AsksForMarks(), nn.Linear(5, 4))
    x = torch.tensor([[7, 1, 2, 3, 4]])
    gm = transform(model, x, config=AimConfig(write="none")).eval()
    with pytest.raises(MissingInputsError, match=r"pass example_inputs to fold \(.*no mark"):
        fold(gm)
    random_weights(gm)
    assert_same(fold(gm, x)(x), gm(x), 1e-5)


@pytest.mark.parametrize("after", ["relu", "relu6", "nothing"])
def test_a_map_without_samples_stays_one(after: str) -> None:
    layers = {"relu": [nn.ReLU()], "relu6": [nn.ReLU6()], "nothing": []}[after]
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 3, 8, 8)
    config = AimConfig(write="none", memory=100, budget=None, init="fresh")
    gm = transform(net, x, config=config).eval()
    folded = fold(gm)
    for size in (8, 6):
        one = torch.randn(3, size, size)
        assert folded(one).shape == (4, size, size)
        assert_same(folded(one), gm(one), tolerance=1e-5)
        assert_same(folded(one), folded(one[None])[0], tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.func's own imports
@pytest.mark.parametrize("inner", [nn.BatchNorm2d(16), nn.ReLU(inplace=True)])
def test_folded_models_are_batched_and_derived_along_a_direction(inner: nn.Module) -> None:
    gm = operated(
        nn.Sequential(nn.Conv2d(3, 16, 3), inner, nn.Conv2d(16, 16, 3)), images(4, 3, 9, 9)
    )
    folded, x = fold(gm), images(4, 3, 9, 9)
    direction = torch.ones_like(x)
    assert_same(torch.vmap(lambda one: folded(one[None])[0])(x), gm(x))
    expected = torch.func.jvp(gm, (x,), (direction,))
    assert_same(torch.func.jvp(folded, (x,), (direction,)), expected)


class NormByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.conv(x))


def test_norms_that_are_called_by_keyword_are_merged() -> None:
    x = images(2, 3, 9, 9)
    gm = operated(NormByName(), x)
    folded = fold(gm, batch_norm=True)
    assert "norm" not in dict(folded.named_modules())
    assert_same(folded(x), gm(x))


class PadsSamples(nn.Module):
    """(N, 3, H, W) -> (N + 1, 4, H - 4, W - 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.pad(self.first(x), (0, 0, 0, 0, 0, 0, 0, 1)))


@pytest.mark.parametrize("write", WRITES)
def test_samples_that_are_padded(write: Any) -> None:
    gm = operated(PadsSamples(), images(2, 3, 9, 9), write=write)
    folded = fold(gm)
    for batch in (1, 2, 5):
        assert_same(folded(images(batch, 3, 9, 9)), gm(images(batch, 3, 9, 9)))


@pytest.mark.parametrize("change", [lambda gm: gm, fold])
def test_frozen_models_of_their_own_class_take_weights_from_elsewhere(change: Any) -> None:
    x = images(2, 3, 9, 9)
    gm = operated(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), x, emit="module")
    if change is not fold:
        aim_surgery.freeze_base(gm)
    changed = change(gm)
    weights = {name: parameter * 1 for name, parameter in changed.named_parameters()}
    assert_same(torch.func.functional_call(changed, weights, (x,)), changed(x))
