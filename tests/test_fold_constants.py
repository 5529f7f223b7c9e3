"""Folding models whose own constants meet the memory: layers on parameters, tokens, tables."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aim_surgery import AimConfig, fold, lower, transform
from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision
from tests.cases import assert_same, largest_difference
from tests.test_fold import images, operated, reads_memory


class OnConstants(nn.Module):
    """Two layers: one of the input, one of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.randn(1, 6))
        self.of_anchor, self.of_input = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 4)


class Sum(OnConstants):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.of_anchor(self.anchor) + self.of_input(x))


class Difference(OnConstants):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.of_input(x) - self.of_anchor(self.anchor))


class Subtracted(OnConstants):
    """The memory's part comes first, so what is subtracted from it changes its sign."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.of_anchor(self.anchor) - self.of_input(x))


class SubtractedInPlace(OnConstants):
    def forward(self, x: Tensor) -> Tensor:
        total = self.of_anchor(self.anchor).expand(len(x), -1).clone()
        total -= self.of_input(x)
        return self.out(total)


class Gated(OnConstants):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.of_anchor(self.anchor)) * self.of_input(x))


class ChangedInPlace(OnConstants):
    """What a layer gives, and what is made of that, are used, changed in place, and used again."""

    def forward(self, x: Tensor) -> Tensor:
        told = self.of_anchor(self.anchor)
        more = torch.tanh(told + 1)
        before = self.of_input(x) + told * more
        told.relu_()
        more.mul_(3.0)
        return self.out(before * 0.5 + told - more)


class ChangedUnseen(OnConstants):
    """A constant is used, and changed in place by the last one to look at it."""

    def forward(self, x: Tensor) -> Tensor:
        told = torch.tanh(self.of_anchor(self.anchor))
        before = torch.sigmoid(x + told)
        return self.out(self.of_input(before) + torch.relu_(told))


class ChangedView(OnConstants):
    """A view of a constant shows what is changed later."""

    def forward(self, x: Tensor) -> Tensor:
        told = torch.tanh(self.of_anchor(self.anchor))
        half = told[:, :3]
        told.mul_(2.0)
        return self.out(self.of_input(x)) + half.sum()


class Scaled(OnConstants):
    """A constant multiplies what is made of memory, before and after it is changed."""

    def forward(self, x: Tensor) -> Tensor:
        scale, told = torch.tanh(self.anchor), self.of_anchor(self.anchor)
        first = told * scale
        scale.mul_(3.0)
        return self.out(self.of_input(x) + first + told * scale)


class Token(OnConstants):
    """A projected class token before the others."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.of_input(x[:, None].expand(-1, 3, -1))
        token = self.of_anchor(self.anchor).expand(len(x), 1, 6)
        return self.out(torch.cat([token, tokens], 1)).mean(1)


class Counted(OnConstants):
    """A buffer that each forward changes."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.out(self.of_input(x) + self.of_anchor(self.anchor + 0.1 * self.calls))


MODELS = (
    Sum, Difference, Subtracted, SubtractedInPlace, Gated, ChangedInPlace, ChangedUnseen,
    ChangedView, Scaled, Token,
)  # fmt: skip


@pytest.mark.parametrize("write", ["none", "batch", "sample"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_layers_on_constants(model: type[nn.Module], write: str) -> None:
    torch.manual_seed(0)
    x = images(3, 6)
    gm = operated(model(), x, write=write)
    assert {read.site.name for read in gm.plan.reads} == {"of_anchor", "of_input", "out"}
    folded = fold(gm)
    for batch in (3, 5, 3):
        x = images(batch, 6)
        expected = gm(x)
        assert_same(folded(x), expected)
        assert_same(folded(x), expected)  # and once more: no map has changed
        assert_same(lower(gm, "split")(x), expected)
    with torch.no_grad():
        gm.aim.memory.weight.zero_()
    assert largest_difference(gm(x), expected) > 1e-3


def test_a_buffer_that_each_forward_changes_is_no_constant() -> None:
    torch.manual_seed(0)
    x = images(3, 6)
    gm = operated(Counted(), x)
    folded = fold(gm)
    assert torch.equal(gm.calls, torch.zeros_like(gm.calls))
    for _ in range(3):
        assert_same(folded(x), gm(x))


class Excited(nn.Module):
    """Adds, in place, a convolution on one position to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.gate = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x += self.gate(x.mean((2, 3), keepdim=True))
        return self.out(x)


@pytest.mark.parametrize("exclude", ["", "gate"])
@pytest.mark.parametrize("write", ["none", "sample"])
def test_a_sum_of_the_model_s_own_that_broadcasts(write: Any, exclude: str) -> None:
    x = images(2, 3, 8, 8)
    config = AimConfig(
        budget=None, memory=48, init="fresh", write=write, exclude=(exclude,) if exclude else ()
    )
    gm = transform(Excited().double(), x, config=config).eval()
    assert_same(fold(gm)(x), gm(x))


class LookedAt(nn.Module):
    """A norm whose weight is used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.norm.weight[:, None, None]


def test_a_norm_whose_tensors_are_used_elsewhere() -> None:
    x = images(2, 3, 8, 8)
    gm = operated(LookedAt(), x)
    assert_same(fold(gm, batch_norm=True)(x), gm(x))


def test_tables_of_positions() -> None:
    """Swin V2 makes its biases of positions with layers that read."""
    swin = import_torchvision().models.swin_transformer
    torch.manual_seed(0)
    model = swin.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5, block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2, stochastic_depth_prob=0.0,
    )  # fmt: skip
    x = images(1, 3, 32, 32)
    gm = operated(model, x)
    assert any("cpb_mlp" in read.site.name for read in gm.plan.reads)
    assert_same(fold(gm)(x), gm(x))


class Queries(nn.Module):
    """Learned queries go through a decoder; what comes from the input is seen by their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.enter = nn.Embedding(4, 8), nn.Linear(6, 8)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.decoder, self.out = nn.TransformerDecoder(layer, 2), nn.Linear(8, 3)
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.project(self.queries.weight), self.enter(x)
        keys = keys + keys.reshape(-1, queries.shape[1]).mean(0)
        return self.out(self.decoder(queries.expand(len(x), -1, -1), keys))


@pytest.mark.parametrize("write", ["none", "sample"])
def test_sizes_of_what_is_made_of_memory(write: str) -> None:
    gm = operated(Queries(), images(3, 5, 6), write=write)
    folded = fold(gm)
    for shape in ((3, 5, 6), (2, 7, 6)):
        assert_same(folded(images(*shape)), gm(images(*shape)))


class BiasSeen(nn.Module):
    """Looks at a layer's bias besides calling it (as peft's DoRA does), and replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y + 2 * (y - self.layer.bias)
        other = {"bias": torch.ones_like(self.layer.bias)}
        if float(x.detach().sum()) > 1e9:
            y = y * 2
        return self.out(y + torch.func.functional_call(self.layer, other, (x,)))


@pytest.mark.parametrize("emit", ["graph", "module"])
def test_biases_that_python_code_sees(emit: str) -> None:
    x = images(3, 6)
    gm = operated(nn.Sequential(BiasSeen(), nn.Linear(4, 2)), x, emit=emit)
    folded = fold(gm)
    assert folded.notes == ()
    assert not reads_memory(folded)
    assert_same(folded(x), gm(x))
    assert_same(pickle.loads(pickle.dumps(folded))(x), gm(x))
    assert_same(copy.deepcopy(folded).float()(x.float()), gm(x).float(), 1e-5)
    assert folded.get_submodule("0.out").bias is None


def test_sparse_constants() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.out = nn.Linear(5, 4), nn.Linear(4, 2)
            self.register_buffer("adjacent", (torch.rand(6, 6) > 0.5).double().to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.sparse.mm(self.adjacent, self.enter(x)).relu())

    torch.manual_seed(0)
    gm = operated(Graph(), images(6, 5))
    assert_same(fold(gm)(images(6, 5)), gm(images(6, 5)))
