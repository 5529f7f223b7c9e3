"""The command line: arguments in, text out.

Exit codes: 0 done, 1 the operation failed (one line on stderr), 2 wrong usage.

What needs torch is imported where it is used: `--help` and `inspect` answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

import aim_surgery
from aim_surgery.cli_options import (
    PLANNED,
    Budget,
    Carry,
    CheckpointFile,
    DropOptimizer,
    Ema,
    Emit,
    Exclude,
    FoldedOutput,
    Format,
    Include,
    Init,
    Input,
    Key,
    Memory,
    Model,
    ModelArgs,
    NewGroup,
    OperatedFile,
    Output,
    RestoredOutput,
    Trust,
    Write,
    WriteAt,
    config_of,
    example_input,
    is_given,
    parsed_arguments,
    refuse_beside_plan,
)
from aim_surgery.cli_output import line_of, progress_bar, tell_error, tell_written, told_of
from aim_surgery.errors import AimSurgeryError, CheckpointError

if TYPE_CHECKING:
    from aim_surgery.checkpoint.transform import Outcome, Reading

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Automatic model surgery for PyTorch: one learned memory that every layer reads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, the same in a terminal, a file and a pipe
)


def main() -> None:
    """Run the command line; whoever ends it, what was begun to be written is removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


def _failing_in_one_line(command: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AimSurgeryError as err:
            tell_error(err)
            raise typer.Exit(1) from err

    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aim-surgery {aim_surgery.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Version.")
    ] = False,
) -> None:
    pass


@app.command("plan")
@_failing_in_one_line
def plan_command(
    checkpoint: CheckpointFile,
    model: Model = None,
    model_args: ModelArgs = None,
    input: Input = None,
    memory: Memory = None,
    budget: Budget = "auto",
    init: Init = "preserve",
    include: Include = None,
    exclude: Exclude = None,
    write: Write = "sample",
    write_at: WriteAt = None,
    carry: Carry = "weights",
    emit: Emit = "auto",
    key: Key = None,
    ema: Ema = False,
    trust: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> Any:
    """Show what an operation would do: which layer reads how much, and what it costs."""
    config = config_of(memory, budget, init, include, exclude, write, write_at, carry)
    arguments, example = parsed_arguments(model_args, model), example_input(input)
    from aim_surgery.checkpoint.operated import plan_checkpoint
    from aim_surgery.checkpoint.reading.kinds import not_operated, open_source

    with _json_alone(as_json):
        source = not_operated(open_source(checkpoint, key=key, ema=ema, trust=trust))
        found = plan_checkpoint(source, model, arguments, example=example, config=config, emit=emit)
    typer.echo(found.to_json(indent=2) if as_json else str(found))
    return found


@app.command("transform")
@_failing_in_one_line
def transform_command(
    context: typer.Context,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...", help="Weights, as for plan; several, or a folder of them."
        ),
    ],
    output: Output,
    model: Model = None,
    model_args: ModelArgs = None,
    input: Input = None,
    memory: Memory = None,
    budget: Budget = "auto",
    init: Init = "preserve",
    include: Include = None,
    exclude: Exclude = None,
    write: Write = "sample",
    write_at: WriteAt = None,
    carry: Carry = "weights",
    emit: Emit = "auto",
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Do what this plan says.")
    ] = None,
    key: Key = None,
    ema: Ema = False,
    trust: Trust = False,
    drop_optimizer: DropOptimizer = False,
    new_group: NewGroup = None,
    form: Format = "safetensors",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but write.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> Any:
    """Give a model a memory that every layer reads, and write it to OUT."""
    config = config_of(memory, budget, init, include, exclude, write, write_at, carry)
    arguments, example = parsed_arguments(model_args, model), example_input(input)
    if plan is not None:
        refuse_beside_plan(context, *PLANNED)
    from aim_surgery.checkpoint import transform
    from aim_surgery.checkpoint.open import open_plan
    from aim_surgery.checkpoint.save import takes_layout

    wanted = None if plan is None else open_plan(plan)
    operation = transform.Operation(
        model, arguments, example, config, wanted, emit, _carry(new_group, drop=drop_optimizer)
    )
    many, new = transform.several(checkpoints), []
    if many is not None and len(many) == 1 and transform.names_a_file(output):
        checkpoints, many = many, None  # a folder with one checkpoint in it
    if many is None and not transform.names_a_folder(output):
        if is_given(context, "form"):
            raise typer.BadParameter(
                "is for a folder: the name after -o says what to write", param_hint="--format"
            )
        _refuse_itself(checkpoints[0], Path(output))
        jobs = {checkpoints[0]: Path(output)}
    else:
        if transform.names_a_file(output):
            raise typer.BadParameter(
                f"{output} is a file: name a folder for {len(many or [])} checkpoints",
                param_hint="-o",
            )
        folder = Path(output)
        new = [f for f in (folder, *folder.parents) if dry_run and not f.exists()]
        jobs = transform.outputs_in(folder, many or checkpoints, form)
    if new_group is not None and not any(map(takes_layout, jobs.values())):
        raise typer.BadParameter("is for a .pt file or a .dcp folder", param_hint="--new-group")
    reading = transform.Reading(key, ema, trust)
    try:
        outcomes = _transform_each(jobs, operation, reading, dry_run, as_json, alone=many is None)
    finally:
        for made in new:
            made.rmdir()
    if any(isinstance(outcome, AimSurgeryError) for outcome in outcomes.values()):
        raise typer.Exit(1)
    return next(iter(outcomes.values()))


def _json_alone(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """What a user's factory prints goes to stderr, where stdout is to hold JSON."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _carry(new_group: str | None, *, drop: bool) -> Any:
    """How optimizer states are carried, with the group that new parameters join; None: not."""
    from aim_surgery.checkpoint.optimizer import carry_optimizer

    if drop:
        if new_group is not None:
            raise typer.BadParameter("is of no use with --drop-optimizer", param_hint="--new-group")
        return None
    if new_group is None:
        return carry_optimizer
    if new_group != "own" and not new_group.lstrip("-").isdigit():
        raise typer.BadParameter(
            f"{new_group!r} is no group: write its index, or own", param_hint="--new-group"
        )
    wanted = "own" if new_group == "own" else int(new_group)
    return functools.partial(carry_optimizer, new_group=wanted)


def _transform_each(
    jobs: dict[Path, Path],
    operation: Any,
    reading: Reading,
    dry_run: bool,
    as_json: bool,
    *,
    alone: bool,
) -> dict[Path, Outcome | AimSurgeryError]:
    """Go through all checkpoints; a failure is told, and the others go on."""
    from aim_surgery.checkpoint.transform import transform_checkpoint

    outcomes: dict[Path, Outcome | AimSurgeryError] = {}
    for checkpoint, output in jobs.items():
        try:
            with _json_alone(as_json), progress_bar(output.name, shown=not as_json) as progress:
                outcome = transform_checkpoint(
                    checkpoint, output, operation, reading, dry_run=dry_run, progress=progress
                )
        except AimSurgeryError as err:
            outcome = err
        except Exception as err:
            if alone:
                raise  # a defect of this package, to be reported whole
            outcome = AimSurgeryError(f"{checkpoint}: {type(err).__name__}: {err}")
        outcomes[checkpoint] = outcome
        if isinstance(outcome, AimSurgeryError):
            tell_error(outcome)
        elif not as_json:
            typer.echo(told_of(outcome, alone=alone))
    if as_json:
        told = [
            {
                "checkpoint": str(path),
                "output": str(jobs[path]),
                "ok": False,
                "error": line_of(found),
            }
            if isinstance(found, AimSurgeryError)
            else found.to_dict()
            for path, found in outcomes.items()
        ]
        typer.echo(json.dumps(told, indent=2))
    return outcomes


@app.command("verify")
@_failing_in_one_line
def verify_command(
    checkpoint: CheckpointFile,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="What transform wrote.")],
    model: Model = None,
    model_args: ModelArgs = None,
    input: Input = None,
    key: Key = None,
    ema: Ema = False,
    trust: Trust = False,
) -> Any:
    """Check that the model in OUT computes what the original does, and that its memory learns."""
    arguments, example = parsed_arguments(model_args, model), example_input(input)
    from aim_surgery.checkpoint.open import load_counterpart, open_model
    from aim_surgery.checkpoint.operated import in_dtype_of
    from aim_surgery.verification import verify

    original = open_model(checkpoint, model, arguments, key=key, ema=ema, trust=trust)
    operated = load_counterpart(output, original, key=key, ema=ema, trust=trust)
    result = verify(original, operated, in_dtype_of(original, example))
    typer.echo(str(result))
    if not result.ok:
        typer.echo(f"error: {output} failed verification against {checkpoint}", err=True)
        raise typer.Exit(1)
    return result


@app.command("restore")
@_failing_in_one_line
def restore_command(
    checkpoint: OperatedFile,
    output: RestoredOutput,
    model: Model = None,
    model_args: ModelArgs = None,
    input: Input = None,
    key: Key = None,
    ema: Ema = False,
    trust: Trust = False,
    drop_optimizer: DropOptimizer = False,
) -> Any:
    """Take the memory out again: the original's names and shapes, and optimizer's state."""
    arguments, example = parsed_arguments(model_args, model), example_input(input)
    from aim_surgery.checkpoint.back import restore_file

    target = _target(checkpoint, output)
    restored, notes = restore_file(
        checkpoint,
        target,
        model,
        example,
        model_args=arguments or None,
        key=key,
        ema=ema,
        trust=trust,
        drop_optimizer=drop_optimizer,
    )
    tell_written(target, notes)
    typer.echo(f"restored    {restored}")
    return restored


@app.command("fold")
@_failing_in_one_line
def fold_command(
    checkpoint: OperatedFile,
    output: FoldedOutput,
    model: Model = None,
    model_args: ModelArgs = None,
    input: Input = None,
    key: Key = None,
    ema: Ema = False,
    trust: Trust = False,
    norms: Annotated[
        bool, typer.Option("--norms", help="Merge batch norms into convolutions, too.")
    ] = False,
) -> Any:
    """Fold constant memory away for inference, and write the model as an exported program."""
    arguments, example = parsed_arguments(model_args, model), example_input(input)
    from aim_surgery.checkpoint.back import fold_file

    target = _target(checkpoint, output, "pt2")
    notes = fold_file(
        checkpoint,
        target,
        model,
        example,
        model_args=arguments or None,
        key=key,
        ema=ema,
        trust=trust,
        batch_norm=norms,
    )
    tell_written(target, notes)
    return notes


def _target(checkpoint: Path, output: str, *form: Any) -> Path:
    """The file that -o means for one checkpoint, another one than that."""
    from aim_surgery.checkpoint.transform import output_for

    target = output_for(checkpoint, output, *form)
    _refuse_itself(checkpoint, target)
    return target


def _refuse_itself(checkpoint: Path, output: Path) -> None:
    from aim_surgery.checkpoint.writing.atomic import refuse_itself

    try:
        refuse_itself(checkpoint, output)
    except CheckpointError as err:
        raise typer.BadParameter(str(err), param_hint="-o") from err


@app.command("inspect")
@_failing_in_one_line
def inspect_command(
    checkpoint: CheckpointFile,
    model: Model = None,
    model_args: ModelArgs = None,
    key: Key = None,
    ema: Ema = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what is in a file: its kind, tensors, prefixes, and whether it was operated on."""
    from aim_surgery.checkpoint.inspect import inspect

    arguments = parsed_arguments(model_args, model)
    found = inspect(checkpoint, key=key, ema=ema, spec=model, model_args=arguments)
    typer.echo(found.to_json(keys=keys) if as_json else found.to_text(keys=keys))


@app.command("demo")
@_failing_in_one_line
def demo_command(
    folder: Annotated[Path, typer.Option(help="Where the demo's files go.")] = Path("demo"),
) -> None:
    """Operate a ResNet50 with 120 classes from a checkpoint on disk: plan, transform, verify."""
    from aim_surgery.cli_demo import run_demo

    run_demo(app, folder)


if __name__ == "__main__":
    main()
