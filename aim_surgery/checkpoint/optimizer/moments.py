"""What an optimizer remembers of one parameter, through surgery: tensors in, tensors out.

    as the parameter     V (out, in, …)          ->  [V ; 0]      momenta, second moments, maxima
    mean over an axis    R = mean of V over d    ->  mean of [V ; 0] over d:
        d is not the axis that grows                 [R ; 0]
        d is the axis that grows, n -> n + k         R · n / (n + k)
    counters             step, RMS, …            ->  as they are

Means over an axis are Adafactor's, in four layouts:

    torch           row_var (…, out, 1),  col_var (…, 1, in)              last two axes
    transformers    exp_avg_sq_row (…, out),  exp_avg_sq_col (…, in)      last two axes
    timm            the same names; the first two axes of a convolution, where both are large
    timm, big       exp_avg_sq_r, exp_avg_sq_c, axes of size 1            two largest axes
    vision

timm chooses axes by size, and the widened weight may be the one that decides otherwise: moments are
rearranged then. On the way back, new entries go, and with them their share of the means: exact as
far as V is the product that Adafactor takes it for.

What is none of these is not known here, and refused: of it there is no telling what the new entries
should be. Copies of the parameter itself (averages, starting points) are padded with zeros like
momenta, which is right only as long as new weights start at zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aim_surgery.planning import Read
from aim_surgery.surgery.widen import split_for, widen_for

Shape = tuple[int, ...]
Entry = Mapping[str, Any]
Options = Mapping[str, Any]

_PAIRS = (
    ("row_var", "col_var"),
    ("exp_avg_sq_row", "exp_avg_sq_col"),
    ("exp_avg_res_row", "exp_avg_res_col"),
    ("exp_avg_sq_r", "exp_avg_sq_c"),
)
_PARAMETER_COPIES = frozenset(("ax", "z", "x0", "p0", "slow_buffer", "lookahead_slow_buff"))
_BY_SIZE = _PAIRS[1]
_KEEPING = ("row_var", "exp_avg_sq_r")  # their means keep an axis of size 1
_WHOLE = "exp_avg_sq"
_TIMM = "eps_scale"  # an option of timm's Adafactor alone, which looks at sizes at every step
_LEAST_SIZE = "min_dim_size_to_factor"  # of timm's Adafactors, an option of the group


class UnknownState(Exception):  # noqa: N818  # told apart and answered by `optimizer`
    """Why an entry can't be carried."""


class Means(NamedTuple):
    """A pair of means in an entry, and the axes that they are taken over."""

    row: str
    col: str
    over_row: int
    over_col: int
    keepdim: bool

    def over(self, name: str) -> int:
        """The axis of the parameter that one of them is a mean over."""
        return self.over_row if name == self.row else self.over_col

    def shape(self, name: str, shape: Shape) -> Shape:
        """What one of them is of, for a parameter's shape."""
        axis = self.over(name)
        return (*shape[:axis], *((1,) if self.keepdim else ()), *shape[axis + 1 :])

    def lifted(self, name: str, entry: Entry) -> Tensor:
        """One of them with all axes of the parameter, one of size 1."""
        return entry[name] if self.keepdim else entry[name].unsqueeze(self.over(name))

    def lowered(self, name: str, mean: Tensor) -> Tensor:
        """The inverse of `lifted`."""
        return mean if self.keepdim else mean.squeeze(self.over(name))

    def product(self, entry: Entry) -> Tensor:
        """What Adafactor takes the second moments for: row · col, by their common mean."""
        row, col = self.lifted(self.row, entry), self.lifted(self.col, entry)
        return (row * col / row.mean(self.over_col, keepdim=True)).nan_to_num(0.0)


def fits(entry: Entry, shape: Shape, options: Options) -> bool:
    """Whether an entry can be that of a parameter of this shape."""
    return not why_unknown(entry, shape, options)


def why_unknown(entry: Entry, shape: Shape, options: Options) -> str:
    """Why an entry can't be that of a parameter of this shape; "" where it can."""
    try:
        _kinds(entry, shape, options)
    except UnknownState as err:
        return str(err)
    return ""


def widen_entry(
    entry: Entry, shape: Shape, read: Read, options: Options, *, from_zero: bool = True
) -> dict[str, Any]:
    """Widen what is remembered of a parameter that the operation widens.

    Args:
        entry: Tensors and numbers by name; left unchanged.
        shape: The parameter's, before the operation.
        read: The read of its layer.
        options: Of the parameter's group.
        from_zero: Whether the parameter's new entries start at zero.

    Returns:
        A new entry.

    Raises:
        UnknownState: It holds something that is none of the kinds above, or a copy of a parameter
            whose new entries are not zero.
    """
    pairs = _kinds(entry, shape, options)
    copies = _PARAMETER_COPIES.intersection(entry)
    if copies and not from_zero:
        raise UnknownState(
            f"{min(copies)} is a copy of the parameter, whose new entries don't start at zero"
        )
    axis, groups = memory_axis(read)
    size = shape[axis] + groups * read.planes

    def along(pair: Means, name: str) -> Tensor:
        return entry[name] * (shape[axis] / size)

    def across(mean: Tensor) -> Tensor:
        each = mean.unflatten(axis, (groups, -1))
        new = each.new_zeros((*each.shape[: axis + 1], read.planes, *each.shape[axis + 2 :]))
        return torch.cat([each, new], axis + 1).flatten(axis, axis + 1)

    def whole(name: str) -> Tensor:
        return _padded(entry[name], read, _start_of(name, entry, options))

    wide = _each(entry, pairs, shape, axis, whole, along, across)
    return _rearranged(wide, pairs, (*shape[:axis], size, *shape[axis + 1 :]), options)


def narrow_entry(entry: Entry, shape: Shape, read: Read, options: Options) -> dict[str, Any]:
    """The way back of `widen_entry`.

    Args:
        entry: Tensors and numbers by name; left unchanged.
        shape: The parameter's, after the operation.
        read: The read of its layer.
        options: Of the parameter's group.

    Returns:
        A new entry.

    Raises:
        UnknownState: It holds something that is none of the kinds above.
    """
    pairs = _kinds(entry, shape, options)
    axis, groups = memory_axis(read)
    size = shape[axis] - groups * read.planes

    def along(pair: Means, name: str) -> Tensor:
        """The share of the old entries, as the other mean tells it."""
        other = pair.lifted(pair.col if name == pair.row else pair.row, entry)
        share = across(other).mean(axis, keepdim=True) / other.mean(axis, keepdim=True)
        share = torch.where(share.isfinite(), share, torch.ones_like(share))
        return pair.lowered(name, pair.lifted(name, entry) * share)

    def across(mean: Tensor) -> Tensor:
        each = mean.unflatten(axis, (groups, -1))
        return each.narrow(axis + 1, 0, size // groups).flatten(axis, axis + 1)

    own = _each(
        entry, pairs, shape, axis, lambda name: split_for(entry[name], read)[0], along, across
    )
    return _rearranged(own, pairs, (*shape[:axis], size, *shape[axis + 1 :]), options)


def _each(
    entry: Entry,
    pairs: list[Means],
    shape: Shape,
    axis: int,
    whole: Callable[[str], Tensor],
    along: Callable[[Means, str], Tensor],
    across: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """What becomes of each of an entry's values.

    Args:
        entry: The entry.
        pairs: Its means.
        shape: The parameter's, before.
        axis: The axis that changes its size.
        whole: Changes what is as the parameter.
        along: Changes a mean over that axis.
        across: Changes a mean over another, lifted to all axes.
    """
    changed: dict[str, Any] = {}
    for name, value in entry.items():
        pair = _pair_of(name, pairs)
        if pair is None:
            changed[name] = value if _counts(value, shape) else whole(name)
        elif pair.over(name) == axis:
            changed[name] = along(pair, name)
        else:
            changed[name] = pair.lowered(name, across(pair.lifted(name, entry)))
    return changed


def memory_axis(read: Read) -> tuple[int, int]:
    """The axis of a weight that grows, and in how many groups."""
    return (0, read.site.groups) if read.site.kind == "conv_transpose" else (1, 1)


def _rearranged(
    entry: dict[str, Any], pairs: list[Means], shape: Shape, options: Options
) -> dict[str, Any]:
    """Means over the axes that the optimizer takes for the new shape; none where it takes none."""
    before = {pair.row: pair for pair in pairs}
    for names in _PAIRS:
        pair = before.get(names[0])
        if pair is None and not (_TIMM in options and names == _BY_SIZE and _WHOLE in entry):
            continue
        axes = _axes_of(names, shape, options)
        if pair is not None and axes == (pair.over_row, pair.over_col):
            continue
        moments = entry.pop(_WHOLE) if pair is None else pair.product(entry)
        for name in names:
            entry.pop(name, None)
        if axes is None:
            entry[_WHOLE] = moments
            continue
        wanted = Means(*names, *axes, keepdim=names[0] in _KEEPING)
        for name in names:
            mean = moments.mean(wanted.over(name), keepdim=True)
            entry[name] = wanted.lowered(name, mean)
    return entry


# Kinds --------------------------------------------------------------------------------------


def _kinds(entry: Entry, shape: Shape, options: Options) -> list[Means]:
    """Make sure that all of an entry is known, for a parameter of this shape.

    Returns:
        Its pairs of means.

    Raises:
        UnknownState: Something in it is not.
    """
    pairs = [_means(pair, entry, shape, options) for pair in _PAIRS if pair[0] in entry]
    found = {n: pair.shape(n, shape) for pair in pairs for n in (pair.row, pair.col)}
    for name, value in entry.items():
        if name not in found and _counts(value, shape):
            continue
        if not isinstance(value, Tensor):
            raise UnknownState(f"{name} is a {type(value).__name__}")
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise UnknownState(f"{name} is a {type(value).__name__}, not a plain tensor")
        if not value.is_floating_point():
            raise UnknownState(f"{name} is of {value.dtype}")
        expected = found.get(name, shape)
        if tuple(value.shape) != expected:
            raise UnknownState(
                f"{name} is of shape {tuple(value.shape)}, expected {expected} for a parameter of "
                f"{shape}"
            )
    return pairs


def _counts(value: Any, shape: Shape) -> bool:
    """Whether a value is a number (or nothing), which has nothing to do with the shape."""
    if isinstance(value, Tensor):
        return value.ndim == 0 or (value.numel() == 1 and tuple(value.shape) != shape)
    return value is None or isinstance(value, int | float | complex | str | torch.dtype)


def _means(pair: tuple[str, str], entry: Entry, shape: Shape, options: Options) -> Means:
    axes = _axes_of(pair, shape, options)
    if axes is None or pair[1] not in entry:
        raise UnknownState(f"{pair[0]} is of no layout that is known")
    return Means(*pair, *axes, keepdim=pair[0] in _KEEPING)


def _axes_of(pair: tuple[str, str], shape: Shape, options: Options) -> tuple[int, int] | None:
    """The axes that an optimizer's own rule takes means over, for a shape: of row and of col."""
    last = len(shape)
    if last < 2:
        return None
    least = options.get(_LEAST_SIZE)
    if pair[0] == "exp_avg_sq_r":
        (size, col), (_, row) = sorted((size, axis) for axis, size in enumerate(shape))[-2:]
        return None if least is not None and size < least else (row, col)
    if least is None or pair[0] == "row_var":
        return last - 1, last - 2
    if last > 2 and shape[0] > least and shape[1] > least:
        return 1, 0
    if shape[-2] > least and shape[-1] > least:
        return last - 1, last - 2
    return None


def _start_of(name: str, entry: Entry, options: Options) -> float:
    """What an optimizer starts an entry from; zero but for two."""
    if name == "sum":  # Adagrad
        return float(options.get("initial_accumulator_value", 0))
    if name == "step_size" and "prev" in entry:  # Rprop
        return float(options.get("lr", 0))
    return 0.0


def _padded(value: Tensor, read: Read, start: float) -> Tensor:
    wide = widen_for(value, read, "preserve")
    if start:
        old = widen_for(torch.ones_like(value), read, "preserve")
        wide.masked_fill_(old == 0, start)
    return wide


def _pair_of(name: str, pairs: list[Means]) -> Means | None:
    return next((pair for pair in pairs if name in (pair.row, pair.col)), None)
