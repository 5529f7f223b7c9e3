"""Options that several commands share, as Typer reads them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

CheckpointFile = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Weights: .pt, .pth, .bin, .ckpt, .safetensors, .index.json, .pt2, or a DCP folder.",
    ),
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
