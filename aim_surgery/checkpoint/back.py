"""Operated files on their way out of this package: restored to the base, or folded for inference.

    restore_file    load -> restore -> a checkpoint of the base
    fold_file       load -> fold -> an exported program

Where no model is at hand, `restore_state_dict` and `memory_in_use` do with the file's tensors and
plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aim_surgery.capture import ExampleInputs, Inputs
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.reading.kinds import open_source
from aim_surgery.checkpoint.reading.source import Source
from aim_surgery.checkpoint.reading.torch_file import entry_of
from aim_surgery.checkpoint.save import kind_to_write, refuse_unknown, write_content
from aim_surgery.checkpoint.writing.atomic import check_target, refuse_itself
from aim_surgery.checkpoint.writing.exported_file import write_exported
from aim_surgery.checkpoint.writing.layout import keeps_layout, left_behind, restored_layout
from aim_surgery.checkpoint.writing.safetensors_file import write_safetensors
from aim_surgery.checkpoint.writing.torch_file import Placeholders
from aim_surgery.errors import CheckpointError
from aim_surgery.lowering import Restored, fold, restore
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.planning import inputs_of_plan


def restore_file(
    checkpoint: Path,
    output: Path,
    model: nn.Module | str | None = None,
    example_inputs: Inputs | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    ema: bool = False,
    trust: bool = False,
    drop_optimizer: bool = False,
) -> tuple[Restored, list[str]]:
    """Take the memory out of an operated file.

    Args:
        checkpoint: A file that `save` or `transform` wrote; left unchanged.
        output: The file to write or replace: PyTorch's (or a folder of its), of the layout that
            came in (nesting, epoch, scheduler, and the optimizer's state carried back), or a
            `.safetensors` file of weights alone, where tied ones stand under each of their names.
            None tells of a plan.
        model: See `load`.
        example_inputs: What to measure the difference on, see `restore`.
        model_args: See `load`.
        key: See `load`.
        ema: See `load`.
        trust: See `load`.
        drop_optimizer: Whether optimizer states are left out.

    Returns:
        Whether the base computes what the file's model computes, and by how much outputs change if
        not; and notes for the user. Print both.

    Raises:
        AimSurgeryError: See `load` and `restore`; the name asks for another kind of file, or the
            file can't be written.
    """
    refuse_itself(checkpoint, output)
    check_target(output)
    refuse_unknown(output)
    kind = kind_to_write(output)
    if kind not in ("torch", "dcp", "safetensors"):
        raise CheckpointError(
            f"{output}: a restored model goes into a .safetensors or a .pt file, or a .dcp folder"
        )
    gm = load(checkpoint, model, model_args=model_args, key=key, ema=ema, trust=trust)
    source = open_source(checkpoint, key=key, ema=ema, trust=trust)
    base: Any = restore(gm, example_inputs)
    if kind != "safetensors" and keeps_layout(source):
        content, notes = restored_layout(source, gm, drop_optimizer=drop_optimizer)
        write_content(output, content, Placeholders(), {})
        return base.restored, notes
    state = _as_stored(base.state_dict(), source)
    if kind == "safetensors":
        entries = {name: entry_of(value) for name, value in state.items()}
        write_safetensors(output, entries, state.__getitem__, {})
    else:
        write_content(output, state, Placeholders(), {})
    return base.restored, left_behind(source)


def fold_file(
    checkpoint: Path,
    output: Path,
    model: nn.Module | str | None = None,
    example_inputs: Inputs | None = None,
    *,
    model_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    ema: bool = False,
    trust: bool = False,
    batch_norm: bool = False,
) -> list[str]:
    """Fold the memory of an operated file away, into an exported program.

    The program needs neither this package nor a plan.

    Args:
        checkpoint: A file that `save` or `transform` wrote; left unchanged.
        output: The `.pt2` file to write or replace.
        model: See `load`.
        example_inputs: The sizes that are worked with most, see `fold`; by default those of the
            plan.
        model_args: See `load`.
        key: See `load`.
        ema: See `load`.
        trust: See `load`.
        batch_norm: Whether batch norms are merged into convolutions as well.

    Returns:
        What still reads the memory and why, and what the program doesn't take: notes for the user.

    Raises:
        AimSurgeryError: See `load` and `fold`; the name asks for another kind of file, the model
            can't be exported, or the file can't be written.
    """
    if kind_to_write(output) != "exported":
        raise CheckpointError(
            f"{output}: no plan rebuilds a folded model, so it goes into a .pt2 file, as a program"
        )
    refuse_itself(checkpoint, output)
    check_target(output)
    gm = load(checkpoint, model, model_args=model_args, key=key, ema=ema, trust=trust)
    gm.eval()  # a `train` of the model's own may return nothing
    folded: Any = fold(gm, example_inputs, batch_norm=batch_norm)
    if example_inputs is not None:
        inputs = ExampleInputs.given(example_inputs)
    else:
        plan = plan_of(folded)
        inputs = None if plan is None else inputs_of_plan(plan.inputs, folded)
    return [*folded.notes, *write_exported(folded, inputs, output, {})]


def _as_stored(state: dict[str, Any], source: Source) -> dict[str, Any]:
    """The same values in the dtypes that the file has them in, where these can hold them."""
    for name, value in state.items():
        entry = source.entries.get(name)
        stored = getattr(torch, entry.dtype) if entry else None
        if (
            stored
            and isinstance(value, Tensor)
            and stored.is_floating_point
            and stored != value.dtype
        ):
            narrow = value.to(stored)
            if torch.equal(narrow.to(value.dtype), value):
                state[name] = narrow
    return state
