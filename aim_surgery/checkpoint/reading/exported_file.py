"""Exported programs, `.pt2`: graph and weights in one zip, so no model spec is needed.

`torch.export.load` unpickles parts of the file without `weights_only`, loads compiled code where
there is some, and evaluates text of the graph as Python. Here parts that can only be unpickled
freely are refused, and text that could be more than a graph's (`program_text`); PyTorch is told to
read the others with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aim_surgery.checkpoint.reading.program_text import code_in
from aim_surgery.checkpoint.reading.source import Source, damaged
from aim_surgery.checkpoint.reading.torch_file import entry_of, refusal
from aim_surgery.checkpoint.reading.zip_check import check_zip, record_names
from aim_surgery.errors import CheckpointError

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# records that hold compiled code, script objects or plain pickles
_FOREIGN = ("/aotinductor/", "/custom_obj_", "/opaque_obj_")


class ExportedFile(Source):
    """An exported program.

    Attributes:
        program: The program.
    """

    kind = "exported program"

    def __init__(self, path: Path, *, trust: bool = False) -> None:
        """Load the program.

        Args:
            path: The file.
            trust: Whether code may run that the file holds.

        Raises:
            CheckpointError: It is damaged, or holds code.
        """
        self.path, self.metadata = path, {}
        check_zip(path)
        foreign = [
            name for name in record_names(path) if any(part in f"/{name}" for part in _FOREIGN)
        ]
        if foreign and not trust:
            raise CheckpointError(
                f"{path}: holds {foreign[0]}, code or an object that loading would run; export the "
                f"model without it; or, if you trust the file, read it with --trust"
            )
        self._refuse_code(trust)
        try:
            with _weights_only(not trust), warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                self.program = torch.export.load(path)
        except Exception as err:  # whatever a damaged graph raises
            found = refusal(path, err)
            raise (found if "pickled object" in str(found) else damaged(path, err)) from err
        self._tensors = dict(self.program.state_dict)
        self.entries = {name: entry_of(value) for name, value in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Give a tensor."""
        return self._tensors[name].detach()

    def _refuse_code(self, trust: bool) -> None:
        try:
            code = None if trust else code_in(self.path)
        except Exception as err:  # no record that torch.export wrote
            raise damaged(self.path, err) from err
        if code is not None:
            raise CheckpointError(
                f"{self.path}: {code} is no text that torch.export writes for a graph, and loading "
                f"could run it; if you trust the file, read it with --trust"
            )


@contextlib.contextmanager
def _weights_only(forced: bool) -> Iterator[None]:
    before = os.environ.get(_FORCE)
    if forced:
        os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if forced:
            del os.environ[_FORCE]
            if before is not None:
                os.environ[_FORCE] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export logs on its way to an error."""
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
