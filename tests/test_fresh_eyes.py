"""Defects that readings with fresh eyes have found: whole models, small, each with its own trap."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, fold, freeze_base, lower, transform, verify
from aim_surgery.errors import PlanError
from tests.cases import assert_same

SMALL = AimConfig(memory=64, budget=None)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]

# TorchScript ----------------------------------------------------------------------------------


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(8, 3)
        self.j = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))

    def forward(self, x: Any) -> Any:
        return self.c(self.j(x).relu())


@pytest.mark.parametrize("emit", ["graph", "module"])
@pytest.mark.parametrize("grad", [True, False])
def test_script_modules_get_parameters_of_their_own(emit: Any, grad: bool) -> None:
    model: Any = Scripted()
    x = torch.randn(4, 8)
    with torch.set_grad_enabled(grad):
        gm: Any = transform(model, x, config=SMALL, emit=emit)
    assert all(p.is_leaf and p.requires_grad for p in gm.parameters())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in gm.parameters()}
    assert_same(gm.eval()(x), model.eval()(x), 1e-6)
    gm(x).square().sum().backward()
    assert all(p.grad is not None for n, p in gm.named_parameters() if n.startswith("j."))
    assert all(p.grad is None for p in model.parameters())
    torch.optim.SGD(gm.parameters(), lr=0.1).step()
    assert not torch.allclose(gm(x), model(x))
    fold(gm)
    freeze_base(gm)
    assert not any(p.requires_grad for n, p in gm.named_parameters() if n.startswith("j."))


# Nested tensors -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.e, self.o = nn.TransformerEncoder(layer, 2), nn.Linear(8, 8)

    def forward(self, x: Any, mask: Any) -> Any:
        return self.o(self.e(x, src_key_padding_mask=mask))


@pytest.mark.parametrize("form", ["concat", "split"])
def test_padded_input_that_torch_nests(form: Any) -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    args = torch.randn(2, 5, 8), mask
    model = Encoder().eval()
    gm: Any = transform(model, args, config=SMALL, emit="module").eval()
    lower(gm, form)
    with torch.no_grad():
        expected = model(*args)
        assert_same(gm(*args), expected, 1e-5)
        for name, parameter in gm.named_parameters():
            if name.startswith("aim."):
                parameter.copy_(torch.randn_like(parameter))
        for read in gm.aim.plan.reads:
            if read.site.widens:
                gm.get_parameter(read.site.weights[0])[:, read.site.in_channels :] = 0.3
        nested = gm(*args)
    assert not torch.allclose(nested, expected, atol=1e-3)
    padded = gm(*args)  # with gradients, torch nests nothing
    kept = ~mask
    assert_same(nested[kept], padded[kept], 1e-5)


# Names of layers ------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The weight of one layer in two shapes, and another with the name of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.W_2 = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Any) -> Any:
        return F.linear((x @ self.W).relu(), self.W).relu() @ self.W_2


def test_further_shapes_of_a_weight_take_no_name_of_another() -> None:
    model = Decoder()
    x = torch.randn(2, 8)
    gm = transform(model, x, config=SMALL)
    assert_same(gm(x), model(x), 1e-5)
    assert [read.site.layer for read in gm.plan.reads] == ["W", "W_3", "W_2"]
    assert sorted(dict(gm.aim.reads.named_children())) == ["W", "W_2", "W_3"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.enc_2 = nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x: Any) -> Any:
        return self.enc_2(F.linear(self.enc(x).relu(), self.enc.weight.t()).relu())


def test_tied_decoders_beside_a_layer_of_their_name() -> None:
    model = Tied().eval()
    x = torch.randn(2, 8)
    gm = transform(model, x, config=SMALL)
    assert_same(fold(gm)(x), model(x), 1e-5)
    assert_same(freeze_base(gm)(x), model(x), 1e-5)
    left = transform(model, x, config=AimConfig(memory=64, budget=None, exclude=("enc_2",)))
    assert len(left.plan.reads) == 2


# Batches that overflow, batches of none -------------------------------------------------------


@pytest.mark.parametrize("options", [{"carry": "state"}, {"write": "batch"}], ids=str)
def test_a_batch_that_overflows_leaves_nothing_behind(options: Any) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    gm: Any = transform(model, x, config=AimConfig(memory=1024, budget=None, **options)).train()
    gm(x)
    before = {name: value.clone() for name, value in gm.named_buffers()}
    assert any(value.is_floating_point() and value.any() for value in before.values())
    broken = x.clone()
    broken[0, :, 0, 0] = float("nan")
    gm(broken)
    for name, value in gm.named_buffers():
        assert value.isfinite().all(), name
    assert_same(gm(x), model(x), 1e-5)
    assert_same(gm.eval()(x), model.eval()(x), 1e-5)
    gm.train()(x + 1)
    assert any(not torch.equal(value, before[name]) for name, value in gm.named_buffers())


class Frames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Any) -> Any:
        batch, frames, _ = x.shape
        hidden = self.b(self.a(x).relu().reshape(batch * frames, 64)).relu()
        return self.c(hidden.reshape(batch, frames, 64).mean(1))


@pytest.mark.parametrize("form", ["concat", "split"])
def test_no_sample_at_all(form: Any) -> None:
    model = Frames()
    gm = transform(model, torch.randn(2, 4, 8), form=form)
    assert any(read.site.windows > 1 for read in gm.plan.reads)
    for batch in (1, 3):
        x = torch.randn(batch, 4, 8)
        assert_same(gm(x), model(x), 1e-5)
    assert gm(torch.randn(0, 4, 8)).shape == (0, 3)


# Sparse inputs, keys that are no text, nothing to buy with ------------------------------------


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Any, adjacency: Any) -> Any:
        hidden = torch.sparse.mm(adjacency, self.a(x)).relu()
        return torch.sparse.mm(adjacency, self.b(hidden))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("emit", ["graph", "module"])
def test_sparse_inputs(layout: str, emit: Any) -> None:
    adjacency = getattr((torch.rand(6, 6) > 0.5).float(), layout)()
    model, args = Graph(), (torch.randn(6, 4), adjacency)
    gm = transform(model, args, emit=emit)
    assert_same(gm(*args), model(*args), 1e-6)
    assert verify(model, gm, args).ok


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, d: Any) -> Any:
        return self.b(self.a(d[0]) + d[1])


def test_keys_that_are_no_text() -> None:
    inputs = ({0: torch.randn(2, 8), 1: torch.randn(2, 8)},)
    plan = aim_surgery.plan(Keyed(), inputs)
    with pytest.raises(PlanError, match="hold objects that a plan can't store"):
        aim_surgery.apply(Keyed(), plan)
    model = Keyed()
    assert_same(aim_surgery.apply(model, plan, inputs)(*inputs), model(*inputs), 1e-6)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_budget_of_nothing() -> None:
    model = nn.Sequential(nn.Linear(5, 0, bias=False))
    with pytest.raises(PlanError, match="no parameters that a budget could be a share of"):
        transform(model, torch.randn(2, 5))


# Costs ----------------------------------------------------------------------------------------


def _measured(model: nn.Module, gm: Any, args: Any) -> int:
    """Multiply-accumulates a sample that the operation adds, in concat form."""
    from torch.utils.flop_counter import FlopCounterMode

    totals = []
    for one in (model, gm):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            one(*args)
        totals.append(counter.get_total_flops())
    return (totals[1] - totals[0]) // 2 // args[0].shape[0]


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        batch, frames = x.shape[:2]
        hidden = self.b(self.a(x.flatten(0, 1)).relu()).mean((2, 3))
        return self.c(hidden.reshape(batch, frames, 8).mean(1))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)
        self.b = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        hidden = self.a(x).relu()
        return self.b(self.t(hidden, hidden, hidden, need_weights=False)[0])


@pytest.mark.parametrize(
    ("model", "shape", "samples"),
    [
        (Images(), (2, 6, 3, 16, 16), 2),
        (Frames(), (2, 4, 8), 2),
        (TimeFirst(), (7, 2, 8), 2),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, stride=2)), (2, 3, 9, 9), 2),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.Conv2d(4, 2, 1)), (2, 3, 9, 9), 2),
    ],
    ids=["frames of images", "frames", "time first", "convolutions", "transposed"],
)  # fmt: skip
def test_the_plan_tells_what_reads_cost(model: Any, shape: Any, samples: int) -> None:
    x = torch.randn(shape)
    config = AimConfig(memory=256, budget=None, write="none")
    gm = transform(model, x, config=config, form="concat")
    extra = _measured(model, gm, (x,)) * shape[0] // samples
    assert gm.plan.macs == pytest.approx(extra, rel=0.02)


def test_the_plan_tells_what_writes_cost() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2))
    x = torch.randn(2, 3, 32, 32)
    config = AimConfig(memory=8192, budget=None, widths=(4,), write_at=("0",))
    gm = transform(model, x, config=config, form="concat")
    (write,) = gm.plan.writes
    layout = gm.plan.memory.layout
    assert len(layout) == 3
    block = write.macs((layout[0], 1, 1)) - 4 * layout[0]
    assert write.macs(layout) == block + 4 * layout[0] * layout[1] * layout[2]


# Initialisers ---------------------------------------------------------------------------------


def test_fresh_transposed_weights_beside_their_layer_are_as_wide_as_in_it() -> None:
    bounds = []
    for frozen in (False, True):
        layer = nn.ConvTranspose2d(64, 4, 3)
        layer.weight.requires_grad_(not frozen)
        config = AimConfig(init="fresh", memory=2000, budget=None)
        gm: Any = transform(nn.Sequential(layer), torch.randn(2, 64, 8, 8), config=config)
        assert gm.plan.reads[0].site.widens is not frozen
        weight = gm.aim.reads.get_submodule("0").weight if frozen else gm.get_parameter("0.weight")
        bounds.append(float(weight.detach()[0 if frozen else 64 :].abs().max()))
    assert bounds[1] == pytest.approx(bounds[0], rel=0.05)
    assert bounds[0] == pytest.approx((4 * 9) ** -0.5, rel=0.05)


def test_a_copy_keeps_the_plan() -> None:
    gm: Any = transform(Scripted(), torch.randn(4, 8), config=SMALL)
    assert copy.deepcopy(gm).plan == gm.plan
