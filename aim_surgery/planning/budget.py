"""How much memory, how wide the writes, how many planes a site: integers in, integers out.

    cost(M, w, k) = 2 M + Σ_writes c_i(M, w) + Σ_layers k_l · c_l

with c_l = C_out · Π kernel, the weights of one plane of layer l, and c_i the parameters of an
update block of width w. A budget b of P parameters allows b·P. The memory takes 30 % of it, in
whole planes of the home layout where that is one or more; the writes at most 35 %, all of one
width w; the reads what is left, by the largest common cap κ with k_l = min(K_l, κ). Where even the
narrowest writes would take more than their share, the memory that they write is made smaller.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aim_surgery.config import ARTICLE_FLOATS, DEFAULT_BUDGET, MOST_FLOATS, AimConfig
from aim_surgery.errors import RequestError
from aim_surgery.nn.write_block import block_parameters
from aim_surgery.sites import Boundary, Site

MEMORY_SHARE = 0.30
WRITE_SHARE = 0.35
MOST_WIDTH = 16  # the article's first layer
LEAST_WIDTH = 4


@dataclass(frozen=True)
class Sizes:
    """What a budget buys.

    Attributes:
        floats: M.
        home: Spatial size of the memory's home layout, () where there is none.
        planes: k by layer.
        widths: Channels of each update block's layers.
        write_planes: k of each write, in the order of the points.
        notes: What to tell the user.
    """

    floats: int
    home: tuple[int, ...]
    planes: Mapping[str, int]
    widths: tuple[int, ...]
    write_planes: tuple[int, ...]
    notes: tuple[str, ...] = ()


def choose_sizes(
    config: AimConfig, sites: Sequence[Site], points: Sequence[Boundary], parameters: int
) -> Sizes:
    """Choose the size of the memory, the width of the writes and the planes of each layer.

    Args:
        config: Its `budget`, `memory` and `widths` decide.
        sites: The sites that will read.
        points: The write points.
        parameters: P, the parameters of the model before the operation.

    Returns:
        The sizes.

    Raises:
        RequestError: Not even one plane a site fits (the message names the budget that would do),
            or the budget would buy a memory that no machine holds.
    """
    home = home_positions(sites)
    if config.budget is None:
        floats = config.memory or ARTICLE_FLOATS
        full = tuple(available_planes(floats, point.spatial) for point in points)
        widths = config.widths or (MOST_WIDTH,)
        return Sizes(floats, home, available_by_layer(sites, floats), widths, full)
    if not parameters:
        raise RequestError(
            "the model has no parameters that a budget could be a share of: use None"
        )
    purse = _Purse(config, sites, points, parameters, home)
    notes: tuple[str, ...] = ()
    wanted = DEFAULT_BUDGET if config.budget == "auto" else config.budget
    budget = wanted if purse.covers(wanted) else _least_budget(purse, wanted)
    needs = f"{len(purse.costs)} layers need {purse.unit:,} parameters a plane"
    if points:
        narrow = "-".join(map(str, config.widths or (LEAST_WIDTH,)))
        cost = purse.write_parameters(purse.memory_floats(budget), LEAST_WIDTH)
        needs += f", {len(points)} writes of width {narrow} {cost:,}"
    if budget > wanted and config.budget == "auto":
        notes = (
            f"budget raised from {DEFAULT_BUDGET:.1%} to {budget:.2%}, the least that does: "
            f"{needs}",
        )
    elif budget > wanted:
        raise RequestError(
            f"budget {wanted:g} is too small for one plane a site: {needs}, besides the memory; "
            f"budget={budget:.6f} would do"
        )
    return purse.spend(budget, notes)


class _Purse:
    """What things cost in one model, and what a budget buys."""

    def __init__(
        self,
        config: AimConfig,
        sites: Sequence[Site],
        points: Sequence[Boundary],
        parameters: int,
        home: tuple[int, ...],
    ) -> None:
        self._config, self._sites, self._points = config, sites, points
        self._parameters, self._home = parameters, home
        self.costs = plane_costs(sites)
        self.unit = sum(self.costs.values())

    def allowed(self, budget: float) -> int:
        """New parameters that a budget allows."""
        return int(budget * self._parameters)

    def memory_floats(self, budget: float) -> int:
        """The memory's share, or less where the narrowest writes would exceed theirs."""
        if self._config.memory is not None:
            return self._config.memory
        by_hand = self._config.widths is not None
        if by_hand and self._config.budget == "auto":  # the rest is what they cost
            budget = DEFAULT_BUDGET
        share = int(MEMORY_SHARE * budget * self._parameters / 2)
        plane = math.prod(self._home)
        step = plane if share >= plane else 1  # a share below one plane is taken as it is
        counts = range(1, max(share // step, 1) + 1)
        if by_hand and self._config.budget == "auto":
            return max(share // step, 1) * step
        if by_hand:  # they may take all that one plane a site leaves
            limit = self.allowed(budget) - self.unit
            fit = _largest(counts, lambda n: 2 * n * step + self._least_writes(n * step), limit)
        else:
            limit = int(WRITE_SHARE * budget * self._parameters)
            fit = _largest(counts, lambda n: self._least_writes(n * step), limit)
        return max(fit, 1) * step

    def _least_writes(self, floats: int) -> int:
        return self.write_parameters(floats, LEAST_WIDTH)

    def covers(self, budget: float) -> bool:
        """Whether a budget pays for the memory's share, one plane a site and narrow writes."""
        floats = self.memory_floats(budget)
        needed = 2 * floats + self.unit + self.write_parameters(floats, LEAST_WIDTH)
        return needed <= self.allowed(budget)

    def spend(self, budget: float, notes: tuple[str, ...]) -> Sizes:
        """Choose all sizes within a budget that is large enough."""
        allowed, floats = self.allowed(budget), self.memory_floats(budget)
        if floats > MOST_FLOATS:
            raise RequestError(
                f"budget {budget:g} would buy a memory of {floats:,} floats, more than the "
                f"{MOST_FLOATS:,} there may be: choose a smaller budget, or the size with memory="
            )
        share = min(int(WRITE_SHARE * allowed), allowed - 2 * floats - self.unit)
        wider = range(LEAST_WIDTH + 1, MOST_WIDTH + 1)
        width = LEAST_WIDTH + _largest(
            wider, lambda width: self.write_parameters(floats, width), share
        )
        writes = self.write_parameters(floats, width)
        available = available_by_layer(self._sites, floats)
        caps = range(1, max(available.values()) + 1)
        cap = _largest(caps, lambda cap: self._reads(available, cap), allowed - 2 * floats - writes)
        planes = {layer: min(k, cap) for layer, k in available.items()}
        widths, write_planes = self._widths(width), self._write_planes(floats, width)
        return Sizes(floats, self._home, planes, widths, write_planes, notes)

    def _reads(self, available: Mapping[str, int], cap: int) -> int:
        return sum(min(available[layer], cap) * each for layer, each in self.costs.items())

    def write_parameters(self, floats: int, width: int) -> int:
        """Of all update blocks at one width."""
        outputs = -(-floats // math.prod(self._home))
        chosen = zip(self._points, self._write_planes(floats, width), strict=True)
        return sum(
            block_parameters(
                point.channels,
                planes,
                outputs=outputs,
                dims=len(point.spatial),
                widths=self._widths(width),
                kernel_size=self._config.kernel_size,
                norm=self._config.norm,
            )
            for point, planes in chosen
        )

    def _widths(self, width: int) -> tuple[int, ...]:
        return self._config.widths or (width,)

    def _write_planes(self, floats: int, width: int) -> tuple[int, ...]:
        """As many planes as the block is wide: it could not tell more of them apart."""
        most = self._widths(width)[0]
        return tuple(min(available_planes(floats, point.spatial), most) for point in self._points)


def home_positions(sites: Sequence[Site]) -> tuple[int, ...]:
    """The smallest spatial size of more than one position at which a convolution works, or ().

    Inputs and outputs both count: the only convolution of many transformers cuts into patches.
    """
    sizes = [size for site in sites for size in (site.spatial, site.output_size)]
    several = [size for size in sizes if math.prod(size) > 1]
    return min(several, key=lambda size: (math.prod(size), size), default=())


def available_planes(floats: int, spatial: tuple[int, ...]) -> int:
    """K, the planes that M floats give at a spatial size: ceil(M / S); M features at none."""
    return -(-floats // math.prod(spatial))


def available_by_layer(sites: Sequence[Site], floats: int) -> dict[str, int]:
    """K by layer: the least of its sites, because a layer is widened once."""
    planes: dict[str, int] = {}
    for site in sites:
        count = available_planes(floats, site.spatial)
        planes[site.layer] = min(count, planes.get(site.layer, count))
    return planes


def plane_costs(sites: Sequence[Site]) -> dict[str, int]:
    """Parameters of one more plane, by layer."""
    return {site.layer: site.out_channels * math.prod(site.kernel_size) for site in sites}


def _largest(counts: range, cost: Callable[[int], int], allowed: int) -> int:
    """How many of the rising counts cost no more than is allowed."""
    return bisect.bisect_right(counts, allowed, key=cost)


def _least_budget(purse: _Purse, start: float) -> float:
    """The least budget, in whole millionths, above one that does not do."""

    def covered(millionths: int) -> bool:
        return purse.covers(millionths / 1e6)

    first = math.floor(start * 1e6)
    step = 1
    while not covered(first + step):
        step *= 2
    candidates = range(first + 1, first + step + 1)
    return candidates[bisect.bisect_left(candidates, True, key=covered)] / 1e6
