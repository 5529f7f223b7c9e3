"""Operated files on their way out of this package: restored to the base, or folded for inference.

    restore_checkpoint(path, model)    load -> restore      what `aim-surgery restore` does
    fold_checkpoint(path, model)       load -> fold         what `aim-surgery fold` does

Both give a model in memory; what is written of it, and how, is the business of `write`. Where no
model is at hand, `restore_state_dict` and `memory_in_use` do with the file's tensors and plan. The
optimizer of a run that is restored goes through `restore_optimizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from aim_surgery.capture import Inputs
from aim_surgery.checkpoint.write import load
from aim_surgery.lower import fold
from aim_surgery.surgery.restore import restore


def restore_checkpoint(
    path: str | Path,
    model: nn.Module | str | None = None,
    example_inputs: Inputs | None = None,
) -> Any:
    """Read an operated file, and take the memory out again.

    Args:
        path: A file that `save` or `transform` wrote.
        model: See `load`.
        example_inputs: What to measure the difference on, see `restore`.

    Returns:
        The base model, whose state dict loads into the original; its `restored` says whether it is
        what the file's model computes, and by how much outputs change if not. Print that.

    Raises:
        AimSurgeryError: See `load` and `restore`.
    """
    return restore(load(path, model), example_inputs)


def fold_checkpoint(
    path: str | Path,
    model: nn.Module | str | None = None,
    example_inputs: Inputs | None = None,
    *,
    batch_norm: bool = False,
) -> Any:
    """Read an operated file, and fold its memory away for inference.

    Args:
        path: A file that `save` or `transform` wrote.
        model: See `load`.
        example_inputs: The sizes that are worked with most, see `fold`.
        batch_norm: Whether batch norms are merged into convolutions as well.

    Returns:
        The folded model in evaluation mode, to be saved or exported; its `notes` say what still
        reads the memory, and why.

    Raises:
        AimSurgeryError: See `load` and `fold`.
    """
    return fold(load(path, model).eval(), example_inputs, batch_norm=batch_norm)
