"""Sharded checkpoints out: shards of a bounded size, then the index that names them.

The index is the checkpoint: shards come under names that no file has yet, and count from the moment
when the index takes the place of the old one. Until then the old index and its shards are whole.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from aim_surgery.checkpoint.reading.shards import SUFFIX, read_index
from aim_surgery.checkpoint.reading.source import Entry, with_checksum
from aim_surgery.checkpoint.writing.atomic import folder_beside, replacing
from aim_surgery.checkpoint.writing.safetensors_file import Progress, write_safetensors
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import FORMAT_KEY

SHARD_BYTES = 2_000_000_000


def write_shards(
    path: Path,
    entries: Mapping[str, Entry],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an index and its shards.

    Args:
        path: The index to write or replace, `model.safetensors.index.json`.
        entries: What to write.
        tensor: Gives the tensors; each is asked for once, in order.
        metadata: Text by name, for the index.
        progress: Told of bytes as they are written.
        shard_bytes: The most that a shard holds, unless one tensor is larger.

    Raises:
        CheckpointError: They can't be written; the old ones are still there then.
    """
    path = path.resolve() if path.is_symlink() else path  # the shards lie beside what it names
    groups = _groups(entries, shard_bytes)
    names = _free_names(path, len(groups))
    old = _old_shards(path)
    files: dict[str, str] = {}
    moved: list[Path] = []
    try:
        with folder_beside(path) as folder:
            for name, group in zip(names, groups, strict=True):
                write_safetensors(
                    folder / name,
                    {n: entries[n] for n in group},
                    tensor,
                    {"format": "pt"},
                    progress,
                )
                files.update(dict.fromkeys(group, name))
            for name in names:
                moved.append((folder / name).rename(path.parent / name))
            index = {
                "metadata": {
                    "total_size": sum(e.nbytes for e in entries.values()),
                    **with_checksum(metadata),
                },
                "weight_map": files,
            }
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(index, indent=2), encoding="utf-8")
    except BaseException:
        for shard in moved:
            shard.unlink(missing_ok=True)
        raise
    for shard in old - {path.parent / name for name in names}:
        with contextlib.suppress(OSError):
            shard.unlink()


def _groups(entries: Mapping[str, Entry], most: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if groups[-1] and filled + entry.nbytes > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += entry.nbytes
    return groups


def _free_names(path: Path, count: int) -> list[str]:
    """The usual names of shards; with a mark in them where such files are there already."""
    stem = path.name.removesuffix(SUFFIX).removesuffix(".safetensors")
    for mark in ("", f"-{secrets.token_hex(4)}"):
        names = [f"{stem}{mark}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if not any((path.parent / name).exists() for name in names):
            break
    return names


def _old_shards(path: Path) -> set[Path]:
    """The shards of an index that this package wrote: with the index, they are replaced."""
    try:
        index = read_index(path)
    except CheckpointError:
        return set()
    ours = FORMAT_KEY in index["metadata"]
    return {path.parent / file for file in index["weight_map"].values()} if ours else set()
