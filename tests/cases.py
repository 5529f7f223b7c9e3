"""Small architectures and the table of layer geometries, shared by the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

import aim_surgery
from aim_surgery import AimConfig

# Float64 comparisons: one table of tolerances, relative to the largest entry.
FLOAT64_TOLERANCE = 1e-12
FLOAT32_TOLERANCE = 1e-5


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected entry."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(f"{actual.shape} {actual.dtype} != {expected.shape} {expected.dtype}")
    actual, expected = actual.detach(), expected.detach()
    scale = expected.abs().max().clamp_min(1e-30)
    return float((actual - expected).abs().max() / scale)


def assert_same(actual: Any, expected: Any, tolerance: float = FLOAT64_TOLERANCE) -> None:
    """Nested outputs agree within the tolerance."""
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, torch.Tensor):
            difference = largest_difference(a, e)
            assert difference <= tolerance, f"differs by {difference:g} > {tolerance:g}"
        else:
            assert a == e


def assert_rounds_alike(gm: Any, form: Callable[[Any], Any], x: torch.Tensor) -> None:
    """In bfloat16, a form is about as near to float64 as concat; without any one read, it isn't.

    Args:
        gm: An operated model in concat form, whose reads widen their layers; the weights of its
            memory are made larger.
        form: Gives the other form.
        x: Its input.
    """
    with torch.no_grad():
        for read in gm.plan.reads:
            gm.get_parameter(read.site.weights[0])[:, -read.planes :] *= 8
        exact = copy.deepcopy(gm).double()(x.double())

        def rounding(model: Any) -> float:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(x)
            assert output.dtype == torch.bfloat16
            return float((output.double() - exact).norm() / exact.norm())

        limit = 2 * rounding(gm)
        assert rounding(form(gm)) <= limit
        for read in gm.plan.reads:
            less = copy.deepcopy(gm)
            less.get_parameter(read.site.weights[0])[:, -read.planes :] = 0
            assert rounding(form(less)) > limit, f"nobody would miss the read of {read.site.name}"


@dataclass(frozen=True)
class Case:
    """A model with an example input."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    reads: int  # sites that must read
    beside: int = 0  # of them, sites whose memory weights live beside

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return self.build().to(dtype)

    def input(self, dtype: torch.dtype = torch.float64, batch: int | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = self.shape if batch is None else (batch, *self.shape[1:])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Residual(nn.Module):
    """Two convolutions and an in-place sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        out += x
        return self.relu(out)


class SmallNet(nn.Module):
    """Stem, two residual blocks, dropout, a head: every ordinary thing once."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(12), nn.MaxPool2d(2), Residual(12))
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(F.dropout(self.dropout(x), 0.2, self.training))


class Twice(nn.Module):
    """One convolution called at two sizes, one linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv(x))
        x = self.conv(F.max_pool2d(x, 2))
        x = x.mean((-1, -2))
        return self.fc(torch.relu(self.fc(x)))


class Functional(nn.Module):
    """Weights of its own, used by functions: widened in place where each has one use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.up_weight = nn.Parameter(torch.randn(6, 2, 2, 2))
        self.linear_weight = nn.Parameter(torch.randn(5, 4))
        self.linear_bias = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(x, self.conv_weight, stride=1, padding=1)
        x = F.conv_transpose2d(weight=self.up_weight, input=x, stride=2, groups=2)
        return F.linear(x.mean((-1, -2)), self.linear_weight, bias=self.linear_bias)


class Products(nn.Module):
    """Matrix products with 2-d parameters, in all their spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(6, 6)) for _ in range(5))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x @ self.weights[0])
        x = torch.tanh(torch.matmul(x, self.weights[1]))
        x = torch.tanh(x.matmul(other=self.weights[2]))
        x = torch.tanh(torch.addmm(self.bias, x, self.weights[3]))
        return torch.addmm(self.bias, mat1=x, mat2=self.weights[4])


class WeightFirst(nn.Module):
    """Matrix products with the parameter on the left: features are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 4))
        self.one, self.two = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.mix @ x)
        return torch.stack([torch.addmm(self.bias, self.one, mat2=x[0]), self.two.matmul(x[1])])


class Standardized(nn.Conv2d):
    """Weight standardisation: a convolution whose weight is computed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(
            input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.middle(self.embedding(tokens))))


class PerSample(nn.Module):
    """Goes through the samples one by one, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.fc(sample) for sample in x])


class BatchAsNumber(PerSample):
    """Takes the batch size, of which the samples are a multiple, as Python's own number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples = int(x.shape[0] / 1)
        return self.fc(x).view(samples, 2, -1).flip(1).reshape(samples, -1)


class OneByOneInTraining(PerSample):
    """Two functions, of which one goes through the samples."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1 if self.training else self.fc(x)


class FixedBatch(PerSample):
    """Takes four samples and no other number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 4:
            raise ValueError(f"four samples, not {x.shape[0]}")
        return torch.stack([self.fc(sample) for sample in x])


class SameConv(nn.Conv2d):
    """A subclass that keeps the stock forward."""


def parametrized() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(6, 4, 3))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


CASES = (
    Case("small_net", SmallNet, (2, 3, 32, 32), reads=6),
    Case("mlp", mlp, (4, 16), reads=4),
    Case("mlp_tokens", mlp, (2, 5, 16), reads=4),
    Case("conv1d", lambda: nn.Sequential(
        nn.Conv1d(2, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, groups=2)),
        (2, 2, 64), reads=2),
    Case("conv3d", lambda: nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 4, 3)),
        (2, 2, 8, 10, 12), reads=2),
    Case("autoencoder", lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2)),
        (2, 3, 16, 16), reads=2),
    Case("twice", Twice, (2, 4, 12, 12), reads=4),
    Case("functional", Functional, (2, 4, 8, 8), reads=3),
    Case("products", Products, (3, 6), reads=5, beside=5),
    Case("weight_first", WeightFirst, (2, 4, 5), reads=3, beside=3),
    Case("standardized", lambda: nn.Sequential(
        Standardized(3, 6, 3), nn.ReLU(), Standardized(6, 6, 3, groups=3)),
        (2, 3, 12, 12), reads=2, beside=2),
    Case("subclass", lambda: nn.Sequential(SameConv(3, 6, 3), nn.ReLU()), (2, 3, 9, 9), reads=1),
    Case("weight_norm", parametrized, (2, 3, 12, 12), reads=2, beside=1),
    Case("one_linear", lambda: nn.Linear(9, 4), (3, 9), reads=1),
)  # fmt: skip


def conv_geometries() -> list[dict[str, Any]]:
    """All combinations of what a convolution can be told, pruned to those that differ in kind."""
    table: list[dict[str, Any]] = []
    for dims in (1, 2, 3):
        for groups in (1, 2, 4):
            for stride, dilation in ((1, 1), (2, 1), (1, 2), (2, 2)):
                for padding in (0, 1, "same", "valid"):
                    if padding == "same" and stride != 1:
                        continue
                    for mode in ("zeros", "reflect", "replicate", "circular"):
                        if mode != "zeros" and (padding in (0, "valid") or dims == 3 != stride + 2):
                            continue
                        table.append({
                            "dims": dims, "groups": groups, "stride": stride,
                            "dilation": dilation, "padding": padding, "padding_mode": mode,
                        })  # fmt: skip
    return table


def with_filled_reads(
    model: nn.Module, x: torch.Tensor, *, floats: int, **options: Any
) -> tuple[Any, torch.Tensor]:
    """The operated model with known memory weights beside its layers, and its memory."""
    config = AimConfig(budget=None, memory=floats, **{"write": "none", **options})
    gm = aim_surgery.transform(model, (x,), config=config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in gm.named_parameters():
            if name.startswith("aim.reads"):
                parameter.copy_(torch.randn_like(parameter))
    return gm, aim_surgery.read_memory(gm, x)["memory"].reshape(-1)
