"""Which tensor of a file is which of the model: every name of both accounted for.

A file's names differ from the model's by what was wrapped around it when they were saved:

    in front      module.conv.weight, _orig_mod.module.conv.weight, model.conv.weight
    in between    layer1._orig_mod.0.weight, layers.0._fsdp_wrapped_module.fc.weight

A prefix may be anything, as long as all names have it. In between, only names that PyTorch's own
wrappers use are passed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aim_surgery.checkpoint.reading.source import Entry
from aim_surgery.errors import listed

if TYPE_CHECKING:
    from torch import Tensor

WRAPPERS = frozenset((
    "module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
))  # fmt: skip
QUANTIZED = "of another kind of number, quantized?"
AVERAGING_COUNT = "n_averaged"  # torch.optim.swa_utils.AveragedModel's own buffer


@dataclass(frozen=True)
class Names:
    """A file's names for the model's.

    Attributes:
        keys: The file's name for each of the model's; tied names may share one.
        prefix: What stands before all of them.
        problems: What doesn't fit, in words; empty if all does.
    """

    keys: Mapping[str, str]
    prefix: str
    problems: tuple[str, ...] = ()

    def key_of(self, name: str) -> str:
        """The file's name for a tensor of the model, or what it would be for a new one."""
        return self.keys.get(name, self.prefix + name)


def match_names(own: Mapping[str, Any], entries: Mapping[str, Entry]) -> Names:
    """Find the model's names in a file.

    Args:
        own: The model's state dict, with identical tensors under tied names.
        entries: What the file holds.

    Returns:
        The best match; look at its `problems`.
    """
    best: Names | None = None
    for prefix, keys in readings(own, entries):
        problems = _problems(own, entries, keys, prefix)
        found = Names(_with_twins(own, keys), prefix, tuple(problems))
        if not problems:
            return found
        if best is None or len(keys) > len(best.keys):
            best = found
    assert best is not None
    return best


def misfits(own: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    """What doesn't fit between a model and tensors that go by the model's names.

    Args:
        own: The model's state dict.
        entries: The tensors.

    Returns:
        A sentence for each kind of misfit; nothing where all fits.
    """
    return _problems(own, entries, {name: name for name in own if name in entries}, "")


def is_averaged(prefix: str) -> bool:
    """Whether names with this prefix may be those of an averaged model, beside its counter."""
    return prefix.startswith("module.")


def common_prefix(names: Iterable[str]) -> str:
    """The wrappers that stand before all names: `module._orig_mod.`, or nothing."""
    names = list(names)
    prefix = ""
    while names:
        first = names[0].partition(".")[0]
        if first not in WRAPPERS or not all(name.startswith(f"{first}.") for name in names):
            break
        prefix += f"{first}."
        names = [name[len(first) + 1 :] for name in names]
    return prefix


def readings(
    own: Mapping[str, Any], entries: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Ways to read a file's names.

    Args:
        own: The model's names.
        entries: The file's.

    Yields:
        What stands before all names, and by it the file's name for those of the model's that there
        are.
    """
    yield "", {name: name for name in own if name in entries}
    prefixes = dict.fromkeys(
        key[: len(key) - len(name)]
        for name, key in (
            *itertools.product(list(own)[:3], entries),
            *itertools.product(own, list(entries)[:3]),
        )
        if key.endswith(f".{name}")
    )
    for prefix in sorted(prefixes, key=len):
        yield prefix, {name: prefix + name for name in own if prefix + name in entries}
    plain = _unique(own, _unwrapped)
    wrapped = _unique(entries, _unwrapped)
    if plain and wrapped:
        keys = {name: wrapped[short] for short, name in plain.items() if short in wrapped}
        yield common_prefix(entries), keys


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unique(names: Iterable[str], short: Callable[[str], str]) -> dict[str, str] | None:
    names = list(names)
    found = {short(name): name for name in names}
    return found if len(found) == len(names) else None


def _with_twins(own: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, str]:
    """Names tied to a found one share its key where the file has none for them."""
    first = {id(own[name]): key for name, key in reversed([*keys.items()]) if _is_tensor(own[name])}
    found = dict(keys)
    for name, value in own.items():
        if name not in found and id(value) in first:
            found[name] = first[id(value)]
    return found


def _problems(
    own: Mapping[str, Any], entries: Mapping[str, Entry], keys: Mapping[str, str], prefix: str
) -> list[str]:
    there = _with_twins(own, keys)
    used = set(there.values())
    known = {AVERAGING_COUNT} if is_averaged(prefix) else set()
    shapes, kinds = [], []
    for name, key in there.items():
        expected, got = shape_of(own[name]), entries[key].shape
        if expected not in (None, got):
            shapes.append(f"{name} (expected {expected}, got {got})")
        elif _is_tensor(own[name]) and _loses_meaning(own[name], entries[key].dtype):
            kinds.append(f"{name} (expected {_dtype(own[name])}, got {entries[key].dtype})")
    found = {
        "missing": [n for n, v in own.items() if n not in there and _is_tensor(v)],
        "unexpected": [key for key in entries if key not in used and key not in known],
        "of another shape": shapes,
        QUANTIZED: kinds,
    }
    return [f"{len(names)} {what}: {listed(names)}" for what, names in found.items() if names]


def shape_of(value: Any) -> tuple[int, ...] | None:
    """A tensor's shape; None where it has none yet (lazy modules), or is none."""
    from torch.nn.parameter import is_lazy

    return tuple(value.shape) if _is_tensor(value) and not is_lazy(value) else None


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loses_meaning(tensor: Tensor, dtype: str) -> bool:
    """Whether loading would make numbers of codes: whole ones for a weight."""
    floats = dtype.startswith(("float", "bfloat", "complex"))
    return tensor.is_floating_point() and not floats
