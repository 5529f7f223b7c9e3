"""The demo: a real network in a checkpoint on disk, through the commands as one would type them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import typer

from aim_surgery.errors import CheckpointError

SPEC = "torchvision:resnet50"


def run_demo(app: typer.Typer, folder: Path) -> None:
    """Plan, transform and verify a ResNet50 with 120 classes, and print what came of it.

    Args:
        app: The command line.
        folder: Where the files go.

    Raises:
        CheckpointError: The folder can't be made.
    """
    checkpoint, output = folder / "resnet50.pt", folder / "resnet50-aim.safetensors"
    arguments = {"num_classes": 120}
    if not checkpoint.exists():
        _save_random_weights(checkpoint, SPEC, arguments)
    options = ["--model", SPEC, "--model-args", json.dumps(arguments)]
    plan = _run_aloud(app, "plan", checkpoint, *options)
    _run_aloud(app, "transform", checkpoint, *options, "-o", output)
    verification = _run_aloud(app, "verify", checkpoint, output, *options)

    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = (f"{file.stat().st_size / 1e6:,.1f} MB" for file in (checkpoint, output))
    table.add_row("parameters", f"{plan.base_parameters:,}", f"{plan.total_parameters:,}")
    table.add_row("memory, floats", "", f"{plan.memory.floats:,}")
    table.add_row("largest difference of outputs", "", f"{verification.largest_difference:.3g}")
    table.add_row("file size", before, after)
    Console().print(table)


def _run_aloud(app: typer.Typer, *arguments: str | Path) -> Any:
    """Run a command as if it had been typed; its return value, or its failure as ours."""
    words = [str(argument) for argument in arguments]
    typer.echo(f"$ {shlex.join(['aim-surgery', *words])}")
    result = app(words, prog_name="aim-surgery", standalone_mode=False)
    if isinstance(result, int):
        raise typer.Exit(result)
    typer.echo()
    return result


def _save_random_weights(path: Path, spec: str, arguments: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(f"{path.parent}: no folder can be made here: {err.strerror}") from err
    import torch

    from aim_surgery.checkpoint.models import build
    from aim_surgery.checkpoint.writing.atomic import replacing

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(spec, **arguments)
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)
