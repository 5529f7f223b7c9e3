"""The command line: arguments in, text out.

Exit codes: 0 done, 1 the operation failed (one line on stderr), 2 wrong usage.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table

import aim_surgery
from aim_surgery import operation
from aim_surgery.checkpoint.atomic import check_target, replacing
from aim_surgery.checkpoint.models import build, parse_model_args
from aim_surgery.checkpoint.open import open_model, open_plan
from aim_surgery.checkpoint.write import load, save
from aim_surgery.config import AimConfig
from aim_surgery.errors import AimSurgeryError, CheckpointError, ModelSpecError, PlanError
from aim_surgery.nn.aim_modules import plan_of
from aim_surgery.planning import Plan
from aim_surgery.verification import Verification, verify

DEMO_SPEC = "torchvision:resnet50"

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    help="Automatic model surgery for PyTorch: one learned memory that every layer reads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, the same in a terminal, a file and a pipe
)

CheckpointFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Weights: .pt, .pth, .bin or .safetensors.")
]
Model = Annotated[
    str,
    typer.Option(
        help="torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory."
    ),
]
ModelArgs = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="""Arguments of the factory: '{"num_classes": 120}'."""),
]
Input = Annotated[
    str | None,
    typer.Option(metavar="SIZES", help="Size of an input, 1,3,224,224; found if left out."),
]
Memory = Annotated[
    int | None, typer.Option(min=1, help="Floats of memory; chosen by the budget if left out.")
]
Budget = Annotated[
    str,
    typer.Option(help="New parameters ÷ old ones: 1.5%, 0.015, auto, or none for full reads."),
]
Init = Annotated[
    Literal["preserve", "fresh"],
    typer.Option(help="New weights: zero, which preserves the outputs, or drawn anew."),
]
Write = Annotated[
    Literal["sample", "batch", "none"],
    typer.Option(help="Update blocks: a copy of the memory a sample, one for the batch, or none."),
]
WriteAt = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Write after this module instead; may be repeated."),
]
Carry = Annotated[
    Literal["weights", "state"],
    typer.Option(help="What of the memory survives a batch: its weights, or what was written too."),
]
Emit = Annotated[
    Literal["auto", "graph", "module"],
    typer.Option(
        help="A graph, or the model's own class with hooks: reads only, all methods; auto: a graph "
        "where there can be one."
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Sites or layers to operate; may be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Sites or layers to leave out; may be repeated."),
]


def main() -> None:
    """Run the command line."""
    app()


def _failing_in_one_line(command: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AimSurgeryError as err:
            typer.echo(f"error: {' '.join(str(err).split())}", err=True)
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
    model: Model,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> Plan:
    """Show what an operation would do: which layer reads how much, and what it costs."""
    config = _config(memory, budget, init, include, exclude, write, write_at, carry)
    arguments, example = _model_args(model_args), _example_input(input)
    original = open_model(checkpoint, model, arguments)
    found = operation.plan(original, example, config=config, emit=emit)
    typer.echo(found.to_json(indent=2) if as_json else str(found))
    return found


@app.command("transform")
@_failing_in_one_line
def transform_command(
    context: typer.Context,
    checkpoint: CheckpointFile,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="File to write (.safetensors).")
    ],
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
) -> Plan:
    """Give a model a memory that every layer reads, and write it to OUT."""
    config = _config(memory, budget, init, include, exclude, write, write_at, carry)
    arguments, example = _model_args(model_args), _example_input(input)
    if plan is not None:
        _refuse_beside_plan(context, *_PLANNED)
    if output.resolve() == checkpoint.resolve():
        raise typer.BadParameter("is the checkpoint itself: name another file", param_hint="-o")
    check_target(output)
    wanted = None if plan is None else open_plan(plan)
    original = open_model(checkpoint, model, arguments)
    if wanted is None:
        gm = operation.transform(original, example, config=config, emit=emit, copy=False)
    else:
        gm = operation.apply(original, wanted, example, copy=False)
    save(gm, output, model_spec=model, model_args=arguments)
    typer.echo(f"wrote       {output}")
    done: Plan = plan_of(gm)
    typer.echo(str(done).partition("\n\n")[2])  # without the table of reads
    return done


@app.command("verify")
@_failing_in_one_line
def verify_command(
    checkpoint: CheckpointFile,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="What transform wrote.")],
    model: Model,
    model_args: ModelArgs = None,
    input: Input = None,
) -> Verification:
    """Check that the model in OUT computes what the original does, and that its memory learns."""
    arguments, example = _model_args(model_args), _example_input(input)
    original = open_model(checkpoint, model, arguments)
    result = verify(original, load(output, original), example)
    typer.echo(str(result))
    if not result.ok:
        typer.echo(f"error: {output} failed verification against {checkpoint}", err=True)
        raise typer.Exit(1)
    return result


@app.command("demo")
@_failing_in_one_line
def demo_command(
    folder: Annotated[Path, typer.Option(help="Where the demo's files go.")] = Path("demo"),
) -> None:
    """Operate a ResNet50 with 120 classes from a checkpoint on disk: plan, transform, verify."""
    checkpoint, output = folder / "resnet50.pt", folder / "resnet50-aim.safetensors"
    arguments = {"num_classes": 120}
    if not checkpoint.exists():
        _save_random_weights(checkpoint, DEMO_SPEC, arguments)
    options = ["--model", DEMO_SPEC, "--model-args", json.dumps(arguments)]
    plan = _run_aloud("plan", checkpoint, *options)
    _run_aloud("transform", checkpoint, *options, "-o", output)
    verification = _run_aloud("verify", checkpoint, output, *options)

    table = Table()
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    before, after = (f"{file.stat().st_size / 1e6:,.1f} MB" for file in (checkpoint, output))
    table.add_row("parameters", f"{plan.base_parameters:,}", f"{plan.total_parameters:,}")
    table.add_row("memory, floats", "", f"{plan.memory.floats:,}")
    table.add_row("largest difference of outputs", "", f"{verification.largest_difference:.3g}")
    table.add_row("file size", before, after)
    Console().print(table)


def _run_aloud(*arguments: str | Path) -> Any:
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(spec, **arguments)
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)


# Options ------------------------------------------------------------------------------------


def _config(
    memory: int | None,
    budget: str,
    init: Literal["preserve", "fresh"],
    include: list[str] | None,
    exclude: list[str] | None,
    write: Literal["sample", "batch", "none"],
    write_at: list[str] | None,
    carry: Literal["weights", "state"],
) -> AimConfig:
    try:
        return AimConfig(
            budget=_budget(budget),
            memory=memory,
            init=init,
            write=write,
            write_at=tuple(write_at) if write_at else None,
            carry=carry,
            include=tuple(include or ("*",)),
            exclude=tuple(exclude or ()),
        )
    except PlanError as err:
        raise typer.BadParameter(str(err)) from err


def _budget(text: str) -> float | Literal["auto"] | None:
    word = text.strip().lower()
    if word == "none":
        return None
    if word == "auto":
        return "auto"
    try:
        return float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError as err:
        raise typer.BadParameter(
            f"{text!r} is no budget: write 1.5%, 0.015, auto or none", param_hint="--budget"
        ) from err


def _example_input(text: str | None) -> torch.Tensor | None:
    if text is None:
        return None
    try:
        sizes = torch.Size(int(size) for size in text.split(","))
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    except (ValueError, TypeError, RuntimeError) as err:  # also sizes below 0, or too large
        raise typer.BadParameter(
            f"{text!r} is no size of an input: write 1,3,224,224", param_hint="--input"
        ) from err


def _model_args(text: str | None) -> dict[str, Any]:
    try:
        return parse_model_args(text)
    except ModelSpecError as err:
        raise typer.BadParameter(str(err), param_hint="--model-args") from err


_PLANNED = (
    "memory", "budget", "init", "include", "exclude", "write", "write_at", "carry", "emit",
)  # fmt: skip


def _refuse_beside_plan(context: typer.Context, *names: str) -> None:
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"the plan decides that: leave out --{name.replace('_', '-')}")


if __name__ == "__main__":
    main()
