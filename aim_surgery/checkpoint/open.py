"""From files to what the operation takes: a model with its weights, a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.read import load_into, read_state_dict
from aim_surgery.errors import CheckpointError, PlanError
from aim_surgery.planning import Plan


def open_model(
    path: str | Path, spec: str, model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build the model that a spec names, with the weights of a checkpoint.

    Args:
        path: The checkpoint, see `read_state_dict`.
        spec: The model spec, see `build`.
        model_args: Keyword arguments for the factory.

    Returns:
        The model, in the mode that its factory left it in.

    Raises:
        CheckpointError: The file can't be read, or its weights are not all of the model's.
        ModelSpecError: The spec can't be built.
    """
    state_dict = read_state_dict(path)
    model = build(spec, **(model_args or {}))
    load_into(model, state_dict, path)
    return model


def open_plan(path: str | Path) -> Plan:
    """Read a plan that `Plan.to_json` wrote.

    Args:
        path: The file.

    Returns:
        The plan.

    Raises:
        CheckpointError: The file can't be read.
        PlanError: It holds no plan.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        reason = getattr(err, "strerror", None) or err
        raise CheckpointError(f"{path}: cannot be read as a plan: {reason}") from err
    try:
        return Plan.from_json(text)
    except PlanError as err:
        raise PlanError(f"{path}: {err}") from err
