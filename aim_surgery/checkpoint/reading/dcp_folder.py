"""Folders that `torch.distributed.checkpoint` wrote: `.metadata`, and tensors in pieces.

`.metadata` is a pickle, and PyTorch's own reader unpickles it as it is, which would run what it
says. Here only the classes of the format itself are let in. Each piece is what `torch.save` wrote
of it, and is read with `weights_only=True`. What this package notes (the plan) stands in a file of
its own beside them.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from aim_surgery.checkpoint.reading.nesting import (
    beside,
    find_all,
    is_optimizer_state,
    is_tensor,
    value_at,
    weights_in,
)
from aim_surgery.checkpoint.reading.plain_data import plain_classes
from aim_surgery.checkpoint.reading.source import Entry, Source, damaged, notes_in, unreadable
from aim_surgery.checkpoint.reading.torch_file import refusal
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

    def __init__(self, path: Path, *, key: str | None, ema: bool, trust: bool) -> None:
        """Read the metadata.

        Args:
            path: The folder.
            key: See `weights_in`.
            ema: See `weights_in`.
            trust: Whether pickled objects beside the tensors may run code; those of the format
                itself never may.

        Raises:
            CheckpointError: It is damaged, names foreign classes, or holds no weights.
        """
        self.path, self._trust = path, trust
        self._metadata = _read_metadata(path / METADATA)
        told = self._metadata.state_dict_metadata
        names = {place: name for name, place in _places(self._metadata).items()}
        outline = self._nested({name: _Piece.of(value) for name, value in told.items()})
        self.where = weights_in(outline, path, key=key, ema=ema)
        self.besides = beside(outline, self.where)
        weights = value_at(outline, self.where)
        self.entries = {n: Entry(v.shape, v.dtype) for n, v in weights.items() if is_tensor(v)}
        self._names = {name: names[(*self.where, name)] for name in self.entries}
        self.extras = self._extras(told, [name for name in weights if name not in self.entries])
        self.metadata = notes_in(path)

    def _extras(self, told: Mapping[str, Any], wanted: list[str]) -> dict[str, Any]:
        """What the weights hold besides tensors; dicts and lists were written in parts."""
        if not wanted:
            return {}
        depth = len(self.where)
        parts = {
            name: self._value(name, told[name])
            for name, place in _places(self._metadata).items()
            if place[:depth] == self.where and place[depth : depth + 1] and place[depth] in wanted
        }
        found = value_at(self._nested(parts), self.where)
        return {name: found[name] for name in wanted}

    @functools.cached_property
    def content(self) -> Any:
        """All that the folder holds, in memory.

        Raises:
            CheckpointError: It is damaged, or holds pickled objects.
        """
        told = self._metadata.state_dict_metadata
        content = self._nested({name: self._value(name, told[name]) for name in told})
        for where in find_all(content, is_optimizer_state):
            _number_parameters(value_at(content, where))
        return content

    def _nested(self, flat: dict[str, Any]) -> Any:
        """The dicts and lists that were saved, of their parts."""
        from torch.distributed.checkpoint._nested_dict import unflatten_state_dict

        places = self._metadata.planner_data
        if not isinstance(places, Mapping):
            return flat
        try:
            if any(
                type(part) is int and part >= len(flat) for path in places.values() for part in path
            ):
                raise damaged(self.path / METADATA, "a list has more items than there are")
            return unflatten_state_dict(flat, {name: places.get(name, (name,)) for name in flat})
        except (AttributeError, TypeError, ValueError, IndexError, KeyError) as err:
            raise damaged(self.path / METADATA, err) from err

    def _value(self, name: str, told: Any) -> Any:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        if hasattr(told, "chunks"):
            return self._checked(name, name, _Piece.of(told))
        info = self._metadata.storage_data.get(MetadataIndex(name))
        if info is None:
            raise damaged(self.path, f"{name} is in no file")
        return self._loaded(name, info)

    def tensor(self, name: str) -> Tensor:
        """Load a tensor from its pieces."""
        return self._checked(name, self._names[name], self.entries[name])

    def _checked(self, name: str, fqn: str, entry: Entry) -> Tensor:
        try:
            return self._assembled(name, fqn, entry)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as err:
            raise damaged(self.path, f"{name}: {err}") from err  # .metadata has no checksum

    def _assembled(self, name: str, fqn: str, entry: Entry) -> Tensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        values = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="cpu")
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
        piece = self._loaded(name, info)
        if not isinstance(piece, Tensor):
            raise damaged(self.path, f"{name} is a {type(piece).__name__}")
        return piece

    def _loaded(self, name: str, info: Any) -> Any:
        file = PurePath(info.relative_path)
        if file.is_absolute() or ".." in file.parts:
            raise CheckpointError(f"{self.path}: names a file outside its folder: {file}")
        try:
            with (self.path / file).open("rb") as stream:
                stream.seek(info.offset)
                raw = io.BytesIO(stream.read(info.length))
            check_archive(raw, self.path / file)
            raw.seek(0)
            with torch.serialization.safe_globals(plain_classes()):
                return torch.load(raw, map_location="cpu", weights_only=not self._trust)
        except CheckpointError:
            raise
        except OSError as err:
            raise unreadable(self.path / file, err) from err
        except Exception as err:  # BadZipFile, whatever torch.load raises
            found = refusal(self.path / file, err)
            if "pickled object" in str(found):
                raise CheckpointError(f"{found} ({name})") from err
            raise damaged(self.path, f"{name} in {file}: {err}") from err


class _Piece(Entry):
    """What stands in the place of a value."""

    @classmethod
    def of(cls, told: Any) -> Any:
        if not hasattr(told, "chunks"):
            return None
        return cls(tuple(told.size), str(told.properties.dtype).removeprefix("torch."))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # as Python 3.13 wrote it
            module = "pathlib"
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


def _number_parameters(state: dict[str, Any]) -> None:
    """The format makes text of all keys; an optimizer's numbers are numbers again."""
    keys = {key for group in state["param_groups"] for key in group["params"]}
    numbers = {str(key): key for key in keys if isinstance(key, int)}
    state["state"] = {numbers.get(key, key): entry for key, entry in state["state"].items()}
