"""Reads through hooks: layers inside Python calls, and models that keep their class."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import aim_surgery
from aim_surgery import AimConfig, AimSurgeryError, CaptureError, Plan, transform
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from aim_surgery.cli import app
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.nn.inside import AddMemory, JoinMemory, View
from aim_surgery.nn.memory import Memory
from tests.cases import assert_same

WIDE = AimConfig(budget=None, memory=48)


class OnValues(nn.Module):
    """Its Python looks at values, so that it stays a Python call."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if float(x.detach().sum()) > 1e9 else x * 2


def partly() -> nn.Module:
    """A graph with a Python call in it."""
    torch.manual_seed(0)
    inner = OnValues(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=4))
    ends = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*ends, inner, nn.Conv2d(8, 4, 1)).double()


class WithMethods(nn.Module):
    """More than one way in, an attribute, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"classes": 5}
        self.stem = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.deep(self.stem(x).relu()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def whole() -> WithMethods:
    torch.manual_seed(0)
    return WithMethods().double()


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

TOKENS = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def filled(gm: nn.Module) -> nn.Module:
    """As if trained: what is new is no longer zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in aim_surgery.memory_parameters(gm):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return gm


def read_of(gm: nn.Module, name: str) -> Any:
    return next(read for read in plan_of(gm).reads if read.site.name == name)


# Values ---------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 12)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 8)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 2, 4, 3, 4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2), (2, 4, 6, 8)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 3, 4)),
    "linear": (nn.Linear(5, 7), (2, 5)),
    "tokens": (nn.Linear(5, 7, bias=False), (2, 9, 5)),
    "no batch": (nn.Conv2d(4, 6, 3), (4, 6, 8)),
}


def by_hand(layer: Any, wide: Tensor, view: Tensor, x: Tensor, **options: Any) -> Tensor:
    """The layer with a wide weight on cat[x, m], group by group."""
    if isinstance(layer, nn.Linear):
        joined = torch.cat([x, view.expand(*x.shape[:-1], -1)], -1)
        return F.linear(joined, wide, layer.bias)
    dims = len(layer.kernel_size)
    axis = x.ndim - dims - 1
    parts = []
    for own in x.chunk(layer.groups, axis):
        parts += [own, view.expand(*x.shape[:axis], *view.shape)]
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(wide.detach())
    return twin(torch.cat(parts, axis), **options)


@pytest.mark.parametrize("name", LAYERS)
def test_a_hook_reads_as_a_concatenation_by_hand(name: str) -> None:
    layer, shape = copy.deepcopy(LAYERS[name])
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    gm = filled(transform(OnValues(layer), x, config=WIDE, emit="module"))
    operated, read = gm.get_submodule("layers.0"), read_of(gm, "layers.0")
    assert read.site.widens
    assert read.site.inside == "."
    memory = gm.get_submodule("aim.memory")
    assert isinstance(memory, Memory)
    view = View(memory, read.planes, read.site.spatial).for_input(x)
    assert tuple(view.shape) == (read.planes, *read.site.spatial)
    wide = operated.get_parameter("weight")
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        assert wide.shape[1] == layer.weight.shape[1] + read.planes
        layer = copy.deepcopy(layer)
    layer.bias = operated.bias  # type: ignore[assignment]
    expected = by_hand(layer, wide, view, x)
    assert_same(operated(x), expected)
    assert_same(operated(input=x), expected)
    assert not torch.allclose(layer(x), expected)  # the comparison can fail
    aim_surgery.freeze_base(gm)
    assert not read_of(gm, "layers.0").site.widens
    assert_same(gm.get_submodule("layers.0")(x), expected)
    assert_same(gm.get_submodule("layers.0")(input=x), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_transposed_convolution_with_output_size(frozen: bool) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    gm = filled(transform(OnValues(layer), x, config=WIDE, emit="module"))
    if frozen:
        aim_surgery.freeze_base(gm)
    operated = gm.get_submodule("layers.0")
    for size in ([9, 7], [10, 8], [9, 8]):
        whole, twice = operated(x, output_size=size), operated(x[:1], output_size=size)
        assert list(whole.shape[2:]) == size
        assert_same(whole[:1], twice)
    small = operated(x, output_size=[9, 7])  # the same sums, on the places that both have
    large = operated(x, output_size=[10, 8])
    assert_same(small, large[..., :9, :7])


def test_calls_of_one_layer_at_several_sizes() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.conv(x), self.conv(x[..., ::2, ::2]), self.conv(input=x[..., :5, :7])]

    model = Pyramid().double()
    gm = transform(model, IMAGES, config=WIDE, emit="module")
    assert [read.site.name for read in plan_of(gm).reads] == ["conv"]
    for mine, own in zip(gm(IMAGES), model(IMAGES), strict=True):
        assert_same(mine, own)
    filled(gm)
    memory = gm.get_submodule("aim.memory")
    assert isinstance(memory, Memory)
    view = View(memory, read_of(gm, "conv").planes, (8, 8))
    assert view.for_input(IMAGES[..., :4, :4]).shape[1:] == (4, 4)
    third = gm(IMAGES)[2]
    wide = gm.get_parameter("conv.weight")
    x = IMAGES[..., :5, :7]
    bias = gm.get_parameter("conv.bias")
    joined = torch.cat([x, view.for_input(x).expand(2, -1, -1, -1)], 1)
    assert_same(third, F.conv2d(joined, wide, bias, padding=1))


def test_a_layer_that_pads_by_itself() -> None:
    class Same(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(F.pad(input, (0, 1, 0, 1)))

    layer = Same(3, 4, 3, stride=2).double()
    gm = transform(OnValues(layer), IMAGES, config=WIDE, emit="module")
    assert read_of(gm, "layers.0").site.why_beside == "its forward is its own"
    assert_same(gm(IMAGES), OnValues(layer)(IMAGES))
    filled(gm)
    assert not torch.allclose(gm(IMAGES), OnValues(layer)(IMAGES))


# One graph with a Python call in it, and a whole model -----------------------------------------


@pytest.fixture(params=["graph", "module"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    model = partly() if request.param == "graph" else whole()
    config = AimConfig(budget=0.6, write="batch" if request.param == "graph" else "none")
    return model, transform(model, IMAGES, config=config, emit=request.param)


def test_it_computes_what_it_did_and_every_check_passes(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model, gm = pair
    result = aim_surgery.verify(model, gm, IMAGES)
    assert result.ok, str(result)
    assert not plan_of(gm).skips
    assert any(read.site.inside for read in plan_of(gm).reads)
    filled(gm)
    assert not aim_surgery.verify(model, gm, IMAGES).equivalence.ok


def test_copies_pickles_modes_and_dtypes(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, gm = pair
    filled(gm).eval()
    expected = gm(IMAGES)
    twin = copy.deepcopy(gm)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(gm(IMAGES), expected)  # nothing of it is the copy's
    assert not twin(IMAGES).any()
    assert_same(pickle.loads(pickle.dumps(gm))(IMAGES), expected)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(IMAGES), expected)
    aim_surgery.save(gm, tmp_path / "gm.safetensors")
    loaded = aim_surgery.load(tmp_path / "gm.safetensors", model).eval()
    assert type(loaded).__name__ == type(gm).__name__
    assert_same(loaded(IMAGES), expected)
    halves = copy.deepcopy(gm).to(torch.float32)
    assert halves(IMAGES.float()).dtype == torch.float32
    torch.testing.assert_close(halves(IMAGES.float()).double(), expected, rtol=1e-3, atol=1e-4)
    assert all(module.training for module in copy.deepcopy(gm).train().modules())


def test_a_frozen_base_computes_the_same_and_stays(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    filled(gm).eval()
    expected = gm(IMAGES)
    aim_surgery.freeze_base(gm, statistics=True)
    assert_same(gm(IMAGES), expected)
    assert not any(read.site.widens for read in plan_of(gm).reads)
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    gm.train()
    optimizer = torch.optim.AdamW(aim_surgery.memory_parameters(gm), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gm(IMAGES).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in gm.state_dict().items() if not value.equal(before[name])}
    assert changed
    assert all(name.startswith("aim.") for name in changed)
    reads = {name for name in gm.state_dict() if name.startswith(("aim.reads.", "aim.memory."))}
    assert reads <= changed
    own = dict(model.state_dict())
    assert {name: value.shape for name, value in gm.state_dict().items() if name in own} == {
        name: value.shape for name, value in own.items()
    }
    aim_surgery.freeze_base(gm, statistics=True)  # nothing is taken apart twice
    assert_same(copy.deepcopy(gm)(IMAGES), gm(IMAGES))


def test_a_frozen_base_goes_to_a_file_and_back(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    model, gm = pair
    aim_surgery.freeze_base(filled(gm)).eval()
    aim_surgery.save(gm, tmp_path / "gm.safetensors")
    loaded = aim_surgery.load(tmp_path / "gm.safetensors", model).eval()
    assert_same(loaded(IMAGES), gm(IMAGES))
    assert loaded.state_dict().keys() == gm.state_dict().keys()


def test_the_notebook(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    filled(aim_surgery.freeze_base(gm)).eval()
    model.eval()
    assert not torch.allclose(gm(IMAGES), model(IMAGES))
    with aim_surgery.disable(gm):
        assert_same(gm(IMAGES), model(IMAGES))
    memory = aim_surgery.read_memory(gm, IMAGES)["memory"]
    floats = plan_of(gm).memory.floats
    assert_same(memory.flatten()[:floats], gm.get_submodule("aim.memory")().flatten())
    assert "memory" in aim_surgery.read_memory(gm)
    aim_surgery.reset_memory(gm)
    names = {name for name, _ in gm.named_parameters()}
    assert len(list(aim_surgery.memory_parameters(gm))) <= len(names)


def test_a_plan_round_trip(pair: tuple[nn.Module, nn.Module]) -> None:
    model, gm = pair
    plan = plan_of(gm)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert_same(aim_surgery.apply(model, again)(IMAGES), gm(IMAGES))
    with pytest.raises(CaptureError, match="has been operated on"):
        transform(gm, IMAGES, emit="module")


def test_a_write_in_the_graph_is_not_seen_inside() -> None:
    gm = transform(partly(), IMAGES, config=AimConfig(budget=0.5, write_at="2"))
    assert len(gm.plan.writes) == 1
    inside = [read for read in gm.plan.reads if read.site.inside]
    assert {read.version for read in inside} == {0}
    assert any("before any write" in note for note in gm.plan.notes)


def test_hooks_registered_after_a_pickle_take_no_place(tmp_path: Path) -> None:
    """In a new process, numbers of hooks begin at 0 again."""
    torch.save(transform(nn.Sequential(nn.Linear(48, 48)), emit="module"), tmp_path / "gm.pt")
    script = (
        "import sys, torch\n"
        "gm = torch.load(sys.argv[1], weights_only=False)\n"
        "for _ in range(200): gm[0].register_forward_pre_hook(lambda *_: None)\n"
        "print(gm(torch.zeros(1, 48)).shape)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "gm.pt")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "torch.Size([1, 48])", found.stderr


def test_calls_share_views_within_one_forward_without_gradients() -> None:
    model = OnValues(*(nn.Linear(8, 8) for _ in range(4))).double()
    gm = filled(transform(model, TOKENS, config=WIDE, emit="module"))
    expected = gm(TOKENS)
    calls: list[int] = []
    gm.get_submodule("aim.memory").register_forward_hook(lambda *_: calls.append(1))

    def looked(function: Any) -> int:
        calls.clear()
        function()
        return len(calls)

    assert looked(lambda: gm(TOKENS)) == 4
    with torch.no_grad():
        assert looked(lambda: gm(TOKENS)) == 1
        assert_same(gm(TOKENS), expected)
        assert looked(lambda: gm.get_submodule("layers.0")(TOKENS)) == 1  # outside a forward
        assert looked(lambda: gm.get_submodule("layers.0")(TOKENS)) == 1
        with pytest.raises(RuntimeError):
            gm(TOKENS[..., :3])  # a forward that fails ends, too
        gm.get_parameter("aim.memory.bias").data.add_(1)
        changed = gm(TOKENS)
        assert not torch.allclose(changed, expected)
        with aim_surgery.disable(gm):
            assert not torch.allclose(gm(TOKENS), changed)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(gm, [TOKENS] * 8))
    for each in found:
        torch.testing.assert_close(each, changed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Saving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, saving: bool = False) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if saving else block(x)  # type: ignore[assignment]
                x = x.relu()
            return x

    gm = filled(transform(Saving().double(), TOKENS, config=WIDE, emit="module"))
    gradients = []
    for saving in (False, True):
        gm.zero_grad()
        gm(TOKENS.clone().requires_grad_(), saving).square().sum().backward()
        gradients.append([parameter.grad for parameter in gm.parameters()])
    assert_same(*gradients)


def test_a_layer_called_inside_that_lives_elsewhere() -> None:
    class Borrowing(OnValues):
        def __init__(self, borrowed: nn.Module) -> None:
            super().__init__(nn.Linear(8, 8))
            self.borrowed = [borrowed]  # no submodule of its

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.borrowed[0](x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.lent = nn.Linear(8, 8), nn.Linear(8, 8)
            self.first, self.second = Borrowing(self.shared), Borrowing(self.lent)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.shared(x).relu()))

    model = Outer().double()
    gm = transform(model, TOKENS, config=WIDE)
    sites = {read.site.name: read.site for read in gm.plan.reads}
    assert set(sites) == {"shared", "lent", "first.layers.0", "second.layers.0"}
    assert sites["shared"].why_beside == "it is also called inside a Python call"
    assert_same(gm(TOKENS), model(TOKENS))


# What is left alone, and what is listed -------------------------------------------------------


def operated(*layers: nn.Module, x: Tensor) -> nn.Module:
    return transform(OnValues(*layers), x, config=WIDE, emit="module")


def test_computed_weights_read_beside() -> None:
    torch.manual_seed(0)
    normed = parametrizations.weight_norm(nn.Linear(8, 8))
    pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    model = OnValues(normed, pruned).double()
    gm = transform(model, TOKENS, config=WIDE, emit="module")
    reads = {read.site.name: read.site for read in plan_of(gm).reads}
    assert {site.why_beside for site in reads.values()} == {
        "its weight is computed",
    }
    assert set(reads["layers.0"].weights) == {
        "layers.0.parametrizations.weight.original0",
        "layers.0.parametrizations.weight.original1",
    }
    assert reads["layers.1"].weights == ("layers.1.weight_orig",)
    assert aim_surgery.verify(model, gm, TOKENS).ok


def test_tied_and_hooked_layers_read_beside() -> None:
    torch.manual_seed(0)
    first, second, hooked = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    seen: list[int] = []
    hooked.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    model = OnValues(first, second, hooked).double()
    gm = transform(model, TOKENS, config=WIDE, emit="module")
    reads = {read.site.name: read.site.why_beside for read in plan_of(gm).reads}
    assert reads == {
        "layers.0": "its weight is shared by layers.0.weight, layers.1.weight",
        "layers.2": "forward hooks see its input and output",
    }
    seen.clear()
    assert_same(gm(TOKENS), model(TOKENS))
    assert set(seen) == {8}
    assert aim_surgery.verify(model, gm, TOKENS).ok


class Half(nn.Parameter):
    """A parameter with a class of its own."""


def test_layers_in_a_python_call_widen_by_the_rules_of_a_graph() -> None:
    """One that no graph could widen is not widened here either."""
    torch.manual_seed(0)
    kinds, watched, stopped = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    kinds.weight = Half(kinds.weight.detach())
    seen: list[int] = []
    watched.register_full_backward_hook(lambda _, grads, __: seen.append(grads[0].shape[-1]))
    stopped.weight.requires_grad_(False)
    layers = (kinds, watched, stopped, nn.Linear(8, 8))
    inside, graph = OnValues(*layers).double(), nn.Sequential(*layers).double()
    whys = []
    for model, emit in ((inside, "module"), (graph, "graph")):
        gm = transform(model, TOKENS, config=WIDE, emit=emit)  # type: ignore[arg-type]
        whys.append([read.site.why_beside for read in plan_of(gm).reads])
        seen.clear()
        gm(TOKENS.clone().requires_grad_()).sum().backward()
        assert set(seen) == {8}
    assert whys[0] == whys[1]
    assert whys[0] == [
        "its weight is a Half",
        "backward hooks see its gradients",
        "its weight is frozen",
        "",
    ]


def test_what_has_no_place_for_a_hook_is_listed() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x, x, x, need_weights=False)[0]
            return self.head(self.lstm(x)[0])

    model = Attention().double()
    gm = transform(model, TOKENS, config=WIDE, emit="module")
    assert [read.site.name for read in plan_of(gm).reads] == ["lstm.weight_ih_l0", "head"]
    reasons = {name: skip.reason for skip in plan_of(gm).skips for name in skip.weights}
    assert "multi_head_attention_forward uses its weight" in reasons["inner.out_proj.weight"]
    assert "MultiheadAttention uses it" in reasons["inner.in_proj_weight"]
    assert "lstm.weight_hh_l0" not in reasons
    assert "not called" in reasons["unused.weight"]
    result = aim_surgery.verify(model, gm, TOKENS)
    assert result.ok, str(result)


def test_a_weight_that_others_use_too_stays_as_it_is() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).to(self.b.weight.dtype)  # a question that does no harm
            return self.b(x) + x @ self.a.weight

    model = Peeking().double()
    gm = transform(model, TOKENS, config=WIDE, emit="module")
    assert read_of(gm, "a").site.why_beside == "matmul uses its weight, too"
    assert read_of(gm, "b").site.widens
    assert_same(gm(TOKENS), model(TOKENS))


def test_a_layer_called_in_the_graph_and_inside_reads_by_one_hook() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = OnValues(nn.Linear(8, 8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner.layers[0](x).relu())

    model = Outer().double()
    gm = transform(model, TOKENS, config=WIDE)
    sites = {read.site.name: read.site for read in gm.plan.reads}
    assert set(sites) == {"inner.layers.0", "inner.layers.1"}
    assert sites["inner.layers.0"].inside == "inner"
    result = aim_surgery.verify(model, gm, TOKENS)
    assert result.ok, str(result)


def test_a_layer_reads_in_both_modes_where_training_alone_looks_at_data() -> None:
    class LayerDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if self.training and torch.rand([]) < 0.0:
                    continue
                x = layer(x).tanh()
            return x

    model = nn.Sequential(nn.Linear(8, 8), LayerDrop(), nn.Linear(8, 8)).double()
    gm = transform(model, TOKENS, config=AimConfig(budget=None, memory=48, init="fresh"))
    names = {f"1.layers.{index}" for index in range(3)}
    assert {read.site.name for read in gm.plan.reads if read.site.inside == "1"} == names
    assert_same(gm.train()(TOKENS), gm.eval()(TOKENS))
    for mode in (True, False):
        gm.zero_grad()
        gm.train(mode)(TOKENS).square().sum().backward()
        for index in range(3):
            weight = gm.get_parameter(f"1.layers.{index}.weight")
            assert weight.shape == (8, 8 + read_of(gm, f"1.layers.{index}").planes)
            assert weight.grad is not None
            assert bool((weight.grad[:, 8:] != 0).any())
    same = transform(model, TOKENS, config=WIDE)
    result = aim_surgery.verify(model, same, TOKENS)
    assert result.ok, str(result)
    loaded = copy.deepcopy(same)
    assert_same(loaded.train()(TOKENS), model.train()(TOKENS))
    aim_surgery.freeze_base(same)
    assert_same(same.eval()(TOKENS), model.eval()(TOKENS))


def test_a_layer_whose_calls_give_no_tensor_is_left_out() -> None:
    class Router(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            y = F.linear(input, self.weight)
            return (y * 2 if self.training and y.sum() > 1e9 else y,)

    class First(nn.Identity):
        def forward(self, input: Any) -> Tensor:
            return input[0]

    model = nn.Sequential(nn.Linear(8, 8), Router(8, 8), First(), nn.Linear(8, 8)).double().eval()
    gm = transform(model, TOKENS, config=WIDE)
    assert {read.site.name for read in gm.plan.reads} == {"0", "3"}
    (skip,) = gm.plan.skips
    assert skip.weights == ("1.weight",)
    assert skip.reason == "calls of this Router take or give something else than a float tensor"
    result = aim_surgery.verify(model, gm, TOKENS)
    assert result.ok, str(result)


def test_the_reason_of_a_run_that_failed_is_one_line() -> None:
    class Demanding(OnValues):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets are missing\nin training")
            return self.layers[0](x)

    plan = aim_surgery.plan(Demanding(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), TOKENS.float(),
                            config=WIDE, emit="module")  # fmt: skip
    (skip,) = plan.skips
    assert skip.reason == (
        "this Linear was not called when the model was run: in training it fails with "
        "ValueError: targets are missing"
    )


def test_a_model_that_copies_itself_in_its_own_way_is_refused() -> None:
    class Single(OnValues):
        def __deepcopy__(self, memo: dict[int, Any]) -> Single:
            return self

    class Never(OnValues):
        def __deepcopy__(self, memo: dict[int, Any]) -> Single:
            raise TypeError("no")

    for kind in (Single, Never):
        model = kind(nn.Linear(8, 8))
        hooks = len(model.layers[0]._forward_hooks)
        with pytest.raises(AimSurgeryError, match="cop"):
            transform(model, TOKENS.float(), config=WIDE, emit="module")
        assert len(model.layers[0]._forward_hooks) == hooks


def test_hooks_are_taken_for_what_they_are() -> None:
    gm = transform(whole(), IMAGES, config=WIDE, emit="module")
    stem = gm.get_submodule("stem")
    (hook,) = stem._forward_pre_hooks.values()
    assert isinstance(hook, JoinMemory)
    aim_surgery.freeze_base(gm)
    assert not stem._forward_pre_hooks
    (hook,) = stem._forward_hooks.values()
    assert isinstance(hook, AddMemory)
    assert hook.beside is gm.get_submodule("aim.reads.stem")


# The model's own class ------------------------------------------------------------------------


def test_class_attributes_and_methods_stay() -> None:
    model = whole().eval()
    gm = transform(model, IMAGES, config=AimConfig(budget=0.6), emit="module")
    assert type(gm) is WithMethods
    assert gm.config == {"classes": 5}
    assert gm.stem.in_channels == 3  # what it is called with
    assert gm.state_dict().keys() >= model.state_dict().keys()
    assert_same(gm.features(IMAGES), model.features(IMAGES))
    assert {n for n, _ in gm.named_children()} == {*dict(model.named_children()), "aim"}
    assert any("nothing is written" in note for note in plan_of(gm).notes)
    assert not hasattr(model, "aim")
    filled(gm)
    assert not torch.allclose(gm.features(IMAGES), model.features(IMAGES))


@pytest.fixture(scope="module")
def transformers() -> Any:
    import_torchvision()
    return pytest.importorskip("transformers")


def llama(transformers: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2(transformers: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_language_models_generate_the_same_tokens(make: Any, transformers: Any) -> None:
    torch.manual_seed(0)
    model: Any = make(transformers).double().eval()
    ids = torch.randint(0, 61, (2, 5))
    gm = transform(model, {"input_ids": ids}, config=AimConfig(budget=0.3), emit="module")
    plan = plan_of(gm)
    assert type(gm) is type(model)
    assert not plan.skips
    weights = {name for read in plan.reads for name in read.site.weights}
    assert "lm_head.weight" in weights
    if make is gpt2:
        assert "transformer.h.0.attn.c_attn.weight" in weights
        assert gm.lm_head.weight is gm.transformer.wte.weight
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = [
        each.generate(ids, use_cache=cache, **options)
        for each in (model, gm)
        for cache in (True, False)
    ]
    assert all(other.equal(tokens[0]) for other in tokens)
    assert tokens[0].shape == (2, 13)
    filled(gm)
    with_cache, without = (gm.generate(ids, use_cache=c, **options) for c in (True, False))
    assert with_cache.equal(without)
    assert gm.state_dict().keys() >= model.state_dict().keys()


def test_timm_models_keep_their_two_halves() -> None:
    import_torchvision()
    timm = pytest.importorskip("timm")
    model: Any = timm.create_model("resnet10t", num_classes=7).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    gm = transform(model, x, emit="module")
    assert type(gm) is type(model)
    features = gm.forward_features(x)
    assert_same(features, model.forward_features(x))
    assert_same(gm.forward_head(features), model(x))
    assert gm.num_classes == 7


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers
def test_low_rank_adapters_go_on_top(transformers: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = llama(transformers).eval()
    ids = torch.randint(0, 61, (2, 5))
    gm = transform(model, {"input_ids": ids}, config=AimConfig(budget=0.3), emit="module")
    before = gm(input_ids=ids).logits
    adapted = peft.get_peft_model(gm, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(adapted(input_ids=ids).logits, before)


def test_the_command_line_keeps_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64))\n"
    (tmp_path / "net.py").write_text(source)
    torch.save(nn.Sequential(nn.Linear(64, 64)).state_dict(), "net.pt")
    options = ["net.pt", "--model", "net.py:net", "--budget", "none", "--memory", "48"]
    found = CliRunner().invoke(app, ["plan", *options, "--emit", "module", "--json"])
    assert Plan.from_json(found.stdout).emit == "module", found.output
    words = ["transform", *options, "--emit", "module", "-o", "a.safetensors"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    loaded = aim_surgery.load("a.safetensors", nn.Sequential(nn.Linear(64, 64)))
    assert type(loaded) is nn.Sequential
    found = CliRunner().invoke(app, ["verify", "net.pt", "a.safetensors", "--model", "net.py:net"])
    assert found.exit_code == 0, found.output


def test_a_layer_that_its_caller_moves_to_another_dtype() -> None:
    """A router that computes in float32 whatever the rest does."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(8, 4)
            self.tied = self.classifier.weight  # so that W_m lives beside

        def forward(self, x: Tensor) -> Tensor:
            if float(x.detach().sum()) > 1e9:
                return x
            self.classifier = self.classifier.to(torch.float32)
            return self.classifier(x.to(torch.float32)).to(x.dtype)

    model = nn.Sequential(nn.Linear(8, 8), Router())
    x = TOKENS.float()
    gm = transform(model, x, config=WIDE)
    read = read_of(gm, "1.classifier")
    assert not read.site.widens
    result = aim_surgery.verify(model, gm, x)
    assert result.ok, str(result)
