"""Arms: from a network to what is trained, each changing as little as it can.

All arms of a seed start from the same base weights (but for another width or resolution); what
memory adds to the layers starts at zero (`init="preserve"`) unless the arm is about that, so at the
first step they compute the same.

`BUDGET` is 10 % new parameters for all kinds of memory, so that they can be compared. `AimConfig`
itself has "auto", which grants networks as small as these 9.9 % (resnet: the same plan), 6.4 %
(vgg) and 1.9 % (mlp): "budget-auto" is the configuration that `transform(model)` takes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

import aim_surgery
from aim_surgery import AimConfig, Plan
from benchmarks.evidence import lunkad2021
from benchmarks.evidence.bias_maps import add_bias_maps
from benchmarks.evidence.first_planes import read_first_planes
from benchmarks.evidence.networks import Network, widened

BUDGET = 0.10
DEFAULT = AimConfig(budget=BUDGET)
_AFTER_BASE = 500_000  # added to the seed for what is drawn besides the base


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Attributes:
        title: In tables.
        what: What it is, in one sentence.
        make: From a network and a seed to a module.
        zeroed: Name of the row that is this arm with its memory zeroed at evaluation, or "".
        swapped: Name of the row where every image reads another's memory at evaluation, or "".
    """

    title: str
    what: str
    make: Callable[[Network, int], nn.Module]
    zeroed: str = ""
    swapped: str = ""


def base(network: Network, seed: int) -> nn.Module:
    """The network as it is, its weights drawn from the seed."""
    torch.manual_seed(seed)
    return network.build()


@functools.lru_cache
def default_plan(network: Network) -> Plan:
    """The plan of the arm "per-sample"."""
    return _plan(network, DEFAULT)


def _plan(network: Network, config: AimConfig) -> Plan:
    return aim_surgery.plan(network.build(), network.example(), config=config)


def _with(**options: object) -> Callable[[Network, int], nn.Module]:
    """Memory with options that differ from `DEFAULT`."""
    config = dataclasses.replace(DEFAULT, **options)  # pyright: ignore[reportArgumentType]

    def make(network: Network, seed: int) -> nn.Module:
        return _operated(network, seed, config)

    return make


def _operated(network: Network, seed: int, config: AimConfig) -> nn.Module:
    model = base(network, seed)
    torch.manual_seed(seed + _AFTER_BASE)
    return aim_surgery.transform(model, network.example(), config=config)


def _memory_times(factor: float) -> Callable[[Network, int], nn.Module]:
    """A memory of another size, in whole home planes; reads and writes as wide as before."""

    def make(network: Network, seed: int) -> nn.Module:
        plan, model = default_plan(network), base(network, seed)
        memory = plan.memory
        plane = memory.floats // memory.layout[0]
        floats = max(round(memory.layout[0] * factor), 1) * plane
        torch.manual_seed(seed + _AFTER_BASE)
        return aim_surgery.apply(model, plan.with_memory(floats), network.example())

    return make


def _no_writes(network: Network, seed: int) -> nn.Module:
    model = base(network, seed)
    torch.manual_seed(seed + _AFTER_BASE)
    plan = default_plan(network).without_writes("*")
    return aim_surgery.apply(model, plan, network.example())


def _widened(network: Network, seed: int) -> nn.Module:
    return base(widened(network, default_plan(network).total_parameters), seed)


def _resolution(network: Network, seed: int) -> nn.Module:
    return base(replace(network, stride=1), seed)


def _frozen_floats(network: Network, seed: int) -> nn.Module:
    model = _operated(network, seed, DEFAULT)
    model.get_submodule("aim.memory").requires_grad_(False)
    return model


def _bias_map(network: Network, seed: int) -> nn.Module:
    return add_bias_maps(base(network, seed), network.example())


def _first_planes(network: Network, seed: int) -> nn.Module:
    model = base(network, seed)
    torch.manual_seed(seed + _AFTER_BASE)
    gm = aim_surgery.transform(model, network.example(), config=DEFAULT, emit="graph")
    read_first_planes(gm)
    return gm


def _original(network: Network, seed: int) -> nn.Module:
    model = base(network, seed)
    torch.manual_seed(seed + _AFTER_BASE)
    return aim_surgery.apply(model, lunkad2021.plan(network, model), network.example())


ARMS = {
    "base": Arm("base", "the network as it is", base),
    "widened": Arm(
        "base, widened", "the base with as many parameters as per-sample writes have", _widened
    ),
    "resolution": Arm(
        "base, twice the resolution",
        "the first layer keeps the resolution: what the article's network had besides memory",
        _resolution,
    ),
    "no-writes": Arm(
        "memory, no writes",
        "memory and reads of per-sample writes, without the writes",
        _no_writes,
    ),
    "per-sample": Arm(
        "memory, per-sample writes",
        f"the default configuration, but at a budget of {BUDGET:.0%}",
        _with(),
        zeroed="per-sample, zeroed",
        swapped="per-sample, swapped",
    ),
    "per-batch": Arm("memory, batch writes", 'write="batch"', _with(write="batch")),
    "carried": Arm(
        "memory, carried state", 'per-sample writes and carry="state"', _with(carry="state")
    ),
    "lunkad2021": Arm(
        "memory, settings of 2021",
        "the original's reads, writes, two memories and init, scaled down",
        _original,
    ),
    "frozen-floats": Arm(
        "memory, floats frozen",
        "per-sample writes; the memory's own floats stay as they were drawn",
        _frozen_floats,
    ),
    "bias-map": Arm(
        "base with bias maps",
        "a free map for each layer: all that memory without writes could express",
        _bias_map,
    ),
    "budget-auto": Arm(
        "memory, budget auto",
        'budget="auto": what `transform(model)` does by itself',
        _with(budget="auto"),
    ),
    "budget-20": Arm("budget 20 %", "budget=0.2", _with(budget=0.2)),
    "budget-40": Arm("budget 40 %", "budget=0.4", _with(budget=0.4)),
    "memory-quarter": Arm("a quarter of the memory", "with_memory", _memory_times(0.25)),
    "memory-fourfold": Arm("four times the memory", "with_memory", _memory_times(4)),
    "first-planes": Arm("first planes", "reads see the first planes, not averages", _first_planes),
    "init-fresh": Arm("fresh init", 'init="fresh"', _with(init="fresh")),
    "mode-replace": Arm("writes replace", 'mode="replace"', _with(mode="replace")),
}
