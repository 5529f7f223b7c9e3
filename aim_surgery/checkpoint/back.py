"""Operated files on their way out of this package: restored to the base, or folded for inference.

    restore_checkpoint(path, model)    load -> restore      then write_restored: weights alone
    fold_checkpoint(path, model)       load -> fold         then write_folded: an exported program

Where no model is at hand, `restore_state_dict` and `memory_in_use` do with the file's tensors and
plan. The optimizer of a run that is restored goes through `restore_optimizer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.save import layout_of
from aim_surgery.checkpoint.writing.atomic import replacing
from aim_surgery.checkpoint.writing.exported_file import write_exported
from aim_surgery.checkpoint.writing.safetensors_file import write_safetensors
from aim_surgery.errors import CheckpointError
from aim_surgery.lower import fold
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.planning import inputs_of_plan
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


def write_restored(base: nn.Module, path: Path) -> None:
    """Write a state dict as the original's own training script would: no plan, no metadata.

    Args:
        base: From `restore_checkpoint`.
        path: A `.safetensors` file, where tied weights stand under each of their names, or one of
            PyTorch's.

    Raises:
        CheckpointError: The name asks for another layout, or the file can't be written.
    """
    layout, state = layout_of(path), base.state_dict()
    if layout == "torch":
        with replacing(path) as temporary:
            torch.save(state, temporary)
    elif layout == "safetensors":
        entries = {name: entry_of(value) for name, value in state.items()}
        write_safetensors(path, entries, state.__getitem__, {})
    else:
        raise CheckpointError(f"{path}: a restored model goes into a .safetensors or a .pt file")


def write_folded(folded: Any, path: Path, example_inputs: Inputs | None = None) -> None:
    """Write a folded model as an exported program, which needs neither this package nor a plan.

    Args:
        folded: From `fold_checkpoint`.
        path: A `.pt2` file.
        example_inputs: What to export it with; by default inputs of the sizes in its plan.

    Raises:
        CheckpointError: The name asks for another layout, the model can't be exported, or the file
            can't be written.
    """
    if layout_of(path) != "exported":
        raise CheckpointError(
            f"{path}: no plan rebuilds a folded model, so it goes into a .pt2 file, as a program"
        )
    if example_inputs is not None:
        inputs = ExampleInputs.given(example_inputs)
    else:
        plan = plan_of(folded)
        inputs = None if plan is None else inputs_of_plan(plan.inputs, folded)
    write_exported(folded, inputs, path, {})
