"""What a file of an operated model tells besides its weights: plan, model spec, versions, form.

A tensor that goes by several names is stored once; the metadata tells its other names.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from aim_surgery._version import __version__
from aim_surgery.checkpoint.reading.source import Source
from aim_surgery.config import Form
from aim_surgery.errors import CheckpointError
from aim_surgery.file_format import (
    ALIASES_KEY,
    FILE_FORMAT,
    FORM_KEY,
    FORMAT_KEY,
    MODEL_KEY,
    PLAN_KEY,
    VERSION_KEY,
    VERSIONS_KEY,
)
from aim_surgery.planning import Plan

_LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def metadata_of(
    plan: Plan,
    aliases: Mapping[str, str],
    form: str,
    path: Path,
    model_spec: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Text by name, for a file.

    Args:
        plan: What was done.
        aliases: Further names of stored tensors.
        form: How the model's sites are written.
        path: The file, for messages.
        model_spec: Where the original model comes from.
        model_args: The factory's keyword arguments.

    Raises:
        CheckpointError: The arguments are no JSON.
    """
    found = {
        FORMAT_KEY: FILE_FORMAT,
        VERSION_KEY: __version__,
        VERSIONS_KEY: json.dumps(_versions()),
        PLAN_KEY: plan.to_json(),
        ALIASES_KEY: json.dumps(dict(aliases)),
        FORM_KEY: form,
    }
    if model_spec is not None:
        try:
            found[MODEL_KEY] = json.dumps({"spec": model_spec, "args": dict(model_args or {})})
        except (TypeError, ValueError) as err:
            raise CheckpointError(
                f"{path}: model arguments {model_args!r} can't be stored as JSON: {err}"
            ) from err
    return found


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plan_in(source: Source) -> Plan:
    """The plan in a file.

    Raises:
        CheckpointError: There is none, or it is of another format.
        PlanError: It is damaged.
    """
    version = source.metadata.get(FORMAT_KEY)
    if version is None or PLAN_KEY not in source.metadata:
        raise CheckpointError(
            f"{source.path}: not an aim-surgery file: it has weights but no plan. Load it into its "
            f"model and transform that"
        )
    if version != FILE_FORMAT:
        raise CheckpointError(
            f"{source.path}: written in format {version}, this version reads {FILE_FORMAT}; "
            f"update aim-surgery"
        )
    return Plan.from_json(source.metadata[PLAN_KEY])


def form_in(source: Source) -> Form:
    """The form that a file's model was in; "concat" where it doesn't say.

    Raises:
        CheckpointError: There is no such form.
    """
    form: Any = source.metadata.get(FORM_KEY, "concat")
    if form not in get_args(Form):
        raise CheckpointError(f"{source.path}: its model is in a form {form!r}: pass form='concat'")
    return form


def aliases_in(source: Source) -> dict[str, str]:
    """Further names of a file's tensors.

    Raises:
        CheckpointError: Their list is damaged.
    """
    aliases = json_in(source, ALIASES_KEY)
    if not all(isinstance(name, str) for name in aliases.values()):
        raise CheckpointError(f"{source.path}: its list of tied tensors is damaged; save it again")
    return aliases


def json_in(source: Source, key: str) -> dict[str, Any]:
    """A dict in a file's metadata; empty if there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    text = source.metadata.get(key, "{}")
    try:
        data = json.loads(text)
    except ValueError as err:
        raise CheckpointError(
            f"{source.path}: its metadata is damaged: {err}; save it again"
        ) from err
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{source.path}: its metadata is damaged: {text[:80]!r}; save it again"
        )
    return data
