"""Stages: where a write may follow, and what becomes of an axis on the way there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import aim_surgery
from aim_surgery import AimConfig
from aim_surgery.capture import Capture, capture
from aim_surgery.errors import PlanError
from aim_surgery.sites import Boundary, Stages, boundary_nodes, find_calls, find_stages
from aim_surgery.sites import match_boundaries as match
from aim_surgery.sites.axes import follow_axis
from aim_surgery.sites.axis_moves import regrouped, reshaped_axis
from tests.cases import SmallNet, Twice, mlp


def stages_of(model: nn.Module, *inputs: Any) -> tuple[Stages, Capture]:
    captured = capture(model, inputs or None)
    return find_stages(captured), captured


def names(boundaries: tuple[Boundary, ...]) -> list[str]:
    return [boundary.name for boundary in boundaries]


# Architectures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("resnet50", {"relu": 112, "layer1.0": 56, "layer2.0": 28, "layer3.0": 14, "layer4.0": 7,
                      "fc": 1}),
        ("densenet121", {"features.relu0": 112, "features.transition1.relu": 56,
                         "features.transition2.relu": 28, "features.transition3.relu": 14,
                         "relu": 7, "classifier": 1}),
        ("vgg16_bn", {"features.2": 224, "features.9": 112, "features.16": 56, "features.26": 28,
                      "features.36": 14, "classifier.2": 1}),
        ("mobilenet_v3_large", {"features.0": 112, "features.2.block.1": 56,
                                "features.4.block.1": 28, "features.7.block.1": 14,
                                "features.13.block.1": 7, "classifier.2": 1}),
    ],
)  # fmt: skip
def test_one_point_for_each_resolution(spec: str, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        model = aim_surgery.build(f"torchvision:{spec}")
    stages, captured = stages_of(model)
    assert names(stages.chosen) == list(expected)
    assert [point.positions for point in stages.chosen] == [n * n for n in expected.values()]
    assert all(point.dominates for point in stages.boundaries)
    nodes = boundary_nodes(captured, captured.graph, names(stages.boundaries))
    order = [list(captured.graph.nodes).index(nodes[name]) for name in nodes]
    assert len(order) == len(stages.boundaries)
    assert order == sorted(order)
    numbers = [point.stage for point in stages.boundaries]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1


def test_a_boundary_says_what_it_is() -> None:
    stages, _ = stages_of(SmallNet(), torch.randn(2, 3, 32, 32))
    relu, block, *_ = stages.chosen
    assert relu == Boundary(
        name="relu",
        names=("relu",),
        stage=1,
        channels=12,
        channel_axis=1,
        sample_axis=0,
        spatial=(16, 16),
        positions=256,
        dominates=True,
    )
    assert (block.name, block.names[-3:]) == ("blocks", ("blocks.2", "blocks", "blocks_2_relu_1"))
    assert names(stages.boundaries)[:4] == ["stem", "relu", "iadd", "blocks.0"]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_feature_maps_of_any_rank(dims: int) -> None:
    conv, pool = getattr(nn, f"Conv{dims}d"), getattr(nn, f"MaxPool{dims}d")
    model = nn.Sequential(
        conv(2, 4, 3, padding=1), nn.ReLU(), pool(2), conv(4, 8, 3, padding=1), nn.ReLU()
    )
    stages, _ = stages_of(model, torch.randn(2, 2, *[8] * dims))
    assert names(stages.chosen) == ["1", "4"]
    assert [point.spatial for point in stages.chosen] == [(8,) * dims, (4,) * dims]
    assert {point.channel_axis for point in stages.boundaries} == {1}


def test_a_multilayer_perceptron_writes_after_its_first_activation() -> None:
    stages, _ = stages_of(mlp(), torch.randn(4, 16))
    assert names(stages.chosen) == ["2"]
    stages, _ = stages_of(mlp(), torch.randn(4, 5, 16))
    (point,) = stages.chosen
    assert (point.spatial, point.positions, point.channel_axis) == ((), 5, 2)


class Windows(nn.Module):
    """A map in channels-first, channels-last and window layout, at one resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, stride=4)
        self.inside = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(4, 2))
        self.cpb_mlp = nn.Linear(2, 6)
        self.back = nn.Conv2d(6, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = x.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        y = self.inside(y) + self.cpb_mlp(self.table)
        y = y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return self.back((x + y).movedim(-1, 1))


def test_layouts_of_one_resolution_are_one_stage() -> None:
    stages, captured = stages_of(Windows(), torch.randn(2, 3, 32, 16))
    assert {point.positions for point in stages.boundaries} == {32}
    assert {point.spatial for point in stages.boundaries} == {(8, 4)}
    assert {point.channel_axis for point in stages.boundaries} == {1, 3}
    sites = {call.site.name: call.site for call in find_calls(captured, captured.graph)}
    assert [(s.sample_axis, s.windows) for s in sites.values()] == [
        (0, 1), (0, 8), (None, 1), (0, 1)]  # fmt: skip
    assert sites["cpb_mlp"].sample_axis is None  # its input is the same for all samples


class UNet(nn.Module):
    """Two skip connections: no node but the first and the last resolution's dominates."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, stride=2, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.ConvTranspose2d(4 + 4 * (i > 0), 4, 2, 2) for i in range(3))
        self.leave = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.enter(x).relu()]
        for down in self.down:
            skips.append(down(skips[-1]).relu())
        y = skips.pop()
        for up in self.up:
            y = torch.cat([up(y), skips.pop()], 1)
        return self.leave(y)


def test_skip_connections_fall_back_to_the_last_node_of_each_resolution() -> None:
    stages, captured = stages_of(UNet(), torch.randn(2, 3, 32, 32))
    assert [(p.name, p.positions, p.dominates) for p in stages.chosen] == [
        ("relu", 1024, True), ("relu_3", 16, False), ("cat", 64, False), ("cat_1", 256, False)
    ]  # fmt: skip
    assert match(stages, captured, "cat_1") == (stages.chosen[-1],)
    with pytest.raises(PlanError, match=r"features reach '\S+' around it"):
        match(stages, captured, "down.1")


def test_an_empty_table_is_no_mask() -> None:
    class Empty(nn.Module):
        """Stands in for features that an encoder has not got (segmentation_models_pytorch)."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nothing = torch.empty(x.shape[0], 0, *x.shape[2:])
            return self.head(torch.cat((nothing, self.conv(x).relu()), 1))

    stages, _ = stages_of(Empty(), torch.randn(2, 3, 8, 8))
    assert stages.chosen


# Which axis the samples are -----------------------------------------------------------------


def sample_axes(model: nn.Module, *inputs: torch.Tensor) -> dict[str, int | None]:
    """Axes by site; but the last projection of attention works on (T·B, C) where torch is asked."""
    captured = capture(model, inputs)
    sites = (call.site for call in find_calls(captured, captured.graph))
    return {s.name: s.sample_axis for s in sites if not s.layer.endswith("out_proj")}


def in_order(batch: int, time: int, *, batch_first: bool) -> torch.Tensor:
    return torch.randn(*((batch, time) if batch_first else (time, batch)), 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_says_whether_time_comes_first(batch_first: bool, batch: int) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), layer)
    x = in_order(batch, 5, batch_first=batch_first)
    stages, _ = stages_of(model, x)
    outside = 0 if batch_first else 1
    assert (stages.chosen[0].sample_axis, stages.chosen[0].positions) == (outside, 5)
    assert sample_axes(model, x) == {
        "0": outside,
        "2.self_attn.in_proj_weight": outside,
        "2.linear1": outside,
        "2.linear2": outside,
    }


class Crossed(nn.Module):
    """Attention of one input to another, with no residual that would show the axis again."""

    def __init__(self, *, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = self.enter(y).relu()
        return self.leave(self.attention(x, y, y, need_weights=self.need_weights)[0])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("others", [5, 7])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_to_another_input(
    batch_first: bool, need_weights: bool, others: int, batch: int
) -> None:
    model = Crossed(batch_first=batch_first, need_weights=need_weights)
    x, y = (in_order(batch, time, batch_first=batch_first) for time in (5, others))
    axes = sample_axes(model, x, y)
    outside = 0 if batch_first else 1
    assert (axes.pop("enter"), axes.pop("leave")) == (outside, outside)
    assert set(axes.values()) == {outside}  # projected as it comes, not after its axes are swapped


class Detector(nn.Module):
    """Maps become time-first tokens, and learned queries look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16)
        self.queries, self.places = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.ones(16, 8))
        self.classes = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x).relu().flatten(2).permute(2, 0, 1) + self.places[:, None]
        queries = self.queries[:, None].repeat(1, x.shape[0], 1)
        return self.classes(self.transformer(h, queries).transpose(0, 1))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_of_maps_may_be_time_first(batch: int) -> None:
    axes = sample_axes(Detector(), torch.randn(batch, 3, 16, 16))
    assert (axes.pop("stem"), axes.pop("classes")) == (0, 0)
    own = {name: axis for name, axis in axes.items() if axis is None}
    assert set(axes.values()) == {1, None}
    # queries are the same for all samples before they have looked at any
    assert all(name.startswith("transformer.decoder.layers.0.") for name in own)
    assert len(own) == 2


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_stay_apart_whatever_comes_first(batch_first: bool) -> None:
    model = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=batch_first).double().eval()
    inputs = [in_order(3, time, batch_first=batch_first).double() for time in (7, 5)]
    assert set(sample_axes(model, *inputs).values()) == ({0} if batch_first else {1})
    config = AimConfig(memory=48, budget=None, init="fresh")
    gm = aim_surgery.transform(model, tuple(inputs), config=config).eval()
    axis = 0 if batch_first else 1
    together = gm(*inputs).narrow(axis, 1, 1)
    alone = gm(*(x.narrow(axis, 1, 1) for x in inputs))
    torch.testing.assert_close(alone, together, atol=1e-12, rtol=0)
    later = inputs[0].narrow(1 - axis, 1, 6)  # and time is no sample: it may be shorter
    assert gm(later, inputs[1]).shape == inputs[1].shape


class Layers(nn.Module):
    """Some layers around what a function does with them."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tokens, self.score = nn.Linear(5, 5), nn.Linear(8, 1)
        self.conv, self.lstm = nn.Conv1d(8, 8, 3, padding=1), nn.LSTM(8, 4, bidirectional=True)
        self.table = nn.Parameter(torch.randn(6, 8))
        self.function = function

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.leave(self.function(self, self.enter(x).relu(), *others))


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1)


MIXED: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...], int | None]] = {
    # what is done with (T, B, 8) or (B, T, 8), and which axis the samples are
    "products": (lambda m, h: (scores(h.mT, h.mT) @ h.mT).mT, ((3, 5, 8),), 0),
    "products, time first": (
        lambda m, h: (scores(h.transpose(0, 1), h.transpose(0, 1)) @ h.transpose(0, 1)).transpose(
            0, 1), ((5, 3, 8),), 1),
    "einsum": (
        lambda m, h: torch.einsum("bst,bt...->bs...", torch.einsum("bsc,btc->bst", h, h), h),
        ((3, 5, 8),), 0),
    "einsum, time first": (
        lambda m, h: torch.einsum("bst,tb...->sb...", torch.einsum("sbc,tbc->bst", h, h), h),
        ((5, 3, 8),), 1),
    "linear attention": (
        lambda m, h: torch.einsum("btc,bcd->btd", h, torch.einsum("btc,btd->bcd", h, h)),
        ((3, 5, 8),), 0),
    "linear attention, time first": (
        lambda m, h: torch.einsum("tbc,bcd->tbd", h, torch.einsum("tbc,tbd->bcd", h, h)),
        ((5, 3, 8),), 1),
    "cross-covariance": (lambda m, h: h @ scores(h.mT, h.mT), ((3, 5, 8),), 0),
    "additive": (lambda m, h: h * m.score(h).softmax(1), ((3, 5, 8),), 0),
    "additive, time first": (lambda m, h: h * F.softmax(m.score(h), dim=0), ((5, 3, 8),), 1),
    "chosen by torch": (lambda m, h: h * nn.functional.softmax(m.score(h)), ((5, 3, 8),), 1),
    "mixer": (lambda m, h: m.tokens(h.mT).mT, ((3, 5, 8),), 0),
    "mixer, time first": (
        lambda m, h: m.tokens(h.permute(1, 2, 0)).permute(2, 0, 1), ((5, 3, 8),), 1),
    "conv": (lambda m, h: m.conv(h.mT).mT, ((3, 5, 8),), 0),
    "conv, time first": (
        lambda m, h: m.conv(h.permute(1, 2, 0)).permute(2, 0, 1), ((5, 3, 8),), 1),
    "recurrent": (lambda m, h: m.lstm(h)[0], ((5, 3, 8),), 1),
    "one by one": (lambda m, h: h * h.std(0), ((3, 5, 8),), 0),  # statistics of the batch
    "all pairs": (lambda m, h, e: h * (h @ e.T).mean(), ((6, 8), (6, 8)), 0),
    "a table": (lambda m, h: scores(h, m.table) @ m.table, ((4, 8),), 0),
    "another input as table": (lambda m, h, e: scores(h, e) @ e, ((4, 8), (6, 8)), 0),
    "attention without samples": (
        lambda m, h: F.scaled_dot_product_attention(h, h, h), ((5, 8),), None),
    "nodes of a graph": (lambda m, h, e: e @ h, ((6, 8), (6, 6)), None),
    "neither": (
        lambda m, h: F.scaled_dot_product_attention(*[h.flatten(0, 1)] * 3).view_as(h),
        ((5, 3, 8),), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("name", MIXED)
def test_what_is_mixed_is_no_samples(name: str) -> None:
    function, shapes, expected = MIXED[name]
    model, inputs = Layers(function), tuple(map(torch.randn, shapes))
    axes = sample_axes(model, *inputs)
    assert (axes["enter"], axes["leave"]) == (expected, expected)
    assert bool(stages_of(model, *inputs)[0].chosen) == (expected is not None)


def test_shared_modules_are_numbered() -> None:
    stages, captured = stages_of(Twice(), torch.randn(2, 4, 12, 12))
    assert names(stages.boundaries) == [
        "conv", "relu", "max_pool2d", "conv@1", "mean", "fc", "relu_1", "fc@1"
    ]  # fmt: skip
    assert "relu" not in captured.modules
    assert match(stages, captured, "fc@1")[0].stage == 3


@pytest.mark.parametrize(
    ("model", "shape", "positions"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3)), (3, 8, 8), 16),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (4,), 1),
    ],
)
def test_a_single_sample_without_a_batch(
    model: nn.Module, shape: tuple[int, ...], positions: int
) -> None:
    stages, captured = stages_of(model, torch.randn(shape))
    assert {point.sample_axis for point in stages.boundaries} == {None}
    assert {point.channel_axis for point in stages.boundaries} == {0}
    assert {call.site.sample_axis for call in find_calls(captured, captured.graph)} == {None}
    assert (stages.chosen[0].name, stages.chosen[0].positions) == ("1", positions)


def test_regions_without_gradients_hold_no_boundary() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.body(x).relu()
            return self.head(x)

    stages, captured = stages_of(Frozen(), torch.randn(2, 4))
    assert names(stages.boundaries) == ["head"]
    with pytest.raises(PlanError, match="gradients are switched off"):
        match(stages, captured, "body")


def test_frames_in_the_batch_hold_no_boundary() -> None:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frame, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.frame(x.flatten(0, 1)).mean((2, 3))
            return self.head(y.unflatten(0, x.shape[:2]).mean(1))

    stages, captured = stages_of(Video(), torch.randn(2, 5, 3, 8, 8))
    with pytest.raises(PlanError, match="5 entries for each of 2 samples"):
        match(stages, captured, "frame")


class Reordered(nn.Module):
    """Samples in another order inside; what comes out has the order of the input."""

    def __init__(self, there: Callable[..., Any], back: Callable[..., Any]) -> None:
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.there, self.back = there, back

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x).relu()
        order = h.sum((1, 2)).argsort()
        y = self.middle(self.there(h, order)).relu()
        return self.leave(self.back(y, order.argsort()))


def along(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index[:, None, None].expand_as(x)


REORDERINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "getitem": (lambda h, i: h[i], lambda h, i: h[i]),
    "getitem of two": (lambda h, i: h[i, :], lambda h, i: h[i, ...]),
    "index_select": (lambda h, i: h.index_select(0, i), lambda h, i: h.index_select(0, i)),
    "gather": (lambda h, i: h.gather(0, along(i, h)), lambda h, i: h.gather(0, along(i, h))),
    "take_along_dim": (
        lambda h, i: torch.take_along_dim(h, along(i, h), 0),
        lambda h, i: torch.take_along_dim(h, along(i, h), dim=0)),
    "index_add": (
        lambda h, i: torch.zeros_like(h).index_add(0, i.argsort(), h),
        lambda h, i: torch.zeros_like(h).index_add(0, i.argsort(), h)),
    "flip": (lambda h, i: h.flip(0), lambda h, i: torch.flip(h, (0,))),
    "flip of two": (lambda h, i: h.flip(0, 1), lambda h, i: h.flip((1, 0))),
    "flipud": (lambda h, i: h.flipud(), lambda h, i: h.flipud()),
    "roll": (lambda h, i: h.roll(1, 0), lambda h, i: torch.roll(h, -1, dims=0)),
    "rot90": (lambda h, i: h.rot90(2), lambda h, i: h.rot90(2, (0, 1))),
    "written": (lambda h, i: placed(h, i), lambda h, i: placed(h, i)),
}  # fmt: skip


def placed(h: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(h)
    out[order.argsort()] = h
    return out


@pytest.mark.parametrize("name", REORDERINGS)
def test_reordered_samples_are_lost(name: str) -> None:
    model = Reordered(*REORDERINGS[name]).double()
    x = torch.randn(4, 5, 4, dtype=torch.float64)

    def error(model: nn.Module) -> float:
        alone = torch.cat([model(x[i : i + 1]) for i in range(len(x))])
        return float((model(x) - alone).detach().abs().max())

    assert error(model) < 1e-14
    stages, captured = stages_of(model, x)
    axes = {call.site.name: call.site.sample_axis for call in find_calls(captured, captured.graph)}
    assert axes == {"enter": 0, "middle": None, "leave": None}
    assert {point.name for point in stages.boundaries} == {"enter", "relu"}
    gm = aim_surgery.transform(
        model, x, config=AimConfig(memory=48, budget=None, init="fresh", write_at="relu")
    )
    assert error(gm.eval()) < 1e-12


def test_an_axis_of_the_number_of_samples_is_not_taken_for_theirs() -> None:
    class Heads(nn.Module):
        """Heads in front, tokens before samples: (heads, tokens * samples, features)."""

        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inside = nn.Linear(6, 8), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.enter(x).unflatten(-1, (2, 4)).permute(2, 1, 0, 3)
            return self.inside(h.flatten(1, 2))

    _, captured = stages_of(Heads(), torch.randn(2, 5, 6))
    sites = [call.site for call in find_calls(captured, captured.graph)]
    assert [site.sample_axis for site in sites] == [0, None]


class Auxiliary(nn.Module):
    """A second head in training only, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.middle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.auxiliary, self.head = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.body(x).relu()
        if self.training:
            return self.head(self.middle(x.sigmoid()).relu()), self.auxiliary(x.relu())
        return self.head(self.middle(x).relu())


def test_evaluation_counts_and_both_graphs_have_the_nodes() -> None:
    stages, captured = stages_of(Auxiliary(), torch.randn(2, 4))
    assert names(stages.boundaries) == ["body", "relu", "middle", "relu_1", "head"]
    training, evaluation = captured.traces
    for trace in (training, evaluation):
        nodes = boundary_nodes(captured, trace.graph, ["body", "relu", "middle"])
        assert all(node in trace.graph.nodes for node in nodes.values())
        assert list(nodes) == ["body", "relu", "middle"]
    assert boundary_nodes(captured, training.graph, ["auxiliary"])
    assert not boundary_nodes(captured, evaluation.graph, ["auxiliary"])


@dataclasses.dataclass
class Outputs:
    """What models of many libraries return."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()


class Plain:
    """An object of a model's own."""

    def __init__(self, logits: torch.Tensor, hidden: Any) -> None:
        self.logits, self.hidden = logits, hidden


CONTAINERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "tuple": lambda logits, hidden: (logits, (hidden,)),
    "dict": lambda logits, hidden: {"logits": logits, "hidden": [hidden]},
    "dataclass": lambda logits, hidden: Outputs(logits, (hidden,)),
    "object": lambda logits, hidden: Plain(logits, hidden),
    "dataclass in a tuple": lambda logits, hidden: (Outputs(logits, (hidden,)),),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_whatever_holds_the_outputs_features_reach_it(container: str) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = self.stem(x).relu()
            return CONTAINERS[container](self.head(self.block(hidden).relu()), hidden)

    stages, _ = stages_of(Returns(), torch.randn(2, 3, 12, 12))
    assert names(stages.chosen) == ["relu", "head"]


def test_a_dict_of_outputs() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"logits": self.head(self.fc(batch["x"]).relu())}

    stages, _ = stages_of(Keyed(), {"x": torch.randn(3, 4)})
    assert names(stages.chosen) == ["relu"]
    assert stages.chosen[0].sample_axis == 0


# What a user names --------------------------------------------------------------------------


class OnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet(12)
        self.python = OnData()
        self.pair = nn.LSTM(12, 12, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.python(self.net(x))
        y, _ = self.pair(x[:, None])
        return self.head(y[:, 0])


@pytest.fixture(scope="module")
def named() -> tuple[Stages, Capture]:
    return stages_of(Named(), torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("net.blocks.0", ["net.blocks.0"]),
        ("net.blocks.0.relu@1", ["net.blocks.0"]),  # the relu that the block returns
        ("net.blocks.?", ["net.blocks.0", "net.blocks.1"]),
        ("python", ["python"]),  # what a Python call returns is a tensor like others
    ],
)
def test_names_and_globs(named: tuple[Stages, Capture], pattern: str, expected: list[str]) -> None:
    assert names(match(*named, pattern)) == expected


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("net.block.0", ["does not exist", "net.blocks.0"]),
        ("nothing*", ["does not exist"]),
        ("python.fc", ["one Python call", "python", "outside"]),
        ("net.blocks.0.conv1", ["does not dominate", "features reach", "around it"]),
        ("pair", ["no single tensor"]),
        ("x", ["no features"]),
    ],
)
def test_what_is_no_boundary(named: tuple[Stages, Capture], pattern: str, words: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        match(*named, pattern)
    for word in words:
        assert word in str(caught.value)


# Axes ---------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def runs_over(shape: tuple[int, ...], axis: int) -> torch.Tensor:
    """A tensor that tells the index along one axis."""
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return torch.arange(shape[axis]).view(view).expand(shape)


@given(SIZES, SIZES, st.data())
def test_the_prefix_rule_tells_the_truth(before: list[int], after: list[int], data: Any) -> None:
    axis = data.draw(st.integers(0, len(before) - 1))
    rest, extra = divmod(math.prod(before), math.prod(after))
    assume(not extra)
    shape, target = tuple(before), (*after, rest)
    for samples in (0, before[axis]):
        found = reshaped_axis(shape, axis, target, samples=samples)
        reshaped = runs_over(shape, axis).reshape(target)
        if found is not None:
            entries = target[found] // before[axis]
            if entries == 1 or samples:
                expected = runs_over(target, found) // max(entries, 1)
                assert torch.equal(reshaped, expected)


@given(SIZES, SIZES, st.data())
def test_samples_behind_others_are_found_again(
    before: list[int], after: list[int], data: Any
) -> None:
    axis = data.draw(st.integers(0, len(before) - 1))
    rest, extra = divmod(math.prod(before), math.prod(after))
    assume(not extra)
    shape, target, samples = tuple(before), (*after, rest), before[axis]
    found = regrouped(shape, axis, 1, target, samples=samples)
    assume(found is not None)
    place, outer = cast(tuple[int, int], found)
    entries = target[place] // samples // outer
    reshaped = runs_over(shape, axis).reshape(target)
    assert torch.equal(reshaped, runs_over(target, place) // entries % samples)
    back = regrouped(target, place, outer, shape, samples=samples)
    assert samples == 1 or back == (axis, 1)


def test_the_truth_can_fail() -> None:
    assert reshaped_axis((3, 2, 5), 1, (6, 5), samples=2) is None  # time first: lost
    assert reshaped_axis((2, 3, 5), 0, (6, 5), samples=2) == 0
    assert reshaped_axis((6, 5), 0, (2, 3, 5), samples=2) == 0
    assert reshaped_axis((6, 5), 0, (3, 2, 5), samples=2) is None
    wrong = runs_over((3, 2, 5), 1).reshape(6, 5)
    assert not torch.equal(wrong, runs_over((6, 5), 0) // 3)


MOVES: dict[str, tuple[Callable[[torch.Tensor], Any], int | None]] = {
    # what becomes of the first axis of (2, 3, 4, 5)
    "permute": (lambda x: x.permute(1, 0, 2, 3), 1),
    "permute of a tuple": (lambda x: torch.permute(x, (3, 1, 2, 0)), 3),
    "transpose": (lambda x: x.transpose(0, -1), 3),
    "T": (lambda x: x[:, :, 0, 0].T, 1),
    "mT": (lambda x: x[:, :, 0, 0].mT, 1),
    "movedim": (lambda x: x.movedim((0, 1), (-1, 0)), 3),
    "unsqueeze": (lambda x: x.unsqueeze(0), 1),
    "unsqueeze behind": (lambda x: x.unsqueeze(-1), 0),
    "squeeze": (lambda x: x[:, :1].transpose(0, 1).squeeze(0), 0),
    "getitem": (lambda x: x[None, ..., 0], 1),
    "getitem of one": (lambda x: x[0], None),
    "getitem elsewhere": (lambda x: x[:, torch.tensor([2, 0])], 0),
    "getitem of neighbours": (lambda x: x.mT[:, [0, 1], [1, 2]], 0),
    "getitem of others": (lambda x: x[:, torch.tensor([0, 1]), :, torch.tensor([1, 2])], 1),
    "getitem in front": (lambda x: x.movedim(0, 2)[torch.tensor([[0, 1, 2]])], 3),
    "getitem of each": (lambda x: x[torch.arange(x.shape[0]), x.argmax(1)[:, 0, 0]], 0),
    "getitem itself": (lambda x: x[torch.tensor([1, 0])], None),
    "table": (lambda x: torch.ones(9, 7)[x[:, 0].long()], 0),
    "flip": (lambda x: x.flip(1, 2), 0),
    "flip itself": (lambda x: x.flip(0), None),
    "roll of all": (lambda x: x.roll(1), None),
    "sort": (lambda x: x.sort(dim=1)[0], 0),
    "sort itself": (lambda x: x[:, 0, 0, 0].sort()[1], None),
    "sort of rows, falling": (lambda x: x.mean((2, 3)).sort(1, True)[0], 0),
    "cumsum itself": (lambda x: x.cumsum(0), None),
    "gather": (lambda x: x.gather(1, x.argsort(1)), 0),
    "scattered": (lambda x: torch.zeros_like(x).scatter(2, x.argsort(2), x), 0),
    "shifted": (lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)), None),
    "padded": (lambda x: F.pad(x, (1, 1)), 0),
    "einsum of the rest": (lambda x: torch.einsum("b...w,vw->v...b", x, torch.ones(7, 5)), 3),
    "part": (lambda x: x[:1], None),
    "unbind": (lambda x: x.unbind(1)[0], 0),
    "unbind itself": (lambda x: x.unbind(0)[0], None),
    "chunk": (lambda x: x.transpose(0, 1).chunk(3)[1], 1),
    "chunk itself": (lambda x: x.chunk(2)[1], None),
    "stack": (lambda x: torch.stack([x, x]), 1),
    "cat": (lambda x: torch.cat([x, x], 1), 0),
    "cat itself": (lambda x: torch.cat([x, x]), None),
    "mean": (lambda x: x.transpose(0, 2).mean(1), 1),
    "mean that keeps": (lambda x: x.mean((2, 3), keepdim=True), 0),
    "mean itself": (lambda x: x.mean(0, keepdim=True), None),
    "mean of all": (lambda x: x.mean(), None),
    "max": (lambda x: x.max(dim=1)[0], 0),
    "values": (lambda x: x.max(dim=-1).values, 0),
    "larger": (lambda x: torch.max(x, x + 1), 0),
    "broadcast": (lambda x: x[:, 0, 0, :1] * torch.ones(3, 2, 1), 1),
    "expand": (lambda x: x.expand(7, -1, -1, -1, -1), 1),
    "disagree": (lambda x: x[:, :2, 0, 0] + x[:, :2, 0, 0].T, None),
    "matmul": (lambda x: x[:, :, 0] @ x[:, :, 0].mT, 0),
    "contracted": (lambda x: x[:, :, 0, 0].T @ x[:, :, 0, 0], None),
    "rows": (lambda x: x[:, :, 0, 0] @ torch.ones(3, 2), 0),
    "columns": (lambda x: torch.ones(2, 3) @ x[:, :, 0, 0].T, 1),
    "einsum": (lambda x: torch.einsum("bchw,c->whb", x, torch.ones(3)), 2),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), 0),
    "softmax": (lambda x: x.softmax(1), 0),
    "flatten": (lambda x: x.flatten(1), 0),
    "windows": (lambda x: x.flatten(0, 1), 0),
    "windows back": (lambda x: x.flatten(0, 1).unflatten(0, (2, 3)), 0),
    "windows behind": (lambda x: x.movedim(1, 0).flatten(1, 2), 1),
    "windows behind and back": (
        lambda x: x.movedim(1, 0).flatten(1, 2).unflatten(1, (2, 4)).movedim(1, 2),
        2,
    ),
    "time first": (lambda x: x.transpose(0, 1).flatten(0, 1), None),
    "time first and back": (
        lambda x: (x.transpose(0, 1).flatten(0, 1) + 1).relu().unflatten(0, (3, 2)), 1),
    "time first, overwritten": (
        lambda x: _overwritten(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, 2)), None),
    "time first, added to samples first": (
        lambda x: (x.transpose(0, 1).flatten(0, 1) + x.flatten(0, 1)).unflatten(0, (3, 2)), None),
    "in place": (lambda x: (x + 1).unsqueeze(0).add_(1), 1),
}  # fmt: skip


def _overwritten(x: torch.Tensor) -> torch.Tensor:
    x[torch.tensor([0, 5])] = x[torch.tensor([5, 0])]
    return x


class Applied(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize("name", MOVES)
def test_an_axis_is_followed(name: str) -> None:
    function, expected = MOVES[name]
    captured = capture(Applied(function), (torch.randn(2, 3, 4, 5),))
    start, *_, output = captured.graph.nodes
    axes = follow_axis(captured, captured.graph, {start: 0}, samples=2)
    assert axes.get(output.args[0]) == expected


def test_channels_may_change_in_number() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        x = F.glu(torch.cat([x, x], 1), 1)
        return F.pixel_shuffle(F.pad(x, (0, 0, 0, 0, 0, 1)), 2)

    captured = capture(Applied(forward), (torch.randn(2, 3, 4, 5),))
    start, *_, output = captured.graph.nodes
    assert follow_axis(captured, captured.graph, {start: 1})[output.args[0]] == 1
    assert output.args[0] not in follow_axis(captured, captured.graph, {start: 1}, samples=3)


def test_windows_with_channels_in_the_middle_are_no_place_to_write() -> None:
    """A (N, 2, 2, C, H, W) tensor is neither a map of up to three axes nor tokens."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inside = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            n, c, h, w = x.shape
            x = x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5)
            x = self.inside(x.reshape(n * 4, c, h // 2, w // 2)).relu()
            return self.head(x.reshape(n, 4, c, -1).mean((1, 3)))

    model, x = Windows().eval(), torch.randn(2, 3, 8, 8)
    stages, _ = stages_of(model, x)
    assert stages.boundaries
    assert not any(len(point.spatial) == 0 and point.channel_axis == 3
                   for point in stages.boundaries)  # fmt: skip
    gm = aim_surgery.transform(model, x)
    assert gm.plan.writes
    torch.testing.assert_close(gm(x), model(x))
