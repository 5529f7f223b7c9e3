"""`AimConfig`: all that a user can choose, as frozen data."""

from __future__ import annotations

import fnmatch
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from aim_surgery.errors import PlanError

if TYPE_CHECKING:
    from aim_surgery.sites import Site

Filter = str | tuple[str, ...] | Callable[["Site"], bool]
Init = Literal["preserve", "fresh"]

DEFAULT_BUDGET = 0.015
ARTICLE_FLOATS = 50_176
MOST_FLOATS = 2**40
MOST_BUDGET = 1e9


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
    init: Init = "preserve"
    write: Literal["none", "sample", "batch"] = "none"
    carry: Literal["weights", "state"] = "weights"
    include: Filter = "*"
    exclude: Filter = ()

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget != "auto":
            number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
            if not number or not 0 < self.budget <= MOST_BUDGET:
                raise PlanError(
                    f"budget must be a positive ratio of new to old parameters such as 0.015 "
                    f"({MOST_BUDGET:g} at most), 'auto', or None for full reads; got "
                    f"{reprlib.repr(self.budget)}"
                )
        if self.memory is not None:
            check_memory(self.memory)
        _check_filter("include", self.include)
        _check_filter("exclude", self.exclude)
        if self.init not in get_args(Init):
            raise PlanError(f"init must be 'preserve' or 'fresh', got {self.init!r}")
        if self.write not in ("none", "sample", "batch"):
            raise PlanError(f"write must be 'none', 'sample' or 'batch', got {self.write!r}")
        if self.write != "none":
            raise PlanError(f"write={self.write!r} is not there yet: use write='none'")
        if self.carry not in ("weights", "state"):
            raise PlanError(f"carry must be 'weights' or 'state', got {self.carry!r}")
        if self.carry != "weights":
            raise PlanError(f"carry={self.carry!r} is not there yet: use carry='weights'")


def check_memory(floats: object) -> None:
    """Refuse what is no size of a memory.

    Args:
        floats: M.

    Raises:
        PlanError: It is no positive whole number, or more than any machine holds.
    """
    if not isinstance(floats, int) or isinstance(floats, bool) or floats <= 0:
        raise PlanError(
            f"memory must be a positive whole number of floats, got {reprlib.repr(floats)}"
        )
    if floats > MOST_FLOATS:
        raise PlanError(
            f"memory must be {MOST_FLOATS:,} floats at most, got {floats:,}: weight and bias of "
            f"that many need {8 * floats:,} bytes in float32"
        )


def _check_filter(name: str, chosen: object) -> None:
    globs = (chosen,) if isinstance(chosen, str) else chosen
    if callable(globs):
        return
    if not isinstance(globs, tuple | list) or not all(isinstance(glob, str) for glob in globs):
        raise PlanError(
            f"{name} must be a glob on site names such as 'features.*', a tuple of globs, or a "
            f"predicate on Site; got {chosen!r}"
        )


def matches(chosen: Filter, site: Site) -> str:
    """Whether a filter chooses a site.

    Args:
        chosen: A glob, several, or a predicate.
        site: The site; globs are tried on its name and on its layer's.

    Returns:
        The glob (or the predicate's name) that chose it, "" if none did.

    Raises:
        PlanError: The predicate raised; the message names it and the site.
    """
    if callable(chosen):
        name = getattr(chosen, "__name__", "predicate")
        try:
            return name if chosen(site) else ""
        except Exception as err:
            raise PlanError(
                f"predicate {name!r} of include or exclude failed at site {site.name!r}: "
                f"{type(err).__name__}: {err}"
            ) from err
    for pattern in (chosen,) if isinstance(chosen, str) else chosen:
        if fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.layer, pattern):
            return pattern
    return ""
