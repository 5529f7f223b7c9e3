"""Checkpoint files in: tensors by name, read without running anything that the file says.

The format is told from the first bytes, not from the file's name: safetensors, or PyTorch's own
(a zip, before 1.6 a bare pickle). Pickles are read with `weights_only=True`, so a file that holds
more than tensors and plain containers is refused, and the refusal names the class.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from aim_surgery.errors import CheckpointError

FORMAT_KEY = "aim_surgery.format"  # metadata of files that hold an operated model

_NESTED = ("state_dict", "model", "model_state_dict")
_REMEDY = "save the weights alone, torch.save(model.state_dict(), path)"
_LISTED = 10


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, on the CPU.

    Args:
        path: A `.pt`, `.pth`, `.bin` or `.safetensors` file that holds a state dict, or a training
            checkpoint with one under `state_dict`, `model` or `model_state_dict`.

    Returns:
        Tensors by name, mapped from the file where its format allows it: don't write into the file
        while they are in use. A dict that PyTorch saved keeps its `_metadata` (module versions).

    Raises:
        CheckpointError: There is no such file, it is empty, cut short or no checkpoint; it holds a
            pickled module or other objects; or what it holds is not a state dict.
    """
    path = Path(path)
    if _kind_of(path) == "safetensors":
        tensors, metadata = read_safetensors(path)
        if FORMAT_KEY in metadata:
            raise CheckpointError(
                f"{path}: holds a model that was operated on already; expected the original "
                f"model's weights (aim_surgery.load reads operated models)"
            )
        return tensors
    return _state_dict_in(_load_pickle(path), path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU, and the metadata of the file.

    Raises:
        CheckpointError: There is no such file, or it is not (or not wholly) a safetensors file.
    """
    kind = _kind_of(path)
    if kind != "safetensors":
        raise CheckpointError(f"{path}: expected a safetensors file, this is a PyTorch {kind} file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError as err:
        raise _unreadable(path, err) from err
    except Exception as err:
        raise CheckpointError(
            f"{path}: cut short or damaged ({err}); copy or save it again"
        ) from err


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Load weights into a model, every key accounted for.

    A tied tensor may come under one of its names or all of them. Values are cast to the model's
    dtypes. Loading hooks of the model (conversions of older layouts) have their say.

    Args:
        model: The model; changed in place if everything fits, else left unchanged.
        state_dict: From `read_state_dict`.
        path: Where it comes from, for the message.

    Raises:
        CheckpointError: Keys are missing, left over or of another shape; the message lists them.
            Or tied names come with different values.
    """
    own = model.state_dict(keep_vars=True)
    given = _with_tied_names(own, state_dict, path)
    metadata = getattr(state_dict, "_metadata", None)
    problems = _problems(own, given)
    if not problems:
        # without module versions (safetensors), a layout that fits exactly is the current one
        _load(model, given, metadata or getattr(own, "_metadata", None), path)
        return
    before = {name: _clone(value) for name, value in own.items()}
    try:  # an older layout that the model's own hooks convert
        _load(model, given, metadata, path)
    except CheckpointError as err:
        with torch.no_grad():
            for name, value in before.items():
                if isinstance(value, Tensor) and not is_lazy(value):
                    own[name].copy_(value)
        raise CheckpointError(
            f"{path}: does not fit {type(model).__name__}: {'; '.join(problems)}. Check the model "
            f"and its arguments"
        ) from err


# Reading ------------------------------------------------------------------------------------


def _kind_of(path: Path) -> str:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder; expected a checkpoint file in it")
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        with path.open("rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as err:
        raise _unreadable(path, err) from err
    if not head:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    if path.suffix == ".safetensors" or head[8:] == b"{":  # after its length, the JSON header
        return "safetensors"
    if head.startswith(b"PK"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(
        f"{path}: not a checkpoint; expected a state dict written by torch.save or safetensors"
    )


def _load_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch.load remarks on is an error below
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=_kind_of(path) == "zip"
            )
    except Exception as err:  # torch.load has no error of its own: KeyError, EOFError, OSError
        raise _refusal(path, err) from err


def _refusal(path: Path, err: Exception) -> CheckpointError:
    message = str(err)
    blocked = re.search(r"GLOBAL (\S+)|but got <?(?:class )?'?([\w.]+)", message)
    if blocked:
        return CheckpointError(
            f"{path}: holds a pickled object of {blocked[1] or blocked[2]}, and unpickling it "
            f"would run code from the file; where it was written, {_REMEDY}"
        )
    if "TorchScript" in message:
        return CheckpointError(f"{path}: is a TorchScript archive; expected weights, {_REMEDY}")
    if "data.pkl" in message:
        return CheckpointError(f"{path}: is an archive without a state dict in it; {_REMEDY}")
    return CheckpointError(f"{path}: cut short, damaged or not a checkpoint; copy or save it again")


def _unreadable(path: Path, err: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {getattr(err, 'strerror', None) or err}")


def _state_dict_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict that a file's content is, or the only one that it nests."""
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a state dict; {_REMEDY}"
        )
    nested = [name for name in _NESTED if isinstance(content.get(name), dict)]
    if len(nested) > 1:
        raise CheckpointError(f"{path}: holds a dict under {' and '.join(nested)}; {_REMEDY}")
    where = f" under {nested[0]!r}" if nested else ""
    found = content[nested[0]] if nested else content
    strangers = [
        f"{name!r}: {type(value).__name__}"
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers or not found:
        what = f"not only tensors ({_listed(strangers, 5)})" if strangers else "nothing"
        raise CheckpointError(f"{path}: the dict{where} holds {what}; {_REMEDY}")
    return found


# Loading ------------------------------------------------------------------------------------


def _with_tied_names(
    own: Mapping[str, Any], given: Mapping[str, Tensor], path: str | Path
) -> dict[str, Tensor]:
    """Fill in names that are tied to given ones; a tensor can't take two values."""
    first: dict[int, str] = {}
    filled = dict(given)
    for name in sorted(own, key=lambda name: name not in given):
        if not isinstance(own[name], Tensor):
            continue
        twin = first.setdefault(id(own[name]), name)
        if twin not in given:
            continue
        if name not in given:
            filled[name] = given[twin]
        elif not _same(given[twin], given[name]):
            raise CheckpointError(
                f"{path}: {twin} and {name} are one tensor in the model, and have different "
                f"values in the file; untie them in the model or make them equal"
            )
    return filled


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is itself


def _problems(own: Mapping[str, Any], given: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    misshaped = [
        f"{name} (expected {_shape(own[name])}, got {_shape(value)})"
        for name, value in given.items()
        if name in own and _shape(own[name]) not in (None, _shape(value))
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    return [f"{len(n)} {kind}: {_listed(n, _LISTED)}" for kind, n in kinds.items() if n]


def _shape(value: Any) -> tuple[int, ...] | None:
    return None if not isinstance(value, Tensor) or is_lazy(value) else tuple(value.shape)


def _load(model: nn.Module, given: dict[str, Tensor], metadata: Any, path: str | Path) -> None:
    state = dict(given)
    if metadata is not None:
        state = _Versioned(given)
        state._metadata = metadata
    try:
        model.load_state_dict(state)
    except Exception as err:  # load_state_dict's own, or whatever a loading hook raises
        raise CheckpointError(f"{path}: does not load into {type(model).__name__}: {err}") from err


class _Versioned(dict[str, Tensor]):
    """A state dict with the versions of the modules that wrote it, where PyTorch looks for them."""

    _metadata: Any


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and not is_lazy(value) else value


def _listed(names: Iterable[str], limit: int) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
