"""Options that several commands share, as Typer reads them, and what they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from aim_surgery.config import AimConfig
from aim_surgery.errors import ModelSpecError, PlanError

if TYPE_CHECKING:
    from torch import Tensor

CheckpointFile = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Weights: .pt, .pth, .bin, .ckpt, .safetensors, .index.json, .pt2, or a DCP folder.",
    ),
]
OperatedFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="What transform or save wrote.")
]
Model = Annotated[
    str | None,
    typer.Option(
        help="torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory; "
        "not for .pt2."
    ),
]
Key = Annotated[
    str | None,
    typer.Option(metavar="A.B", help="Where in a training checkpoint the weights are."),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights.")]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let pickled objects in the file run their code.")
]
Output = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="File to write: .safetensors; .index.json for shards; .pt, or .dcp for a folder, for "
        "the layout that came in; .pt2. Or a folder to write into, FOLDER/.",
    ),
]
RestoredOutput = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="File to write: .pt, or .dcp for a folder, for the layout that came in; .safetensors "
        "for weights alone. Or a folder to write into, FOLDER/.",
    ),
]
FoldedOutput = Annotated[
    str,
    typer.Option("--output", "-o", metavar="OUT", help="A .pt2 file, or a folder for it."),
]
Format = Annotated[
    Literal["safetensors", "shards", "pt", "dcp", "pt2"],
    typer.Option("--format", help="What to write into a folder."),
]
NewGroup = Annotated[
    str | None,
    typer.Option(
        "--new-group",
        metavar="N|own",
        help="Group of the optimizer that new parameters join, or one of their own, in a .pt file; "
        "by default the one that suits them.",
    ),
]
DropOptimizer = Annotated[
    bool, typer.Option("--drop-optimizer", help="Leave optimizer states out of a .pt file.")
]
ModelArgs = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="""Arguments of the factory: '{"num_classes": 120}'."""),
]
Input = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES[:DTYPE]",
        help="Size of an input, 1,3,224,224, or of tokens, 1,16:int64; found if left out.",
    ),
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


def config_of(
    memory: int | None,
    budget: str,
    init: Literal["preserve", "fresh"],
    include: list[str] | None,
    exclude: list[str] | None,
    write: Literal["sample", "batch", "none"],
    write_at: list[str] | None,
    carry: Literal["weights", "state"],
) -> AimConfig:
    """The configuration that options ask for."""
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
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError as err:
        raise typer.BadParameter(
            f"{text!r} is no budget: write 1.5%, 0.015, auto or none", param_hint="--budget"
        ) from err
    if value > 1 and not word.endswith("%"):
        typer.echo(f"note: --budget {word} is {100 * value:g}%; did you mean {word}%?", err=True)
    return value


_INPUT = re.compile(r"([1-9]\d*(?:, ?[1-9]\d*)*)(?::(\w+))?")


def example_input(text: str | None) -> Tensor | None:
    """Noise of the sizes "1,3,224,224"; of a dtype, "1,16:int64": of whole numbers, zeros."""
    if text is None:
        return None
    import torch

    found = _INPUT.fullmatch(text.strip())
    dtype = getattr(torch, found[2] or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise _no_input(text)
    try:
        shape = tuple(int(size) for size in found[1].split(","))
        if not dtype.is_floating_point:
            return torch.zeros(shape, dtype=dtype)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    except (ValueError, TypeError, RuntimeError) as err:  # sizes too large
        raise _no_input(text) from err


def _no_input(text: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{text!r} is no size of an input: write 1,3,224,224 or, for tokens, 1,16:int64",
        param_hint="--input",
    )


def parsed_arguments(text: str | None, model: str | None) -> dict[str, Any]:
    """The arguments, from their JSON, of the factory that a spec names."""
    if text is None:
        return {}
    if model is None:
        raise typer.BadParameter(
            "are for a factory: name it with --model", param_hint="--model-args"
        )
    from aim_surgery.checkpoint.models import parse_model_args

    try:
        return parse_model_args(text)
    except ModelSpecError as err:
        raise typer.BadParameter(str(err), param_hint="--model-args") from err


PLANNED = (
    "memory", "budget", "init", "include", "exclude", "write", "write_at", "carry", "emit",
)  # fmt: skip


def refuse_beside_plan(context: typer.Context, *names: str) -> None:
    """Refuse options that a plan has decided."""
    for name in names:
        if is_given(context, name):
            raise typer.BadParameter(f"the plan decides that: leave out --{name.replace('_', '-')}")


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was given, and not left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
