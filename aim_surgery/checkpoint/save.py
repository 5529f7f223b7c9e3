"""Operated models in files: the weights, and the plan that rebuilds the model around them.

The name of a file tells its kind:

    *.safetensors, or no suffix    safetensors
    *.index.json                   shards of safetensors
    *.pt, *.pth, *.bin, *.ckpt,    a PyTorch file, of the layout that came in
    *.tar
    *.dcp                          a folder of torch.distributed.checkpoint, likewise
    *.pt2                          an exported program
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from aim_surgery.checkpoint.metadata import metadata_of
from aim_surgery.checkpoint.operated import Operated, stored_once
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.writing.exported_file import write_exported
from aim_surgery.checkpoint.writing.layout import CarryOptimizer, left_behind, operated_layout
from aim_surgery.checkpoint.writing.safetensors_file import Progress, write_safetensors
from aim_surgery.checkpoint.writing.shards import write_shards
from aim_surgery.checkpoint.writing.torch_file import Placeholders, write_torch
from aim_surgery.errors import CheckpointError
from aim_surgery.lowering.forms import form_of
from aim_surgery.nn.aim_modules import is_folded, plan_of, unwrapped
from aim_surgery.planning import inputs_of_plan

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")


def kind_to_write(path: Path) -> str:
    """What a file's name asks for: "shards", "exported", "torch", "dcp" or "safetensors"."""
    suffix = path.suffix.lower()
    if path.name.endswith(".index.json"):
        return "shards"
    if suffix == ".dcp":
        return "dcp"
    if suffix == ".pt2":
        return "exported"
    return "torch" if suffix in TORCH_SUFFIXES else "safetensors"


def takes_layout(path: Path) -> bool:
    """Whether what is written under a name keeps the layout that came in, optimizers and all."""
    return kind_to_write(path) in ("torch", "dcp")


def refuse_unknown(path: Path) -> None:
    """Refuse names of formats that are not written, instead of writing another one under them.

    Raises:
        CheckpointError: The suffix is none of the module's table.
    """
    if path.suffix.lower() not in ("", ".safetensors") and kind_to_write(path) == "safetensors":
        names = ", ".join((".safetensors", ".index.json", ".pt2", ".dcp", *TORCH_SUFFIXES))
        raise CheckpointError(f"{path}: {path.suffix} is no format that is written: use {names}")


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
        path: The file to write (or replace): see the table above.
        model_spec: Where the original model comes from ("torchvision:resnet50"), for `load`.
        model_args: The factory's keyword arguments; must be JSON.

    Warns:
        UserWarning: An exported program takes one batch size alone.

    Raises:
        CheckpointError: The folder is missing or can't be written, the disk is full, the model
            holds something that the format can't, or it is folded.
    """
    path, gm = Path(path), unwrapped(gm)
    if is_folded(gm):
        raise CheckpointError(
            f"{path}: this model is folded, and no plan rebuilds it: save the model that was given "
            f"to fold, and fold what load returns; torch.export.save or torch.save keep it as it is"
        )
    plan = plan_of(gm)
    if plan is None:
        raise CheckpointError(
            f"{path}: expected an operated model, from transform or apply; got a "
            f"{type(gm).__name__}"
        )
    tensors, aliases = stored_once(gm.state_dict(), path)
    without = next((name for name, value in tensors.items() if value.is_meta), None)
    if without is not None:
        raise CheckpointError(f"{path}: {without} is on the meta device and has no values to save")
    entries = {name: entry_of(value) for name, value in tensors.items()}
    operated = Operated(plan, entries, aliases, gm, lambda name, read: tensors[name])
    for note in write_operated(operated, path, model_spec=model_spec, model_args=model_args):
        warnings.warn(f"{path}: {note}", stacklevel=2)


def write_operated(
    operated: Operated,
    path: Path,
    *,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    carry_optimizer: CarryOptimizer | None = None,
    progress: Progress = lambda nbytes: None,
    dry_run: bool = False,
) -> list[str]:
    """Write an operated state dict as the kind of file that its name asks for.

    Args:
        operated: What to write.
        path: The file to write or replace.
        model_spec: See `save`.
        model_args: See `save`.
        carry_optimizer: See `operated_layout`.
        progress: Told of bytes as they are written.
        dry_run: Whether everything is made and nothing is written. (An exported program is not
            made.)

    Returns:
        Notes for the user.

    Raises:
        CheckpointError: See `save`.
    """
    refuse_unknown(path)
    kind = kind_to_write(path)
    laid_out = takes_layout(path)
    aliases = {} if laid_out else operated.aliases
    form = form_of(operated.model)
    metadata = metadata_of(operated.plan, aliases, form, path, model_spec, model_args)
    if laid_out:
        placeholders = Placeholders()
        carry = carry_optimizer
        if carry is not None and kind == "dcp":  # PyTorch's reader asks for all entries
            carry = functools.partial(carry, start_new=True)
        content, notes = operated_layout(operated, metadata, placeholders, carry)
        if dry_run:
            placeholders.make_all()
        else:
            write_content(path, content, placeholders, metadata, progress)
        return notes
    notes: list[str] = []
    if dry_run:
        for name in operated.entries:
            operated.tensor(name)
    elif kind == "exported":
        notes = _write_exported(operated, path, metadata)
    else:
        write = write_shards if kind == "shards" else write_safetensors
        write(path, operated.entries, operated.tensor, metadata, progress)
    return notes + left_behind(None if operated.original is None else operated.original.source)


def write_content(
    path: Path,
    content: Any,
    placeholders: Placeholders,
    metadata: Mapping[str, str],
    progress: Progress = lambda nbytes: None,
) -> None:
    """Write what a training script would, as a file or a folder of PyTorch's.

    Args:
        path: What to write; its name tells which.
        content: See `write_torch` and `write_dcp`, as for all arguments.
        placeholders: Tensors in it without values.
        metadata: Text by name, for a folder; in a file, it is in the content.
        progress: Told of bytes as they are written.

    Raises:
        CheckpointError: It can't be written.
    """
    if kind_to_write(path) == "dcp":
        from aim_surgery.checkpoint.writing.dcp_folder import write_dcp

        write_dcp(path, content, placeholders, metadata, progress)
    else:
        write_torch(path, content, placeholders, progress)


def _write_exported(operated: Operated, path: Path, metadata: Mapping[str, str]) -> list[str]:
    gm: Any = operated.model
    if any(value.is_meta for value in gm.state_dict().values() if isinstance(value, Tensor)):
        gm = _with_values(operated)
    return write_exported(gm, inputs_of_plan(operated.plan.inputs, gm), path, metadata)


def _with_values(operated: Operated) -> nn.Module:
    """The operated model with its weights."""
    state = {name: operated.tensor(name) for name in operated.entries}
    state.update({alias: state[name] for alias, name in operated.aliases.items()})
    gm = operated.model
    gm.load_state_dict(state, assign=True)
    left = [n for n, b in (*gm.named_buffers(), *gm.named_parameters()) if b.is_meta]
    if left:
        raise CheckpointError(
            f"{left[0]} is computed when the model is built: write another kind of file"
        )
    return gm
