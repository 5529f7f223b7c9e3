"""Operated models in files: safetensors for the weights, the plan as metadata; no code, no pickle.

    load(save(gm), model) = apply(model, plan) with the weights of gm

A tensor that goes by several names is stored once; the metadata tells its other names.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from aim_surgery._version import __version__
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.read import FORMAT_KEY, load_into, read_safetensors
from aim_surgery.errors import CheckpointError
from aim_surgery.nn.aim_modules import is_folded, plan_of
from aim_surgery.nn.graph_module import AimGraphModule
from aim_surgery.operation import apply
from aim_surgery.planning import Plan

FORMAT_VERSION = "1"

_PLAN = "aim_surgery.plan"
_MODEL = "aim_surgery.model"
_ALIASES = "aim_surgery.aliases"
_LIBRARIES = ("torchvision", "timm")


def save(
    gm: nn.Module,
    path: str | Path,
    *,
    model_spec: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Write an operated model: its weights, and the plan that rebuilds it around them.

    The file appears whole or not at all: whatever fails on the way leaves the old one, or none.

    Args:
        gm: From `transform` or `apply`; left unchanged.
        path: The file to write (or replace), usually `.safetensors`.
        model_spec: Where the original model comes from ("torchvision:resnet50"), for `load`.
        model_args: The factory's keyword arguments; must be JSON.

    Raises:
        CheckpointError: The folder is missing or can't be written, the disk is full, the model
            holds something that safetensors can't, or it is folded.
    """
    path = Path(path)
    if is_folded(gm):
        raise CheckpointError(
            f"{path}: this model is folded, and no plan rebuilds it: save the model that was given "
            f"to fold, and fold what load returns; torch.export.save or torch.save keep it as it is"
        )
    plan = gm.plan if isinstance(gm, AimGraphModule) else plan_of(gm)
    if plan is None:
        raise CheckpointError(
            f"{path}: expected an operated model, from transform or apply; got a "
            f"{type(gm).__name__}"
        )
    tensors, aliases = _stored_once(gm.state_dict(), path)
    metadata = {
        FORMAT_KEY: FORMAT_VERSION,
        "aim_surgery.version": __version__,
        _PLAN: plan.to_json(),
        _ALIASES: json.dumps(aliases),
    }
    if model_spec is not None:
        metadata[_MODEL] = _model_json(model_spec, model_args or {}, path)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except Exception as err:  # SafetensorError for a full disk, others by the tensor's kind
            raise CheckpointError(
                f"{path}: could not be written ({err}); the old file, if any, is still there"
            ) from err


def load(path: str | Path, model: nn.Module | ExportedProgram | str | None = None) -> Any:
    """Read an operated model.

    Args:
        path: A file that `save` wrote.
        model: The original model or exported program (left unchanged; its weights don't matter),
            or a model spec. Without it, the spec in the file is used if it names a torchvision or
            timm model; a factory in a module or file is code, which runs only where the caller
            names it.

    Returns:
        The operated model, in the mode of the original and on its device. Built from a spec, it has
        the dtypes of the file; otherwise values are cast to the dtypes of `model`.

    Raises:
        CheckpointError: The file is not one that `save` wrote, or its weights don't fit.
        ModelSpecError: The spec can't be built.
        PlanError: The plan in the file was made for another model.
    """
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    plan = _plan_in(metadata, path)
    tensors.update({alias: tensors[name] for alias, name in _aliases_in(metadata, tensors, path)})
    if isinstance(model, nn.Module | ExportedProgram):
        gm = apply(model, plan)
    else:
        base = _build(metadata, model, path)
        _adopt_dtypes(base, tensors)
        gm = apply(base, plan, copy=False)
    load_into(gm, tensors, path)
    return gm


def check_target(path: str | Path) -> None:
    """Make sure, before long work, that a file can be written where its result will go.

    Args:
        path: The file to be written; it is not touched.

    Raises:
        CheckpointError: The folder is missing or can't be written, or `path` is no regular file.
    """
    _temporary_beside(_target(Path(path))).unlink()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: under a temporary name in the same folder, then renamed.

    Args:
        path: The file to write or replace.

    Yields:
        The temporary file to write to. It takes the place of `path` if the block ends well, and is
        removed if it doesn't.

    Raises:
        CheckpointError: The folder is missing or can't be written, or the disk is full.
    """
    target = _target(Path(path))
    temporary = _temporary_beside(target)
    try:
        yield temporary
        temporary.chmod(_mode_for(target))
        _sync(temporary)
        temporary.replace(target)
    except OSError as err:
        raise CheckpointError(f"{path}: could not be written: {err.strerror or err}") from err
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the file is there; not every system can sync a folder
        _sync(target.parent)


# Files --------------------------------------------------------------------------------------


def _target(path: Path) -> Path:
    try:
        target = path.resolve()  # the file behind a link, not the link
        if target.exists() and not target.is_file():
            what = "a folder" if target.is_dir() else "no regular file"
            raise CheckpointError(f"{path}: is {what}; give the name of a file to write")
    except (OSError, RuntimeError, ValueError) as err:
        raise CheckpointError(f"{path}: cannot be written: {err}") from err
    return target


def _temporary_beside(target: Path) -> Path:
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent
        )
    except FileNotFoundError as err:
        raise CheckpointError(f"{target}: there is no folder {target.parent}; make it") from err
    except OSError as err:
        raise CheckpointError(
            f"{target}: folder {target.parent} cannot be written: {err.strerror or err}"
        ) from err
    os.close(handle)
    return Path(name)


def _mode_for(target: Path) -> int:
    """Permissions of the old file, or of any new one; temporary files are for the owner alone."""
    if target.exists():
        return target.stat().st_mode & 0o777
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Contents -----------------------------------------------------------------------------------


def _stored_once(
    state_dict: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, contiguous and each by itself; and the names that stand for stored ones."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[Any, ...]] = set()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            what = "sparse or quantized tensor" if isinstance(value, Tensor) else type(value)
            raise CheckpointError(f"{path}: {name} is a {what}, which safetensors can't hold")
        if value.is_meta:
            raise CheckpointError(f"{path}: {name} is on the meta device and has no values to save")
        tensor = value.detach()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in first:
            aliases[name] = first[view]
            continue
        first[view] = name
        # safetensors takes no two tensors of one storage
        tensors[name] = tensor.clone() if storage in storages else tensor
        tensors[name] = tensors[name].resolve_conj().resolve_neg().contiguous()
        storages.add(storage)
    return tensors, aliases


def _model_json(spec: str, args: dict[str, Any], path: Path) -> str:
    try:
        return json.dumps({"spec": spec, "args": args})
    except (TypeError, ValueError) as err:
        raise CheckpointError(
            f"{path}: model arguments {args!r} can't be stored as JSON: {err}"
        ) from err


def _plan_in(metadata: Mapping[str, str], path: Path) -> Plan:
    version = metadata.get(FORMAT_KEY)
    if version is None or _PLAN not in metadata:
        raise CheckpointError(
            f"{path}: not an aim-surgery file: it has weights but no plan. Load it into its model "
            f"and transform that"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: written in format {version}, this version reads {FORMAT_VERSION}; update "
            f"aim-surgery"
        )
    return Plan.from_json(metadata[_PLAN])


def _aliases_in(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: Path
) -> list[tuple[str, str]]:
    aliases = _json(metadata.get(_ALIASES, "{}"), path)
    if not all(isinstance(name, str) and name in tensors for name in aliases.values()):
        raise CheckpointError(f"{path}: its list of tied tensors is damaged; save it again")
    return list(aliases.items())


def _build(metadata: Mapping[str, str], spec: str | None, path: Path) -> nn.Module:
    stored = _json(metadata.get(_MODEL, "{}"), path)
    wanted, args = spec or stored.get("spec"), stored.get("args", {})
    if not isinstance(wanted, str) or not isinstance(args, dict):
        raise CheckpointError(f"{path}: holds no model spec; pass the original model or its spec")
    if spec is None and wanted.partition(":")[0] not in _LIBRARIES:
        raise CheckpointError(
            f"{path}: its model is built by {wanted}, code that the file only names; if you trust "
            f"it, pass model={wanted!r}"
        )
    return build(wanted, **(args if wanted == stored.get("spec") else {}))


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as err:
        raise CheckpointError(f"{path}: its metadata is damaged: {err}; save it again") from err
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: its metadata is damaged: {text[:80]!r}; save it again")
    return data


def _adopt_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())  # also what is not in the file
    for name, value in model.state_dict(keep_vars=True).items():
        if name in tensors and isinstance(value, Tensor) and value.dtype != tensors[name].dtype:
            value.data = value.data.to(tensors[name].dtype)
