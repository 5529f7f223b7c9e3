"""From checkpoint to checkpoint: one file, or many of the same model.

Of many, each is by itself: one that fails changes nothing about the others.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aim_surgery.capture import Inputs
from aim_surgery.checkpoint.operated import operate_checkpoint
from aim_surgery.checkpoint.optimizer import carry_optimizer
from aim_surgery.checkpoint.reading.kinds import ALONE, kind_of, not_operated, open_source
from aim_surgery.checkpoint.reading.shards import SUFFIX as INDEX_SUFFIX
from aim_surgery.checkpoint.reading.shards import read_index
from aim_surgery.checkpoint.save import (
    TORCH_SUFFIXES,
    kind_to_write,
    refuse_unknown,
    write_operated,
)
from aim_surgery.checkpoint.writing.atomic import check_target, refuse_itself
from aim_surgery.checkpoint.writing.layout import CarryOptimizer
from aim_surgery.checkpoint.writing.safetensors_file import Progress
from aim_surgery.config import AimConfig
from aim_surgery.errors import CheckpointError
from aim_surgery.operation import Wanted
from aim_surgery.planning import Plan

Format = Literal["safetensors", "shards", "pt", "dcp", "pt2"]
_SUFFIXES = {"shards": INDEX_SUFFIX} | {f: f".{f}" for f in ("safetensors", "pt", "dcp", "pt2")}
_CHECKPOINTS = (*TORCH_SUFFIXES, ".safetensors", ".pt2")
# What the trainers of transformers and accelerate put beside the weights.
_BESIDE = re.compile(
    r"(training_args|optimizer(_\d+)?|scheduler(_\d+)?|scaler|sampler(_\d+)?)\.(bin|pt)"
    r"|rng_state(_\d+)?\.pth"
)


@dataclass(frozen=True)
class Reading:
    """How to read a checkpoint: see `open_source`."""

    key: str | None = None
    ema: bool = False
    trust: bool = False


@dataclass(frozen=True)
class Operation:
    """What to do to each checkpoint: see `transform`, and `operated_layout` for the last."""

    spec: str | None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    example: Inputs | None = None
    config: AimConfig | None = None
    plan: Plan | None = None
    emit: Wanted = "auto"
    carry_optimizer: CarryOptimizer | None = carry_optimizer


@dataclass(frozen=True)
class Outcome:
    """What came of one checkpoint.

    Attributes:
        checkpoint: What was read.
        output: What was written, or would be.
        plan: What was done.
        nbytes: Bytes of tensors.
        notes: What a user should know.
        not_finite: Tensors that hold NaN or infinities; they are kept as they are.
        seconds: How long it took.
        written: False for a dry run.
    """

    checkpoint: Path
    output: Path
    plan: Plan
    nbytes: int
    notes: tuple[str, ...]
    not_finite: tuple[str, ...]
    seconds: float
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plan = self.plan
        return {
            "checkpoint": str(self.checkpoint),
            "output": str(self.output),
            "ok": True,
            "written": self.written,
            "bytes": self.nbytes,
            "base_parameters": plan.base_parameters,
            "total_parameters": plan.total_parameters,
            "memory_floats": plan.memory.floats,
            "reads": len(plan.reads),
            "writes": [write.point.name for write in plan.writes],
            "notes": list(self.notes),
            "not_finite": list(self.not_finite),
            "seconds": round(self.seconds, 3),
        }


def transform_checkpoint(
    checkpoint: Path,
    output: Path,
    operation: Operation,
    reading: Reading = Reading(),  # frozen
    *,
    dry_run: bool = False,
    progress: Callable[[int], Progress] = lambda total: lambda nbytes: None,
) -> Outcome:
    """Operate on one checkpoint.

    Args:
        checkpoint: What to read; left unchanged.
        output: What to write or replace; its name tells the kind of file.
        operation: What to do.
        reading: How to read.
        dry_run: Whether everything is done but the writing.
        progress: Told of the bytes to write, gives what is told of bytes as they are written.

    Returns:
        What came of it.

    Raises:
        AimSurgeryError: It failed; the output is as it was.
    """
    start = time.perf_counter()
    refuse_itself(checkpoint, output)
    check_target(output)
    refuse_unknown(output)
    source = not_operated(open_source(checkpoint, **vars(reading)))
    operated = operate_checkpoint(
        source,
        operation.spec,
        operation.model_args,
        example=operation.example,
        config=operation.config,
        plan=operation.plan,
        emit=operation.emit,
    )
    nbytes = sum(entry.nbytes for entry in operated.entries.values())
    notes = write_operated(
        operated,
        output,
        model_spec=operation.spec,
        model_args=operation.model_args,
        carry_optimizer=operation.carry_optimizer,
        progress=progress(nbytes),
        dry_run=dry_run,
    )
    seconds = time.perf_counter() - start
    return Outcome(
        checkpoint,
        output,
        operated.plan,
        nbytes,
        tuple(notes),
        tuple(dict.fromkeys(operated.odd)),
        seconds,
        not dry_run,
    )


def several(checkpoints: Iterable[Path]) -> list[Path] | None:
    """The checkpoints that are meant, where these are several; None for a single one.

    Args:
        checkpoints: Files, or folders: all checkpoints in them, unless a folder is one itself.

    Raises:
        CheckpointError: A folder holds none.
    """
    named = list(checkpoints)
    if len(named) == 1 and not _is_collection(named[0]):
        return None
    found: list[Path] = []
    for path in named:
        found += _checkpoints_in(path) if _is_collection(path) else [path]
    return found


def _is_collection(path: Path) -> bool:
    """Whether a path is a folder of checkpoints, and not one checkpoint in a folder."""
    if not path.is_dir() or kind_of(path) == "dcp":
        return False
    found = _checkpoints_in(path)
    first = found[0].name
    return len(found) > 1 or not (first.endswith(INDEX_SUFFIX) or first == ALONE)


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder: files by their suffix, indexes in the place of their shards.

    Of folders in it, distributed checkpoints; of files, none that trainers put beside weights.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as err:
        raise CheckpointError(f"{folder}: cannot be read: {err.strerror}") from err
    indexes = [entry for entry in entries if entry.name.endswith(INDEX_SUFFIX)]
    shards = {
        folder / file for index in indexes for file in read_index(index)["weight_map"].values()
    }
    files = [
        entry
        for entry in entries
        if (kind_of(entry) == "dcp" if entry.is_dir() else entry.suffix.lower() in _CHECKPOINTS)
        and entry not in shards
        and not _BESIDE.fullmatch(entry.name)
        and not entry.name.startswith(".")
    ]
    found = sorted([*indexes, *files])
    if not found:
        raise CheckpointError(
            f"{folder}: is a folder without checkpoints ({', '.join(_CHECKPOINTS)}) in it"
        )
    return found


def outputs_in(folder: Path, checkpoints: Iterable[Path], form: Format) -> dict[Path, Path]:
    """Where the results for checkpoints go.

    Args:
        folder: The folder for them; made if it is missing.
        checkpoints: The checkpoints.
        form: The kind of file to write.

    Returns:
        The file to write for each checkpoint.

    Raises:
        CheckpointError: Two would go to the same file, or the folder can't be made.
    """
    found: dict[Path, Path] = {}
    for checkpoint in checkpoints:
        name = Path(checkpoint.name.removesuffix(INDEX_SUFFIX))
        stem = name.stem if name.suffix.lower() in (*_CHECKPOINTS, ".dcp") else name.name
        target = folder / (stem + _SUFFIXES[form])
        twin = next((c for c, t in found.items() if t == target), None)
        if twin is not None:
            raise CheckpointError(
                f"{twin} and {checkpoint} would both be written to {target}; transform them apart"
            )
        found[checkpoint] = target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(f"{folder}: no folder can be made here: {err.strerror}") from err
    return found


def output_for(checkpoint: Path, output: str, form: Format | None = None) -> Path:
    """The file that an output means for one checkpoint: itself, or one in it if it is a folder.

    Args:
        checkpoint: The checkpoint.
        output: What stands after -o.
        form: The kind of file to write into a folder; if left out, that of the checkpoint.

    Raises:
        CheckpointError: The folder can't be made.
    """
    if not names_a_folder(output):
        return Path(output)
    alike: dict[str, Format] = {"torch": "pt", "dcp": "dcp"}
    form = form or alike.get(kind_to_write(checkpoint), "safetensors")
    return outputs_in(Path(output), [checkpoint], form)[checkpoint]


def names_a_folder(output: str) -> bool:
    """Whether an output is meant as a folder to write into: it is one, or ends as one."""
    path = Path(output)
    if kind_to_write(path) == "dcp":
        return False
    return output.endswith(("/", os.sep)) or path.is_dir()


def names_a_file(output: str) -> bool:
    """Whether an output is meant as a file and not as a folder."""
    if names_a_folder(output):
        return False
    known, path = (*_CHECKPOINTS, ".json"), Path(output)
    return path.suffix.lower() in known or kind_to_write(path) != "safetensors" or path.is_file()
