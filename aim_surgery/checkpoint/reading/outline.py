"""What a PyTorch file holds, without torch and without running anything that the file says.

A pickle is a small program: it names functions and calls them. Here every name stands for something
harmless: PyTorch's own for the outline of a tensor, all others for an empty object that only knows
its name. So a file that `torch.load` would refuse can be looked at all the same.
"""

from __future__ import annotations

import collections
import functools
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aim_surgery.checkpoint.reading.plain_data import is_plain, pointer_dtype
from aim_surgery.checkpoint.reading.source import Entry, damaged, unreadable
from aim_surgery.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}  # fmt: skip
# torch.export's numbers for dtypes
_EXPORTED_DTYPES = dict(enumerate((
    "unknown", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64",
    "complex32", "complex64", "complex128", "bool", "bfloat16",
)))  # fmt: skip
_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *args: {},
    ("torch", "Size"): tuple,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("__builtin__", "set"): set,
}


@dataclass(frozen=True)
class Dtype:
    """A dtype by its name."""

    name: str


class Foreign:
    """An object of a class that is not PyTorch's own: its name, and what was to be put into it."""

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Foreign:
        """What a function would do; nothing."""
        return Foreign(self.name, *args)

    def append(self, item: Any) -> None:
        """What a list would do; nothing."""

    def extend(self, items: Any) -> None:
        """What a list would do; nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a dict would do; nothing."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Outliner(pickle.Unpickler):
    """Unpickles outlines.

    Attributes:
        foreign: Names of the classes and functions that `weights_only=True` might refuse.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.foreign: dict[str, None] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Something harmless for a name."""
        if (module, name) in _PLAIN:
            if name == "defaultdict":  # which PyTorch's reader refuses to fill
                self.foreign["collections.defaultdict"] = None
            return _PLAIN[module, name]
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return {
                "_rebuild_tensor_v2": _tensor,
                "_rebuild_tensor": _tensor,
                "_rebuild_tensor_v3": _tensor_of_dtype,
                "_rebuild_parameter": lambda data, *rest: data,
            }.get(name, functools.partial(Foreign, f"{module}.{name}"))
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return Dtype(_STORAGES[name])
        if module == "torch" and {name, name.rstrip("0123456789_")} & _DTYPE_STEMS:
            return Dtype(name)
        ours = module.partition(".")[0] == "torch" and not module.startswith("torch.nn")
        if not ours and not is_plain(f"{module}.{name}"):
            self.foreign[f"{module}.{name}"] = None
        if (module, name) == ("numpy", "dtype"):
            return self._dtype
        return _class_of(f"{module}.{name}")

    def _dtype(self, *args: Any) -> Foreign:
        found = pointer_dtype(args)
        if found is not None:
            self.foreign[found] = None
        return Foreign("numpy.dtype", *args)

    def persistent_load(self, pid: Any) -> Any:
        """The dtype of a storage."""
        return pid[1] if isinstance(pid, tuple) and len(pid) > 1 else None


_DTYPE_STEMS = {"float", "bfloat", "int", "uint", "bool", "complex", "float8_e4m3fn",
    "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}  # fmt: skip


@functools.cache
def _class_of(name: str) -> type[Foreign]:
    """A class to make empty objects of: pickles also make them past `__init__`."""

    class Named(Foreign):
        called = name

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(name, *args)

        def __new__(cls, *args: Any, **kwargs: Any) -> Named:
            made = object.__new__(cls)
            Foreign.__init__(made, name, *args)
            return made

    return Named


def _tensor(storage: Any, offset: Any, size: Any, *rest: Any) -> Entry:
    return _entry(size, storage)


def _entry(size: Any, dtype: Any) -> Entry:
    shape = tuple(size)
    if not all(isinstance(count, int) and count >= 0 for count in shape):
        raise ValueError(f"a tensor of shape {shape!r}")
    return Entry(shape, dtype.name if isinstance(dtype, Dtype) else "unknown")


def _tensor_of_dtype(storage: Any, offset: Any, size: Any, *rest: Any) -> Entry:
    dtype = next((value for value in rest if isinstance(value, Dtype)), storage)
    return _tensor(dtype, offset, size)


def outline_of(path: Path, kind: str) -> tuple[Any, list[str]]:
    """What a PyTorch file holds: nested dicts, with an `Entry` for each tensor.

    Args:
        path: The file.
        kind: "zip" or "pickle".

    Returns:
        The outline, and the names of foreign classes.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        if kind == "zip":
            return _outline_of_zip(path)
        with path.open("rb") as file:
            for _ in range(3):  # magic number, protocol, what the system is like
                Outliner(file).load()
            return _outlined(file)
    except OSError as err:
        raise unreadable(path, err) from err
    except CheckpointError:
        raise
    except Exception as err:  # a damaged pickle raises anything
        raise damaged(path, err) from err


def _outline_of_zip(path: Path) -> tuple[Any, list[str]]:
    with zipfile.ZipFile(path) as archive:
        info = next((i for i in archive.infolist() if i.filename.endswith("/data.pkl")), None)
        if info is None:
            raise CheckpointError(f"{path}: is an archive without a state dict in it")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: is compressed, which PyTorch's files never are")
        with archive.open(info) as file:
            return _outlined(file)


def _outlined(file: IO[bytes]) -> tuple[Any, list[str]]:
    outliner = Outliner(file)
    return outliner.load(), list(outliner.foreign)


def outline_of_dcp(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a distributed checkpoint holds, likewise.

    Args:
        path: Its `.metadata`.

    Returns:
        The outline, and the names of foreign classes.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        with path.open("rb") as file:
            found, foreign = _outlined(file)
        told, places = found.state["state_dict_metadata"], found.state.get("planner_data") or {}
        content: dict[str, Any] = {}
        for name, value in told.items():
            *parents, last = places.get(name, (name,))
            inner = content
            for parent in parents:
                inner = inner.setdefault(str(parent), {})
            inner[str(last)] = _dcp_entry(value)
    except OSError as err:
        raise unreadable(path, err) from err
    except Exception as err:
        raise damaged(path, err) from err
    return content, foreign


def _dcp_entry(told: Any) -> Any:
    state = told.state if isinstance(told.state, Mapping) else {}
    if "size" not in state:
        return Foreign("an object, not read")
    return _entry(state["size"], state["properties"].state[0])


def outline_of_exported(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The weights of an exported program, and what this package noted down in it.

    Args:
        path: The file.

    Returns:
        Outlines by name; text by name.

    Raises:
        CheckpointError: It is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            end = "weights_config.json"
            config = next((n for n in names if n.endswith(end)), None)
            note = next((n for n in names if n.endswith("extra/aim_surgery.json")), None)
            weights = json.loads(archive.read(config))["config"] if config else {}
            metadata = json.loads(archive.read(note)) if note else {}
        entries = {name: _exported_entry(told["tensor_meta"]) for name, told in weights.items()}
    except OSError as err:
        raise unreadable(path, err) from err
    except Exception as err:
        raise damaged(path, err) from err
    return entries, metadata


def _exported_entry(meta: Mapping[str, Any]) -> Entry:
    shape = tuple(int(size["as_int"]) for size in meta["sizes"])
    return _entry(shape, Dtype(_EXPORTED_DTYPES.get(meta["dtype"], "unknown")))
