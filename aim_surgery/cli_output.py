"""What commands print: results on stdout, errors and progress on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from aim_surgery.errors import AimSurgeryError

if TYPE_CHECKING:
    from aim_surgery.checkpoint.transform import Outcome


def tell_error(err: AimSurgeryError) -> None:
    """One line on stderr."""
    typer.echo(f"error: {line_of(err)}", err=True)


def line_of(err: AimSurgeryError) -> str:
    """A message, of however many lines, in one."""
    return " ".join(str(err).split())


def tell_written(output: Path, notes: Iterable[str]) -> None:
    """What was written, and what a user should know of it."""
    typer.echo(f"wrote       {output}")
    for note in notes:
        typer.echo(f"note        {note}")


def told_of(outcome: Outcome, *, alone: bool) -> str:
    """What came of one checkpoint; with its plan, if it is `alone`."""
    verb = "wrote       " if outcome.written else "would write "
    lines = [f"{verb}{outcome.output}"]
    lines += [f"note        {note}" for note in outcome.notes]
    if outcome.not_finite:
        from aim_surgery.errors import listed

        lines.append(f"note        NaN or Inf, kept: {listed(outcome.not_finite, 5)}")
    if alone:
        lines.append(str(outcome.plan).partition("\n\n")[2])  # without the table of reads
    return "\n".join(lines)


@contextlib.contextmanager
def progress_bar(name: str, *, shown: bool) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar over the bytes that are written; nothing where nobody looks."""
    if not shown or not sys.stderr.isatty():
        yield lambda total: lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(name, total=None)

        def begin(total: int) -> Callable[[int], None]:
            bar.update(task, total=total)
            return lambda nbytes: bar.advance(task, nbytes)

        yield begin
