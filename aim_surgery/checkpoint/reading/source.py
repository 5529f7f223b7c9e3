"""What every kind of checkpoint is read as: names, shapes and dtypes at once, tensors one by one.

A source tells what it holds without loading it, so a file can be looked at, compared with a model
and refused for the price of its header; and a file larger than memory can be worked through. There
is one small module for each kind of container: `safetensors_file`, `shards`, `torch_file`,
`dcp_folder`, `exported_file`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import CRC_KEY, FORMAT_KEY

if TYPE_CHECKING:
    from torch import Tensor

NOTES = "aim_surgery.json"

REMEDY = "save the weights alone, torch.save(model.state_dict(), path)"

_ITEM_BYTES = {"bool": 1, "complex64": 8, "complex128": 16, "float4_e2m1fn_x2": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        shape: Its sizes.
        dtype: PyTorch's name, such as "float32".
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * item_bytes(self.dtype)


class Source:
    """Tensors by name, in a file or several.

    Attributes:
        kind: What sort of file, in words.
        path: Where.
        entries: What is there, in the file's order; nothing is loaded yet.
        metadata: Text by name that the file carries besides.
        extras: What is not a tensor but belongs to the weights (extra state of modules).
        versions: Module versions of a dict that PyTorch saved, `state_dict._metadata`.
        besides: What stands beside the weights in a training checkpoint, by its names.
    """

    kind: str
    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    extras: Mapping[str, Any] = {}  # never written to
    versions: Any = None
    besides: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Load a tensor, on the CPU.

        Raises:
            CheckpointError: The file is damaged there, or can't be read any more.
        """
        raise NotImplementedError

    @property
    def operated(self) -> bool:
        """Whether this is a model that was operated on."""
        return FORMAT_KEY in self.metadata

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


def item_bytes(dtype: str) -> int:
    """Bytes of one value of a dtype, by PyTorch's name."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype]
    digits = dtype.partition("_")[0].lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) // 8 if digits.isdigit() else 1


def unreadable(path: Path, err: BaseException) -> CheckpointError:
    """The error for a file that the system doesn't give."""
    return CheckpointError(f"{path}: cannot be read: {getattr(err, 'strerror', None) or err}")


def damaged(path: Path, what: object) -> CheckpointError:
    """The error for a file that is not what it was when it was written."""
    return CheckpointError(f"{path}: cut short or damaged ({what}); copy or save it again")


def notes_in(folder: Path) -> dict[str, str]:
    """What this package noted in a folder, beside the files of the folder's own format.

    Raises:
        CheckpointError: It is damaged.
    """
    path = folder / NOTES
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise unreadable(path, err) from err
    except (ValueError, RecursionError) as err:
        raise damaged(path, err) from err
    if not isinstance(found, dict):
        raise damaged(path, "no dict of notes")
    return checked_notes(found, path)


def with_checksum(notes: Mapping[str, str]) -> dict[str, str]:
    """Notes for a file of text, which has no checksum of its own; none where there are none."""
    return {**notes, CRC_KEY: _crc_of(notes)} if notes else {}


def checked_notes(notes: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The texts among notes, once they have passed their checksum, where there is one.

    Raises:
        CheckpointError: They have been changed.
    """
    texts = {name: text for name, text in notes.items() if isinstance(text, str)}
    if CRC_KEY in texts and texts.pop(CRC_KEY) != _crc_of(texts):
        raise damaged(
            path, f"its notes do not match their checksum; who edits them drops {CRC_KEY}"
        )
    return texts


def _crc_of(notes: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(sorted(notes.items())).encode()):08x}"
