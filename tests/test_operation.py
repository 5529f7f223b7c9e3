"""The public boundary: what is no config, no plan, no model, is refused in words."""

from __future__ import annotations

import copy
import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, CaptureError, PlanError
from aim_surgery.planning import Plan
from tests.cases import FLOAT32_TOLERANCE, SmallNet, assert_same

X = torch.zeros(2, 3, 32, 32)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return aim_surgery.plan(SmallNet(), X, config=AimConfig(memory=2 * 64, budget=None))


@pytest.mark.parametrize("act", [aim_surgery.plan, aim_surgery.transform])
@pytest.mark.parametrize(
    ("config", "remedy"),
    [({"budget": 1}, r"AimConfig\(\*\*config\)"), ({}, "dict"), (0.015, "float"), ("auto", "str")],
    ids=str,
)
def test_what_is_no_config(act: Any, config: Any, remedy: str) -> None:
    with pytest.raises(PlanError, match=rf"AimConfig expected.*{remedy}"):
        act(SmallNet(), X, config=config)


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_predicate_that_raises_is_named(name: str) -> None:
    def only_wide(site: Any) -> bool:
        return site.width > 3

    options: Any = {name: only_wide}
    with pytest.raises(PlanError, match=r"'only_wide'.*site 'stem'.*width") as caught:
        aim_surgery.transform(SmallNet(), X, config=AimConfig(**options))
    assert isinstance(caught.value.__cause__, AttributeError)


def test_what_is_no_plan(plan: Plan) -> None:
    no_plans: list[tuple[Any, str]] = [
        (None, r"expected a Plan, got NoneType: aim_surgery\.plan"),
        (plan.to_json(), r"got str: Plan\.from_json"),
        (AimConfig(), "got AimConfig"),
    ]
    for wrong, words in no_plans:
        with pytest.raises(PlanError, match=words):
            aim_surgery.apply(SmallNet(), wrong)


def test_a_plan_for_no_model(plan: Plan) -> None:
    nothing: Any = None
    with pytest.raises(CaptureError, match=r"torch\.nn\.Module, got NoneType"):
        aim_surgery.apply(nothing, plan)


def test_an_edited_plan_is_checked_before_anything_else(plan: Plan) -> None:
    inputs = dataclasses.replace(plan.inputs, args=(("tensor", (2, 3, 32, 32), "foo"),))
    with pytest.raises(PlanError, match=r"inputs\.args\[0\]\[2\] must be a dtype.*'foo'"):
        aim_surgery.apply(SmallNet(), dataclasses.replace(plan, inputs=inputs))
    with pytest.raises(PlanError, match="reads nowhere"):
        aim_surgery.apply(SmallNet(), dataclasses.replace(plan, reads=()))


def test_example_inputs_that_cannot_be_made(plan: Plan) -> None:
    inputs = dataclasses.replace(plan.inputs, args=(("tensor", (2**40, 2**40), "float32"),))
    with pytest.raises(PlanError, match=r"can't be made.*Pass example_inputs"):
        aim_surgery.apply(SmallNet(), dataclasses.replace(plan, inputs=inputs))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("spatial", (16, 16), r"spatial=\(16, 16\), the model has spatial=\(8, 8\): plan again"),
        ("weights", ("zzz",), r"weights=\('zzz',\), the model has weights=\('blocks\.2"),
        ("layer", "elsewhere", "layer='elsewhere'"),
        ("kind", "conv_transpose", "kind='conv_transpose'"),
        ("groups", 2, "groups=2, the model has groups=1"),
        ("kernel_size", (1, 1), r"kernel_size=\(1, 1\)"),
    ],
)
def test_a_site_that_is_not_the_model_s(plan: Plan, field: str, value: Any, words: str) -> None:
    index = [read.site.name for read in plan.reads].index("blocks.2.conv1")
    edits: Any = {field: value}
    reads = list(plan.reads)
    site = dataclasses.replace(reads[index].site, **edits)
    reads[index] = dataclasses.replace(reads[index], site=site)
    edited = dataclasses.replace(plan, reads=tuple(reads))
    if field == "spatial":
        edited = edited.with_memory(2 * 64)  # one of its own kind, but for another resolution
    with pytest.raises(PlanError, match=rf"blocks\.2\.conv1: the plan was made .*{words}"):
        aim_surgery.apply(SmallNet(), edited)


def test_a_plan_may_leave_a_layer_alone_that_could_be_widened(plan: Plan) -> None:
    reads = tuple(
        dataclasses.replace(read, site=dataclasses.replace(read.site, widens=False))
        for read in plan.reads
    )
    model, x = SmallNet().double().eval(), torch.randn(2, 3, 32, 32).double()
    gm = aim_surgery.apply(model, dataclasses.replace(plan, reads=reads), x).eval()
    assert {name: p.shape for name, p in model.named_parameters()}.items() <= {
        name: p.shape for name, p in gm.named_parameters()
    }.items()
    assert_same(gm(x), model(x))
    gm.get_parameter("aim.reads.head.weight").data.normal_()
    assert not torch.allclose(gm(x), model(x))


def test_positions_may_differ() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    short = aim_surgery.plan(model, torch.zeros(2, 3, 4), config=AimConfig(memory=8, budget=None))
    x = torch.randn(2, 7, 4)
    assert_same(aim_surgery.apply(model, short, x)(x), model(x), tolerance=FLOAT32_TOLERANCE)


def test_a_plan_with_another_memory_is_applied(plan: Plan) -> None:
    model = SmallNet().eval()
    gm = aim_surgery.apply(copy.deepcopy(model), plan.with_memory(300)).eval()
    assert gm.get_parameter("aim.memory.weight").numel() == 300
    x = torch.randn(2, 3, 32, 32)
    assert_same(gm(x), model(x), tolerance=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        aim_surgery.transform(model, torch.zeros(2, 8))
        with pytest.raises(CaptureError):
            aim_surgery.transform(model, torch.zeros(2, 7))
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
