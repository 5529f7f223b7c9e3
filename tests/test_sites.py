"""Sites: every convolution and linear call, and a reason for every other weight."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.capture import capture
from aim_surgery.sites import Site, Skip, find_sites
from tests.cases import CASES, Case, Functional, SmallNet, Standardized, Tied, Twice, assert_same


def sites_of(model: nn.Module, *inputs: Any) -> tuple[dict[str, Site], dict[str, Skip]]:
    sites, unread = find_sites(capture(model, inputs))
    return {site.name: site for site in sites}, {item.name: item for item in unread}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_call_is_found(case: Case) -> None:
    sites, unread = sites_of(case.model(), case.input())
    assert len(sites) == case.reads
    assert sum(not site.widens for site in sites.values()) == case.beside
    assert not unread


def test_a_site_says_what_it_is() -> None:
    sites, _ = sites_of(SmallNet(), torch.randn(2, 3, 32, 32))
    assert sites["stem"] == Site(
        name="stem",
        layer="stem",
        kind="conv",
        in_channels=3,
        out_channels=12,
        groups=1,
        kernel_size=(3, 3),
        spatial=(32, 32),
        positions=256,
        weights=("stem.weight",),
        widens=True,
        output_size=(16, 16),
    )
    assert sites["head"].spatial == ()
    assert sites["head"].positions == 1
    assert hash(sites["stem"]) == hash(dataclasses.replace(sites["stem"]))


def test_calls_of_one_layer_are_several_sites() -> None:
    sites, _ = sites_of(Twice(), torch.randn(2, 4, 12, 12))
    assert list(sites) == ["conv", "conv@1", "fc", "fc@1"]
    assert [sites[name].spatial for name in ("conv", "conv@1")] == [(12, 12), (6, 6)]
    assert {site.layer for site in sites.values()} == {"conv", "fc"}


def test_functional_geometry() -> None:
    sites, _ = sites_of(Functional(), torch.randn(2, 4, 8, 8))
    up = sites["up_weight"]
    assert (up.kind, up.in_channels, up.out_channels, up.groups) == ("conv_transpose", 6, 4, 2)
    linear = sites["linear_weight"]
    assert (linear.in_channels, linear.out_channels, linear.widens) == (4, 5, True)


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Standardized(3, 4, 3), "0.weight", "computed"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), "", "computed"),
    ],
)
def test_computed_weights_live_beside(model: nn.Module, name: str, reason: str) -> None:
    sites, _ = sites_of(nn.Sequential(model), torch.randn(2, 3, 8, 8))
    (site,) = sites.values()
    assert not site.widens
    assert reason in site.why_beside
    assert name in site.weights[0]


def test_tied_weights_live_beside() -> None:
    sites, _ = sites_of(Tied(), torch.randint(0, 11, (2, 5)))
    assert sites["middle"].widens
    assert not sites["head"].widens
    assert set(sites["head"].weights) == {"embedding.weight", "head.weight"}
    assert "shared" in sites["head"].why_beside


def test_a_weight_in_two_shapes_is_two_layers() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t())

    model, x = Autoencoder().double(), torch.randn(2, 6, dtype=torch.float64)
    sites, _ = sites_of(model, x)
    assert list(sites) == ["encode", "encode_2"]
    assert not any(site.widens for site in sites.values())
    gm = aim_surgery.transform(model, x, config=AimConfig(memory=5, budget=None))
    assert gm.get_parameter("aim.reads.encode_2.weight").shape == (6, 5)
    assert torch.equal(gm(x), model(x))


def test_a_layer_called_both_ways_is_one_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + F.conv1d(x, self.conv.weight, padding=1)

    model, x = Both().double(), torch.randn(2, 2, 8, dtype=torch.float64)
    sites, _ = sites_of(model, x)
    assert list(sites) == ["conv", "conv@1"]
    gm = aim_surgery.transform(model, x, config=AimConfig(memory=16, budget=None))
    assert [n for n, _ in gm.named_parameters() if "reads" in n] == ["aim.reads.conv.weight"]
    assert torch.equal(gm(x), model(x))


def test_hooks_and_other_uses_keep_a_layer_as_it_is() -> None:
    hooked = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda module, args, output: None)
    sites, _ = sites_of(hooked, torch.randn(2, 4))
    assert "hooks" in sites["0"].why_beside
    assert sites["1"].widens

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) + self.fc.weight.square().sum()

    sites, _ = sites_of(Penalty(), torch.randn(2, 4))
    assert "other uses" in sites["fc"].why_beside


class Unusual(nn.Module):
    """Products that are no sites: einsum over another axis, made from the input; others are."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        x = torch.einsum("bct,cd->dbt", x.mT, self.mixing).permute(1, 2, 0)
        kernel = self.fc(x.mean((0, 1))).view(1, 1, 4)
        return F.conv1d(x.reshape(-1, 1, 4), kernel)


def test_what_is_no_site_is_listed_with_a_reason() -> None:
    sites, unread = sites_of(Unusual(), torch.randn(2, 3, 4))
    packed = ["attention.in_proj_weight", "attention.out_proj"]
    assert list(sites) == ["lstm.weight_ih_l0", *packed, "fc"]
    assert set(unread) == {"mixing"}
    assert sites["lstm.weight_ih_l0"].weights == ("lstm.weight_ih_l0", "lstm.weight_hh_l0")
    assert "einsum" in unread["mixing"].reason


def test_layers_in_a_python_call_are_sites_or_listed() -> None:
    class OnData(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
            self.mix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fc(x) @ self.mix
            return self.never(x) if x.sum() > 1e9 else x

    sites, unread = sites_of(nn.Sequential(nn.Linear(4, 4), OnData()), torch.randn(2, 4))
    assert list(sites) == ["0", "1.fc"]
    assert sites["1.fc"].inside == "1"
    assert sites["1.fc"].widens
    assert "was not called when" in unread["1.never"].reason
    assert unread["1"].weights == ("1.mix",)
    assert "data" in unread["1"].reason


# Modes --------------------------------------------------------------------------------------


class Codes(nn.Module):
    """A VQ-VAE: training adds up what each code stood for, over all samples of the batch."""

    def __init__(self, side: str = "statistics") -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(3, 8, 4, 4), nn.ConvTranspose2d(8, 3, 4, 4)
        self.codes, self.mix = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 8)
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encode(x).relu().permute(0, 2, 3, 1)
        flat = h.reshape(-1, 8)
        near = (flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.t()).argmin(1)
        chosen = F.embedding(near, self.codes).view(h.shape)
        if self.training and self.side == "statistics":
            chosen = chosen + 0 * (F.one_hot(near, 16).to(flat).t() @ flat).sum()
        if self.training and self.side == "halves":
            chosen = chosen.reshape(2 * len(h), -1, *h.shape[2:])
            return self.decode(self.mix(chosen).reshape(h.shape).permute(0, 3, 1, 2))
        return self.decode(self.mix(h + (chosen - h).detach()).permute(0, 3, 1, 2))


@pytest.mark.parametrize("side", ["statistics", "halves"])
def test_a_plan_does_not_depend_on_the_mode(side: str, tmp_path: Path) -> None:
    model, x = Codes(side).double(), torch.randn(2, 3, 16, 16).double()
    plan = aim_surgery.plan(model.train(), x)
    assert aim_surgery.plan(model.eval(), x) == plan
    axes = {read.site.name: (read.site.sample_axis, read.version) for read in plan.reads}
    assert axes["decode"][0] == axes["encode"][0] == 0
    # two entries a sample in training alone: it reads what is the same for all
    assert axes["mix"] == ((0, 1) if side == "statistics" else (None, 0))
    gm = aim_surgery.apply(model.train(), plan)
    assert aim_surgery.verify(model, gm, x).ok
    aim_surgery.save(gm.train(), tmp_path / "codes.pt")
    loaded = aim_surgery.load(tmp_path / "codes.pt", model.eval())
    assert_same(loaded.eval()(x), gm.eval()(x))
