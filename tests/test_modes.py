"""What one mode, one call or one value has and others have not: weights, samples, inputs, sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as ao
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aim_surgery
from aim_surgery import AimConfig, fold, transform, verify
from aim_surgery.errors import MissingInputsError
from tests.cases import assert_same

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))


class Merged(nn.Module):
    """A low-rank part that is a product of its own in training, and merged in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 8))
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, self.w) + F.linear(F.linear(x, self.a), self.b)
        return F.linear(x, self.w + self.b @ self.a)


class Noisy(nn.Module):
    """Noise of learned size on a weight, in training (NoisyNet)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Parameter(torch.randn(8, 8))
        self.size = nn.Parameter(torch.full((8, 8), 0.1))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        noise = self.size * torch.randn_like(self.size) if self.training else 0
        return self.head(F.relu(F.linear(x, self.mean + noise)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Merged, Noisy])
def test_weights_that_modes_use_differently(kind: type[nn.Module], training: bool) -> None:
    model = kind().train(training)
    gm = transform(model, X)
    assert verify(model, gm, X).ok, str(verify(model, gm, X))
    reads = {read.site.name: read.site for read in gm.aim.plan.reads}
    if kind is Merged:
        assert {"a", "b"} <= {name for site in reads.values() for name in site.weights}
        assert not any(site.widens for site in reads.values() if site.weights[0] in ("a", "b"))
    else:
        assert {"mean", "size"} <= {*reads["mean"].weights}


class Reparametrized(nn.Module):
    """Two convolutions in training, one of their sum in evaluation (RepVGG)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.thin = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1, bias=False)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.last(self.wide(x) + self.thin(x))
        weight = self.wide.weight + F.pad(self.thin.weight, (1, 1, 1, 1))
        return self.last(F.conv2d(x, weight, self.wide.bias, padding=1))


def test_sites_that_one_mode_has_alone_are_told_of() -> None:
    notes = aim_surgery.plan(Reparametrized(), torch.randn(2, 3, 8, 8)).notes
    told = [note for note in notes if "alone" in note]
    assert told == [
        "read in training alone, as evaluation has no such call: thin",
    ]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(), nn.Conv2d(8, 8, 1))
    assert not any("alone" in n for n in aim_surgery.plan(model, torch.randn(2, 3, 8, 8)).notes)


class Conditioned(nn.Module):
    """Its first layer works on one vector for all samples."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = last
        self.condition = nn.Linear(5, 8)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        if self.last:
            x = self.first(x)
            return self.second(F.silu(x + self.condition(given)[:, None, None]))
        e = self.condition(given)[:, None, None]
        return self.second(F.silu(self.first(x) + e))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("lead", [(4,), ()], ids=["batched", "single"])
def test_a_condition_for_all_samples_does_not_make_them_one(
    last: bool, lead: tuple[int, ...]
) -> None:
    model, inputs = Conditioned(last), (torch.randn(*lead, 3, 8, 8), torch.randn(5))
    gm = transform(model, inputs)
    assert verify(model, gm, inputs).ok
    axes = {read.site.name: read.site.sample_axis for read in gm.aim.plan.reads}
    assert axes["second"] == (0 if lead else None)
    assert gm.aim.plan.writes
    if lead:
        assert gm(torch.randn(7, 3, 8, 8), inputs[1]).shape == (7, 8, 8, 8)


class CalledWithOthers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expert = nn.Linear(8, 8)
        self.weights = nn.Parameter(torch.randn(3, 8, 8) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        other = torch.func.functional_call(self.expert, {"weight": self.weights[0]}, (x,))
        return self.expert(x) + other


def test_a_layer_that_is_also_called_with_another_weight_reads_beside() -> None:
    model = CalledWithOthers()
    gm = transform(model, X)
    assert gm.aim.plan.emit == "module"
    [read] = [read for read in gm.aim.plan.reads if read.site.layer == "expert"]
    assert not read.site.widens
    assert "functional_call" in read.site.why_beside
    assert verify(model, gm, X).ok


@pytest.mark.parametrize("training", [False, True])
def test_norms_without_momentum_are_captured(training: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64, momentum=None)  # a cumulative mean
    model = nn.Sequential(nn.Conv2d(3, 64, 3), norm, nn.ReLU(), nn.Conv2d(64, 8, 3))
    model.train(training)
    x = torch.randn(4, 3, 8, 8)
    gm = transform(model, x)
    assert gm.aim.plan.emit == "graph"
    assert gm.aim.plan.writes
    assert norm.num_batches_tracked == 0
    assert verify(model, gm, x).ok
    for step in range(3):
        model.train(), gm.train()
        assert_same(gm(x + step), model(x + step))
    assert_same(gm.get_submodule("1").running_var, norm.running_var)
    assert gm.get_submodule("1").num_batches_tracked == 3


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return self.layer(x)


def test_folding_leaves_example_inputs_alone() -> None:
    gm = transform(WritesIntoItsInput(), X).eval()
    x = X.clone()
    folded = fold(gm, x)
    assert torch.equal(x, X)
    assert_same(folded(X.clone()), gm(X.clone()), tolerance=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch.ao's own
def test_observers_that_take_a_size_at_their_first_call_are_folded() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    model: Any = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).train()
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    model = ao.prepare_qat(ao.fuse_modules_qat(model, [["1", "2", "3"]]))
    x = torch.randn(2, 3, 8, 8)
    gm = transform(model, x, config=AimConfig(write="none")).eval()
    before = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    fold(gm, x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in gm.named_buffers())
    gm(x)
    assert_same(fold(gm, x)(x), gm(x))


class Packs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.rnn = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 64)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0])


def test_models_that_zeros_do_not_serve_ask_for_inputs(tmp_path: Path) -> None:
    model, inputs = Packs(), (torch.randint(9, (3, 6)), torch.tensor([6, 2, 4]))
    gm = transform(model, inputs)
    aim_surgery.save(gm, tmp_path / "gm.pt")
    with pytest.raises(MissingInputsError, match="pass example_inputs"):
        aim_surgery.apply(model, gm.aim.plan)
    with pytest.raises(MissingInputsError, match="pass example_inputs"):
        aim_surgery.load(tmp_path / "gm.pt", model)
    loaded = aim_surgery.load(tmp_path / "gm.pt", model, example_inputs=inputs)
    assert_same(loaded.eval()(*inputs), gm.eval()(*inputs))


class Modulated(nn.Module):
    """StyleGAN's convolution: the input scales its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.style = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.randn(1, 8, 8, 3, 3))
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.first(x).reshape(1, -1, h, w)
        weight = self.weight * (self.style(z)[:, None, :, None, None] + 1)
        x = F.conv2d(x, weight.reshape(-1, 8, 3, 3), padding=1, groups=n)
        return self.last(x.view(n, 8, h, w))


class Shifted(nn.Module):
    """A linear call whose weight the input shifts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.shift = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.shift(x).mean(0))


class Experts(nn.Module):
    """Each token picks its matrix; positions are added to what attends, and are no weights."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.router = how, nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(4, 8, 8))
        self.position = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        if self.how == "index_select":
            picked = torch.index_select(input=self.weight, dim=0, index=chosen)
        else:
            picked = self.weight[chosen]
        x = x + self.position
        x = torch.bmm(x.unsqueeze(1), picked.transpose(1, 2)).squeeze(1)
        return (x @ x.t()).softmax(-1) @ x


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Modulated(), (torch.randn(2, 3, 8, 8), torch.randn(2, 6))),
        (Shifted(), X),
        (Experts("index"), X),
        (Experts("index_select"), X),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_weights_that_are_made_from_the_input_are_listed(model: nn.Module, inputs: Any) -> None:
    gm = transform(model, inputs)
    [skip] = gm.aim.plan.skips
    assert skip.weights == ("weight",)
    assert skip.reason.endswith("its weight is made from the input")
    result = verify(model, gm, inputs)
    assert result.coverage.ok
    assert result.ok or isinstance(model, Experts)  # whose router gets no gradient


def test_the_audit_sees_a_convolution_whose_weight_the_input_scales() -> None:
    model, inputs = Modulated(), (torch.randn(2, 3, 8, 8), torch.randn(2, 6))
    gm = transform(model, inputs)
    gm.aim.plan = dataclasses.replace(gm.aim.plan, skips=())
    coverage = verify(model, gm, inputs).coverage
    [(name, why)] = coverage.unaccounted
    assert (name, why.partition(",")[0]) == ("weight", "is used by convolution")
