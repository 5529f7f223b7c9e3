"""From files to what the operation takes: a model with its weights, a plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.operated import open_original
from aim_surgery.checkpoint.reading.kinds import holds_one_set, not_operated, open_source
from aim_surgery.errors import CheckpointError, PlanError
from aim_surgery.planning import Plan


def open_model(
    path: str | Path,
    spec: str | None,
    model_args: Mapping[str, Any] | None = None,
    *,
    key: str | None = None,
    ema: bool = False,
    trust: bool = False,
) -> Any:
    """Build the model that a spec names, with the weights of a checkpoint.

    Args:
        path: The checkpoint, see `open_source`, as for the last three arguments.
        spec: The model spec, see `build`; None where the file holds the model itself.
        model_args: Keyword arguments for the factory.
        key: Where the weights are.
        ema: Whether averaged weights are wanted.
        trust: Whether pickled objects may run code.

    Returns:
        The model, in the mode that its factory left it in; or an exported program.

    Raises:
        CheckpointError: The file can't be read, or its weights are not all of the model's.
        ModelSpecError: The spec can't be built.
    """
    source = not_operated(open_source(path, key=key, ema=ema, trust=trust))
    return open_original(source, spec, model_args, values=True).model


def load_counterpart(
    path: str | Path, original: Any, *, key: str | None, ema: bool, trust: bool
) -> Any:
    """Load the operated model that was made of a checkpoint's model.

    Args:
        path: What `transform` wrote.
        original: The checkpoint's model.
        key: Where its weights are in the checkpoint, and in a file of the same layout.
        ema: Whether they are averaged ones.
        trust: Whether pickled objects may run code.

    Returns:
        See `load`.

    Raises:
        AimSurgeryError: See `load`.
    """
    if holds_one_set(Path(path)):
        key, ema = None, False
    return load(path, original, key=key, ema=ema, trust=trust)


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
