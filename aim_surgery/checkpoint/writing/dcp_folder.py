"""Folders of `torch.distributed.checkpoint` out, as one process would write them.

The folder is written under another name beside, and renamed: it is there whole or not at all. One
that is there already can't be replaced in one step, and is refused. The format has no place for
notes, so these get a file of their own, which PyTorch passes over.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from aim_surgery.checkpoint.reading.source import NOTES, with_checksum
from aim_surgery.checkpoint.writing.atomic import folder_beside, sync
from aim_surgery.checkpoint.writing.safetensors_file import Progress
from aim_surgery.checkpoint.writing.torch_file import Placeholders
from aim_surgery.errors import CheckpointError


def write_dcp(
    path: Path,
    content: Any,
    placeholders: Placeholders,
    metadata: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write what `torch.distributed.checkpoint.save(content, no_dist=True)` would.

    PyTorch's writer keeps all tensors in memory until the last one is written.

    Args:
        path: The folder to make.
        content: What to write: dicts and lists, with tensors and what can be pickled in them.
        placeholders: Tensors in it without values.
        metadata: Text by name, for the notes; none are written where it is empty.
        progress: Told of bytes as they are written.

    Raises:
        CheckpointError: It is there already, or can't be written.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: a distributed checkpoint is a dict, this one holds a "
            f"{type(content).__name__}; write a .pt file"
        )
    with folder_beside(path) as beside:
        folder = beside / "whole"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there is one process alone
                save(
                    dict(content),
                    storage_writer=FileSystemWriter(folder),
                    planner=_Planner(placeholders, progress),
                    no_dist=True,
                )
        except (ValueError, CheckpointException) as err:
            raise _reason(err, path) from err
        if metadata:
            (folder / NOTES).write_text(json.dumps(with_checksum(metadata)), encoding="utf-8")
        for file in (*folder.iterdir(), folder):
            sync(file)
        folder.rename(path)
    sync(path.resolve().parent)


def _reason(err: BaseException, path: Path) -> Exception:
    """What PyTorch's writer failed of: the system's own error, where there is one behind it."""
    if isinstance(err, CheckpointException):
        err = next(iter(err.failures.values()))[0]
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return CheckpointError(
        f"{path}: can't be written as a distributed checkpoint: {err}; write a .pt file"
    )


class _Planner(DefaultSavePlanner):
    """Makes the values of placeholders when they are written."""

    def __init__(self, placeholders: Placeholders, progress: Progress) -> None:
        super().__init__()
        self._placeholders, self._progress = placeholders, progress

    def transform_object(self, write_item: Any, object: Any) -> Any:
        """Give what is written of an item."""
        if isinstance(object, torch.Tensor):
            make = self._placeholders.maker(object.untyped_storage())
            self._progress(object.nbytes)
            return object if make is None else make()
        return super().transform_object(write_item, object)
