"""Is a PyTorch zip what PyTorch wrote? Checked before anything in it is read.

PyTorch's own reader skips the checksums that its writer leaves, so a flipped bit in a weight would
go unseen. And it would unpack compressed records, which its writer never makes, but a zip bomb
does: a file may not hold more than its own size.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from aim_surgery.checkpoint.reading.source import REMEDY, damaged, unreadable
from aim_surgery.errors import CheckpointError

_CHUNK = 1 << 22
_DOS_ATTRIBUTES = 0xFF  # for a folder, PyTorch's reader gives memory that nobody has written
_LOCAL_HEADER = 30  # bytes, before the record's name and extra field


def record_names(path: Path) -> list[str]:
    """The names of a zip's records; none where its directory can't be read.

    Args:
        path: The file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, struct.error, NotImplementedError):
        return []


def is_exported(path: Path) -> bool:
    """Whether a zip is an exported program, by its name or its records."""
    ends = ("/archive_format", "serialized_exported_program.json")
    return path.suffix == ".pt2" or any(name.endswith(ends) for name in record_names(path))


def check_zip(path: Path) -> None:
    """Compare every record with its checksum.

    Args:
        path: A file that `torch.save` or `torch.export.save` wrote. Records without a checksum
            (`torch.serialization.set_crc32_options(False)`) can't be checked.

    Raises:
        CheckpointError: A record is damaged or compressed, or the records hold more than the file.
    """
    try:
        with path.open("rb") as file:
            check_archive(file, path)
    except OSError as err:
        raise unreadable(path, err) from err


def check_archive(file: IO[bytes], path: Path) -> None:
    """The same for an open file.

    Args:
        file: The zip, from its first byte to its last.
        path: Its name, for messages.

    Raises:
        CheckpointError: As `check_zip`.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if any(info.filename.endswith("/constants.pkl") for info in infos):
                raise CheckpointError(
                    f"{path}: is a TorchScript archive; expected weights, {REMEDY}"
                )
            _refuse_bomb(infos, file.seek(0, io.SEEK_END), path)
            for info in infos:
                if info.external_attr & _DOS_ATTRIBUTES:
                    raise damaged(path, f"{info.filename} is marked as no file")
                if info.CRC and _crc_of(file, info) != info.CRC:
                    raise damaged(path, f"{info.filename} does not match its checksum")
    except (zipfile.BadZipFile, ValueError, struct.error, NotImplementedError, EOFError) as err:
        raise damaged(path, err) from err


def _refuse_bomb(infos: list[zipfile.ZipInfo], size: int, path: Path) -> None:
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(info.file_size for info in infos)
    if packed or unpacked > size:
        raise CheckpointError(
            f"{path}: {packed[0] if packed else 'its content'} is compressed or overlapping "
            f"({unpacked:,} bytes in a file of {size:,}); PyTorch writes no such files, and "
            f"unpacking it might fill the memory"
        )


def _crc_of(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    file.seek(info.header_offset)
    head = file.read(_LOCAL_HEADER)
    if len(head) < _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"{info.filename} is not where the directory says")
    name, extra = struct.unpack("<HH", head[26:30])
    file.seek(info.header_offset + _LOCAL_HEADER + name + extra)
    crc, left = 0, info.file_size
    while left:
        chunk = file.read(min(left, _CHUNK))
        if not chunk:
            raise EOFError(f"the file ends within {info.filename}")
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return crc
