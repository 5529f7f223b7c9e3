"""How much memory, and how many planes a site: integers in, integers out.

    cost(M, k) = 2 M + Σ_layers k_l · c_l,   c_l = C_out · Π kernel   (one plane of layer l)

A budget b of P parameters allows b·P. The memory takes 30 % of it, in whole planes of the home
layout where that is one or more; the reads take what is left, by the largest common cap κ with
k_l = min(K_l, κ). (Writes will have their share when there are writes.)
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aim_surgery.config import ARTICLE_FLOATS, DEFAULT_BUDGET, MOST_FLOATS, AimConfig
from aim_surgery.errors import PlanError
from aim_surgery.sites import Site

MEMORY_SHARE = 0.30


@dataclass(frozen=True)
class Sizes:
    """What a budget buys: floats of memory, planes by layer, and what to tell the user."""

    floats: int
    planes: Mapping[str, int]
    notes: tuple[str, ...] = ()


def choose_sizes(config: AimConfig, sites: Sequence[Site], parameters: int) -> Sizes:
    """Choose the size of the memory and the planes of each layer.

    Args:
        config: Its `budget` and `memory` decide.
        sites: The sites that will read.
        parameters: P, the parameters of the model before the operation.

    Returns:
        The sizes.

    Raises:
        PlanError: Not even one plane a site fits (the message names the budget that would do), or
            the budget would buy a memory that no machine holds.
    """
    if config.budget is None:
        floats = config.memory or ARTICLE_FLOATS
        return Sizes(floats, available_by_layer(sites, floats))
    costs = plane_costs(sites)
    unit = sum(costs.values())
    home = home_positions(sites)
    budget, notes = config.budget, ()
    least = _least_budget(config.memory, unit, parameters)
    if budget == "auto":
        budget = max(DEFAULT_BUDGET, least)
        if budget > DEFAULT_BUDGET:
            notes = (
                f"budget raised from {DEFAULT_BUDGET:.1%} to {budget:.2%}, the least at which "
                f"every site reads one plane",
            )
    elif budget < least:
        raise PlanError(
            f"budget {budget:g} is too small for one plane a site: {len(costs)} layers need "
            f"{unit:,} parameters a plane, besides the memory; budget={least:.6f} would do"
        )
    allowed = int(budget * parameters)
    floats = config.memory or _memory_floats(budget, parameters, home)
    if floats > MOST_FLOATS:
        raise PlanError(
            f"budget {budget:g} would buy a memory of {floats:,} floats, more than the "
            f"{MOST_FLOATS:,} there may be: choose a smaller budget, or the size with memory="
        )
    available = available_by_layer(sites, floats)
    cap = _largest_cap(allowed - 2 * floats, costs, available)
    return Sizes(floats, {layer: min(k, cap) for layer, k in available.items()}, notes)


def home_positions(sites: Sequence[Site]) -> tuple[int, ...]:
    """The smallest spatial size of more than one position at which a convolution works, or ()."""
    sizes = [site.spatial for site in sites if math.prod(site.spatial) > 1]
    return min(sizes, key=lambda size: (math.prod(size), size), default=())


def available_planes(site: Site, floats: int) -> int:
    """K, the planes that a memory of M floats gives a site: ceil(M / S); M for a linear site."""
    if site.kind == "linear":
        return floats
    return -(-floats // math.prod(site.spatial))


def available_by_layer(sites: Sequence[Site], floats: int) -> dict[str, int]:
    """K by layer: the least of its sites, because a layer is widened once."""
    planes: dict[str, int] = {}
    for site in sites:
        count = available_planes(site, floats)
        planes[site.layer] = min(count, planes.get(site.layer, count))
    return planes


def plane_costs(sites: Sequence[Site]) -> dict[str, int]:
    """Parameters of one more plane, by layer."""
    return {site.layer: site.out_channels * math.prod(site.kernel_size) for site in sites}


def _memory_floats(budget: float, parameters: int, home: tuple[int, ...]) -> int:
    share = int(MEMORY_SHARE * budget * parameters / 2)
    plane = math.prod(home)
    return max(share // plane * plane or share, 1)  # a share below one plane is taken as it is


def _largest_cap(allowed: int, costs: Mapping[str, int], available: Mapping[str, int]) -> int:
    def cost(cap: int) -> int:
        return sum(min(available[layer], cap) * each for layer, each in costs.items())

    caps = range(1, max(available.values()) + 1)
    return bisect.bisect_right(caps, allowed, key=cost)


def _least_budget(memory: int | None, unit: int, parameters: int) -> float:
    """The budget, in whole millionths, from which on every site reads one plane."""
    # a chosen memory costs what it costs; otherwise it takes its share, one float at least
    chosen = memory is not None
    needed = unit + 2 * memory if chosen else max(unit / (1 - MEMORY_SHARE), unit + 2)
    return math.ceil((needed + 1) / parameters * 1e6) / 1e6
