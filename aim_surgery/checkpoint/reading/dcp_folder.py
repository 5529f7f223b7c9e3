"""Folders that `torch.distributed.checkpoint` wrote: `.metadata`, and tensors in pieces.

`.metadata` is a pickle, and PyTorch's own reader unpickles it as it is, which would run what it
says. Here only the classes of the format itself are let in. Each piece is what `torch.save` wrote
of it, and is read with `weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from aim_surgery.checkpoint.reading.nesting import value_at, weights_in
from aim_surgery.checkpoint.reading.source import Entry, Source, damaged, unreadable
from aim_surgery.checkpoint.reading.zip_check import check_archive
from aim_surgery.errors import CheckpointError

METADATA = ".metadata"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PurePath", "WindowsPath", "PureWindowsPath"},
}  # fmt: skip


class DcpFolder(Source):
    """A distributed checkpoint."""

    kind = "distributed checkpoint (DCP)"

    def __init__(self, path: Path, *, key: str | None, ema: bool) -> None:
        """Read the metadata.

        Args:
            path: The folder.
            key: See `weights_in`.
            ema: See `weights_in`.

        Raises:
            CheckpointError: It is damaged, names foreign classes, or holds no weights.
        """
        self.path = path
        self._metadata = _read_metadata(path / METADATA)
        content: dict[str, Any] = {}
        names: dict[tuple[str, ...], str] = {}
        for name, place in _places(self._metadata).items():
            _put(content, place, _Piece.of(self._metadata.state_dict_metadata[name]))
            names[place] = name
        where = weights_in(content, path, key=key, ema=ema)
        weights = value_at(content, where)
        self.metadata = {}
        self.entries = {name: Entry(v.shape, v.dtype) for name, v in weights.items()}
        self._names = {name: names[(*where, name)] for name in self.entries}
        self.where, self.content = where, content

    def tensor(self, name: str) -> Tensor:
        """Load a tensor from its pieces."""
        try:
            return self._assembled(name)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as err:
            raise damaged(self.path, f"{name}: {err}") from err  # .metadata has no checksum

    def _assembled(self, name: str) -> Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        entry, fqn = self.entries[name], self._names[name]
        values = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        filled = 0
        for chunk in self._metadata.state_dict_metadata[fqn].chunks:
            info = self._metadata.storage_data.get(MetadataIndex(fqn, chunk.offsets))
            if info is None:
                raise damaged(self.path, f"a piece of {name} is in no file")
            piece = self._piece(name, info)
            region = values
            for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                region = region.narrow(axis, offset, size)
            if piece.shape != region.shape or piece.dtype != values.dtype:
                raise damaged(self.path, f"a piece of {name} is of shape {tuple(piece.shape)}")
            region.copy_(piece)
            filled += piece.numel()
        if filled != values.numel():
            raise damaged(self.path, f"{name} has {filled} values in its pieces")
        return values

    def _piece(self, name: str, info: Any) -> Tensor:
        file = PurePath(info.relative_path)
        if file.is_absolute() or ".." in file.parts:
            raise CheckpointError(f"{self.path}: names a file outside its folder: {file}")
        try:
            with (self.path / file).open("rb") as stream:
                stream.seek(info.offset)
                raw = io.BytesIO(stream.read(info.length))
            check_archive(raw, self.path / file)
            raw.seek(0)
            piece = torch.load(raw, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except OSError as err:
            raise unreadable(self.path / file, err) from err
        except Exception as err:  # BadZipFile, whatever torch.load raises
            raise damaged(self.path, f"{name} in {file}: {err}") from err
        if not isinstance(piece, Tensor):
            raise damaged(self.path, f"{name} in {file} is a {type(piece).__name__}")
        return piece


class _Piece(Entry):
    """What stands in the place of a value."""

    @classmethod
    def of(cls, told: Any) -> Any:
        if not hasattr(told, "chunks"):
            return None
        return cls(tuple(told.size), str(told.properties.dtype).removeprefix("torch."))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        raise CheckpointError(f"holds a pickled object of {module}.{name}, which would run code")


def _read_metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
        assert isinstance(found, Metadata), f"it holds a {type(found).__name__}"
        assert isinstance(found.storage_data, Mapping), "it does not say where tensors are"
        for told in found.state_dict_metadata.values():
            _Piece.of(told)
    except OSError as err:
        raise unreadable(path, err) from err
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}; save the weights alone with torch.save") from err
    except Exception as err:  # a damaged pickle can raise anything
        raise damaged(path, err) from err
    return found


def _places(metadata: Any) -> dict[str, tuple[str, ...]]:
    """Where each flat name was in the dict that was saved."""
    told = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    return {
        name: tuple(str(part) for part in told.get(name, (name,)))
        for name in metadata.state_dict_metadata
    }


def _put(content: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for part in place[:-1]:
        content = content.setdefault(part, {})
    content[place[-1]] = value
