"""The author's published network, quirks included, from the general operation, to the parameter."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import aim_surgery
from aim_surgery import Plan
from aim_surgery.nn.memory import Memory
from benchmarks.lunkad2021.comparison import compare, compare_reads
from benchmarks.lunkad2021.model import KerasResNet50, keras_count
from benchmarks.lunkad2021.operation import IDENTITY, original_plan, reference

TOTAL, BASE = 26_673_380, 23_792_612


@pytest.fixture(scope="module")
def plan() -> Plan:
    with torch.device("meta"):
        return original_plan(KerasResNet50())


def test_every_figure_is_the_originals() -> None:
    lines = compare()
    assert [line for line in lines if not line.same] == []
    # base, its map, M, different floats, total; two memories; 16 reads and 4 writes with their sums
    assert len(lines) == 5 + 2 + 16 + 1 + 4 + 1


def test_reads_are_compared_by_planes_version_memory_and_name(plan: Plan) -> None:
    first, *rest = plan.reads
    renamed = dataclasses.replace(first.site, name="stem")
    for edited in (
        plan.with_planes({"res5b.branch2a": 255}),
        plan.with_versions({"res5a.branch2a": 2}),
        plan.without("res2c.branch2a"),
        dataclasses.replace(
            plan, reads=(dataclasses.replace(first, memory=IDENTITY), *rest)
        ).checked(),
        dataclasses.replace(plan, reads=(dataclasses.replace(first, site=renamed), *rest)),
    ):
        assert not all(line.same for line in compare_reads(edited, reference()))
    assert all(line.same for line in compare_reads(plan, reference()))


def test_the_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


def test_only_what_reaches_a_reader_is_written(plan: Plan) -> None:
    with torch.device("meta"):
        base = KerasResNet50()
    assert [write.point.name for write in plan.writes] == ["res2a", "res3a", "res4a"]
    more = original_plan(base, last_write=True)
    assert [write.point.name for write in more.writes] == ["res2a", "res3a", "res4a", "res5a"]
    assert not [read for read in more.reads if read.version == 4]
    assert {read.version for read in plan.reads if read.memory == IDENTITY} == {0}


def test_the_operated_network_trains(plan: Plan) -> None:
    torch.manual_seed(0)
    base = KerasResNet50()
    assert keras_count(base) == BASE
    operated = aim_surgery.apply(base, plan).train()
    assert keras_count(operated) == TOTAL
    x = torch.randn(2, 3, 64, 64)  # planned at 224: the planes are resized
    operated(x).logsumexp(1).sum().backward()
    without = [name for name, weight in operated.named_parameters() if weight.grad is None]
    assert without == []
    for name in ("memory", IDENTITY):
        memory = operated.get_submodule(f"aim.{name}")
        assert isinstance(memory, Memory)
        assert memory.weight.grad is not None
        assert memory.weight.grad.abs().max() > 0


def test_1024_of_the_floats_are_different(plan: Plan) -> None:
    inputs, shared = plan.memory.inputs, plan.memory.shared
    value = Memory(plan.memory.floats, inputs=inputs, shared=shared, dtype=torch.float64)()
    assert value is not None
    planes = value.unflatten(1, plan.memory.layout)
    assert torch.equal(planes, planes[..., :1, :1].expand_as(planes))
    assert value.unique().numel() == 1024


def test_stride_one_in_the_first_convolution_doubles_the_resolution() -> None:
    with torch.device("meta"):
        x = torch.zeros(1, 3, 224, 224)
        maps = [KerasResNet50(stride=stride).features(x).shape for stride in (1, 2)]
    assert [tuple(found[2:]) for found in maps] == [(14, 14), (7, 7)]
