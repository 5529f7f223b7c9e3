"""`AimConfig`: all that a user can choose, as frozen data."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from aim_surgery.errors import PlanError

if TYPE_CHECKING:
    from aim_surgery.sites import Site

Filter = str | tuple[str, ...] | Callable[["Site"], bool]

DEFAULT_BUDGET = 0.015
ARTICLE_FLOATS = 50_176


@dataclass(frozen=True)
class AimConfig:
    """What to operate and how much it may cost.

    Args:
        budget: New parameters ÷ old ones, memory and reads counted. A number is a limit: a plan
            that doesn't fit raises `PlanError` and names the budget that would do. "auto" aims at
            1.5 % and takes the least more that lets every site read one plane (MobileNets:
            depthwise layers have few parameters and many channels). None: full reads everywhere.
        memory: Size of the memory in floats; None lets the budget choose (50,176, as in the
            article, where there is no budget).
        init: "preserve" starts the new weights at zero, so that the operated model computes what
            the original computed; "fresh" draws them as the layer's own initialiser would.
        write: Update blocks; "none" is all there is yet.
        carry: What of the memory survives a batch; "weights" is all there is yet.
        include: Sites to operate: globs on qualified names, or a predicate on `Site`.
        exclude: Sites to leave out, likewise; goes before `include`.

    Raises:
        PlanError: A value that makes no sense; the message says which and what would.

    Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021.
    """

    budget: float | Literal["auto"] | None = "auto"
    memory: int | None = None
    init: Literal["preserve", "fresh"] = "preserve"
    write: Literal["none", "sample", "batch"] = "none"
    carry: Literal["weights", "state"] = "weights"
    include: Filter = "*"
    exclude: Filter = ()

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget != "auto":
            number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
            if not number or not math.isfinite(self.budget) or self.budget <= 0:
                raise PlanError(
                    f"budget must be a positive ratio of new to old parameters such as 0.015, "
                    f"'auto', or None for full reads; got {self.budget!r}"
                )
        if self.memory is not None:
            whole = isinstance(self.memory, int) and not isinstance(self.memory, bool)
            if not whole or self.memory <= 0:
                raise PlanError(
                    f"memory must be a positive whole number of floats, got {self.memory!r}"
                )
        if self.init not in ("preserve", "fresh"):
            raise PlanError(f"init must be 'preserve' or 'fresh', got {self.init!r}")
        if self.write not in ("none", "sample", "batch"):
            raise PlanError(f"write must be 'none', 'sample' or 'batch', got {self.write!r}")
        if self.write != "none":
            raise PlanError(f"write={self.write!r} is not there yet: use write='none'")
        if self.carry not in ("weights", "state"):
            raise PlanError(f"carry must be 'weights' or 'state', got {self.carry!r}")
        if self.carry != "weights":
            raise PlanError(f"carry={self.carry!r} is not there yet: use carry='weights'")


def matches(chosen: Filter, site: Site) -> str:
    """Whether a filter chooses a site.

    Args:
        chosen: A glob, several, or a predicate.
        site: The site; globs are tried on its name and on its layer's.

    Returns:
        The glob (or the predicate's name) that chose it, "" if none did.
    """
    if callable(chosen):
        return getattr(chosen, "__name__", "predicate") if chosen(site) else ""
    for pattern in (chosen,) if isinstance(chosen, str) else chosen:
        if fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.layer, pattern):
            return pattern
    return ""
