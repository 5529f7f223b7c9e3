"""Safetensors files out, tensor by tensor, with checksums: see `safetensors_file` for their place.

The library's own writer takes all tensors at once, which is as much memory as the file is long.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aim_surgery.checkpoint.reading.safetensors_file import CRC_DIGITS, CRC_KEY, DTYPES
from aim_surgery.checkpoint.reading.source import Entry, item_bytes
from aim_surgery.checkpoint.writing.atomic import replacing
from aim_surgery.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int], None]


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write a safetensors file; it appears whole or not at all.

    Args:
        path: The file to write or replace.
        entries: What to write.
        tensor: Gives the tensors; each is asked for once.
        metadata: Text by name.
        progress: Told of bytes as they are written.

    Raises:
        CheckpointError: A dtype or name that the format doesn't know, or it can't be written.
    """
    order = sorted(entries, key=lambda name: -item_bytes(entries[name].dtype))  # aligned, so
    blank = "0" * CRC_DIGITS * (len(order) + 1)
    header: dict[str, Any] = {"__metadata__": {**metadata, CRC_KEY: blank}}
    begin = 0
    for name in order:
        entry = entries[name]
        if entry.dtype not in _NAMES or name == "__metadata__":
            raise CheckpointError(
                f"{path}: could not be written: {name} is of dtype {entry.dtype}, and safetensors "
                f"has no such dtype or name; write a .pt file"
            )
        end = begin + entry.nbytes
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    at = raw.index(f'"{CRC_KEY}":"'.encode()) + len(CRC_KEY) + 4
    checksums: list[int] = []
    with (
        replacing(path, 8 + len(raw) + begin) as temporary,
        temporary.open("r+b") as file,
        ThreadPoolExecutor(1) as beside,  # sums up what is being written: both leave Python alone
    ):
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            view = bytes_of(tensor(name), name, entries[name])
            checksum = beside.submit(zlib.crc32, view)
            file.write(view)
            checksums.append(checksum.result())
            progress(len(view))
        digits = "".join(f"{checksum:08x}" for checksum in checksums).encode()
        filled = raw[: at + CRC_DIGITS] + digits + raw[at + CRC_DIGITS + len(digits) :]
        file.seek(8 + at)
        file.write(f"{zlib.crc32(filled):08x}".encode() + digits)


def bytes_of(tensor: Tensor, name: str, entry: Entry) -> memoryview:
    """A tensor's values as bytes, in the order of its indices.

    Raises:
        CheckpointError: It is not what was told of it.
    """
    got = Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if got != entry:
        raise CheckpointError(f"{name}: expected {entry}, got {got}")
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    return memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
