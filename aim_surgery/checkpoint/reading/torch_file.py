"""Files that `torch.save` wrote: a zip, before PyTorch 1.6 a bare pickle.

They are read with `weights_only=True`, so one that holds more than tensors and plain data is
refused, and the refusal names the class; `trust=True` runs what the file says. Tensors of a zip are
mapped from it: don't write into the file while they are in use.

A zip has a checksum for each record, which is compared; a bare pickle has none.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aim_surgery.checkpoint.reading.nesting import (
    Where,
    beside,
    is_state_dict,
    is_tensor,
    metadata_in,
    value_at,
    weights_in,
)
from aim_surgery.checkpoint.reading.plain_data import plain_classes
from aim_surgery.checkpoint.reading.source import REMEDY, Entry, Source
from aim_surgery.checkpoint.reading.zip_check import check_zip
from aim_surgery.errors import CheckpointError

_TRUST = "if you trust the file, read it with --trust (in Python, trust=True)"


class TorchFile(Source):
    """A state dict in a PyTorch file.

    Attributes:
        content: All that the file holds.
        where: The place of the weights in it.
        module: The model itself, where the file holds a pickled one.
    """

    def __init__(self, path: Path, kind: str, *, key: str | None, ema: bool, trust: bool) -> None:
        """Read the file; tensors of a zip stay in it.

        Args:
            path: The file.
            kind: "zip" or "pickle".
            key: See `weights_in`.
            ema: See `weights_in`.
            trust: Whether code may run that the file names.

        Raises:
            CheckpointError: It is damaged, holds objects or no weights.
        """
        self.path = path
        self.kind = "PyTorch file" if kind == "zip" else "PyTorch file of the format before 1.6"
        self.content = load_content(path, kind, trust=trust)
        matches = _is_weights if trust else is_state_dict
        self.where: Where = weights_in(self.content, path, key=key, ema=ema, matches=matches)
        self.besides = beside(self.content, self.where)
        found: Any = value_at(self.content, self.where)
        self.module: nn.Module | None = found if isinstance(found, nn.Module) else None
        weights: Any = found if self.module is None else self.module.state_dict()
        self._tensors = {name: value for name, value in weights.items() if is_tensor(value)}
        self.extras = {name: value for name, value in weights.items() if not is_tensor(value)}
        _refuse_without_values(self._tensors, path)
        self.entries = {name: entry_of(value) for name, value in self._tensors.items()}
        self.versions = getattr(weights, "_metadata", None)
        self.metadata = metadata_in(self.versions)

    def tensor(self, name: str) -> Tensor:
        """Give a tensor, mapped from the file where its format allows it."""
        return self._tensors[name].detach()


def entry_of(tensor: Tensor) -> Entry:
    """What a source tells of a tensor."""
    return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _refuse_without_values(tensors: dict[str, Any], path: Path) -> None:
    """Refuse weights that can't be widened: there is no place for a value at each index."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_meta:
            what = "on the meta device, without values" if value.is_meta else "sparse"
            raise CheckpointError(f"{path}: {name} is {what}; save it as a dense tensor")


def _is_weights(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_state_dict(value)


def load_content(path: Path, kind: str, *, trust: bool = False) -> Any:
    """Load all that a PyTorch file holds, on the CPU.

    Args:
        path: The file.
        kind: "zip" or "pickle".
        trust: Whether code may run that the file names.

    Returns:
        What was given to `torch.save`.

    Raises:
        CheckpointError: It is damaged, or holds objects.
    """
    if kind == "zip":
        check_zip(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(plain_classes()):
            warnings.simplefilter("ignore")  # what torch.load remarks on is an error below
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=kind == "zip")
    except Exception as err:  # torch.load has no error of its own: KeyError, EOFError, OSError
        raise refusal(path, err) from err


def refusal(path: Path, err: Exception) -> CheckpointError:
    """Why `torch.load` did not load a file."""
    message = str(err)
    blocked = re.search(r"GLOBAL (\S+)|but got <?(?:class )?'?([\w.]+)", message)
    if blocked:
        return CheckpointError(
            f"{path}: holds a pickled object of {blocked[1] or blocked[2]}, and unpickling it "
            f"would run code from the file; where it was written, {REMEDY}; or, {_TRUST}"
        )
    if "data.pkl" in message:
        return CheckpointError(f"{path}: is an archive without a state dict in it; {REMEDY}")
    return CheckpointError(f"{path}: cut short, damaged or not a checkpoint; copy or save it again")
