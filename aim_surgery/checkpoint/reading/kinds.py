"""Checkpoints in: what kind a file or folder is, told from its content, and a source for it.

safetensors         a JSON header                       SafetensorsFile
*.index.json        shards of the other kinds           Shards
a zip, a pickle     torch.save                          TorchFile
a zip with a graph  torch.export.save                   ExportedFile
a folder            torch.distributed.checkpoint        DcpFolder
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from aim_surgery.checkpoint.reading.safetensors_file import SafetensorsFile
from aim_surgery.checkpoint.reading.shards import SUFFIX as INDEX_SUFFIX
from aim_surgery.checkpoint.reading.shards import Shards, read_index
from aim_surgery.checkpoint.reading.source import Source, unreadable
from aim_surgery.checkpoint.reading.zip_check import is_exported
from aim_surgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


ALONE = "model.safetensors"  # in folders that transformers and diffusers write
_ONE_SET = ("safetensors", "index", "exported")


def open_source(
    path: str | Path, *, key: str | None = None, ema: bool = False, trust: bool = False
) -> Source:
    """Open a checkpoint; nothing is loaded that can wait.

    Args:
        path: A file, an index of shards, or a folder that holds one index, a distributed
            checkpoint or `model.safetensors`.
        key: Where in a training checkpoint the weights are, `checkpoint.model`; found by its usual
            names if left out.
        ema: Whether averaged weights are wanted.
        trust: Whether pickled objects may run code.

    Returns:
        The source.

    Raises:
        CheckpointError: There is no such file, it is empty, cut short or no checkpoint; it holds
            pickled objects; or it is not clear which of its weights are meant.
    """
    path, kind = _located(Path(path))
    nested = key is not None or ema
    if kind in _ONE_SET and nested:
        raise CheckpointError(f"{path}: holds one set of weights; leave out --key and --ema")
    match kind:
        case "safetensors":
            return SafetensorsFile(path)
        case "index":
            return Shards(path, functools.partial(open_source, trust=trust))
        case "dcp":
            from aim_surgery.checkpoint.reading.dcp_folder import DcpFolder

            return DcpFolder(path, key=key, ema=ema, trust=trust)
        case "exported":
            from aim_surgery.checkpoint.reading.exported_file import ExportedFile

            return ExportedFile(path, trust=trust)
    from aim_surgery.checkpoint.reading.torch_file import TorchFile

    return TorchFile(path, kind, key=key, ema=ema, trust=trust)


def read_state_dict(
    path: str | Path, *, key: str | None = None, ema: bool = False, trust: bool = False
) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint that is to be operated on, on the CPU.

    Args:
        path: See `open_source`, as for all arguments.
        key: Where the weights are.
        ema: Whether averaged weights are wanted.
        trust: Whether pickled objects may run code.

    Returns:
        Tensors by name. A dict that PyTorch saved keeps its `_metadata` (module versions).

    Raises:
        CheckpointError: See `open_source`; or it was operated on already.
    """
    source = not_operated(open_source(path, key=key, ema=ema, trust=trust))
    return tensors_of(source)


def tensors_of(source: Source) -> dict[str, Tensor]:
    """Load all tensors of a source, with what belongs to them."""
    from aim_surgery.surgery.state_dict import versioned

    tensors = {name: source.tensor(name) for name in source.entries}
    return versioned({**tensors, **source.extras}, source.versions)


def not_operated(source: Source) -> Source:
    """A source, if it is of an original model.

    Raises:
        CheckpointError: It was operated on already.
    """
    if source.operated:
        raise CheckpointError(
            f"{source.path}: holds a model that was operated on already; expected the original "
            f"model's weights (aim_surgery.load reads operated models)"
        )
    return source


def kind_of(path: Path) -> str:
    """What a path holds: "folder", "dcp", "index", "safetensors", "exported", "zip" or "pickle".

    Raises:
        CheckpointError: There is nothing, or nothing that is a checkpoint.
    """
    try:
        if path.is_dir():
            return "dcp" if (path / ".metadata").is_file() else "folder"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        with path.open("rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as err:
        raise unreadable(path, err) from err
    if not head:
        raise CheckpointError(f"{path}: the file is empty; copy or save it again")
    if path.name.endswith(INDEX_SUFFIX):
        return "index"
    if path.suffix == ".safetensors" or head[8:] == b"{":  # after its length, the JSON header
        return "safetensors"
    if head.startswith(b"PK"):
        return "exported" if is_exported(path) else "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(
        f"{path}: not a checkpoint; expected a state dict written by torch.save or safetensors"
    )


def holds_one_set(path: Path) -> bool:
    """Whether a checkpoint's kind has no place for several sets of weights."""
    return _located(path)[1] in _ONE_SET


def files_of(path: Path) -> list[Path]:
    """All files that a checkpoint is in; itself alone where it is none that can be read."""
    try:
        path, kind = _located(path)
        if kind == "dcp":
            return sorted(path.rglob("*"))
        shards = read_index(path)["weight_map"].values() if kind == "index" else ()
        return [path, *(path.parent / file for file in dict.fromkeys(shards))]
    except CheckpointError:  # who reads it is told
        return [path]


def _located(path: Path) -> tuple[Path, str]:
    """A checkpoint's own path, where a folder was named, and its kind."""
    kind = kind_of(path)
    if kind != "folder":
        return path, kind
    path = _index_in(path)
    return path, kind_of(path)


def _index_in(folder: Path) -> Path:
    try:
        found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    except OSError as err:
        raise unreadable(folder, err) from err
    alone = folder / ALONE
    if not found and alone.is_file():
        return alone
    if len(found) != 1:
        there = f"{len(found)} indexes of shards" if found else f"no index of shards or {ALONE}"
        raise CheckpointError(
            f"{folder}: is a folder with {there} in it; expected a checkpoint file"
        )
    return found[0]
