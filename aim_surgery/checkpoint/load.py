"""Operated models out of files: the plan rebuilds the model, and the weights go into it.

load(save(gm), model) = apply(model, plan) with the weights of gm
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from aim_surgery.checkpoint.metadata import aliases_in, form_in, json_in, plan_in
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.loading import load_into
from aim_surgery.checkpoint.models.skeleton import adopt_dtypes
from aim_surgery.checkpoint.operated import renamed
from aim_surgery.checkpoint.reading.kinds import kind_of, open_source, tensors_of
from aim_surgery.checkpoint.reading.names import Names, match_names, misfits
from aim_surgery.checkpoint.reading.source import Entry, Source
from aim_surgery.config import Form
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import MODEL_KEY
from aim_surgery.operation import apply
from aim_surgery.planning import Plan
from aim_surgery.surgery.modules import AIM, widened_reads
from aim_surgery.surgery.widen import input_size

_LIBRARIES = ("torchvision", "timm")


def load(
    path: str | Path,
    model: nn.Module | ExportedProgram | str | None = None,
    *,
    form: Form | None = None,
    key: str | None = None,
    ema: bool = False,
) -> Any:
    """Read an operated model.

    Args:
        path: A file that `save` or the command line wrote.
        model: The original model or exported program (left unchanged; its weights don't matter),
            or a model spec. Without it, the spec in the file is used if it names a torchvision or
            timm model; a factory in a module or file is code, which runs only where the caller
            names it.
        form: How sites are written, see `lower`; by default as in the model that was saved.
        key: Where in a training checkpoint the weights are, `checkpoint.model`; found by its usual
            names, or as those that were operated on, if left out.
        ema: Whether averaged weights are wanted.

    Returns:
        The operated model, in the mode of the original and on its device. Built from a spec, it
        has the dtypes of the file; otherwise values are cast to the dtypes of `model`.

    Raises:
        CheckpointError: The file is not one that `save` wrote, the model is not what it was, or the
            weights don't fit.
        ModelSpecError: The spec can't be built.
        PlanError: The plan in the file was made for another model.
    """
    path = Path(path)
    if kind_of(path) == "exported":
        raise CheckpointError(
            f"{path}: is an exported program, which torch.export.load reads by itself"
        )
    source = open_source(path, key=key, ema=ema)
    plan = plan_in(source)
    prefix = _prefix(source, plan)
    entries = {
        name.removeprefix(prefix): entry
        for name, entry in source.entries.items()
        if name.startswith(prefix)
    }
    aliases = aliases_in(source)
    if not all(name in entries for name in aliases.values()):
        raise CheckpointError(f"{path}: its list of tied tensors is damaged; save it again")
    entries.update({alias: entries[name] for alias, name in aliases.items()})
    if isinstance(model, nn.Module | ExportedProgram):
        base, copy, what = model, True, type(model).__name__
    else:
        base, what = _build(source, model)
        copy = False
        adopt_dtypes(base, entries, Names({name: name for name in entries}, ""))
    _refuse_other(base, plan, entries, f"{path}: the model that {what} gives")
    gm = apply(base, plan, form=form or form_in(source), copy=copy)
    tensors = renamed(tensors_of(source), Names({}, prefix))
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    names = match_names(gm.state_dict(keep_vars=True), entries)
    load_into(gm, tensors if names.problems else renamed(tensors, names), path)
    return gm


def _prefix(source: Source, plan: Plan) -> str:
    """What stands before every name in a file: before that of the memory."""
    own = f"{AIM}.{plan.memory.name}."
    return next((n[: n.index(own)] for n in source.entries if own in n), "")


def _refuse_other(base: Any, plan: Plan, entries: Mapping[str, Entry], what: str) -> None:
    """Refuse a model that is not the one that was operated on, and tell the difference."""
    if not isinstance(base, nn.Module):
        return  # an exported program is what it was
    narrow = {name: e for name, e in entries.items() if not name.startswith(f"{AIM}.")}
    for name, read in widened_reads(plan).items():
        if name not in narrow:
            continue
        (axis, wide), (_, own) = (input_size(read, operated=when) for when in (True, False))
        sizes = list(narrow[name].shape)
        if axis < len(sizes):
            sizes[axis] -= wide - own
        narrow[name] = Entry(tuple(sizes), narrow[name].dtype)
    problems = misfits(base.state_dict(keep_vars=True), narrow)
    if any("unexpected" not in problem for problem in problems):
        raise CheckpointError(
            f"{what} is not the one that was operated on: {'; '.join(problems)}. Check the "
            f"factory, its arguments and the versions of its library"
        )


def _build(source: Source, spec: str | None) -> tuple[nn.Module, str]:
    stored = json_in(source, MODEL_KEY)
    wanted, args = spec or stored.get("spec"), stored.get("args", {})
    path = source.path
    if not isinstance(wanted, str) or not isinstance(args, dict):
        raise CheckpointError(f"{path}: holds no model spec; pass the original model or its spec")
    if spec is None and wanted.partition(":")[0] not in _LIBRARIES:
        raise CheckpointError(
            f"{path}: its model is built by {wanted}, code that the file only names; if you trust "
            f"it, pass model={wanted!r}"
        )
    return build(wanted, **(args if wanted == stored.get("spec") else {})), wanted
