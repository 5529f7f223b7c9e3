"""Exported programs out: a model in evaluation mode, its first axes left free where they can be."""

from __future__ import annotations

import inspect
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from aim_surgery.capture import ExampleInputs
from aim_surgery.checkpoint.writing.atomic import replacing
from aim_surgery.errors import CheckpointError


def write_exported(
    gm: nn.Module, inputs: ExampleInputs | None, path: Path, metadata: Mapping[str, str]
) -> list[str]:
    """Export a model and write the program; it appears whole or not at all.

    Args:
        gm: The model with its weights; left in evaluation mode.
        inputs: What to export it with; None where the plan could not make any.
        path: The file to write or replace.
        metadata: Text by name, which goes along as `aim_surgery.json`.

    Returns:
        Notes for the user: where the first axis could not be left free.

    Raises:
        CheckpointError: There are no inputs, the exporter refuses, or the file can't be written.
    """
    if inputs is None:
        raise CheckpointError(f"{path}: the plan's example inputs can't be made for an export")
    try:
        program, notes = _free_or_fixed(gm, inputs)
    except Exception as err:  # the exporter has errors of many kinds
        raise CheckpointError(
            f"{path}: the model can't be exported: {err}; keep the .safetensors file"
        ) from err
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        patient: Any = _Patient(file)
        try:
            torch.export.save(
                program, patient, extra_files={"aim_surgery.json": json.dumps(dict(metadata))}
            )
        except Exception as err:  # outputs of a class that the exporter can't name, say
            raise CheckpointError(
                f"{path}: the program can't be stored: {err}; keep the .safetensors file"
            ) from err
        if patient.failure is not None:
            raise patient.failure
    return notes


class _Patient(io.RawIOBase):
    """Takes what is written when the disk is full as well: PyTorch's writer would abort Python.

    Attributes:
        failure: Why writing failed, to be raised afterwards.
    """

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__()
        self.file, self.failure = file, cast("OSError | None", None)

    def write(self, data: Any) -> int:
        """Write all of it, or nothing once something went wrong."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self.failure is None and done < len(view):
                done += self.file.write(view[done:]) or 0
        except OSError as err:
            self.failure = err
        return len(view)

    def writable(self) -> bool:
        """Asked by PyTorch."""
        return True

    def seekable(self) -> bool:
        """Asked by PyTorch."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """PyTorch winds back when all is written."""
        return self.file.seek(offset, whence)


def _free_or_fixed(
    gm: nn.Module, inputs: ExampleInputs
) -> tuple[torch.export.ExportedProgram, list[str]]:
    """A program for all batch sizes, or one for that of the example, with a note that says so."""
    twice, why = _of_two(inputs), "the model takes no other"
    try:
        program = _exported(gm, twice)
        if _is_free(program):
            return program, []
    except Exception as err:  # the first axis is no batch, or the model wants it to be one
        if twice is inputs:
            raise
        why = str(err).strip().partition("\n")[0]
    size = next((len(v) for v in (*inputs.args, *inputs.kwargs.values()) if _has_axes(v)), None)
    if size is None:
        return _exported(gm, inputs), []
    return _exported(gm, inputs), [f"the program takes a first axis of {size} alone: {why}"]


def _is_free(program: torch.export.ExportedProgram) -> bool:
    """Whether each input's first axis is of any size."""
    users = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in users]
    return all(isinstance(v.shape[0], torch.SymInt) for v in values if _has_axes(v))


def _exported(gm: nn.Module, inputs: ExampleInputs) -> torch.export.ExportedProgram:
    free = {0: torch.export.Dim.AUTO}
    values = dict(zip(inspect.signature(gm.forward).parameters, inputs.args, strict=False))
    values.update(inputs.kwargs)
    shapes = {n: free if _has_axes(v) else None for n, v in values.items()}
    gm.eval()  # a `train` of the model's own may return nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            gm, tuple(inputs.args), dict(inputs.kwargs), dynamic_shapes=shapes
        )


def _of_two(inputs: ExampleInputs) -> ExampleInputs:
    """Inputs of a batch of two for those of one, which the exporter would take for granted."""
    tensors = [v for v in (*inputs.args, *inputs.kwargs.values()) if _has_axes(v)]
    if not tensors or any(len(tensor) != 1 for tensor in tensors):
        return inputs
    args = tuple(torch.cat((v, v)) if _has_axes(v) else v for v in inputs.args)
    kwargs = {n: torch.cat((v, v)) if _has_axes(v) else v for n, v in inputs.kwargs.items()}
    return replace(inputs, args=args, kwargs=kwargs)


def _has_axes(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0
