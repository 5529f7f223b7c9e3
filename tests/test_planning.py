"""Plans: sizes, budgets, filters, edits, JSON. Integers only."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, PlanError
from aim_surgery.checkpoint.models import build
from aim_surgery.config import ARTICLE_FLOATS
from aim_surgery.planning import Memory, Plan, Write
from aim_surgery.planning.budget import available_planes, choose_sizes, plane_costs
from aim_surgery.sites import Boundary, Site
from tests.cases import CASES, Case, SmallNet, Tied, Twice, mlp

X = torch.zeros(2, 3, 32, 32)


def conv_site(name: str, channels: int, size: int, kernel: int = 3, groups: int = 1) -> Site:
    spatial = (size, size)
    kernel_size = (kernel, kernel)
    weights = (f"{name}.weight",)
    return Site(
        name, name, "conv", channels, channels, groups, kernel_size, spatial, size**2, weights, True
    )


def map_boundary(name: str, channels: int, size: int) -> Boundary:
    return Boundary(
        name, (name,), 1, channels, 1, 0, (size, size), positions=size**2, dominates=True
    )


@pytest.mark.parametrize(
    ("spec", "classes", "total"),
    [
        ("torchvision:resnet50", 120, 54_022_392),
        ("torchvision:resnet50", 1000, 99_980_392),
        ("torchvision:vgg16", 1000, 604_220_328),
        ("torchvision:mobilenet_v2", 1000, 94_324_424),
    ],
)
def test_full_reads_cost_what_the_design_says(spec: str, classes: int, total: int) -> None:
    with torch.device("meta"):
        model = build(spec, num_classes=classes)
    plan = aim_surgery.plan(model, config=AimConfig(memory=50_176, budget=None, write="none"))
    assert plan.total_parameters == total
    assert all(read.planes == read.available for read in plan.reads)


def test_resnet50_within_the_default_budget() -> None:
    with torch.device("meta"):
        plan = aim_surgery.plan(build("torchvision:resnet50", num_classes=120))
    assert plan.base_parameters == 23_753_912
    assert len(plan.reads) == 54
    assert not plan.skips
    assert plan.total_parameters <= 24_120_000
    assert plan.new_parameters <= 0.015 * plan.base_parameters
    assert 45_000 <= plan.memory.floats <= 56_000
    assert plan.memory.layout[1:] == (7, 7)
    written = ["relu", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert [write.point.name for write in plan.writes] == written
    assert [(skip.name, skip.reason) for skip in plan.unwritten] == [
        ("fc", "no later site would read it")
    ]
    assert plan.write_parameters <= 0.35 * 0.015 * plan.base_parameters
    versions = {read.site.name: read.version for read in plan.reads}
    assert versions["conv1"] == 0
    assert versions["layer1.0.conv1"] == versions["layer1.0.downsample.0"] == 1
    assert versions["layer1.1.conv1"] == versions["layer2.0.conv3"] == 2
    assert versions["layer4.1.conv1"] == versions["fc"] == 5


def test_how_a_site_reads() -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=2 * 64, budget=None))
    reads = {read.site.name: read for read in plan.reads}
    assert (reads["stem"].available, reads["stem"].how) == (1, "pad")  # 32·32 > 128
    assert (reads["blocks.2.conv1"].available, reads["blocks.2.conv1"].how) == (2, "reshape")
    assert (reads["head"].available, reads["head"].how) == (128, "features")
    assert plan.memory.layout == (2, 8, 8)
    narrow = plan.with_planes({"head": 3})
    assert {r.site.name: r.averaged for r in narrow.reads}["head"]


@given(
    sites=st.lists(
        st.tuples(st.integers(1, 64), st.integers(1, 32), st.integers(1, 7)), min_size=1, max_size=8
    ),
    parameters=st.integers(10_000, 10_000_000),
    budget=st.floats(0.001, 2.0),
    writes=st.lists(st.tuples(st.integers(1, 512), st.integers(1, 16)), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_budgets_hold(
    sites: list[tuple[int, int, int]],
    parameters: int,
    budget: float,
    writes: list[tuple[int, int]],
) -> None:
    table = [conv_site(f"s{i}", c, s, k) for i, (c, s, k) in enumerate(sites)]
    points = [map_boundary(f"w{i}", c, s) for i, (c, s) in enumerate(writes)]
    costs = plane_costs(table)
    try:
        sizes = choose_sizes(AimConfig(budget=budget), table, points, parameters)
    except PlanError as err:
        least = float(str(err).split("budget=")[1].split(" ")[0])
        assert least > budget
        sizes = choose_sizes(AimConfig(budget=least), table, points, parameters)
        with pytest.raises(PlanError):  # and no less would do
            choose_sizes(AimConfig(budget=least - 2e-6), table, points, parameters)
        budget = least
    memory = Memory.of(sizes.floats, sizes.home)
    written = sum(
        Write.of(point, memory, k, version, widths=sizes.widths).parameters
        for version, (point, k) in enumerate(zip(points, sizes.write_planes, strict=True), 1)
    )
    fixed = 2 * sizes.floats + written
    spent = fixed + sum(costs[name] * k for name, k in sizes.planes.items())
    assert spent <= budget * parameters
    assert len(sizes.widths) == 1
    assert 4 <= sizes.widths[0] <= 16
    if sizes.widths[0] > 4:
        assert written <= 0.35 * budget * parameters
    cap = max(sizes.planes.values())
    for site in table:
        available = available_planes(sizes.floats, site.spatial)
        assert 1 <= sizes.planes[site.layer] <= available
        assert sizes.planes[site.layer] == min(available, cap)
    wider = {s.layer: min(available_planes(sizes.floats, s.spatial), cap + 1) for s in table}
    more = fixed + sum(costs[name] * k for name, k in wider.items())
    assert wider == dict(sizes.planes) or more > int(budget * parameters)  # κ is the largest


@given(floats=st.integers(1, 100_000), size=st.integers(1, 300))
def test_planes_hold_all_floats_and_no_more(floats: int, size: int) -> None:
    planes = available_planes(floats, (size, size))
    assert (planes - 1) * size**2 < floats <= planes * size**2


def test_auto_budget_gives_every_site_a_plane_and_says_so() -> None:
    with torch.device("meta"):
        model = build("torchvision:mobilenet_v2")
    plan = aim_surgery.plan(model)
    assert len(plan.reads) == 53
    assert min(read.planes for read in plan.reads) == 1
    assert "raised from 1.5%" in plan.notes[0]
    with pytest.raises(PlanError, match="too small for one plane a site") as caught:
        aim_surgery.plan(model, config=AimConfig(budget=0.015))
    least = float(str(caught.value).split("budget=")[1].split(" ")[0])
    assert aim_surgery.plan(model, config=AimConfig(budget=least)).reads
    with pytest.raises(PlanError):
        aim_surgery.plan(model, config=AimConfig(budget=least - 1e-6))


def test_memory_and_budget_together() -> None:
    config = AimConfig(memory=50, budget=0.5)
    plan = aim_surgery.plan(SmallNet(), X, config=config)
    assert plan.memory.floats == 50
    assert plan.new_parameters <= 0.5 * plan.base_parameters
    literal = aim_surgery.plan(SmallNet(), X, config=AimConfig(budget=None))
    assert literal.memory.floats == ARTICLE_FLOATS


def test_a_layer_is_widened_once() -> None:
    plan = aim_surgery.plan(
        Twice(), torch.zeros(2, 4, 12, 12), config=AimConfig(memory=400, budget=None)
    )
    planes = {read.site.name: read.planes for read in plan.reads}
    assert planes["conv"] == planes["conv@1"] == math.ceil(400 / 144)
    widths = {read.site.layer: read.parameters for read in plan.reads}
    assert plan.read_parameters == sum(widths.values())
    reads = (dataclasses.replace(plan.reads[0], planes=1), *plan.reads[1:])
    uneven = dataclasses.replace(plan, reads=reads)
    with pytest.raises(PlanError, match="widened once"):
        uneven.checked()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_json_gives_the_plan_back(case: Case) -> None:
    plan = aim_surgery.plan(case.model(), case.input(), config=AimConfig(budget=3.0))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert json.loads(plan.to_json(indent=1))["format"] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "x": 2}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="plan"):
        Plan.from_json(text)


def test_a_plan_prints_its_sites_and_totals() -> None:
    text = str(aim_surgery.plan(SmallNet(), X, config=AimConfig(budget=0.5, exclude="head")))
    for word in ("stem", "blocks.2.conv2", "not read: head: excluded by 'head'", "memory", "MACs"):
        assert word in text
    assert f"{sum(p.numel() for p in SmallNet().parameters()):,} ->" in text


def test_filters() -> None:
    def names(**kwargs: Any) -> list[str]:
        config = AimConfig(budget=3.0, **kwargs)
        return [read.site.name for read in aim_surgery.plan(SmallNet(), X, config=config).reads]

    assert names(include="blocks.*") == [f"blocks.{b}.conv{c}" for b in (0, 2) for c in (1, 2)]
    assert names(include=("stem", "head")) == ["stem", "head"]
    assert names(exclude="blocks.*") == ["stem", "head"]
    assert names(include=lambda site: site.kind == "linear") == ["head"]
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(budget=3.0, include="stem"))
    assert {skip.reason for skip in plan.skips} == {"not included"}


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_filter_without_a_match_lists_close_names(name: str) -> None:
    options: Any = {name: "blocks.0.conv9"}
    with pytest.raises(PlanError, match=rf"{name}='blocks.0.conv9' matches no site.*blocks.0.conv"):
        aim_surgery.plan(SmallNet(), X, config=AimConfig(**options))


def test_leaving_out_everything_is_an_error() -> None:
    with pytest.raises(PlanError, match="no site of 6"):
        aim_surgery.plan(SmallNet(), X, config=AimConfig(exclude="*"))


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize("chosen", [5, None, (5,), ("stem", None), {"stem": 1}], ids=str)
def test_filters_that_make_no_sense(name: str, chosen: Any) -> None:
    options: Any = {name: chosen}
    with pytest.raises(PlanError, match=rf"{name} must be a glob.*or a predicate on Site; got"):
        AimConfig(**options)


@pytest.mark.parametrize("budget", [0, -0.1, math.nan, math.inf, "lots", True, 1e30, 10**400])
def test_budgets_that_make_no_sense(budget: Any) -> None:
    with pytest.raises(PlanError, match="budget must be"):
        AimConfig(budget=budget)


@pytest.mark.parametrize("memory", [0, -5, 1.5, "many", True, math.nan])
def test_memories_that_make_no_sense(memory: Any) -> None:
    with pytest.raises(PlanError, match="memory must be a positive whole number"):
        AimConfig(memory=memory)


def test_memories_that_no_machine_holds() -> None:
    with pytest.raises(PlanError, match=r"10,000,000,000,000: .* 80,000,000,000,000 bytes"):
        AimConfig(memory=10**13)
    with pytest.raises(PlanError, match=r"budget 1e\+09 would buy a memory of .*memory="):
        choose_sizes(AimConfig(budget=1e9), [conv_site("s", 64, 8)], (), parameters=10**8)
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(budget=1e9, memory=64))
    assert all(read.planes == read.available for read in plan.reads)


@pytest.mark.parametrize(
    "options",
    [
        {name: "maybe"}
        for name in ("write", "carry", "init", "mode", "norm", "activation", "widths", "momentum")
    ],
    ids=str,
)
def test_words_that_do_not_exist(options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="must be"):
        AimConfig(**options)


class Pairs(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x)


def test_nothing_to_read_with() -> None:
    with pytest.raises(PlanError, match="no convolution or linear call"):
        aim_surgery.plan(nn.Sequential(nn.BatchNorm1d(4)), torch.zeros(2, 4))
    with pytest.raises(PlanError, match=r"no convolution or linear.*Bilinear"):
        aim_surgery.plan(nn.Sequential(Pairs(nn.Bilinear(4, 4, 4))), torch.zeros(2, 4))


def test_quantized_weights_are_named() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes = torch.zeros(4, 4, dtype=torch.int8)
            self.codes = nn.Parameter(codes, requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.codes.to(x.dtype)

    with pytest.raises(PlanError, match=r"quantized integers .codes"):
        aim_surgery.plan(Quantized(), torch.zeros(2, 4))


def test_edits() -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=300, budget=None))
    edited = plan.with_planes({"blocks.*": 1, "head": 7}).without("stem")
    assert {r.site.name: r.planes for r in edited.reads} == {
        "blocks.0.conv1": 1, "blocks.0.conv2": 1, "blocks.2.conv1": 1, "blocks.2.conv2": 1,
        "head": 7,
    }  # fmt: skip
    assert edited.skips[-1].reason == "left out by hand"
    assert len(plan.reads) == 6
    for planes in ({"nothing": 1}, {"head": 0}, {"head": 301}):
        with pytest.raises(PlanError, match=r"matches no read|planes must be 1 … 300"):
            plan.with_planes(planes)


@pytest.mark.parametrize("floats", [1, 50, 128, 1000])
def test_another_memory_changes_all_that_follows_from_it(floats: int) -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=300, budget=None))
    edited = plan.with_memory(floats)
    fresh = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=floats, budget=None))
    assert edited.memory == fresh.memory
    for old, new, full in zip(plan.reads, edited.reads, fresh.reads, strict=True):
        assert new.planes == min(old.planes, full.available)
        assert dataclasses.replace(new, planes=full.planes) == full
    assert plan.with_memory(300) == plan


def test_a_layer_with_two_sites_follows_its_narrower_one() -> None:
    x = torch.zeros(2, 4, 12, 12)
    plan = aim_surgery.plan(Twice(), x, config=AimConfig(memory=400, budget=None))
    planes = {read.site.layer: read.planes for read in plan.with_memory(100).reads}
    fresh = aim_surgery.plan(Twice(), x, config=AimConfig(memory=100, budget=None))
    assert planes == {read.site.layer: read.planes for read in fresh.reads}


@pytest.mark.parametrize("floats", ["abc", 0, 1.5, None, 10**13])
def test_another_memory_must_be_one(floats: Any) -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=300, budget=None))
    with pytest.raises(PlanError, match="memory must be"):
        plan.with_memory(floats)


def test_edits_that_make_no_sense() -> None:
    plan: Any = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=300, budget=None))
    with pytest.raises(PlanError, match="reads nowhere"):
        plan.without("*")
    for edit in (lambda: plan.without(5), lambda: plan.with_planes({5: 1})):
        with pytest.raises(PlanError, match=r"expected a glob.*got 5"):
            edit()
    with pytest.raises(PlanError, match=r"with_planes takes a dict.*'head'"):
        plan.with_planes("head")


# Plans that were edited as JSON -------------------------------------------------------------


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the last of the path at the place that the others lead to."""

    def edit(data: Any) -> None:
        *way, last, value = path
        for key in way:
            data = data[key]
        data[last] = value

    return edit


def twice_the_same(data: dict[str, Any]) -> None:
    data["reads"].append(data["reads"][0])


SITE = ("reads", 0, "site")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("memory", "floats", "abc"), r"memory\.floats must be a whole number, got 'abc'"),
        (put("memory", "floats", 1.5), r"memory\.floats must be a whole number, got 1\.5"),
        (put("memory", "floats", None), r"memory\.floats must be a whole number, got None"),
        (put("memory", "floats", 0), "memory must be a positive whole number"),
        (put("memory", "floats", 2**41), "memory must be 1,099,511,627,776 floats at most"),
        (put("memory", "floats", 120), r"are stale, a memory of 120 floats .*with_memory"),
        (put("memory", "layout", []), r"memory\.layout .* doesn't hold 128 floats"),
        (put("memory", "layout", [1, 8, 8]), r"memory\.layout .* doesn't hold.*with_memory"),
        (put("memory", "layout", [3, 8, 8]), r"memory\.layout .* doesn't hold 128 floats"),
        (put("memory", "layout", [-2, -8, 8]), r"memory\.layout .* doesn't hold 128 floats"),
        (put("memory", 5), "not a plan"),
        (put("base_parameters", "many"), "base_parameters must be a whole number, got 'many'"),
        (put("base_parameters", -1), "base_parameters must not be negative"),
        (put("init", "foo"), "init must be one of 'preserve', 'fresh', got 'foo'"),
        (put("model", 3), "model must be text, got 3"),
        (put("notes", "a note"), "notes must be a list, got 'a note'"),
        (put("skips", [{"name": "x", "weights": "w", "reason": ""}]), r"skips\[0\]\.weights must"),
        (put("reads", []), "reads nowhere"),
        (put("reads", None), "not a plan"),
        (put("reads", ["stem"]), "not a plan"),
        (put("reads", 0, "planes", True), r"reads\[0\]\.planes must be a whole number, got True"),
        (put("reads", 0, "planes", 0), r"stem: planes must be 1 … 1, got 0"),
        (put("reads", 0, "planes", 2), r"stem: planes must be 1 … 1, got 2"),
        (put("reads", 0, "available", 9), "stem: available=9 .*stale.*gives 1 and 'pad'"),
        (put("reads", 0, "how", "reshape"), "stem: .*how='reshape' are stale.*plan again"),
        (put("reads", 0, "how", "guess"), r"reads\[0\]\.how must be one of 'reshape'"),
        (put("reads", 0, "extra", 1), "not a plan.*extra"),
        (put(*SITE, "spatial", []), r"stem: .*one to three spatial sizes, got spatial=\(\)"),
        (put(*SITE, "spatial", [32]), r"stem: .*one to three spatial sizes, got spatial=\(32,\)"),
        (put(*SITE, "spatial", [0, 32]), "stem: a size of this site is not positive"),
        (put(*SITE, "spatial", ["a", "b"]), r"reads\[0\]\.site\.spatial\[0\] must be a whole"),
        (put(*SITE, "kernel_size", 3), r"reads\[0\]\.site\.kernel_size must be a list, got 3"),
        (put(*SITE, "kind", "linear"), "stem: a linear site has no spatial size"),
        (put(*SITE, "groups", 5), "stem: groups=5 don't divide"),
        (put(*SITE, "weights", []), "stem: weights names no parameter"),
        (put(*SITE, "weights", "stem.weight"), r"site\.weights must be a list"),
        (put(*SITE, "widens", "yes"), r"site\.widens must be true or false, got 'yes'"),
        (twice_the_same, "stem: two reads of this plan are at the same site"),
        (put("inputs", "args", 0, 2, "foo"), r"inputs\.args\[0\]\[2\] must be a dtype.*'foo'"),
        (put("inputs", "args", 0, 2, "nn"), r"inputs\.args\[0\]\[2\] must be a dtype.*'nn'"),
        (put("inputs", "args", 0, 1, [2, "3"]), r"inputs\.args\[0\]\[1\]\[1\] must be a whole"),
        (put("inputs", "args", 0, 1, [-2]), r"inputs\.args\[0\]\[1\]\[0\] must be a size"),
        (put("inputs", "args", 0, ["tensor"]), r"inputs\.args\[0\] must be a literal"),
        (put("inputs", "args", 0, {"a": 1}), r"inputs\.args\[0\] must be a literal"),
        (put("inputs", "args", 0, ["dict", [["a"]]]), r"inputs\.args\[0\]\[1\]\[0\] must be 2"),
        (put("inputs", "args", 0, ["list", [[]]]), r"inputs\.args\[0\]\[1\]\[0\] must be a lit"),
        (put("inputs", "args", "x"), r"inputs\.args must be a list, got 'x'"),
        (put("inputs", "kwargs", [["a", ["foo"]]]), r"inputs\.kwargs\['a'\] must be a literal"),
        (put("inputs", "kwargs", [[1, 2]]), r"inputs\.kwargs\[0\]\[0\] must be text"),
    ],
)
def test_json_that_was_edited_into_no_plan(
    edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    plan = aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=2 * 64, budget=None))
    data = json.loads(plan.to_json())
    edit(data)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps(data))


def put_write(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return put("writes", 0, name, value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put_write("version", 2), "stem: makes version 2, and the next one .* is 1"),
        (put_write("source", 1), "stem: reads version 1 of memory 'memory', which has .* 0 … 0"),
        (put_write("memory", "B"), "stem: writes to 'B', which is no memory of this plan"),
        (put_write("outputs", 3), "stem: outputs of this write are stale"),
        (put_write("planes", 99), "stem: planes must be 0 … 1, got 99"),
        (put_write("kernel_size", 2), "stem: kernel_size must be odd, got 2"),
        (put_write("widths", []), "widths must be a tuple of the channels"),
        (put_write("widths", [0]), "widths must be a tuple of the channels"),
        (put_write("norm", "group"), r"writes\[0\]\.norm must be one of 'layer'"),
        (put_write("momentum", 0), r"stem: momentum must be in \(0, 1\], got 0"),
        (put_write("point", {"name": "x"}), "not a plan"),
        (put("writes", 0, "point", "spatial", [0, 16]), "stem: a size of this write point"),
        (put("reads", 0, "version", 9), "stem: reads version 9 .* has versions 0 … 2"),
        (put("reads", 0, "memory", "B"), "stem: reads 'B', which is no memory of this plan"),
        (put("memory", "name", "reads"), "memory: 'reads' can't be the name of a module"),
        (put("memory", "shared", 3), "shared=3 must be positive, and shared must divide 128"),
        (lambda d: d["further"].append(d["memory"]), "two memories of this plan have one name"),
        (lambda d: d["writes"].append(d["writes"][0]), "two writes .* would live under the name"),
        (
            lambda d: d["memory"].update(carry="state") or d.update(writes=[]) or reset(d),
            "carry='state' of memory 'memory': nothing writes to it",
        ),
    ],
)
def test_writes_that_were_edited_into_no_plan(
    edit: Callable[[dict[str, Any]], None], words: str
) -> None:
    config = AimConfig(memory=2 * 64, budget=None, write_at=("stem", "blocks"))
    data = json.loads(aim_surgery.plan(SmallNet(), X, config=config).to_json())
    edit(data)
    with pytest.raises(PlanError, match=words):
        Plan.from_json(json.dumps(data))


def reset(data: dict[str, Any]) -> None:
    for read in data["reads"]:
        read["version"] = 0


def test_versions_by_hand() -> None:
    config = AimConfig(memory=2 * 64, budget=None, write_at=("stem", "blocks"))
    plan = aim_surgery.plan(SmallNet(), X, config=config)
    assert [read.version for read in plan.reads] == [0, 1, 1, 1, 1, 2]
    silent = plan.with_versions({"*": 0})
    assert [read.version for read in silent.reads] == [0] * 6
    assert not silent.writes
    assert silent.unwritten[-1].reason == "no later site would read it"
    fewer = plan.without("head")
    assert [write.point.name for write in fewer.writes] == ["stem"]
    earlier = plan.with_versions({"head": 1})
    assert [read.version for read in earlier.reads] == [0, 1, 1, 1, 1, 1]
    without = plan.without_writes("stem")
    assert [read.version for read in without.reads] == [0, 0, 0, 0, 0, 1]
    assert [(w.point.name, w.version, w.source) for w in without.writes] == [("blocks", 1, 0)]
    assert without.unwritten[-1].reason == "left out by hand"
    assert not plan.without_writes("*").writes
    for edit in (
        lambda: plan.with_versions({"head": 3}),
        lambda: plan.with_versions({"nothing": 0}),
        lambda: plan.with_versions(3),  # type: ignore[arg-type]
        lambda: plan.without_writes("nothing"),
        lambda: plan.without_writes(5),  # type: ignore[arg-type]
    ):
        with pytest.raises(PlanError, match=r"version 3|matches no|takes a dict|expected a glob"):
            edit()
    with pytest.raises(PlanError, match=r"stem: reads version 2 .* written after it"):
        aim_surgery.apply(SmallNet(), plan.with_versions({"stem": 2}))


def test_writes_show_in_the_text_of_a_plan() -> None:
    config = AimConfig(memory=2 * 64, budget=None, write_at="stem", mode="replace", carry="state")
    text = str(aim_surgery.plan(SmallNet(), X, config=config))
    row = next(line for line in text.splitlines() if line.startswith("stem:"))
    assert "replace, a sample" in row
    assert "0 -> 1" in row
    assert "writes      after stem: " in text
    assert "state carried" in text


def test_nothing_to_carry() -> None:
    with pytest.raises(PlanError, match="write='none' writes nothing"):
        AimConfig(carry="state", write="none")
    with pytest.raises(PlanError, match=r"nothing to carry \(.*no later site would read it\)"):
        aim_surgery.plan(nn.Linear(64, 64), torch.zeros(2, 64), config=AimConfig(carry="state"))


def test_writes_by_config() -> None:
    config = AimConfig(
        budget=None, memory=128, write="batch", write_at="stem", mode="replace",
        widths=(8, 4), kernel_size=3, norm="batch", activation="sigmoid", momentum=0.3,
    )  # fmt: skip
    (write,) = aim_surgery.plan(SmallNet(), X, config=config).writes
    assert (write.per, write.mode, write.widths, write.kernel_size) == (
        "batch",
        "replace",
        (8, 4),
        3,
    )
    assert (write.norm, write.activation, write.momentum) == ("batch", "sigmoid", 0.3)
    block = ((12 + 1) * 9 * 8 + 8 + 2 * 8) + (8 * 9 * 4 + 4 + 2 * 4) + (4 * 2 + 2)
    assert write.parameters == block
    assert write.point.name == "stem"


def test_tied_parameters_count_once() -> None:
    plan = aim_surgery.plan(
        Tied(), torch.zeros(2, 5, dtype=torch.int64), config=AimConfig(memory=5, budget=None)
    )
    assert plan.base_parameters == sum(p.numel() for p in Tied().parameters())


def test_plans_work_on_the_meta_device() -> None:
    with torch.device("meta"):
        on_meta = aim_surgery.plan(mlp(), (torch.zeros(2, 16),), config=AimConfig(budget=1.0))
    assert on_meta == aim_surgery.plan(mlp(), torch.zeros(2, 16), config=AimConfig(budget=1.0))
