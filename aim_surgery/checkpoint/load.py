"""Operated models out of files: the plan rebuilds the model, and the weights go into it.

load(save(gm), model) = apply(model, plan) with the weights of gm
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from aim_surgery.capture import Inputs
from aim_surgery.checkpoint.metadata import aliases_in, form_in, json_in, plan_in
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.models.loading import load_into
from aim_surgery.checkpoint.models.skeleton import adopt_dtypes
from aim_surgery.checkpoint.operated import renamed
from aim_surgery.checkpoint.reading.kinds import kind_of, open_source, tensors_of
from aim_surgery.checkpoint.reading.names import (
    AVERAGING_COUNT,
    Names,
    is_averaged,
    match_names,
    misfits,
)
from aim_surgery.checkpoint.reading.source import Entry, Source
from aim_surgery.config import Form
from aim_surgery.errors import CheckpointError, listed
from aim_surgery.file_format import FORMAT_KEY, MODEL_KEY
from aim_surgery.operation import apply
from aim_surgery.planning import Plan
from aim_surgery.surgery.modules import AIM, widened_reads
from aim_surgery.surgery.state_dict import versioned
from aim_surgery.surgery.widen import input_size

_LIBRARIES = ("torchvision", "timm")
# Their factories' arguments that say where weights come from.
_OF_WEIGHTS = re.compile(r"weights|pretrained|checkpoint_path|cache_dir")


def load(
    path: str | Path,
    model: nn.Module | ExportedProgram | str | None = None,
    example_inputs: Inputs | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    form: Form | None = None,
    key: str | None = None,
    ema: bool = False,
    trust: bool = False,
) -> Any:
    """Read an operated model.

    Args:
        path: A file that `save` or the command line wrote.
        model: The original model or exported program (left unchanged; its weights don't matter),
            or a model spec. Without it, the spec in the file is used if it names a torchvision or
            timm model; a factory in a module or file is code, which runs only where the caller
            names it.
        example_inputs: Needed only where the plan could not hold the example inputs (dataclasses
            and other objects), or the model takes no zeros of their shapes (lengths).
        model_args: Keyword arguments for the factory that the spec names, see `build`; by default
            those in the file, less what would fetch or read other weights, where it is the file's.
        form: How sites are written, see `lower`; by default as in the model that was saved.
        key: Where in a training checkpoint the weights are, `checkpoint.model`; found by its usual
            names, or as those that were operated on, if left out.
        ema: Whether averaged weights are wanted.
        trust: Whether pickled objects beside the weights may run code.

    Returns:
        The operated model, in the mode of the original and on its device. Built from a spec, it
        has the dtypes of the file; otherwise values are cast to the dtypes of `model`.

    Warns:
        UserWarning: The file holds weights beside the operated model: a training module's loss.

    Raises:
        CheckpointError: The file is not one that `save` wrote, the model is not what it was, the
            weights don't fit, or they are of several operated models.
        ModelSpecError: The spec can't be built.
        PlanError: The plan in the file was made for another model.
        MissingInputsError: What stands for the plan's example inputs does not serve.
    """
    path = Path(path)
    if kind_of(path) == "exported":
        raise CheckpointError(
            f"{path}: is an exported program, which torch.export.load reads by itself"
        )
    source = open_source(path, key=key, ema=ema, trust=trust)
    plan = plan_in(source)
    prefix = _prefix(source, plan)
    entries = _under(prefix, source.entries)
    aliases = aliases_in(source)
    if not all(name in entries for name in aliases.values()):
        raise CheckpointError(f"{path}: its list of tied tensors is damaged; save it again")
    entries.update({alias: entries[name] for alias, name in aliases.items()})
    if isinstance(model, nn.Module | ExportedProgram):
        base, copy, what = model, True, type(model).__name__
    else:
        base, what = _build(source, model, model_args)
        copy = False
        adopt_dtypes(base, entries, Names({name: name for name in entries}, ""))
    _refuse_other(base, plan, entries, f"{path}: the model that {what} gives")
    gm = apply(base, plan, example_inputs, form=form or form_in(source), copy=copy)
    tensors = _weights(source, prefix)
    tensors.update({alias: tensors[name] for alias, name in aliases.items()})
    names = match_names(gm.state_dict(keep_vars=True), entries)
    load_into(gm, tensors if names.problems else renamed(tensors, names), path)
    left = _left_out(source, prefix)
    if left:
        warnings.warn(
            f"{path}: left out, beside the operated model under {prefix!r}: {listed(left)}",
            stacklevel=2,
        )
    return gm


def _prefix(source: Source, plan: Plan) -> str:
    """What stands before every name of the operated model: before that of its memory."""
    own = f".{AIM}.{plan.memory.name}."
    found = {n[:at] for n in source.entries if (at := f".{n}".find(own)) >= 0}
    outer = sorted(p for p in found if not any(p != o and p.startswith(o) for o in found))
    if len(outer) > 1:
        raise CheckpointError(
            f"{source.path}: holds several operated models, under {listed(map(repr, outer))}; save "
            f"the state dict of the one that is meant"
        )
    return outer[0] if outer else ""


def _under(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What goes by names with a prefix, without it."""
    return {n.removeprefix(prefix): value for n, value in named.items() if n.startswith(prefix)}


def _weights(source: Source, prefix: str) -> dict[str, Any]:
    """The operated model's own weights and module versions, in what else there may be."""
    weights: Any = tensors_of(source)
    versions = getattr(weights, "_metadata", None) or {}
    own = _under(prefix, {(f"{path}." if path else ""): told for path, told in versions.items()})
    own = {path.removesuffix("."): told for path, told in own.items() if path != f"{FORMAT_KEY}."}
    return versioned(_under(prefix, weights), own or None)


def _left_out(source: Source, prefix: str) -> list[str]:
    """Names beside the operated model: of a loss with weights, say. A counter is none."""
    known = {AVERAGING_COUNT} if is_averaged(prefix) else set()
    names = (*source.entries, *source.extras)
    return [name for name in names if not name.startswith(prefix) and name not in known]


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


def _build(
    source: Source, spec: str | None, model_args: Mapping[str, Any] | None
) -> tuple[nn.Module, str]:
    stored = json_in(source, MODEL_KEY)
    wanted, args = spec or stored.get("spec"), stored.get("args", {})
    path = source.path
    if not isinstance(wanted, str) or not isinstance(args, dict):
        raise CheckpointError(
            f"{path}: holds no model spec; pass the original model or its spec (--model)"
        )
    library = wanted.partition(":")[0]
    if spec is None and library not in _LIBRARIES:
        raise CheckpointError(
            f"{path}: its model is built by {wanted}, code that the file only names; if you trust "
            f"it, name it: --model {wanted} (in Python, model={wanted!r})"
        )
    if model_args is None:
        model_args = args if wanted == stored.get("spec") else {}
        if library in _LIBRARIES:  # a file shall fetch nothing
            model_args = {n: v for n, v in model_args.items() if not _OF_WEIGHTS.match(n)}
    return build(wanted, **model_args), wanted
