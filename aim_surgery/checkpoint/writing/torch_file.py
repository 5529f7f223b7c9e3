"""PyTorch files out, as `torch.save` writes them, but tensor by tensor.

`torch.save` wants all values in memory. Here a tensor may be a placeholder, memory that is never
touched; its values are asked for when their record is written.

    archive/data.pkl     the pickle; storages by number
    archive/data/N       values of storage N, 64-byte aligned so that they can be mapped
    archive/version ...
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.writing.atomic import replacing
from aim_surgery.checkpoint.writing.safetensors_file import Progress, bytes_of
from aim_surgery.errors import CheckpointError

_ALIGNMENT = 64
_LOCAL_HEADER, _ZIP64_EXTRA, _PADDING_HEADER = 30, 20, 4  # bytes
_PADDING_ID = 0x4246  # "FB", as PyTorch marks it


class Placeholders:
    """Tensors whose values are made when they are written."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._makers: dict[int, Callable[[], Tensor]] = {}

    def add(self, shape: tuple[int, ...], dtype: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor to stand for one that `make` gives, of the same shape and dtype.

        Raises:
            CheckpointError: What `make` gives is another; raised when it is made.
        """
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
        told = entry_of(tensor)

        def checked() -> Tensor:
            value = make()
            if entry_of(value) != told:
                raise CheckpointError(f"expected {told} to write, got {entry_of(value)}")
            return value

        if tensor.numel():  # empty ones share the address of nothing
            self._makers[tensor.untyped_storage()._cdata] = checked
        self._kept.append(tensor)
        return tensor

    def make_all(self) -> None:
        """Make the values of all, one after the other, for what comes to light on the way."""
        for make in self._makers.values():
            make()

    def maker(self, storage: torch.UntypedStorage) -> Callable[[], Tensor] | None:
        """What makes the values of a storage, if it is a placeholder's."""
        return self._makers.get(storage._cdata)


def write_torch(
    path: Path,
    content: Any,
    placeholders: Placeholders,
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write what `torch.save(content, path)` would; it appears whole or not at all.

    Args:
        path: The file to write or replace.
        content: What to write.
        placeholders: Tensors in it without values.
        progress: Told of bytes as they are written.

    Raises:
        CheckpointError: It can't be written.
    """
    pickled, storages = _pickled(content)
    size = sum(storage.nbytes() for storage in storages)
    with replacing(path, size) as temporary, temporary.open("r+b") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            small = {
                "data.pkl": pickled,
                ".format_version": b"1",
                ".storage_alignment": str(_ALIGNMENT).encode(),
                "byteorder": sys.byteorder.encode(),
            }
            for name, raw in small.items():
                _write_record(archive, file, name, memoryview(raw))
            for number, storage in enumerate(storages):
                view = _values(storage, placeholders)
                _write_record(archive, file, f"data/{number}", view)
                progress(len(view))
            _write_record(archive, file, "version", memoryview(b"3\n"))
        file.truncate()


def _values(storage: torch.UntypedStorage, placeholders: Placeholders) -> memoryview:
    make = placeholders.maker(storage)
    if make is not None:
        value = make()
        return bytes_of(value, "a tensor", entry_of(value))
    flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return memoryview(flat.cpu().numpy())  # pyright: ignore[reportArgumentType]


def _pickled(content: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=2)
    pickler.dump(content)
    return buffer.getvalue(), pickler.storages


class _Pickler(pickle.Pickler):
    """Writes storages as numbers: what `torch.load` finds in the pickle of a file."""

    def __init__(self, file: BinaryIO, *, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.storages: list[torch.UntypedStorage] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, kind, count = (
                obj._untyped_storage,
                getattr(torch, obj._pickle_storage_type()),
                obj._size(),
            )
        elif isinstance(obj, torch.UntypedStorage):
            storage, kind, count = obj, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return ("storage", kind, str(number), "cpu", count)


def _write_record(archive: zipfile.ZipFile, file: BinaryIO, name: str, values: memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(values)
    zip64 = len(values) * 1.05 > zipfile.ZIP64_LIMIT
    header = _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA * zip64 + _PADDING_HEADER
    padding = -(file.tell() + header) % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as record:
        record.write(values)
