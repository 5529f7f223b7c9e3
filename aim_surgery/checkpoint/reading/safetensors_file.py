"""Safetensors files: a header in JSON, then the tensors' bytes.

The safetensors library judges the header; tensors are read with plain reads, not mapped, so that a
file that is worked through tensor by tensor never takes more memory than its largest tensor, and
one that is cut short meanwhile gives an error and not a signal.

The format knows no checksums. Files of this package carry some in their metadata: eight
hexadecimal digits of CRC-32 for the header (with these digits as zeros), then eight for each tensor
in the order of their data. They are checked as the parts are read.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from safetensors import safe_open

from aim_surgery.checkpoint.reading.source import Entry, Source, damaged, unreadable
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import CRC_KEY

if TYPE_CHECKING:
    from torch import Tensor

CRC_DIGITS = 8

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def _version_of(file: IO[bytes]) -> tuple[int, ...]:
    """What changes when a file is written to, or when another takes its place."""
    told = os.fstat(file.fileno())
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


class SafetensorsFile(Source):
    """A safetensors file.

    Attributes:
        begins: Where each tensor's data begins, in bytes from the start of the file.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        """Read the header.

        Args:
            path: The file.

        Raises:
            CheckpointError: It is not, or not wholly, a safetensors file.
        """
        self.path = path
        try:
            with safe_open(path, framework="np"):  # judges header, sizes and offsets
                pass
            with path.open("rb") as file:
                self._version = _version_of(file)
                length = int.from_bytes(file.read(8), "little")
                raw = file.read(length)
            header = json.loads(raw)
        except OSError as err:
            raise unreadable(path, err) from err
        except Exception as err:
            raise damaged(path, err) from err
        self.metadata = header.pop("__metadata__", None) or {}
        order = sorted(header, key=lambda name: header[name]["data_offsets"])
        self.begins = {name: 8 + length + header[name]["data_offsets"][0] for name in order}
        self.entries = {name: self._entry(name, header[name]) for name in order}
        self._checksums = self._checked_header(raw)

    def _entry(self, name: str, info: dict[str, object]) -> Entry:
        dtype = DTYPES.get(str(info["dtype"]))
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name} is of dtype {info['dtype']}, which this package can't read"
            )
        shape = info["shape"]
        assert isinstance(shape, list)
        return Entry(tuple(shape), dtype)

    def _checked_header(self, raw: bytes) -> dict[str, int]:
        """The tensors' checksums, where there are some, once the header has passed its own."""
        digits = self.metadata.get(CRC_KEY)
        if digits is None:
            return {}
        begin = raw.find(digits.encode())
        zeros = b"0" * CRC_DIGITS
        blank = raw[:begin] + zeros + raw[begin + CRC_DIGITS :]
        try:
            found = [int(digits[i : i + CRC_DIGITS], 16) for i in range(0, len(digits), CRC_DIGITS)]
            if found[0] != zlib.crc32(blank):
                raise damaged(self.path, self._mismatch("its header"))
            return dict(zip(self.entries, found[1:], strict=True))
        except (ValueError, IndexError) as err:
            raise damaged(self.path, self._mismatch("its list of checksums")) from err

    def _mismatch(self, what: str) -> str:
        return f"{what} does not match its checksum; a tool that edits such a file drops {CRC_KEY}"

    def tensor(self, name: str) -> Tensor:
        """Load a tensor."""
        import torch

        entry = self.entries[name]
        values = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        view = memoryview(values.numpy())  # pyright: ignore[reportArgumentType]
        try:
            with self.path.open("rb", buffering=0) as file:
                same = _version_of(file) == self._version
                file.seek(self.begins[name])
                filled = 0
                while filled < entry.nbytes and (count := file.readinto(view[filled:])):
                    filled += count
        except OSError as err:
            raise unreadable(self.path, err) from err
        if not same or filled < entry.nbytes:
            raise CheckpointError(f"{self.path}: has been changed while it was read; start again")
        if name in self._checksums and zlib.crc32(view) != self._checksums[name]:
            raise damaged(self.path, self._mismatch(name))
        return values.view(getattr(torch, entry.dtype)).reshape(entry.shape)
