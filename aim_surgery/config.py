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
Per = Literal["sample", "batch"]
Mode = Literal["add", "replace"]
Norm = Literal["layer", "batch", "none"]
Activation = Literal["relu", "gelu", "silu", "sigmoid", "tanh"]
Carry = Literal["weights", "state"]
Emit = Literal["graph", "module"]
Form = Literal["concat", "split"]

DEFAULT_BUDGET = 0.015
ARTICLE_FLOATS = 50_176
MOST_FLOATS = 2**40
MOST_BUDGET = 1e9


@dataclass(frozen=True)
class AimConfig:
    """What to operate and how much it may cost.

    Args:
        budget: New parameters ÷ old ones, memory, reads and writes counted. A number is a limit: a
            plan that doesn't fit raises `PlanError` and names the budget that would do. "auto" aims
            at 1.5 % and takes the least more that lets every site read one plane (MobileNets:
            depthwise layers have few parameters and many channels). None: full reads everywhere.
        memory: Size of the memory in floats; None lets the budget choose (50,176, as in the
            article, where there is no budget).
        init: "preserve" starts the new weights of the reads at zero, so that the operated model
            computes what the original computed; "fresh" draws them as the layer's own initialiser
            would.
        write: Update blocks, after the first block of each stage. "sample": each sample writes
            into its own copy of the memory. "batch": the features are averaged over the batch, the
            memory stays one; evaluation uses the running average. "none": the memory is read only.
        carry: What of the memory survives a batch. "weights": what the optimizer leaves in the
            memory layer. "state": besides, a buffer with the moving average of what was written.
        write_at: Write points instead of those that are found: names of modules (or nodes of the
            graph) after which to write, such as "layer1.0", or globs.
        mode: "add" adds what a block gives to the memory, "replace" puts it in its place.
        widths: Channels of each convolution (linear layer) of a block; None: one layer, as wide as
            the budget allows, 16 at most.
        kernel_size: Of the blocks' convolutions, odd; pointwise by default.
        norm: Normalisation in the blocks: "layer" (of one sample: over channels and positions of a
            map, over the features of a token), "batch" or "none".
        activation: Of the blocks: "relu", "gelu", "silu", "sigmoid" or "tanh".
        momentum: Share of the newest batch in running averages and in the carried state.
        include: Sites to operate: globs on qualified names, or a predicate on `Site`.
        exclude: Sites to leave out, likewise; goes before `include`.

    Raises:
        PlanError: A value that makes no sense; the message says which and what would.

    Source: Lunkad, "Memory for Artificial Intelligence", Towards AI, 2021. Its blocks have
        `widths=(16, 16, 32), kernel_size=3, norm="batch", activation="sigmoid", mode="replace"`.
    Deviation: pointwise blocks, because 3x3 ones on wide features would use up the budget with two
        channels; layer norm, because a batch norm sees other samples, and one value in a batch of
        one; adding, because each write then keeps what the ones before it wrote.
    """

    budget: float | Literal["auto"] | None = "auto"
    memory: int | None = None
    init: Init = "preserve"
    write: Literal["none", "sample", "batch"] = "sample"
    carry: Carry = "weights"
    write_at: str | tuple[str, ...] | None = None
    mode: Mode = "add"
    widths: tuple[int, ...] | None = None
    kernel_size: int = 1
    norm: Norm = "layer"
    activation: Activation = "relu"
    momentum: float = 0.1
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
                raise PlanError(f"{name} must be {listed}, got {getattr(self, name)!r}")
        if self.carry == "state" and self.write == "none":
            raise PlanError(
                "carry='state' keeps what was written, and write='none' writes nothing: choose "
                "write='sample' or 'batch', or carry='weights'"
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """The options of update blocks."""
        if self.write_at is not None:
            _check_names("write_at", self.write_at)
            if not self.write_at:
                raise PlanError("write_at names no write point: use write='none', or leave it out")
            if self.write == "none":
                raise PlanError("write_at names write points, and write='none' has no writes")
        if self.widths is not None:
            check_widths(self.widths)
        if not _is_count(self.kernel_size) or self.kernel_size % 2 == 0:
            raise PlanError(
                f"kernel_size must be an odd number such as 1 or 3, got {self.kernel_size!r}"
            )
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        if not number or not 0 < self.momentum <= 1:
            raise PlanError(f"momentum must be in (0, 1], got {self.momentum!r}")


_CHOICES = {
    "init": get_args(Init),
    "write": ("sample", "batch", "none"),
    "carry": get_args(Carry),
    "mode": get_args(Mode),
    "norm": get_args(Norm),
    "activation": get_args(Activation),
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_widths(widths: object) -> None:
    """Refuse what are no widths of an update block.

    Args:
        widths: Channels of each of its layers.

    Raises:
        PlanError: They are no positive whole numbers, or none.
    """
    if not isinstance(widths, tuple) or not widths or not all(map(_is_count, widths)):
        raise PlanError(
            f"widths must be a tuple of the channels of each layer such as (16, 16, 32), got "
            f"{reprlib.repr(widths)}"
        )


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
    if not callable(chosen):
        _check_names(name, chosen, "or a predicate on Site")


def _check_names(name: str, chosen: object, otherwise: str = "") -> None:
    globs = (chosen,) if isinstance(chosen, str) else chosen
    if not isinstance(globs, tuple | list) or not all(isinstance(glob, str) for glob in globs):
        raise PlanError(
            f"{name} must be a glob on names such as 'features.*' or a tuple of globs"
            f"{otherwise and ', ' + otherwise}; got {chosen!r}"
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
