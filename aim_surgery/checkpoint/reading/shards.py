"""Sharded checkpoints: an index, `*.index.json`, names the file of every tensor.

    {"metadata": {...}, "weight_map": {"conv.weight": "model-00001-of-00002.safetensors", ...}}

Shards are safetensors or PyTorch files. Index and shards must agree: a tensor that only one of them
knows would be lost silently.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from aim_surgery.checkpoint.reading.source import Source, checked_notes, damaged, unreadable
from aim_surgery.errors import CheckpointError, listed

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".index.json"


class Shards(Source):
    """All tensors of a sharded checkpoint.

    Attributes:
        files: The shard that each tensor is in.
    """

    def __init__(self, path: Path, open_shard: Callable[[Path], Source]) -> None:
        """Read the index and the headers of all shards.

        Args:
            path: The index.
            open_shard: Opens a shard.

        Raises:
            CheckpointError: The index is damaged, a shard is missing, or they don't agree.
        """
        self.path = path
        index = read_index(path)
        files: dict[str, str] = index["weight_map"]
        missing = sorted({f for f in files.values() if not (path.parent / f).is_file()})
        if missing:
            raise CheckpointError(
                f"{path}: shards are missing: {listed(missing)}; copy them into its folder"
            )
        self.files = files
        self._shards = {
            file: open_shard(path.parent / file) for file in dict.fromkeys(files.values())
        }
        for file, shard in self._shards.items():
            told = {name for name, its in files.items() if its == file}
            strange = sorted(told ^ set(shard.entries))
            if strange:
                raise CheckpointError(
                    f"{path}: does not agree with {file} about {listed(strange)}; copy both again"
                )
        kinds = {shard.kind for shard in self._shards.values()}
        count = len(self._shards)
        self.kind = f"{count} shard{'s' * (count > 1)}, {' and '.join(sorted(kinds))}"
        self.entries = {n: e for shard in self._shards.values() for n, e in shard.entries.items()}
        self.metadata = checked_notes(index["metadata"], path)

    def tensor(self, name: str) -> Tensor:
        """Load a tensor."""
        return self._shards[self.files[name]].tensor(name)


def read_index(path: Path) -> dict[str, dict[str, str]]:
    """Read an index: `weight_map` and `metadata`.

    Args:
        path: The index.

    Returns:
        Both, each a dict.

    Raises:
        CheckpointError: It can't be read, is no index, or names files outside its folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise unreadable(path, err) from err
    except (ValueError, RecursionError) as err:
        raise damaged(path, err) from err
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(
            f"{path}: is no index of shards; expected a 'weight_map' with a file for each tensor"
        )
    for file in sorted(set(files.values())):
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts or not PurePath(file).name:
            raise CheckpointError(f"{path}: names a shard outside its folder: {file!r}")
        if file.endswith(SUFFIX):
            raise CheckpointError(f"{path}: names an index where a shard should be: {file!r}")
    if not files:
        raise CheckpointError(f"{path}: names no tensor at all")
    metadata = index.get("metadata")
    return {"weight_map": files, "metadata": metadata if isinstance(metadata, dict) else {}}
